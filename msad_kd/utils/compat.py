"""What differs between Detectron2 0.6 and its git main, and the patches that libraries need."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import build as data_build
from detectron2.data import detection_utils
from detectron2.data.datasets import cityscapes
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.engine import DefaultTrainer, TrainerBase, defaults
from detectron2.evaluation import coco_evaluation
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

from msad_kd.utils.errors import InputError
from msad_kd.utils.replaced import replaced
from msad_kd.utils.unpickle import UntrustedError, load_pickle


def add_missing_keys(cfg: CfgNode) -> None:
    """Add to a config the keys of git main that this project reads and Detectron2 0.6 lacks."""
    # The share of the images that RandomSubsetTrainingSampler draws from.
    cfg.DATALOADER.setdefault("RANDOM_SUBSET_RATIO", 1.0)


def ddp_on(device: str) -> AbstractContextManager:
    """Let ``DefaultTrainer`` wrap a model on this device in DistributedDataParallel.

    Both versions pass ``device_ids``, which torch refuses for a model on the CPU.
    """
    if device != "cpu":
        return nullcontext()
    wrap = partial(defaults.create_ddp_model, device_ids=None)
    return replaced(defaults, create_ddp_model=wrap)


def checkpointer_of(cls: type) -> AbstractContextManager:
    """Let ``DefaultTrainer`` make its checkpointer of this class, before it builds its hooks.

    Neither version has a method to override for this.
    """
    return replaced(defaults, DetectionCheckpointer=cls)


def create_local_process_group(processes_per_machine: int) -> None:
    """Tell Detectron2 which processes run on the same machine.

    Git main has a function for this. Detectron2 0.6 does it inside ``launch``, which needs GPUs.
    """
    for first in range(0, dist.get_world_size(), processes_per_machine):
        ranks = range(first, first + processes_per_machine)
        group = dist.new_group(ranks)  # every process has to create every group
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def trainer_state(trainer: DefaultTrainer) -> dict:
    """Return a trainer's state for a checkpoint, with the optimizer.

    The optimizer belongs to the inner trainer, which Detectron2 0.6 leaves out of checkpoints.
    """
    return {**TrainerBase.state_dict(trainer), "_trainer": trainer._trainer.state_dict()}


def load_trainer_state(trainer: DefaultTrainer, state: dict) -> bool:
    """Restore what ``trainer_state`` returned, and return whether it has the optimizer's state.

    Git main refuses a checkpoint without one, such as 0.6 itself writes.
    """
    TrainerBase.load_state_dict(trainer, state)
    if "_trainer" in state:
        trainer._trainer.load_state_dict(state["_trainer"])
    return "_trainer" in state


@contextmanager
def plain_proposals() -> Iterator[None]:
    """Let Detectron2 read DATASETS.PROPOSAL_FILES by ``load_pickle``, which runs no code.

    Neither version has a method to override for this.

    Raises:
        InputError: if a file cannot be read, or does not fit the images.
    """
    load = data_build.load_proposals_into_dataset

    def load_or_explain(dicts: list[dict], file: str) -> list[dict]:
        try:
            return load(dicts, file)
        except UntrustedError as error:
            words = f"asks for {error}, which could run code; --trust-files would run it"
            raise InputError(f"DATASETS.PROPOSAL_FILES: '{file}' {words}") from error
        except Exception as error:  # whatever a damaged pickle, or one of other contents, raises
            words = "cannot be read as proposals for these images"
            raise InputError(f"DATASETS.PROPOSAL_FILES: '{file}' {words} ({error!r})") from error

    reader = SimpleNamespace(load=load_pickle)
    with replaced(data_build, pickle=reader, load_proposals_into_dataset=load_or_explain):
        yield


def repeat_factor_options(cfg: CfgNode) -> dict[str, bool]:
    """Return the options of ``repeat_factors_from_category_frequency`` that this version takes.

    Git main has DATALOADER.REPEAT_SQRT. Detectron2 0.6 has no such key and always takes the root.
    """
    return {"sqrt": cfg.DATALOADER.REPEAT_SQRT} if "REPEAT_SQRT" in cfg.DATALOADER else {}


def coco_eval_class(cls: type) -> AbstractContextManager:
    """Let ``COCOEvaluator`` compute AP by ``cls`` where it would use its own C++ code.

    With a limit of detections other than 100 it would use pycocotools. Neither version has an
    option for this.
    """
    return replaced(coco_evaluation, COCOeval_opt=cls, COCOevalMaxDets=cls)


def coco_ground_truth(read: Callable[[str], dict]) -> AbstractContextManager:
    """Let ``COCOEvaluator``'s constructor get its ground truth by ``read(path)``.

    Neither version takes anything but the path of a file, which pycocotools reads as it is. For a
    data set that a function registers, Detectron2 writes this file, and would read that of an
    earlier run instead, even if the function has changed since.
    """

    def convert(name: str, path: str, **_) -> None:
        if comm.is_main_process():
            convert_to_coco_json(name, path, allow_cached=False)
        comm.synchronize()
        if not PathManager.exists(path):  # on another machine
            convert_to_coco_json(name, path)

    def build(path: str) -> COCO:
        truth = COCO()
        truth.dataset = read(path)
        truth.createIndex()
        return truth

    return replaced(coco_evaluation, COCO=build, convert_to_coco_json=convert)


def numpy_with_in1d(module: ModuleType) -> AbstractContextManager:
    """Give a module that has NumPy as ``np`` one with ``in1d``; no other module sees it.

    cityscapesScripts 2.3 calls ``in1d``, which NumPy 2.4 dropped.
    """
    return replaced(module, np=SimpleNamespace(**{**vars(np), "in1d": np.isin}))


def images_read_by(read: Callable[..., np.ndarray]) -> AbstractContextManager:
    """Let ``DatasetMapper`` read images by ``read(file_name, format)``.

    Neither version has a method or an option for this.
    """
    return replaced(detection_utils, read_image=read)


class _CityscapesScripts(MetaPathFinder, Loader):
    """Finds the installed cityscapesScripts under the path that git main imports them from."""

    package = "deeplearning.projects.cityscapesApi.cityscapesscripts"

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name == self.package or name.startswith(f"{self.package}."):
            return ModuleSpec(name, self, is_package=True)
        if self.package.startswith(f"{name}."):
            return ModuleSpec(name, None, is_package=True)  # an empty namespace
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        prefix = self.package.removesuffix("cityscapesscripts")
        module = importlib.import_module(spec.name.removeprefix(prefix))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state  # the import has replaced it


def find_cityscapes_scripts(source: str) -> None:
    """Let the code of a module of Detectron2 import cityscapesScripts, if it has another path.

    Since December 2024 git main imports it from a package inside Meta, which nobody else has.
    """
    known = any(isinstance(finder, _CityscapesScripts) for finder in sys.meta_path)
    if _CityscapesScripts.package in source and not known:
        # At the front: Python's own finder would load each script a second time.
        sys.meta_path.insert(0, _CityscapesScripts())


find_cityscapes_scripts(Path(cityscapes.__file__).read_text())
