"""Colours and mixup: the same for both resolutions, and a function of the sample's seed."""

import itertools

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from helpers import NO_TEST, same_instances, train

from msad_kd.data.augmentation import colour_augmentations
from msad_kd.data.loader import build_train_loader
from msad_kd.data.mapper import build_mapper
from msad_kd.data.mixing import mix
from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import seed_all

COLOURS = ("BRIGHTNESS", "CONTRAST", "SATURATION")
COLOUR = [x for name in COLOURS for x in (f"INPUT.COLOR.{name}", 0.4)]
MIXUP = ["INPUT.MIXUP.PROB", 1.0]
STRONG = [*COLOUR, *MIXUP, "INPUT.JITTER.SIZE"]


def samples(cfg, batches, start=0):
    loader = build_train_loader(cfg, build_mapper(cfg, is_train=True))
    loader.start = start
    return list(itertools.chain(*itertools.islice(loader, batches)))


def same(one, other):
    images = [key for key in one if key.startswith("image") and key != "image_id"]
    equal = all(torch.equal(one[key], other[key]) for key in images)
    return equal and same_instances(one["instances"], other["instances"])


# ---- Colours ----


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_a_colour_is_the_worked_out_one_in_both_orders(config, name, order):
    cfg = config("lr", f"INPUT.COLOR.{name}", 0.5, "INPUT.FORMAT", order)
    (augmentation,) = colour_augmentations(cfg, True)
    assert colour_augmentations(cfg, False) == colour_augmentations(config("lr"), True) == []
    image = np.array([[[200.0, 100.0, 60.0], [20.0, 40.0, 60.0]]])  # red, green, blue
    origin = {"BRIGHTNESS": 0, "CONTRAST": 80, "SATURATION": [[[125.34], [36.3]]]}[name]
    np.random.seed(0)
    factor = np.random.uniform(0.5, 1.5)
    np.random.seed(0)
    turn = slice(None, None, -1 if order == "BGR" else 1)
    found = augmentation.get_transform(image[..., turn]).apply_image(image[..., turn])
    np.testing.assert_allclose(found[..., turn], origin + factor * (image - origin))


def test_colours_leave_objects_and_the_other_random_numbers_of_a_mapper_alone(config):
    cfg, colours = config("lr"), config("lr", *COLOUR)
    augmentations = [*(f(0.6, 1.4) for f in (T.RandomBrightness, T.RandomContrast))]
    augmentations += [T.RandomSaturation(0.6, 1.4), *build_augmentation(cfg, True)]
    mappers = [DatasetMapper(cfg, True, augmentations=augmentations), build_mapper(colours, True)]
    for seed, entry in enumerate(DatasetCatalog.get("tiny_train")):
        found = []
        for mapper in mappers:
            seed_all(seed)
            found.append(mapper(entry))
        assert same(*found)


def test_both_resolutions_have_the_same_colours(student_config):
    plain, coloured = (samples(student_config(*x), 6) for x in ([], COLOUR))
    changes = []
    for one, other in zip(plain, coloured):  # the flip comes after the colours' draws
        means = [
            [x[key].float().mean((1, 2)) for key in ("image", "image_hr")] for x in (one, other)
        ]
        torch.testing.assert_close(*means[1], atol=1.5, rtol=0)
        changes.append((means[0][0] - means[1][0]).abs().max())
    assert max(changes) > 20


def test_colours_need_colours(config):
    with pytest.raises(InputError, match="INPUT.COLOR needs .* INPUT.FORMAT is 'L'; set"):
        build_mapper(config("lr", *COLOUR, "INPUT.FORMAT", "L"), True)


# ---- Mixup ----


def sample(image, boxes=(), masks=None, **images):
    """A mapped sample: the image is (H, W) numbers, and masks are polygons or not."""
    image = torch.tensor(image, dtype=torch.uint8)[None]
    truth = Instances(tuple(image.shape[1:]))
    truth.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    truth.gt_classes = torch.arange(len(boxes))
    if boxes and masks == "polygon":
        truth.gt_masks = PolygonMasks([[np.array([0.0, 0, 1, 0, 1, 1])] for _ in boxes])
    elif boxes and masks == "bitmask":
        truth.gt_masks = BitMasks(torch.ones(len(boxes), *image.shape[1:], dtype=torch.bool))
    if boxes:
        truth.gt_keypoints = Keypoints(torch.full((len(boxes), 2, 3), 1.0))
    return {"image": image, "instances": truth, "file_name": f"{len(boxes)}.png", **images}


@pytest.mark.parametrize("masks", ["polygon", "bitmask"])
def test_a_pair_of_2_by_2_pixels(masks):
    one = sample([[101, 200]], [[0, 0, 2, 1]], masks)
    other = sample([[0], [40]], [[0, 0, 1, 1], [0, 1, 1, 2]], masks)
    mixed = mix(one, other, 0.75, [80.0])
    assert mixed["image"].tolist() == [[[76, 170], [70, 80]]] and mixed["file_name"] == "1.png"
    truth = mixed["instances"]
    assert mixed["image"].dtype == torch.uint8 and truth.image_size == (2, 2)
    assert truth.gt_boxes.tensor.tolist() == [[0, 0, 2, 1], [0, 0, 1, 1], [0, 1, 1, 2]]
    assert truth.gt_classes.tolist() == [0, 0, 1] and len(truth.gt_keypoints) == 3
    if masks == "polygon":
        assert len(truth.gt_masks) == 3
    else:
        pixels = [[[1, 1], [0, 0]], [[1, 0], [1, 0]], [[1, 0], [1, 0]]]
        assert truth.gt_masks.tensor.int().tolist() == pixels
    # The other way round: the same picture, and the same objects in the other order.
    assert torch.equal(mix(other, one, 0.25, [80.0])["image"], mixed["image"])
    floats = [{**x, "image": x["image"].float()} for x in (one, other)]
    assert mix(*floats, 0.3, [80.0])["image"].tolist() == [[pytest.approx([30.3, 116]), [52, 80]]]


def test_an_image_without_objects_takes_those_of_the_other():
    some, none = sample([[9, 9]], [[0, 0, 1, 1]], "bitmask"), sample([[9], [9], [9]])
    for pair in ((some, none), (none, some)):
        truth = mix(*pair, 0.5, [9])["instances"]  # PIXEL_MEAN may be whole numbers
        assert truth.gt_masks.tensor.int().tolist() == [[[1, 1], [0, 0], [0, 0]]]
    assert len(mix(none, none, 0.5, [9.0])["instances"]) == 0


@pytest.mark.parametrize("key", ["image_hr", "image_lr"])
def test_plain_pictures_have_the_same_colours_at_both_resolutions(key):
    pair = []
    for value, height, width in ((30, 5, 7), (91, 6, 4)):
        (low, high) = (torch.full((3, k * height, k * width), value).byte() for k in (1, 2))
        image, second = (low, high) if key == "image_hr" else (high, low)
        pair.append({"image": image, key: second})
    mixed = mix(*pair, 0.3, [10.0, 20.0, 30.0])
    low, high = sorted((mixed["image"], mixed[key]), key=torch.numel)
    assert low.shape == (3, 6, 7)
    assert torch.equal(high, low.repeat_interleave(2, 1).repeat_interleave(2, 2))


@pytest.mark.parametrize("size", [0, 40])
def test_teacher_and_student_see_the_same_two_pictures(student_config, config, size):
    scales = ["INPUT.MIN_SIZE_TRAIN", (32, 40)], ["INPUT.MIN_SIZE_TRAIN", (64, 80)]
    low = student_config(*STRONG, size, *scales[0])
    high = config("teacher", *STRONG, 2 * size, *scales[1])
    shapes = set()
    for one, other in zip(*(samples(cfg, 5) for cfg in (low, high)), strict=True):
        assert torch.equal(one["image"], other["image_lr"])
        assert torch.equal(one["image_hr"], other["image"])
        height, width = one["image"].shape[1:]
        assert one["image_hr"].shape == (3, 2 * height, 2 * width)
        assert one["instances"].image_size == (height, width)
        small, large = (x["instances"].gt_boxes.tensor for x in (one, other))
        torch.testing.assert_close(2 * small, large, atol=1e-3, rtol=0)
        shapes.add((height, width))
    assert len(shapes) == (1 if size else 2)


@pytest.mark.parametrize("masks", ["polygon", "bitmask"])
def test_a_mixed_sample_holds_a_sample_and_another(config, masks):
    options = ["INPUT.MASK_FORMAT", masks]
    plain = samples(config("lr", *options), 6)
    rare = samples(config("lr", *options, "INPUT.MIXUP.PROB", 1e-12), 6)
    mixed = samples(config("lr", *options, *MIXUP), 6)
    assert all(map(same, plain, rare))  # the draws of mixup are no other's
    for one, both in zip(plain, mixed, strict=True):
        assert not torch.equal(one["image"], both["image"])
        count = len(one["instances"])
        assert 0 < count < len(both["instances"])
        assert same_instances(one["instances"], both["instances"][:count])
    some = samples(config("lr", "INPUT.MIXUP.PROB", 0.5), 20)
    assert 10 < sum(not same(x, y) for x, y in zip(samples(config("lr"), 20), some)) < 30


def test_a_mixed_sample_is_a_function_of_its_seed(student_config):
    options = [*STRONG, 40]
    whole = samples(student_config(*options), 6)
    assert all(map(same, whole, samples(student_config(*options), 6)))
    workers = student_config(*options, "DATALOADER.NUM_WORKERS", 2)
    assert all(map(same, whole[4:], samples(workers, 4, start=2)))
    assert not any(map(same, whole, samples(student_config(*options, "SEED", 4), 6)))


def test_partners_are_images_that_the_run_may_see(config, monkeypatch):
    """Partners are of the sampler's subset, and of the same orientation as all of a batch."""
    size = {"height": 40, "annotations": [0]}
    dicts = [{"file_name": str(i), "width": 50 if i % 2 else 30, **size} for i in range(12)]
    monkeypatch.setitem(DatasetCatalog.data, "numbers", lambda: dicts)
    subset = ["DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"]
    subset += ["DATALOADER.RANDOM_SUBSET_RATIO", 0.5, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False]
    cfg = config("lr", "DATASETS.TRAIN", ("numbers",), "MODEL.MASK_ON", False, *MIXUP, *subset)
    seen = []

    def mapper(entry):
        seen.append(int(entry["file_name"]))
        return {"image": torch.zeros(3, 1, 1)}

    list(itertools.islice(build_train_loader(cfg, mapper), 30))
    pairs = set(zip(seen[::2], seen[1::2]))
    assert len({one for one, _ in pairs}) == 6 and {x for _, x in pairs} <= {x for x, _ in pairs}
    assert all(one % 2 == other % 2 for one, other in pairs) and len(pairs) > 6


@pytest.mark.parametrize("detector", ["mask_rcnn", "fcos"], indirect=True)
def test_student_and_teacher_train_with_all_of_it(student_config, config, detector):
    keys = ["SOLVER.MAX_ITER", 2, *NO_TEST, *STRONG]
    assert train(student_config(*keys, 48)).iter == train(config("teacher", *keys, 96)).iter == 2


def test_what_cannot_be_mixed(config):
    cfg = config("lr", *MIXUP, "INPUT.MIN_SIZE_TRAIN", (0,))
    with pytest.raises(InputError, match="INPUT.MIXUP.PROB is 1.0, but no image is resized"):
        samples(cfg, 1)
    maps = {**sample([[1]]), "sem_seg": torch.zeros(1, 1)}
    with pytest.raises(InputError, match="INPUT.MIXUP cannot mix segmentation maps"):
        mix(maps, maps, 0.5, [0.0])
