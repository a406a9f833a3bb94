"""Regions that student and teacher both predict: the same ones, whatever frame the heads are in."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from helpers import WARMUP, build, build_student, losses_of
from torch.testing import assert_close

from msad_kd import attach_teacher
from msad_kd.distill.regions import predict_regions, recording_regions
from msad_kd.distill.roi_distiller import RoIDistiller
from msad_kd.distill.student import check_losses
from msad_kd.distill.teacher import Teacher
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.losses.roi import ROI_LOSS_REGISTRY
from msad_kd.losses.terms import LossTerm
from msad_kd.modeling.capture import recording
from msad_kd.utils.errors import InputError

NAMES = ("roi_class", "roi_box", "roi_mask")
ROI = [{"name": name, "weight": 1.0, "warmup_iters": WARMUP} for name in NAMES]
L1 = {"name": "l1", "weight": 0.6, "warmup_iters": WARMUP}


@pytest.fixture
def recorded(config, batch):
    """A stock model, its pyramid and what it predicts for its regions in a training step."""
    model = build(config("lr")).train()
    with recording(model.backbone) as call, recording_regions(model.roi_heads) as seen:
        torch.manual_seed(0)
        with EventStorage():
            model(batch(config("lr")))
    return model, call.output, seen


def same(one, other):
    pairs = zip(vars(one).values(), vars(other).values())
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


def test_the_same_heads_predict_the_same(recorded):
    model, pyramid, seen = recorded
    assert len(seen.predictions.classes) == sum(map(len, seen.boxes)) > 0
    assert len(seen.predictions.masks) == len(seen.classes) == sum(map(len, seen.masked)) > 0
    found = predict_regions(model.eval().roi_heads, pyramid, seen, 1)
    assert same(found, seen.predictions)


def test_heads_in_the_frame_of_high_resolution_predict_the_same(recorded, config):
    """A multi-resolution teacher's heads count in pixels of an image twice as large."""
    model, pyramid, seen = recorded
    heads = build(config("teacher")).eval().roi_heads
    heads.load_state_dict(model.roi_heads.state_dict())
    renamed = {f"p{int(name[1:]) + 1}": each for name, each in pyramid.items()}
    found = predict_regions(heads, renamed, seen, 2)
    for part in ("classes", "deltas", "masks"):
        assert_close(getattr(found, part), getattr(seen.predictions, part))
    shifted = predict_regions(heads, renamed, seen, 1)
    assert not torch.equal(shifted.classes, found.classes)


def test_a_student_has_the_stock_losses_and_these(student_config, config, batch):
    cfg = student_config("KD.LOSSES", [L1, *ROI])
    inputs = batch(cfg, "lr")
    found, expected = (
        losses_of(build_student(cfg), inputs, WARMUP),
        losses_of(build(config("lr")), inputs),
    )
    assert found.keys() == expected.keys() | {f"loss_kd_{name}" for name in ("l1", *NAMES)}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[f"loss_kd_{name}"] > 0 for name in NAMES)


def test_the_values_are_of_the_teachers_heads_on_its_pyramid(student_config, batch):
    cfg = student_config("KD.LOSSES", ROI, "KD.DIAGNOSTICS_PERIOD", 1)
    model = build_student(cfg)
    inputs = batch(cfg, "lr")
    torch.manual_seed(1)
    with recording_regions(model.roi_heads) as seen, EventStorage(WARMUP // 2) as storage:
        losses = model.train()(inputs)
    padded = model.preprocess_image(inputs).tensor.shape[-2:]
    pyramid = model.teacher.pyramid(inputs, tuple(padded))
    theirs = predict_regions(model.teacher.model.roi_heads, pyramid, seen, 2)
    for name in NAMES:
        value = ROI_LOSS_REGISTRY.get(name)(seen.predictions, theirs)
        assert_close(losses[f"loss_kd_{name}"], value / 2)  # halfway through the warm-up
        assert storage.latest()[f"kd/{name}"][0] == pytest.approx(value.item())


def test_their_gradient_reaches_heads_and_backbone(student_config, batch):
    cfg = student_config("KD.LOSSES", ROI)
    model = build_student(cfg)
    losses = losses_of(model, batch(cfg, "lr"), WARMUP)
    sum(losses[f"loss_kd_{name}"] for name in NAMES).backward()
    for part in (model.roi_heads, model.backbone.bottom_up.stem):
        assert all(p.grad is not None and p.grad.any() for p in part.parameters() if p.dim() > 1)
    assert all(p.grad is None for p in model.proposal_generator.parameters())


@pytest.mark.parametrize(("branch", "scale"), [("hr", 2), ("lr", 1)])
def test_a_plain_teacher_teaches_by_its_heads(config, config_files, batch, branch, scale, tmp_path):
    """Its heads read levels that have no partner among the student's, and are computed."""
    weights = tmp_path / "plain.pth"
    torch.save({"model": build(config(branch)).state_dict()}, weights)
    teacher = ["KD.TEACHER.WEIGHTS", str(weights), "KD.TEACHER.BRANCH", branch]
    teacher += ["KD.TEACHER.CONFIG_FILE", str(config_files[branch])]
    cfg = config("student", *teacher, "KD.LOSSES", [{**L1, "levels": ["p3"]}, *ROI])
    model = build_student(cfg)
    assert model.teacher.image_scale == scale
    assert {"p2", "p3", "p4", "p5"} <= model.teacher.needed
    losses = losses_of(model, batch(cfg, "lr"), WARMUP)
    assert all(losses[f"loss_kd_{name}"] > 0 for name in NAMES)


@pytest.mark.parametrize("detector", ["faster_rcnn"], indirect=True)
def test_without_masks(student_config, batch):
    cfg = student_config("KD.LOSSES", ROI[:2])
    losses = losses_of(build_student(cfg), batch(cfg, "lr"), WARMUP)
    assert losses["loss_kd_roi_class"] > 0 and losses["loss_kd_roi_box"] > 0
    with pytest.raises(InputError, match="'roi_mask' compares masks, and the student's MODEL.MASK"):
        check(student_config("KD.LOSSES", ROI))


def test_masks_that_no_loss_reads_are_not_predicted(student_config, batch):
    inputs, found = batch(student_config(), "lr"), []
    for losses in (ROI[:2], ROI):
        model = build_student(student_config("KD.LOSSES", losses))
        with recording(model.teacher.model.roi_heads.mask_head.predictor) as call:
            found.append(losses_of(model, inputs, WARMUP))
        assert (call.output is not None) == (losses is ROI)
    without, whole = found
    assert whole.keys() - without.keys() == {"loss_kd_roi_mask"}
    assert all(torch.equal(value, whole[name]) for name, value in without.items())


def test_alone_they_need_no_levels(student_config, batch, caplog, monkeypatch):
    """Of this teacher no level has a partner among the student's."""
    cfg = student_config("KD.LOSSES", ROI)
    model = build(cfg)
    monkeypatch.setattr(Teacher, "levels", lambda _: {"p9": ShapeSpec(channels=3, stride=512)})
    attach_teacher(model, cfg)
    assert "are not distilled" not in caplog.text
    losses = losses_of(model, batch(cfg, "lr"), WARMUP)
    assert all(losses[f"loss_kd_{name}"] > 0 for name in NAMES)


def check(cfg):
    check_losses(cfg, TeacherSpec.from_config(cfg))


@pytest.mark.parametrize("detector", ["retinanet"], indirect=True)
def test_a_dense_student_has_no_regions(student_config):
    message = "'roi_class' compares .* StandardROIHeads, and the student, a DistilledRetinaNet, has"
    with pytest.raises(InputError, match=message):
        check(student_config("KD.LOSSES", ROI))


CASCADE = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"]
CASCADE += ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.META_ARCHITECTURE", "MultiResolutionFCOS"], "a MultiResolutionFCOS, has none"),
        (CASCADE, "the teacher, a MultiResolutionRCNN, has CascadeROIHeads"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", 7], "NUM_CLASSES .* 8 in the student and 7 in the teach"),
        (["MODEL.MASK_ON", False], "the teacher's MODEL.MASK_ON is False"),
        (
            ["MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 7],
            r"ROI_MASK_HEAD.POOLER_RESOLUTION .* \(14, 14\) in the student and \(7, 7\) in the",
        ),
        (
            ["MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (20.0, 20.0, 10.0, 10.0)],
            r"BBOX_REG_WEIGHTS .* \(10.0, 10.0, 5.0, 5.0\) in the student and \(20.0, .* teacher",
        ),
    ],
)
def test_teachers_whose_predictions_cannot_be_compared(student_config, opts, message):
    with pytest.raises(InputError, match=message):
        check(student_config("KD.LOSSES", ROI, "KD.TEACHER.OPTS", opts))


def test_heads_without_a_background_cannot_be_compared(student_config, batch):
    student = build_student(student_config())
    student.teacher.model.roi_heads.box_predictor.use_sigmoid_ce = True  # of git main
    with pytest.raises(InputError, match="with a background, and the teacher has none; train it"):
        RoIDistiller([LossTerm("roi_class", 1.0)]).connect(student, student.teacher)


def test_a_value_that_a_loss_refuses_is_told_with_its_name(recorded):
    term = LossTerm("roi_class", 1.0, arguments={"temperature": -1})
    with pytest.raises(InputError, match="KD.LOSSES: 'roi_class': temperature is -1; it should be"):
        RoIDistiller.evaluate(term, *[recorded[2].predictions] * 2)
