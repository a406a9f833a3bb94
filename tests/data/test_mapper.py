"""The two-resolution mapper: the stock mapper's image, and the same image k times as large.

H, W: of the low-resolution image, k: high-resolution side / low-resolution side.
"""

import copy

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper, detection_utils, get_detection_dataset_dicts
from detectron2.data import transforms as T
from helpers import same_instances
from pycocotools import mask as mask_util
from torch.testing import assert_close

from msad_kd import TwoResolutionMapper
from msad_kd.data.augmentation import jitter_arguments
from msad_kd.data.mapper import build_mapper
from msad_kd.data.transforms import scale_transforms
from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import seed_all

# Flips, crops before the resize and several odd sizes: all that Detectron2's own keys offer.
LIVELY = [
    *("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "relative_range"),
    *("INPUT.MIN_SIZE_TRAIN", (31, 40, 47), "INPUT.MAX_SIZE_TRAIN", 61),
]
JITTER = ["INPUT.JITTER.SIZE", 40]
RLE = [*LIVELY, "INPUT.MASK_FORMAT", "bitmask"]


def test_what_jitter_adds_to_an_image_is_in_no_mask(config, smooth):
    """Git main's crop pads masks with 255, unless it is told otherwise."""
    mask = np.zeros((97, 133), dtype=np.uint8, order="F")
    mask[20:80, 10:120] = 1
    entry = {**smooth, "annotations": [{**smooth["annotations"][0]}]}
    entry["annotations"][0]["segmentation"] = mask_util.encode(mask)
    small = ["INPUT.JITTER.SIZE", 100, "INPUT.JITTER.SCALES", [0.5, 0.5]]
    mapper = build_mapper(config("lr", *small, "INPUT.MASK_FORMAT", "bitmask"), is_train=True)
    (resize, crop) = jitter_arguments(config("lr", *small), True)["augmentations"][:2]
    assert crop.seg_pad_value == 0
    (found,) = mapped(mapper, entry, 0)["instances"].gt_masks.tensor
    assert found.shape == (100, 100)
    assert found.sum() == pytest.approx(mask.sum() * (50 / 133) ** 2, rel=0.05)


@pytest.fixture
def dicts(config):
    return get_detection_dataset_dicts(config("lr").DATASETS.TRAIN)


@pytest.fixture(scope="module")
def smooth(tmp_path_factory):
    """A data set dict of a smooth, asymmetric picture of 97 x 133 px, with one rectangle."""
    y, x = np.mgrid[0:97, 0:133]
    channels = [x * 1.8, y * 2.4, 120 + 100 * np.sin(x / 20 + y / 30)]
    file = tmp_path_factory.mktemp("smooth") / "smooth.png"
    cv2.imwrite(str(file), np.stack(channels, axis=2).astype(np.uint8))
    x0, y0, x1, y1 = 26.6, 29.1, 93.1, 77.6
    annotation = {"bbox": [x0, y0, x1, y1], "bbox_mode": 0, "category_id": 0}
    annotation["segmentation"] = [[x0, y0, x1, y0, x1, y1, x0, y1]]
    return {"file_name": str(file), "height": 97, "width": 133, "annotations": [annotation]}


def mapped(mapper, entry, seed):
    seed_all(seed)
    return mapper(copy.deepcopy(entry))


def mapper_with(augmentations, frame="lr", scale=2, is_train=True):
    return TwoResolutionMapper(
        is_train, frame=frame, scale=scale, augmentations=augmentations, image_format="RGB"
    )


def with_rles(entry):
    """Return a dict whose masks are RLEs."""
    entry, size = copy.deepcopy(entry), (entry["height"], entry["width"])
    for label in entry["annotations"]:
        label["segmentation"] = mask_util.merge(mask_util.frPyObjects(label["segmentation"], *size))
    return entry


OPTIONS = {"plain": [], "lively": LIVELY, "jitter": JITTER, "RLE": RLE}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_low_resolution_image_is_bitwise_the_stock_mappers(config, dicts, options):
    dicts = [with_rles(entry) for entry in dicts] if options is RLE else dicts
    cfg = config("lr", *options)
    stock = DatasetMapper(cfg, True, **jitter_arguments(cfg, True))
    ours = TwoResolutionMapper(cfg, True, frame="lr")
    shapes, flips = set(), 0
    for seed in range(8):
        for entry in dicts[:3]:
            expected, found = mapped(stock, entry, seed), mapped(ours, entry, seed)
            assert torch.equal(found["image"], expected["image"])
            assert same_instances(found["instances"], expected["instances"])
            assert found.keys() == expected.keys() | {"image_hr"}
            shapes.add(tuple(found["image"].shape))
            flips += not torch.equal(found["image"], mapped(ours, entry, 0)["image"])
    assert flips and (len(shapes) > 3) == (
        options in (LIVELY, RLE)
    )  # the augmentations did something


@pytest.mark.parametrize("image_format", ["RGB", "BGR", "L", None])
def test_both_images_are_bitwise_those_of_the_plain_transforms(smooth, image_format):
    flips = [T.RandomFlip(), T.RandomFlip(horizontal=False, vertical=True)]
    augmentations = [*flips[:1], T.ResizeShortestEdge((29, 34), 60, "choice"), *flips]
    keys = {"frame": "lr", "scale": 2, "augmentations": augmentations}
    mapper = TwoResolutionMapper(True, image_format=image_format, **keys)
    image = detection_utils.read_image(smooth["file_name"], image_format)
    for seed in range(12):
        found = mapped(mapper, smooth, seed)
        seed_all(seed)
        inputs = T.AugInput(image)
        high = scale_transforms(T.AugmentationList(augmentations)(inputs), 2).apply_image(image)
        for name, expected in (("image", inputs.image), ("image_hr", high)):
            assert found[name].is_contiguous() and found[name].dtype == torch.uint8
            assert np.array_equal(found[name], expected.transpose(2, 0, 1))


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_high_resolution_has_exactly_k_times_the_sides(config, dicts, scale, is_train):
    sizes = ["INPUT.MIN_SIZE_TEST", 37, "INPUT.MAX_SIZE_TEST", 50]
    cfg = config("lr", "KD.SCALE", scale, *LIVELY, *sizes)
    mapper = TwoResolutionMapper(cfg, is_train, frame="lr")
    for seed in range(6):
        found = mapped(mapper, dicts[0], seed)
        height, width = found["image"].shape[1:]
        assert found["image_hr"].shape == (3, scale * height, scale * width)
        assert found["image_hr"].dtype == found["image"].dtype == torch.uint8
        if scale == 1:
            assert torch.equal(found["image_hr"], found["image"])


@pytest.mark.parametrize("is_train", [True, False])
def test_in_the_hr_frame_image_lr_is_the_stock_image_of_half_the_size(config, dicts, is_train):
    def sizes(small, large, longest):
        keys = ["INPUT.MIN_SIZE_TRAIN", (small, large), "INPUT.MAX_SIZE_TRAIN", longest]
        return [*LIVELY[:4], *keys, "INPUT.MIN_SIZE_TEST", small, "INPUT.MAX_SIZE_TEST", longest]

    # Halves are rounded up: 61, 94 -> 31, 47 as the paper's 1333 -> 667.
    stock = DatasetMapper(config("lr", *sizes(31, 47, 61)), is_train)
    ours = TwoResolutionMapper(config("teacher", *sizes(61, 94, 121)), is_train, frame="hr")
    for seed in range(6):
        other_seed = seed if is_train else 9  # in evaluation nothing is random
        expected, found = mapped(stock, dicts[1], seed), mapped(ours, dicts[1], other_seed)
        assert torch.equal(found["image_lr"], expected["image"])
        assert ("instances" in found) == is_train
        height, width = expected["image"].shape[1:]
        assert found["image"].shape == (3, 2 * height, 2 * width)
        if is_train:
            boxes = 2 * expected["instances"].gt_boxes.tensor
            assert_close(found["instances"].gt_boxes.tensor, boxes, atol=1e-3, rtol=0)
            assert found["instances"].image_size == (2 * height, 2 * width)


@pytest.mark.parametrize("jitter", [False, True])
@pytest.mark.parametrize("scale", [2, 4])
def test_both_frames_hold_the_same_two_images(config, dicts, scale, jitter):
    mappers = []
    for frame, factor in (("lr", 1), ("hr", scale)):
        sizes = [tuple(factor * side for side in (31, 40, 47)), "INPUT.MAX_SIZE_TRAIN", 61 * factor]
        options = [JITTER[0], 40 * factor] if jitter else [*LIVELY[:5], *sizes]
        cfg = config("lr", "KD.SCALE", scale, *options)
        before = copy.deepcopy(cfg)
        mappers.append(TwoResolutionMapper(cfg, True, frame=frame))
        assert cfg == before  # the config is left alone
    boxes = 0
    for seed, entry in enumerate(dicts * 2):
        low, high = (mapped(mapper, entry, seed) for mapper in mappers)
        assert torch.equal(low["image"], high["image_lr"])
        assert torch.equal(low["image_hr"], high["image"])
        small, large = (x["instances"].gt_boxes.tensor for x in (low, high))
        assert_close(scale * small, large, atol=1e-3, rtol=0)
        boxes += len(small)
    assert boxes > 10


@pytest.mark.parametrize("scale", [2, 4])
def test_both_resolutions_show_the_same_picture(smooth, scale):
    augmentations = [
        T.RandomCrop("relative_range", (0.5, 0.5)),
        T.RandomFlip(),
        T.ResizeShortestEdge((29, 34, 41), 60, "choice"),
        T.RandomFlip(horizontal=False, vertical=True),
        T.RandomCrop("absolute", (25, 27)),
        T.RandomBrightness(0.7, 1.3),
        T.RandomContrast(0.7, 1.3),
    ]
    mapper = mapper_with(augmentations, scale=scale)
    for seed in range(12):
        found = mapped(mapper, smooth, seed)
        low, high = found["image"].float(), found["image_hr"].float()
        shrunk = torch.nn.functional.avg_pool2d(high, scale)
        assert (shrunk - low).abs().mean() < 3  # grey levels
        assert (shrunk.flip(2) - low).abs().mean() > 6  # so a missed flip would be seen


def test_segmentation_follows_the_frame(smooth, tmp_path):
    labels = np.zeros((97, 133), np.uint8)
    labels[:, :60] = 7
    cv2.imwrite(str(tmp_path / "labels.png"), labels)
    entry = {**smooth, "sem_seg_file_name": str(tmp_path / "labels.png")}
    resize = [T.ResizeShortestEdge(30, 60), T.RandomFlip()]
    for seed in range(4):
        low = mapped(mapper_with(resize), entry, seed)
        high = mapped(mapper_with(resize, frame="hr"), entry, seed)
        for found in (low, high):
            assert found["sem_seg"].shape == found["image"].shape[1:]
        assert torch.equal(low["sem_seg"][0, ::20], high["sem_seg"][0, ::40])


@pytest.mark.parametrize(
    ("augmentation", "name"),
    [(T.RandomRotation([10, 20]), "Rotation"), (T.RandomSaturation(0.5, 0.6), "Blend")],
)
def test_what_cannot_be_scaled_is_named(smooth, augmentation, name):
    resize = T.ResizeShortestEdge(30, 60)
    with pytest.raises(InputError, match=f"{name}Transform follows the last resize.*before"):
        mapped(mapper_with([resize, augmentation]), smooth, 0)
    # Before the resize there is nothing to scale.
    found = mapped(mapper_with([augmentation, resize]), smooth, 0)
    shrunk = torch.nn.functional.avg_pool2d(found["image_hr"].float(), 2)
    assert (shrunk - found["image"].float()).abs().mean() < 3


def test_no_resize_and_a_wrong_scale_or_frame_are_refused(config, dicts):
    cfg = config("lr", "INPUT.MIN_SIZE_TEST", 0)
    with pytest.raises(InputError, match="no resize.*INPUT.MIN_SIZE_TEST"):
        TwoResolutionMapper(cfg, False, frame="lr")(dicts[0])
    with pytest.raises(InputError, match="KD.SCALE is 3"):
        mapper_with([], scale=3)
    with pytest.raises(InputError, match="'lr' or 'hr', not 'both'"):
        TwoResolutionMapper(config("lr"), True, frame="both")


@pytest.mark.parametrize("scale", [2, 4])
def test_jitter_pads_both_resolutions_alike(config, dicts, scale):
    mapper = TwoResolutionMapper(config("lr", *JITTER, "KD.SCALE", scale), True, frame="lr")
    padded = set()
    for seed, entry in enumerate(dicts * 2):
        found = mapped(mapper, entry, seed)
        low, high = ((found[name] == 128).all(dim=0) for name in ("image", "image_hr"))
        padded.add(bool(low[:, -1].all() or low[:, 0].all() or low[-1].all()))
        scaled = low.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        assert high[scaled].float().mean() > 0.95 or not low.any()
    assert padded == {True, False}


def test_a_stock_model_jitters_too_but_only_in_training(config, dicts):
    cfg = config("lr", *JITTER)
    assert jitter_arguments(config("lr"), True) == jitter_arguments(cfg, False) == {}
    assert mapped(build_mapper(cfg, True), dicts[0], 0)["image"].shape == (3, 40, 40)
    assert mapped(build_mapper(cfg, False), dicts[0], 0)["image"].shape == (3, 32, 48)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["INPUT.JITTER.SCALES", [2.0, 0.1]], "SCALES is .2.0, 0.1.; it should be a range"),
        (["INPUT.CROP.ENABLED", True], "INPUT.CROP.ENABLED and INPUT.JITTER.SIZE both crop"),
    ],
)
def test_wrong_jitter(config, options, words):
    with pytest.raises(InputError, match=words):
        TwoResolutionMapper(config("lr", *JITTER, *options), True, frame="lr")
