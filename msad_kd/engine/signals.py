"""Ends a training on a signal: the step is finished and saved, and ``--resume`` goes on from it."""

import logging
import signal
from contextlib import contextmanager

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm

from msad_kd.engine.hooks import KeepNormalizer, is_due
from msad_kd.utils.replaced import replaced
from msad_kd.utils.signals import Stopped, on_signal

_logger = logging.getLogger(__name__)


def _meet() -> None:
    """Wait for all processes, on the CPU, where the end of one of them is an error at once.

    Detectron2's ``comm.synchronize`` waits on GPUs until NCCL's time is out, and Python handles no
    signal meanwhile.
    """
    if comm.get_world_size() > 1:
        dist.barrier(group=comm._get_global_gloo_group())


class StopOnSignal(HookBase):
    """Save and stop all processes after the same step if one of them has got a signal.

    An evaluation is not finished. Its process stops at once, and the launcher tells the others. If
    the step before it has no checkpoint yet, the main process saves it now; so it does if the
    evaluation fails, as it does in the processes whose partner has stopped.

    It has to stand after the hook that writes checkpoints and before those that evaluate.

    Args:
        checkpoint_period: iterations between two checkpoints.
        eval_period: iterations between two evaluations; 0: only after the training.
        before_saving: the hook that prepares a checkpoint.
    """

    def __init__(self, checkpoint_period: int, eval_period: int, before_saving: KeepNormalizer):
        self.checkpoint_period = checkpoint_period
        self.eval_period = eval_period
        self.before_saving = before_saving
        self.received = 0  # the signal that this process has got
        self.agreed = 0  # the one that all processes know of
        self._at_once = True  # outside of steps
        self._unsaved: list[tuple[dict, dict]] | None = None  # the buffers of a step not saved

    @contextmanager
    def handling(self):
        """Handle signals while the trainer trains.

        Raises:
            Stopped: once the trainer has stopped because of one.
        """
        with on_signal(self._receive), replaced(comm, synchronize=_meet):
            try:
                yield
            except (Stopped, Exception) as error:
                if self._unsaved is not None:
                    for buffers, before in self._unsaved:
                        buffers.update(before)
                    self._save()
                # Others have stopped in an evaluation, and this process talked to them in vain.
                if self.received and comm.get_world_size() > 1:
                    raise Stopped(self.received) from error
                raise

    def _receive(self, number: int) -> None:
        self.received = number
        if self._at_once:
            raise Stopped(number)

    def before_step(self):
        """Begin a step, which a signal does not interrupt."""
        self._at_once, self._unsaved = False, None

    def agree(self, failed: bool) -> bool:
        """Tell all processes of a signal, and whether this step has failed.

        Returns:
            Whether it has failed in any of them.
        """
        news = torch.tensor([self.received, failed])
        if comm.get_world_size() > 1:
            # On GPUs, too, through the CPU: it must not wait for the step's kernels.
            dist.all_reduce(news, dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
        self.agreed, failed = news.tolist()
        return bool(failed)

    def after_step(self):
        """Stop if a process has got a signal."""
        trainer = self.trainer
        if trainer.iter + 1 >= trainer.max_iter:
            return  # the final checkpoint is written; what is left is to evaluate
        saved = is_due(trainer, self.checkpoint_period)
        if self.agreed:
            if not saved:
                self.before_saving.prepare()
                self._save()
            comm.synchronize()  # the launcher ends the others once the first has ended
            raise Stopped(self.agreed)
        if is_due(trainer, self.eval_period):
            modules = [] if saved else trainer.model.modules()
            # An evaluation may be interrupted where it has exchanged buffers for a moment.
            buffers = [(module._buffers, dict(module._buffers)) for module in modules]
            self._unsaved = buffers or None
            self._stop_at_once()

    def after_train(self):
        """Stop before the last evaluation."""
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self.received = self.received or self.agreed
            self._stop_at_once()

    def _stop_at_once(self) -> None:
        self._at_once = True
        if self.received:
            raise Stopped(self.received)

    def _save(self) -> None:
        trainer = self.trainer
        if comm.is_main_process():
            name = f"model_{trainer.iter:07d}"
            trainer.checkpointer.save(name, iteration=trainer.iter)
            number = self.agreed or self.received
            cause = signal.Signals(number).name if number else "The evaluation failed"
            _logger.warning(f"{cause}: saved {name}; --resume goes on after it")
