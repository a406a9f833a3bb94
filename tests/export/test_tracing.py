"""Traced detectors find what the detectors themselves find, in images of any size."""

import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers import paste_masks_in_image
from timm_networks import MOBILE
from torchvision.ops import batched_nms

from msad_kd import InputError
from msad_kd.export.parity import differences
from msad_kd.export.tracing import ExportableDetector, resize, traceable

DETECTORS = ["mask_rcnn", "retinanet", "fcos"]
ON_TIMM = f"faster_rcnn on {MOBILE}"
MORE = [*DETECTORS, ON_TIMM, "faster_rcnn", "mask_rcnn on tf_efficientnet_lite0"]
SIZES = [(32, 48), (75, 33), (150, 201)]  # the first is that of the traced image


def noise(height, width):
    return (np.random.default_rng(0).random((3, height, width)) * 255).astype(np.float32)


def check(model, run, image, size=None, atol=5e-3):
    """Compare a traced model with what the model itself returns, and return how much it found."""
    height, width = size or image.shape[1:]
    with torch.no_grad():
        found = model([{"image": image, "height": height, "width": width}])[0]["instances"]
    boxes, scores, classes, *masks = run(image)
    expected = found.pred_boxes.tensor, found.scores, found.pred_classes
    pair = [[x.numpy() for x in outputs] for outputs in (expected, (boxes, scores, classes))]
    largest = differences(*pair, threshold=-1, most=-1)  # in any order, where scores are equal
    assert largest["boxes"] <= atol and largest["scores"] <= atol / 50
    assert len(masks) == found.has("pred_masks")
    if masks:
        assert masks[0].shape == (len(scores), 28, 28)
        pasted = paste_masks_in_image(masks[0], boxes, (height, width))
        assert (pasted != found.pred_masks).sum() <= pasted.numel() / 1000  # 0.5 is a border
    return len(scores)


@pytest.mark.parametrize("detector", [*DETECTORS, pytest.param(ON_TIMM, marks=pytest.mark.long)])
def test_parity(exported, detector):
    model, onnx, traced = exported(detector)
    for size in SIZES:  # more candidates than TOPK_CANDIDATES_TEST only in the last
        image = torch.as_tensor(noise(*size))
        assert check(model, onnx, image) > 2
        check(model, traced, image, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("height", [17, 64, 150])
@pytest.mark.parametrize("width", [19, 64, 203])
@pytest.mark.parametrize("detector", MORE)
def test_parity_at_more_sizes(exported, detector, height, width):
    model, onnx, traced = exported(detector)
    image = torch.as_tensor(noise(height, width))
    check(model, onnx, image)
    check(model, traced, image, atol=0)


def test_a_cascade(exported):
    keys = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"]
    keys += ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]
    model, onnx, traced = exported("faster_rcnn", *keys)
    image = torch.as_tensor(noise(40, 56))
    assert check(model, onnx, image) > 2
    check(model, traced, image, atol=0)


def test_nothing_found(exported):
    model, onnx, traced = exported("mask_rcnn", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.999)
    for run in (onnx, traced):
        assert check(model, run, torch.as_tensor(noise(40, 40))) == 0


def test_torchscript_takes_bytes_and_a_batch_of_one(exported):
    _, _, traced = exported("mask_rcnn")
    image = torch.as_tensor(noise(30, 40)).to(torch.uint8)
    expected = traced(image.float())
    for other in (image, image[None]):
        assert all(map(torch.equal, traced(other), expected))


@pytest.mark.parametrize("channels", [3, 1])
def test_resizing_inside(build, channels):
    """Boxes are in the image as it is, whose pixels Detectron2 would resize itself."""
    pixel = "MODEL.PIXEL_MEAN", [120.0] * channels, "MODEL.PIXEL_STD", [64.0] * channels
    _, model = build("fcos", *pixel, "MODEL.FCOS.TOPK_CANDIDATES_TEST", 10)
    image = noise(61, 90)[:channels]
    transform = ResizeShortestEdge(32, 40).get_transform(image.transpose(1, 2, 0))
    pixels = image.astype(np.uint8)
    small = transform.apply_image(pixels.transpose(1, 2, 0)).transpose(2, 0, 1).copy()
    with torch.no_grad():
        outputs = ExportableDetector(model, (32, 40))(torch.as_tensor(pixels))
    found = check(model, lambda _: outputs, torch.as_tensor(small), (61, 90), atol=0.05)
    assert found > 2


@pytest.mark.parametrize("size", [(61, 90), (90, 61), (20, 31), (32, 32), (32, 300), (7, 95)])
def test_the_resize_is_that_of_pillow(size):
    image = noise(*size).astype(np.uint8).transpose(1, 2, 0)
    transform = ResizeShortestEdge(32, 80).get_transform(image)
    expected = transform.apply_image(image).transpose(2, 0, 1).astype(int)
    found = resize(torch.as_tensor(image.transpose(2, 0, 1).copy()).float(), 32, 80)
    assert found.shape == expected.shape
    off = np.abs(found.numpy() - expected)
    assert off.max() <= 1 and off.mean() < 0.05  # Pillow rounds its coefficients


class Suppression(torch.nn.Module):
    def forward(self, boxes, scores, classes):
        return batched_nms(boxes, scores, classes, 0.7)


def test_suppression_is_that_of_the_program_for_any_number_of_boxes():
    """torchvision has two ways, and its traces only know the one that rounds the boxes."""

    def data(count):
        torch.manual_seed(count)
        corner = 1200 + 60 * torch.rand(count, 2)
        boxes = torch.cat([corner, corner + 35 + 20 * torch.rand(count, 2)], dim=1)
        scores = torch.linspace(0, 1, count)[torch.randperm(count)]  # all different
        return boxes, scores, torch.randint(80, (count,))

    with traceable():
        traced = torch.jit.trace(Suppression(), data(50), check_trace=False)
    for count in (0, 1, 50, 1000, 1001, 20000):
        assert torch.equal(traced(*data(count)), Suppression()(*data(count)))
    assert not torch.equal(
        torch.jit.trace(Suppression(), data(50), check_trace=False)(*data(20000)),
        Suppression()(*data(20000)),
    )


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["MODEL.KEYPOINT_ON", True], "MODEL.KEYPOINT_ON"),
        (["MODEL.META_ARCHITECTURE", "SemanticSegmentor"], "META_ARCHITECTURE: a SemanticSegm"),
    ],
)
def test_what_cannot_be_traced(build, opts, words):
    _, model = build("mask_rcnn", *opts)
    with pytest.raises(InputError, match=words):
        ExportableDetector(model)
