"""Explains losses that are NaN or infinite."""

from itertools import chain

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch.utils.hooks import RemovableHandle

from msad_kd.utils.errors import NotFiniteError

MOST = 16  # image files in one message


class WatchLosses(HookBase):
    """Remember the images and losses of a step, to name them if a loss is not finite."""

    def __init__(self):
        self._watches: list[RemovableHandle] = []
        self._losses: dict[str, torch.Tensor] | None = None  # None: not known yet
        self._error: NotFiniteError | None = None

    def before_step(self):
        """Begin a step, which may run the model more than once (SOLVER.ACCUMULATE)."""
        self._files: list[str] = []
        self._sums: dict[str, torch.Tensor] = {}

    def before_train(self):
        """Watch the model."""
        self.before_step()
        model = self.trainer.model
        self._watches = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._remember),
        ]

    def after_train(self):
        """Leave the model as it was, and keep a broken one from the last evaluation."""
        for watch in self._watches:
            watch.remove()
        if self._error is not None and self.trainer.iter + 1 >= self.trainer.max_iter:
            raise self._error

    def _begin(self, model, arguments):
        if model.training:
            keys = ("file_name", "mixed_with")  # the second by INPUT.MIXUP
            self._files += [str(x[key]) for x in arguments[0] for key in keys if key in x]
            self._losses = None

    def _remember(self, model, arguments, losses):
        if model.training:
            losses = losses if isinstance(losses, dict) else {"total_loss": losses}
            for name, loss in losses.items():  # a sum is not finite if one of its parts is not
                self._sums[name] = self._sums.get(name, 0) + loss.detach()
            self._losses = self._sums

    @property
    def in_forward(self) -> bool:
        """Whether the model has not returned its losses: other processes wait for gradients."""
        return self._losses is None

    def explain(self, message: str) -> NotFiniteError:
        """Return the error for the last step.

        All processes have to call it, unless the model itself has raised the error: the others
        do not know of it, and the launcher ends them.

        Args:
            message: the error in this process, which is used if no loss of the step is bad.
        """
        trainer = self.trainer
        model, last = trainer.checkpointer.model, trainer.checkpointer.last()
        losses = self._losses or {}
        bad = [name for name, loss in losses.items() if not torch.isfinite(loss).all()]
        levels = model.not_finite() if losses and hasattr(model, "not_finite") else []
        if levels:  # the distillation losses, by level
            bad = [name for name in bad if not name.startswith("loss_kd_")] + levels
        found = bad, self._files if bad or self.in_forward else [], message
        names, files, messages = zip(*([found] if self.in_forward else comm.all_gather(found)))
        names = list(dict.fromkeys(chain(*names))) or list(filter(None, messages))
        files = [f"'{file}'" for file in chain(*files)]
        files[MOST:] = [f"{len(files) - MOST} more"] if len(files) > MOST else []
        images = f"the images of its batch are {', '.join(files)}; " if files else ""
        self._error = NotFiniteError(
            f"the training stops, because a loss is not finite; {images}{last}; check the "
            "images and their annotations, or lower SOLVER.BASE_LR. Not finite at iteration "
            f"{trainer.iter}: {', '.join(names)}"
        )
        return self._error
