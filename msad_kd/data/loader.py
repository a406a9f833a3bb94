"""A training loader whose batches are a function of (seed, rank, iteration) and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import cv2
import torch
import torch.utils.data as torchdata
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, get_detection_dataset_dicts
from detectron2.data.build import trivial_batch_collator
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm

from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import derive_seed, preserved_rng, seed_all

__all__ = ["ResumableLoader", "build_train_loader", "clear_absence", "clear_errors"]


class clear_errors:  # lower case: used as a function; a class can be pickled for spawned workers
    """The mapper, but an image that cannot be read is an ``InputError`` that names its file."""

    def __init__(self, mapper: Callable[[dict], dict]):
        self.mapper = mapper

    def __call__(self, dataset_dict: dict) -> dict:
        try:
            return self.mapper(dataset_dict)
        except (OSError, SizeMismatchError) as error:  # Pillow's are OSErrors
            raise InputError(
                f"image '{dataset_dict.get('file_name')}' cannot be read ({error}); restore it or "
                "take it out of the annotation file"
            ) from error


@contextmanager
def clear_absence(names: tuple[str, ...]):
    """A builtin data set that is not on disk is an ``InputError`` that says where it should be."""
    if not names:
        raise InputError("no data set is named; set DATASETS.TRAIN")
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(
            f"data set {', '.join(names)}: '{error.filename}' does not exist; set "
            "DETECTRON2_DATASETS to the folder that has it"
        ) from error
    except ImportError as error:
        raise InputError(
            f"data set {', '.join(names)}: {error}; install the package, for Cityscapes "
            "cityscapesScripts and shapely"
        ) from error
    except AssertionError as error:  # empty, or nothing left after images without boxes went
        raise InputError(f"data set {', '.join(names)}: {error}") from error


class _SeededDataset(torchdata.Dataset):
    """Maps (index, seed) to a mapped sample; the seed decides every random number in the mapper."""

    def __init__(self, dicts: list[dict], mapper: Callable[[dict], dict | None]):
        self.dicts = DatasetFromList(dicts, copy=False)
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, seed = key
        with preserved_rng(devices=False):
            for attempt in range(100):
                seed_all(derive_seed(seed, attempt), devices=False)
                mapped = self.mapper(self.dicts[index])
                if mapped is not None:
                    return mapped
                # A mapper may refuse a sample: go on with another, which the seed chooses.
                index = derive_seed(seed, attempt, index) % len(self.dicts)
        raise InputError("the mapper refused 100 samples in a row; is there any it accepts?")


class _BatchSampler(torchdata.Sampler):
    """Batches of (index, seed) from an infinite sampler, grouped by aspect ratio."""

    def __init__(self, sampler, batch_size: int, groups: list[int], seed: int, start: int):
        self.sampler = sampler
        self.batch_size = batch_size
        self.groups = groups
        self.seed = seed
        self.start = start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        waiting: dict[int, list[tuple[int, int]]] = {}
        batches = 0
        for draw, index in enumerate(self.sampler):
            group = waiting.setdefault(self.groups[index], [])
            group.append((index, draw))
            if len(group) == self.batch_size:
                if batches >= self.start:
                    rank = comm.get_rank()
                    yield [(i, derive_seed(self.seed, rank, d)) for i, d in group]
                batches += 1
                group.clear()


class ResumableLoader:
    """Batches of mapped samples, for ever; iteration i always gets the same batch.

    ``start`` may be set until the first batch is asked for: Detectron2 0.6 asks for the iterator
    before it knows at which iteration the run resumes, so the work begins with the first batch.
    """

    def __init__(self, dicts, mapper, sampler, *, batch_size, groups, seed, num_workers):
        self.dataset = _SeededDataset(dicts, mapper)
        self.sampler = sampler
        self.batch_size = batch_size
        self.groups = groups
        self.seed = seed
        self.num_workers = num_workers
        self.start = 0

    def __iter__(self) -> Iterator[list[dict]]:
        batches = _BatchSampler(self.sampler, self.batch_size, self.groups, self.seed, self.start)
        # The loader draws a seed for its workers when it starts. That must not come from the global
        # generator: a resumed run starts it at another iteration than an uninterrupted one.
        yield from torchdata.DataLoader(
            self.dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=_one_thread,
            generator=torch.Generator(),
        )


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)  # workers are the parallelism; OpenCV's threads would fight over the cores


def _build_sampler(cfg: CfgNode, dicts: list[dict], seed: int):
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return TrainingSampler(len(dicts), seed=seed)
    if name == "RepeatFactorTrainingSampler":
        # Detectron2 0.6 knows the square root alone, and has no key for it.
        choice = {"sqrt": cfg.DATALOADER.REPEAT_SQRT} if "REPEAT_SQRT" in cfg.DATALOADER else {}
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dicts, cfg.DATALOADER.REPEAT_THRESHOLD, **choice
        )
        return RepeatFactorTrainingSampler(factors, seed=seed)
    if name == "RandomSubsetTrainingSampler":
        ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
        return RandomSubsetTrainingSampler(len(dicts), ratio, seed_shuffle=seed, seed_subset=seed)
    raise InputError(
        f"DATALOADER.SAMPLER_TRAIN: '{name}' is unknown; use TrainingSampler, "
        "RepeatFactorTrainingSampler or RandomSubsetTrainingSampler"
    )


def build_train_loader(cfg: CfgNode, mapper: Callable[[dict], dict | None]) -> ResumableLoader:
    """The training loader of a config, by Detectron2's keys (``DATASETS``, ``DATALOADER``).

    Its order and its augmentations follow ``SEED``; a negative one draws a seed, so that a resumed
    run is then another run.

    Raises:
        InputError: if the sampler is unknown or the batch cannot be divided among the processes.
    """
    with clear_absence(cfg.DATASETS.TRAIN):
        dicts = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
            if cfg.MODEL.KEYPOINT_ON
            else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    world_size = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % world_size:
        raise InputError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which {world_size} processes "
            "cannot share equally"
        )
    grouped = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    logging.getLogger(__name__).info(
        "Training on %d images in the order of seed %d", len(dicts), seed
    )
    return ResumableLoader(
        dicts,
        clear_errors(mapper),
        _build_sampler(cfg, dicts, seed),
        batch_size=cfg.SOLVER.IMS_PER_BATCH // world_size,
        groups=[int(d["width"] > d["height"]) if grouped else 0 for d in dicts],
        seed=seed,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
