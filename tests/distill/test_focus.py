"""Where a loss between maps looks: weights of cells by boxes and by the teacher's scores."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from helpers import build_student, losses_of
from torch.testing import assert_close

from msad_kd.distill.dense_distiller import Head
from msad_kd.distill.focus import box_focus, cell_weights, score_focus
from msad_kd.distill.student import check_losses
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.losses import DISTILL_LOSS_REGISTRY, read_losses
from msad_kd.losses.feature import generator
from msad_kd.utils.errors import InputError

FOCUSED = ("l1", "mse", "ssim", "pkd", "cwd", "mgd")
L1 = {"name": "l1", "weight": 1.0}


def box_cells(*boxes, stride=4, side=4):
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return box_focus([corners], stride, torch.zeros(1, 3, side, side))[0, 0]


def test_boxes_worked_out():
    # 2 x 1 cells whose centres lie in the box: 1 / 2 each.
    found = box_cells([3.0, 5.0, 13.0, 7.0])
    expected = torch.zeros(4, 4)
    expected[1, 1:3] = 1 / 2
    assert torch.equal(found, expected)
    # The smaller of two boxes wins; one that holds no centre takes the cell of its own.
    found = box_cells([0.0, 0.0, 16.0, 16.0], [8.2, 0.2, 8.9, 0.8])
    expected = torch.full((4, 4), 1 / 16)
    expected[0, 2] = 1.0
    assert torch.equal(found, expected)
    assert not box_cells().any()
    assert not box_cells([-9.0, -9.0, -5.0, -5.0]).any()  # outside, where padding moved it


def test_weights_have_mean_one_and_no_focus_is_background_alone():
    focus = torch.tensor([[[[0.0, 3.0], [1.0, 0.0]]], [[[2.0] * 2] * 2], [[[0.0] * 2] * 2]])
    found = cell_weights(focus, background=0.5)
    expected = torch.tensor([[0.5, 3.5], [1.5, 0.5]]) / 1.5
    assert_close(found[0, 0], expected)
    assert_close(found[1, 0], torch.ones(2, 2))
    assert_close(found[2, 0], torch.full((2, 2), 1 / 3))
    assert found[:2].mean().item() == pytest.approx(1.0)
    assert_close(cell_weights(focus, 0.0)[0, 0], torch.tensor([[0.0, 3.0], [1.0, 0.0]]))


@pytest.mark.parametrize("name", FOCUSED)
def test_a_constant_focus_changes_nothing_and_another_does(name):
    torch.manual_seed(0)
    loss, parts = DISTILL_LOSS_REGISTRY.get(name), [generator(3)] if name == "mgd" else []
    student, teacher = torch.rand(2, 3, 16, 20, requires_grad=True), torch.rand(2, 3, 16, 20)

    def value(weights, **arguments):
        torch.manual_seed(1)  # MGD's mask
        return loss(student, teacher, *parts, weights=weights, **arguments)

    plain = value(None)
    assert_close(value(torch.ones(2, 1, 16, 20)), plain)
    half = torch.ones(2, 1, 16, 20)
    half[..., 10:], half[..., :10] = 0.0, 2.0
    assert not torch.isclose(value(half), plain)
    if name in ("l1", "mse", "mgd"):  # no cell's loss depends on another cell's values there
        (gradient,) = torch.autograd.grad(value(half), student)
        reach = 2 if name == "mgd" else 0
        assert not gradient[..., 10 + reach :].any() and gradient[..., :10].any()
    if name == "ssim":
        ones, cropped = torch.ones(2, 1, 16, 20), torch.zeros(2, 1, 16, 20)
        assert_close(value(ones, padding="valid"), value(None, padding="valid"))
        cropped[..., 5:11, 5:15] = 1.0  # the centres of all windows that lie inside
        assert_close(value(cropped, padding="valid"), value(None, padding="valid"))


@pytest.mark.parametrize("name", [x for x in FOCUSED if x != "mgd"])
def test_a_student_that_equals_its_teacher_learns_nothing_wherever_one_looks(name):
    torch.manual_seed(0)
    loss = DISTILL_LOSS_REGISTRY.get(name)
    other, teacher = torch.rand(2, 2, 3, 16, 20)
    student, weights = teacher.clone().requires_grad_(), torch.rand(2, 1, 16, 20)
    value = loss(student, teacher, weights=weights)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.abs() < 1e-6 and gradient.abs().max() < 1e-7
    assert loss(other, teacher, weights=weights) > 1e-3


def test_scores_are_the_best_of_a_cell(student_config, batch):
    cfg = student_config()
    model = build_student(cfg)
    inputs = batch(cfg, "lr")
    padded = tuple(model.preprocess_image(inputs).tensor.shape[-2:])
    pyramid = model.teacher.pyramid(inputs, padded)
    head = Head.of(model.teacher.model)
    scores = score_focus(head, pyramid)
    logits, _ = model.teacher.model.proposal_generator.rpn_head([pyramid["p4"]])
    assert_close(scores["p4"], logits[0].amax(dim=1, keepdim=True).sigmoid())
    assert scores.keys() == set(head.levels)


@pytest.mark.parametrize("detector", ["mask_rcnn", "fcos", "retinanet"], indirect=True)
@pytest.mark.parametrize("focus", ["boxes", "scores"])
def test_a_student_looks_where_it_is_told(student_config, batch, detector, focus):
    """The value of a level, worked out from the maps; an image without objects costs less."""
    term = {**L1, "levels": ["p2"], "focus": focus, "background": 0.25}
    cfg = student_config("KD.LOSSES", [term])
    model = build_student(cfg).train()
    inputs = batch(cfg, "lr")
    torch.manual_seed(1)
    with EventStorage(4):
        found = model(inputs)["loss_kd_l1"]
    images = model.preprocess_image(inputs).tensor
    theirs = model.teacher.pyramid(inputs, tuple(images.shape[-2:]))
    mine = model.backbone(images)["p2"]
    if focus == "boxes":
        boxes = [x["instances"].gt_boxes.tensor for x in inputs]
        expected = box_focus(boxes, 4, mine)
        assert expected.any()
    else:
        expected = score_focus(Head.of(model.teacher.model), theirs)["p3"]
    weights = cell_weights(expected, 0.25)
    assert_close(found, (weights * (mine - theirs["p3"]).abs()).mean())
    for sample in inputs:
        sample["instances"] = sample["instances"][:0]
    value = losses_of(model, inputs)["loss_kd_l1"]
    assert value < found if focus == "boxes" else torch.isclose(value, found)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "roi_class", "focus": "boxes"}, "'roi_class' has no field 'focus'"),
        ({"weights": 1}, "'l1' has no field 'weights'"),
    ],
)
def test_fields_that_are_refused(fields, words):
    with pytest.raises(InputError, match=words):
        read_losses([{**L1, **fields}])


def test_a_loss_of_ones_own_without_weights_has_no_focus():
    @DISTILL_LOSS_REGISTRY.register()
    def plain(student, teacher):
        return (student - teacher).abs().mean()

    try:
        with pytest.raises(InputError, match="'plain' has no field 'focus'"):
            read_losses([{"name": "plain", "weight": 1.0, "focus": "boxes"}])
    finally:
        del DISTILL_LOSS_REGISTRY._obj_map["plain"]


COARSE = ["MODEL.RPN.IN_FEATURES", ["p4", "p5", "p6", "p7"]]
COARSE += ["MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128]]]


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (COARSE, "needs scores on level p3 of the teacher, whose head"),
        (["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"], "needs a teacher with an RPN"),
    ],
)
def test_levels_without_scores_are_refused(student_config, opts, words):
    term = {**L1, "levels": ["p2"], "focus": "scores"}
    cfg = student_config("KD.LOSSES", [term], "KD.TEACHER.OPTS", opts)
    with pytest.raises(InputError, match=words):
        check_losses(cfg, TeacherSpec.from_config(cfg))
