"""A training loader whose batches depend on (seed, rank, iteration) and on nothing else."""

import copy
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import attrgetter

import cv2
import torch
import torch.utils.data as torchdata
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
    samplers,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils import comm

from msad_kd.data.classes import align_classes, annotation_file, spare_classes
from msad_kd.data.dict_checks import (
    check_files,
    check_objects,
    check_shapes,
    explain_missing_data,
)
from msad_kd.data.images import REMEDY, is_wide, unreadable
from msad_kd.data.mixing import add_mixup
from msad_kd.data.statistics import warn_of_small_images
from msad_kd.data.unlabeled import takes_unlabeled, unlabeled_dicts
from msad_kd.utils.compat import repeat_factor_options
from msad_kd.utils.errors import InputError
from msad_kd.utils.processes import keep_many_files_open
from msad_kd.utils.seed import derive_seed, preserved_rng, seed_all
from msad_kd.utils.signals import heed_parent_alone


@dataclass
class CheckedMapper:  # a class, since spawned workers cannot unpickle a closure
    """Wraps a mapper of the user's so that an unreadable image raises an ``InputError``."""

    mapper: Callable[[dict], dict]

    def __call__(self, dataset_dict: dict) -> dict:
        """Map a dict."""
        try:
            return self.mapper(dataset_dict)
        except SizeMismatchError as error:
            raise InputError(str(unreadable(dataset_dict["file_name"], error))) from error
        except OSError as error:  # of Pillow; the file may be another one of the dict's
            words = f"cannot be read ({error}); {REMEDY}"
            raise InputError(f"image '{dataset_dict.get('file_name')}' {words}") from error


@dataclass
class _SeededDataset(torchdata.Dataset):
    """Maps (index, seed) to a sample; the seed decides every random number of the mapper."""

    dicts: DatasetFromList
    mapper: Callable[[dict], dict | None]
    drawn: Sequence[int]  # the images that the sampler draws

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, seed = key
        with preserved_rng(devices=False):
            for attempt in range(100):
                seed_all(derive_seed(seed, attempt), devices=False)
                sample = self.mapper(self.dicts[index])
                if sample is not None:
                    return sample
                # A mapper may refuse an image. The seed chooses another.
                index = int(self.drawn[derive_seed(seed, attempt, index) % len(self.drawn)])
        raise InputError("the mapper refused 100 samples in a row; does it accept any?")


@dataclass
class _WithUnlabeled(torchdata.Dataset):
    """Two seeded data sets in a row; samples of the second have ``unlabeled``: True."""

    labeled: torchdata.Dataset
    unlabeled: torchdata.Dataset

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, seed = key
        if index < len(self.labeled):
            return self.labeled[key]
        return {**self.unlabeled[index - len(self.labeled), seed], "unlabeled": True}


def _group_draws(sampler, groups: list[int], size: int) -> Iterator[list[tuple[int, int]]]:
    """Yield batches of (index, number of the draw), each from one of the groups of images."""
    waiting = defaultdict(list)
    for draw, index in enumerate(sampler):
        waiting[groups[index]].append((index, draw))
        if len(waiting[groups[index]]) == size:
            yield waiting.pop(groups[index])


@dataclass
class ResumableLoader:
    """Endless batches of mapped samples; iteration i always gets the same batch.

    Set ``start``, the first iteration, before the first batch is drawn. Detectron2 0.6 asks for
    the iterator before it knows where the run resumes; a generator reads ``start`` later.

    With ``unlabeled``, each batch is followed by a batch of that loader, whose samples have
    ``unlabeled``: True. The labelled samples are the same as without.
    """

    dataset: torchdata.Dataset  # maps (index, seed) to a sample
    sampler: Iterable[int]  # endless
    batch_size: int  # of this process
    groups: list[int]  # the group of each image; a batch holds images of one group
    seed: int  # with the rank, decides the augmentations
    num_workers: int
    start: int = 0
    unlabeled: "ResumableLoader | None" = None  # its start and num_workers are not read

    def draws(self, start: int) -> Iterator[list[tuple[int, int]]]:
        """Yield the (index, seed) of the samples of each batch, from the batch ``start`` on."""
        batches = islice(_group_draws(self.sampler, self.groups, self.batch_size), start, None)
        rank = comm.get_rank()
        return ([(i, derive_seed(self.seed, rank, d)) for i, d in x] for x in batches)

    def __iter__(self) -> Iterator[list[dict]]:
        dataset, batches = self.dataset, self.draws(self.start)
        if self.unlabeled is not None:  # by the same workers: twice as many would compete
            count, pairs = len(dataset), zip(batches, self.unlabeled.draws(self.start))
            dataset = _WithUnlabeled(dataset, self.unlabeled.dataset)
            batches = (mine + [(count + i, seed) for i, seed in other] for mine, other in pairs)
        if self.num_workers:
            keep_many_files_open()
        # The generator: a loader draws its workers' seed when it starts. From the global generator,
        # that draw would make a resumed run differ from an uninterrupted one.
        yield from torchdata.DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=partial(_prepare_worker, parent=os.getpid()),
            generator=torch.Generator(),
        )


def _prepare_worker(worker: int, parent: int) -> None:
    heed_parent_alone(parent)
    cv2.setNumThreads(0)  # the workers already run in parallel; OpenCV's threads would compete


def _build_sampler(cfg: CfgNode, dicts: list[dict], seed: int):
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return samplers.TrainingSampler(len(dicts), seed=seed)
    if name == "RepeatFactorTrainingSampler":
        factors = samplers.RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dicts, cfg.DATALOADER.REPEAT_THRESHOLD, **repeat_factor_options(cfg)
        )
        return samplers.RepeatFactorTrainingSampler(factors, seed=seed)
    if name == "RandomSubsetTrainingSampler":
        ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
        if int(ratio * len(dicts)) == 0:
            words = f"{ratio}, which of {len(dicts)} images leaves none"
            raise InputError(f"DATALOADER.RANDOM_SUBSET_RATIO is {words}")
        return samplers.RandomSubsetTrainingSampler(len(dicts), ratio, True, seed, seed)
    raise InputError(
        f"DATALOADER.SAMPLER_TRAIN: '{name}' is unknown; use TrainingSampler, "
        "RepeatFactorTrainingSampler or RandomSubsetTrainingSampler"
    )


def build_train_loader(cfg: CfgNode, mapper: Callable[[dict], dict | None]) -> ResumableLoader:
    """Build the training loader from Detectron2's keys under DATASETS and DATALOADER.

    A student's batches are followed by images of DATASETS.UNLABELED, if there are any.

    SEED decides the order of the images and their augmentations. With a negative SEED a new seed is
    drawn, and a resumed run then differs from an uninterrupted one.

    Args:
        cfg: the config.
        mapper: turns a data set dict into a sample, or returns None to refuse it.

    Raises:
        InputError: if a data set is missing, if its classes do not fit, or if a key does not.
    """
    align_classes(cfg, cfg.DATASETS.TRAIN)
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD
    with explain_missing_data(cfg.DATASETS.TRAIN):
        dicts = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    names = ", ".join(cfg.DATASETS.TRAIN)
    # A mapper of the user's may make its objects of something else.
    if isinstance(mapper, DatasetMapper) and not any("annotations" in x for x in dicts):
        words = "it has no boxes; is it one of panoptic or semantic segmentation?"
        raise InputError(f"data set {names}: {words}")
    drop = cfg.DATASETS.INVALID_ANNOTATIONS == "drop"
    dicts = check_shapes(dicts, names, mapper, drop)
    warn_of_small_images(cfg, dicts)
    if words := spare_classes(cfg):
        logging.getLogger(__name__).warning(words)
    check_objects(cfg, dicts, names, mapper)
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    logging.getLogger(__name__).info("Training on %d images, seed %d", len(dicts), seed)
    sampler = _build_sampler(cfg, dicts, seed)
    loader = _build_loader(cfg, "SOLVER.IMS_PER_BATCH", dicts, mapper, sampler, seed, mixed=True)
    if takes_unlabeled(cfg):
        loader.unlabeled = _build_unlabeled(cfg, mapper, derive_seed(seed, *b"unlabeled"))
    return loader


def _build_unlabeled(cfg: CfgNode, mapper: Callable, seed: int) -> ResumableLoader:
    names = ", ".join(cfg.DATASETS.UNLABELED)
    with explain_missing_data(cfg.DATASETS.UNLABELED):
        dicts = unlabeled_dicts(cfg)
    dicts = check_shapes(dicts, names, mapper, cfg.DATASETS.INVALID_ANNOTATIONS == "drop")
    mapper = copy.copy(mapper)  # the masks of the labelled images keep their format
    check_objects(cfg, dicts, names, mapper)
    logging.getLogger(__name__).info("And on %d images without labels: %s", len(dicts), names)
    sampler = samplers.TrainingSampler(len(dicts), seed=seed)
    return _build_loader(cfg, "SOLVER.UNLABELED_PER_BATCH", dicts, mapper, sampler, seed)


def _build_loader(
    cfg: CfgNode,
    key: str,
    dicts: list[dict],
    mapper: Callable,
    sampler: Iterable[int],
    seed: int,
    mixed: bool = False,
) -> ResumableLoader:
    """Build a loader whose batches have as many images, over all processes, as the key says.

    With SOLVER.ACCUMULATE n they have n times as many: the trainer splits them.

    ``mixed``: whether INPUT.MIXUP holds. An image without labels would mix in its objects as
    background.
    """
    count, world_size = attrgetter(key)(cfg), comm.get_world_size()
    if count % world_size:
        words = f"{count}, which {world_size} processes cannot share equally"
        raise InputError(f"{key} is {words}")
    grouped = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    groups = [int(grouped and is_wide(d)) for d in dicts]
    drawn = getattr(sampler, "_indexes_subset", range(len(dicts)))
    dataset = _SeededDataset(DatasetFromList(dicts, copy=False), CheckedMapper(mapper), drawn)
    if mixed:
        dataset = add_mixup(dataset, cfg, drawn, groups)
    return ResumableLoader(
        dataset,
        sampler,
        batch_size=count // world_size * cfg.SOLVER.ACCUMULATE,
        groups=groups,
        seed=seed,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def build_test_loader(cfg: CfgNode, name: str, mapper: Callable[[dict], dict]):
    """Build Detectron2's loader for a data set in DATASETS.TEST.

    Raises:
        InputError: if the data set or one of its images is missing, or if its classes do not fit.
    """
    align_classes(cfg, (name,))
    proposals = None
    if cfg.MODEL.LOAD_PROPOSALS:
        files = dict(zip(cfg.DATASETS.TEST, cfg.DATASETS.PROPOSAL_FILES_TEST))
        if name not in files:
            raise InputError(f"data set '{name}' has no file in DATASETS.PROPOSAL_FILES_TEST")
        proposals = [files[name]]
    with explain_missing_data((name,)):
        dicts = get_detection_dataset_dicts([name], filter_empty=False, proposal_files=proposals)
    if isinstance(dicts, list):
        source = annotation_file(name) or MetadataCatalog.get(name).get("image_dir", name)
        check_files([x["file_name"] for x in dicts if "file_name" in x], source, name)
        check_shapes(dicts, name, mapper)  # all count in its AP, so none can be left out
    workers = cfg.DATALOADER.NUM_WORKERS
    return build_detection_test_loader(dicts, mapper=CheckedMapper(mapper), num_workers=workers)
