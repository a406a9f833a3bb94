"""The trainer's checkpointer: it writes what can be resumed, and resumes from what is whole."""

import errno
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from msad_kd.checkpoint.checkpoint import SafeCheckpointer, mismatches
from msad_kd.checkpoint.files import PART, replacing, replacing_with_checksum
from msad_kd.checkpoint.reading import read_checkpoint
from msad_kd.utils.errors import InputError
from msad_kd.utils.hashes import CHECKSUM
from msad_kd.utils.processes import in_main_process

LAST = "last_checkpoint"  # Detectron2's file with the name of the checkpoint to resume from
FINAL = "model_final.pth"
BEST = "model_best"  # without ".pth"; no run is resumed from it
_NAME = re.compile(r"model_(\d+|final)\.pth")

_logger = logging.getLogger(__name__)


def checkpoints_in(folder: str) -> list[Path]:
    """Return the training checkpoints in a folder, in no order."""
    paths = Path(folder).iterdir() if Path(folder).is_dir() else ()
    return [path for path in paths if _NAME.fullmatch(path.name) and path.is_file()]


def has_checkpoint(folder: str) -> bool:
    """Return whether a folder holds a run to resume, even if none of its checkpoints is whole."""
    return Path(folder, LAST).exists() or bool(checkpoints_in(folder))


def find_checkpoint(folder: str, *, training: bool = True) -> Path | None:
    """Return the checkpoint to resume from: what ``last_checkpoint`` names, or the newest.

    If that one cannot be read, a warning names it, and the newest one before it is taken.

    Args:
        folder: the run's OUTPUT_DIR.
        training: whether the checkpoint has to hold the state of the training.

    Returns:
        The checkpoint; None if the folder has none.

    Raises:
        InputError: if the folder has checkpoints and none can be used.
    """
    found = _find(folder, training=training)
    return found[0] if found else None


def _find(folder: str, *, training: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """Return what ``find_checkpoint`` returns, and the checkpoint's contents."""
    if not has_checkpoint(folder):
        return None
    faults: list[str] = []
    for path in _candidates(folder, faults):
        try:
            contents = _read(path)
            if training:
                _check_training(path, contents)
        except InputError as error:
            faults.append(str(error))
            continue
        if faults:
            _logger.warning("%s; '%s' is used", "; ".join(faults), path)
        return path, contents
    more = f"; {len(faults) - 2} more cannot either" if len(faults) > 2 else ""
    raise InputError(
        f"no checkpoint in '{folder}' can be used: {'; '.join(faults[:2])}{more}; start without "
        "--resume, which sets the old run aside"
    )


def _candidates(folder: str, faults: list[str]) -> Iterator[Path]:
    """Yield what ``last_checkpoint`` names and the checkpoints before it, the newest first."""
    last, named = Path(folder, LAST), None
    if last.is_file():
        name = last.read_text(errors="replace").strip()
        if name == Path(name).name and name.endswith(".pth") and Path(folder, name).is_file():
            named = Path(folder, name)
            yield named
        else:
            faults.append(f"'{last}' names '{name[:80]}', which is no checkpoint in this folder")
    else:
        faults.append(f"'{last}' is missing")
    iterations = {path: _iteration(path) for path in checkpoints_in(folder)}
    newest = iterations.pop(named, float("inf"))
    others = [path for path, iteration in iterations.items() if iteration <= newest]
    yield from sorted(others, key=iterations.get, reverse=True)


def _read(path: Path) -> dict[str, Any]:
    return read_checkpoint(str(path), "resuming")


def _iteration(path: Path) -> float:
    """Return the iteration of a checkpoint; infinity if the name lacks it, and the file as well."""
    number = _NAME.fullmatch(path.name)
    if number and number[1].isdigit():
        return int(number[1])
    try:
        return float(_read(path)["iteration"])
    except (InputError, KeyError, TypeError, ValueError):
        return float("inf")


def _check_training(path: Path, contents: dict) -> None:
    trainer = contents.get("trainer")
    iteration = trainer.get("iteration") if isinstance(trainer, dict) else None
    if not isinstance(iteration, int) or iteration < 0:
        raise InputError(
            f"'{path}' cannot be resumed: it has no 'trainer' with the state of a training; to "
            "start from its weights, name it as MODEL.WEIGHTS of a run with another OUTPUT_DIR"
        )


class TrainingCheckpointer(SafeCheckpointer):
    """Detectron2's checkpointer, but no kill or full disk destroys a checkpoint that was whole.

    Each file is on disk before it takes its place, with its SHA-256 beside it. Weights that are not
    finite are not written. A checkpoint that is resumed has to fit in every key.

    Attributes:
        extra: what every checkpoint holds beside model and trainer.
    """

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        self.extra: dict[str, Any] = {}
        self._contents: dict[str, Any] | None = None  # those of the file that ``find`` found

    def save(self, name: str, **kwargs) -> None:
        """Write a checkpoint; only the main process does.

        Args:
            name: the file's name without ".pth".
            kwargs: more to store.

        Raises:
            InputError: if weights are not finite or the disk is full; earlier files stay.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        path, model = Path(self.save_dir, f"{name}.pth"), self.model.state_dict()
        if bad := [k for k, v in model.items() if not bool(torch.isfinite(v).all())]:
            raise InputError(
                f"{len(bad)} of the model's {len(model)} tensors are not finite, e.g. {bad[0]}, so "
                f"'{path}' is not written; {self.last()}; try another SOLVER.BASE_LR or "
                "SOLVER.CLIP_GRADIENTS, with --resume if there is a checkpoint"
            )
        state = {key: part.state_dict() for key, part in self.checkpointables.items()}
        self.logger.info("Saving checkpoint to %s", path)
        with self._explained(path):
            self._sweep()
            with replacing_with_checksum(path) as part, open(part, "wb") as file:
                torch.save({"model": model, **state, **self.extra, **kwargs}, file)
            if name != BEST:
                self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write the file that names the checkpoint to resume from."""
        with replacing(Path(self.save_dir, LAST)) as part:
            part.write_text(last_filename_basename)

    def keep_as_final(self, path: Path) -> None:
        """Copy a checkpoint of the last iteration to ``model_final.pth``."""
        final = Path(self.save_dir, FINAL)
        if self.save_dir and self.save_to_disk and path != final:
            with self._explained(final):
                with replacing_with_checksum(final) as part:
                    shutil.copyfile(path, part)
                self.tag_last_checkpoint(FINAL)

    def has_checkpoint(self) -> bool:
        """Return whether there is a run to resume."""
        return has_checkpoint(self.save_dir)

    def find(self) -> Path | None:
        """Return ``find_checkpoint`` of the main process; every process has to call this."""

        def find():
            path, self._contents = _find(self.save_dir) or (None, None)
            return path

        return in_main_process(find)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume the folder's run if it has one, or load the weights of a file."""
        if found := self.find() if resume else None:
            return self.resume(found)
        rest = self.load(path, checkpointables=[])
        if words := self._other_classes(rest):
            _logger.warning(f"MODEL.WEIGHTS '{path}' was trained on {words}")
        return rest

    def resume(self, path: Path) -> dict[str, Any]:
        """Load the training checkpoint that ``find`` found; every key has to fit.

        Raises:
            InputError: if the file does not fit the model or the trainer.
        """
        self.logger.info("Resuming from %s", path)
        contents = self._contents or _read(path)  # another process has not read it yet
        self._path, self._contents = str(path), None
        if words := self._other_classes(contents):
            raise InputError(
                f"'{path}' was trained on {words}; resume it with its data or set "
                "DATASETS.CLASSES, or start another run from its weights"
            )
        changes = ""
        for key, part in self.checkpointables.items():
            if hasattr(part, "check_state_dict"):
                changes = part.check_state_dict(contents[key])
        if said := mismatches(self._load_model(contents)):
            raise InputError(
                f"'{path}' cannot be resumed: {said}{changes}; use the run's config, or start "
                "without --resume, which sets the old run aside"
            )
        for key, part in self.checkpointables.items():
            if key in contents:
                part.load_state_dict(contents.pop(key))
        return contents

    def _other_classes(self, contents: dict[str, Any]) -> str:
        """Say how a checkpoint's classes differ from the run's; "" if not, or if unknown."""
        old, new = contents.get("classes"), self.extra.get("classes")
        if not old or not new or list(old) == list(new):
            return ""
        return f"the classes {', '.join(old)}, and the run has {', '.join(new)}, in this order"

    def last(self) -> str:
        """Say for an error message which checkpoint is the last one."""
        file = self.get_checkpoint_file()
        return f"the last checkpoint is '{file}'" if file else "there is no checkpoint yet"

    @contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        """Turn the errors of a disk into one sentence."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            reason = error
            while reason is not None and not isinstance(reason, OSError):
                reason = reason.__context__  # torch.save raises errors of its own in between
            if reason is None:
                raise
            why = reason.strerror or errno.errorcode.get(reason.errno, reason)
            raise InputError(
                f"the checkpoint '{path}' cannot be written ({why}); {self.last()}: make room on "
                "the disk and use --resume"
            ) from error

    def _sweep(self) -> None:
        """Delete unfinished files of a killed run, and checksums of deleted checkpoints."""
        for path in Path(self.save_dir).glob(f"model_*.pth{PART}"):
            path.unlink()
        for path in Path(self.save_dir).glob(f"model_*.pth{CHECKSUM}"):
            if not path.with_suffix("").exists():
                path.unlink()
