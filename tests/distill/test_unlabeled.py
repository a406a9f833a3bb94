"""Images without labels in a student's batch, and detections as their labels."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detectors import DENSE, DETECTORS
from detectron2.structures import Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from helpers import (
    NO_TEST,
    build,
    build_student,
    coco_format,
    cut_off,
    differing,
    tensors_of,
    train,
)

from msad_kd.data.unlabeled import IGNORED
from msad_kd.distill.teacher import Teacher
from msad_kd.distill.unlabeled import UnlabeledImages, kept_apart
from msad_kd.modeling.loss_normalizer import get_normalizer, set_normalizer
from msad_kd.utils.errors import InputError

COUNT = ["SOLVER.UNLABELED_PER_BATCH", 3]
PSEUDO = ["KD.UNLABELED.PSEUDO_LABELS", True]
# (SCORE, IGNORE_SCORE) with which the tiny teachers, who are sure of nothing, have some of each.
SCORES = {"retinanet": (0.0103, 0.01), "fcos": (0.0801, 0.07)}
every_detector = pytest.mark.parametrize("detector", DETECTORS, indirect=True)


def labels_of(detector):
    """Options for pseudo-labels, some of them ignored."""
    high, low = SCORES.get(detector, (0.113, 0.1))
    return [*PSEUDO, "KD.UNLABELED.SCORE", [high], "KD.UNLABELED.IGNORE_SCORE", low]


def unlabeled(inputs):
    """The same images without labels."""
    return [{k: v for k, v in x.items() if k != "instances"} | {"unlabeled": True} for x in inputs]


def step(student, inputs, normalizer=None):
    torch.manual_seed(1)  # RoI heads sample proposals
    set_normalizer(student, normalizer)
    with EventStorage(19) as storage:  # which logs the diagnostics
        return student.train()(inputs), storage.latest()


def test_heads_that_no_loss_reads_are_idle_on_images_without_labels(student_config, batch):
    cfg = student_config()
    student, calls = build_student(cfg), []
    student.roi_heads.register_forward_hook(lambda *_: calls.append(1))
    images = batch(cfg, "lr")
    losses, _ = step(student, images + unlabeled(images))
    assert len(calls) == 1 and losses["loss_kd_l1_unlabeled"].item() > 0


@pytest.mark.parametrize("detector", DENSE, indirect=True)
def test_losses_do_not_depend_on_how_many_images_are_labelled(student_config, batch):
    """Dense detectors divide by a moving average of the objects in a batch."""
    student = build_student(student_config("KD.LOSSES", []))
    student.unlabeled = UnlabeledImages(pseudo_labels=True)
    (image, _) = batch(student_config(), "lr")
    for count in (1, 3):
        inputs = [image] + count * [{**image, "unlabeled": True}]
        for _ in range(80):  # until the average has settled
            losses, _ = step(student, inputs, normalizer=get_normalizer(student))
        for name in [name for name in losses if not name.endswith("_unlabeled")]:
            assert losses[f"{name}_unlabeled"].item() == pytest.approx(
                losses[name].item(), rel=0.01
            )


@every_detector
def test_what_is_labelled_gives_the_same_and_the_rest_has_losses_of_its_own(
    detector, student_config, batch
):
    losses = [{"name": "l1", "weight": 0.6, "focus": "boxes"}]
    student = build_student(student_config("KD.LOSSES", losses, *labels_of(detector)))
    first, *others = batch(student_config(), "lr", count=3)
    settings, mixed = student.unlabeled, [first, *unlabeled(others)]
    expected, logged = step(student, [first])
    normalizer = get_normalizer(student)
    found, also_logged = step(student, mixed)
    assert differing(expected, {key: found[key] for key in expected}) == []
    assert set(found) == {f"{key}{end}" for key in expected for end in ("", "_unlabeled")}
    assert also_logged.items() >= logged.items() and "kd/l1_p2" in logged
    assert {f"unlabeled/{key}" for key in logged} <= set(also_logged)
    assert get_normalizer(student) == normalizer
    student.unlabeled = replace(settings, weight=0.5)
    half, _ = step(student, mixed)
    for key in expected:
        torch.testing.assert_close(half[f"{key}_unlabeled"], 0.5 * found[f"{key}_unlabeled"])
    student.unlabeled = replace(settings, pseudo_labels=False)
    found, _ = step(student, mixed)
    assert set(found) == {*expected, "loss_kd_l1_unlabeled"}
    found["loss_kd_l1_unlabeled"].backward()
    assert student.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0


def test_pictures_are_of_what_is_labelled(student_config, batch):
    student = build_student(student_config("VIS_PERIOD", 1, *labels_of("mask_rcnn")))
    first, *others = batch(student_config(), "lr", count=3)
    with EventStorage(1) as storage:
        student.train()([first, *unlabeled(others)])
    names = [name for name, *_ in storage._vis_data]
    assert len(names) == len(set(names)) > 1 and student.vis_period == 1


def test_an_error_leaves_the_loss_normalizer_as_it_was():
    model = torch.nn.Module()
    set_normalizer(model, 7.0)
    with pytest.raises(MemoryError), EventStorage(0), kept_apart(model, [], share=3.0):
        assert get_normalizer(model) == 21.0
        raise MemoryError
    assert get_normalizer(model) == 7.0


def test_a_loss_that_is_not_finite_is_named_for_both(student_config, batch):
    student = build_student(student_config())
    bad = {"l1_p2": torch.tensor(float("nan")), "l1_p3": torch.tensor(1.0)}
    student.distiller._values = bad
    with EventStorage(0), kept_apart(student, [student.distiller, student.roi_distiller], 1):
        assert student.not_finite() == []
        student.distiller._values = bad
    assert student.not_finite() == ["l1_p2", "l1_p2_unlabeled"]


@pytest.fixture
def run(student_config, data, detector):
    """run(KEY, VALUE, ...): a run of four steps with the validation images as unlabelled ones."""

    def call(*options, resume=False):
        entries = [*coco_format(data, "tiny"), {"name": "bare", "images": str(data / "val")}]
        keys = ["DATASETS.COCO_FORMAT", entries, *NO_TEST, *labels_of(detector)]
        if "SOLVER.UNLABELED_PER_BATCH" in options:
            keys += ["DATASETS.UNLABELED", ["bare"]]
        torch.manual_seed(0)
        trainer = train(student_config(*keys, *options), resume=resume)
        lines = (Path(trainer.cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
        logged = [json.loads(line).items() for line in lines]
        return trainer, [{k: v for k, v in x if "time" not in k} for x in logged]

    return call


def test_with_weight_0_nothing_changes(run):
    (plain, metrics), (other, logged), (with_them, _) = (
        run(*options) for options in ([], [*COUNT, "KD.UNLABELED.WEIGHT", 0.0], COUNT)
    )
    assert differing(tensors_of(plain.model), tensors_of(other.model)) == []
    assert get_normalizer(plain.model) == get_normalizer(other.model)
    assert metrics == logged
    changed = differing(tensors_of(plain.model), tensors_of(with_them.model))
    assert "backbone.bottom_up.stem.conv1.norm.running_mean" in changed


def test_precise_statistics_are_of_what_is_labelled(run):
    keys = ["TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2]
    trainer, _ = run(*COUNT, *keys, "SOLVER.MAX_ITER", 1, "KD.GRADIENT_RATIO_PERIOD", 1)
    assert trainer.iter == 1


@pytest.mark.parametrize("detector", ["retinanet"], indirect=True)
def test_a_resumed_run_is_an_uninterrupted_one(run, tmp_path):
    whole, metrics = run(*COUNT)
    assert metrics[-1]["loss_kd_l1_unlabeled"] > 0
    folder = cut_off(whole.cfg.OUTPUT_DIR, tmp_path / "cut")
    again, _ = run(*COUNT, "OUTPUT_DIR", folder, resume=True)
    assert again.start_iter == 2
    assert differing(tensors_of(whole.model), tensors_of(again.model)) == []
    assert get_normalizer(whole.model) == get_normalizer(again.model)


# ---- Labels ----


def detections(size, scores):
    found = Instances(size, scores=torch.tensor(scores), pred_classes=torch.arange(len(scores)))
    found.pred_boxes = Boxes(torch.tensor([[i, 0.0, i + 4.0, 4.0] for i in range(len(scores))]))
    found.pred_masks = torch.ones(len(scores), *size, dtype=torch.bool)
    found.pred_keypoints = torch.tensor([[[1.5, 2.5, 0.3]]]).repeat(len(scores), 1, 1)
    return found


def test_detections_become_labels_by_their_scores():
    found = detections((8, 8), [0.9, 0.6, 0.59, 0.31, 0.29])
    found.pred_masks[0] = False
    labels = UnlabeledImages(scores=(0.6,), ignore_score=0.3).select(found, False, True)
    assert labels.gt_classes.tolist() == [0, 1, IGNORED, IGNORED]
    assert labels.gt_boxes.tensor.tolist() == found.pred_boxes.tensor[:4].tolist()
    assert labels.gt_keypoints.tensor[0].tolist() == [[1.5, 2.5, 2.0]]
    assert not labels.has("gt_masks")
    one_each = UnlabeledImages(scores=(0.95, 0.7, 0.5, 0.3, 0.2), ignore_score=0.2)
    labels = one_each.select(found, True, False)  # the first has no pixel
    assert labels.gt_classes.tolist() == [IGNORED, 2, 3, 4] and len(labels.gt_masks) == 4


@every_detector
@pytest.mark.parametrize("branch", ["fused", "hr"])
def test_the_teacher_detects_in_the_step_what_it_detects_by_itself(
    detector, branch, student_config, config, batch
):
    student = build_student(student_config("KD.TEACHER.BRANCH", branch, *labels_of(detector)))
    teacher, cfg = student.teacher, config("teacher", "INPUT.RANDOM_FLIP", "none")
    inputs = batch(student_config("INPUT.RANDOM_FLIP", "none"), "lr")
    padded = tuple(student.preprocess_image(inputs).tensor.shape[-2:])
    found = teacher.detect(inputs, teacher.pyramid(inputs, padded))
    frames = [{**x, "height": 32, "width": 48} for x in batch(cfg, "hr")]
    with torch.no_grad():
        expected = [x["instances"] for x in teacher.model(frames)]
    for one, other in zip(found, expected, strict=True):
        assert one.image_size == other.image_size == (32, 48) and len(one) == len(other) > 0
        torch.testing.assert_close(one.scores, other.scores)
        # Scores of an untrained teacher may be equal but for rounding, so these need not be in the
        # same order: what belongs together is put in the order of boxes and classes.
        pairs = [
            torch.column_stack([x.pred_boxes.tensor, x.pred_classes, x.scores])
            for x in (one, other)
        ]
        weights = torch.tensor([1.0, 3.1, 7.7, 13.3, 1000.0, 0.0])
        torch.testing.assert_close(*(x[(x @ weights).argsort()] for x in pairs))
        assert one.has("pred_masks") == (detector == "mask_rcnn")


@every_detector
def test_what_is_no_label_is_not_detected(detector, student_config, batch):
    student = build_student(student_config(*labels_of(detector)))
    inputs = batch(student_config(), "lr", count=2)
    padded = tuple(student.preprocess_image(inputs).tensor.shape[-2:])
    pyramid = student.teacher.pyramid(inputs, padded)
    every = student.teacher.detect(inputs, pyramid)
    middle = torch.cat([x.scores for x in every]).median().item()
    for above in (middle, middle - 1e-6):
        few = student.teacher.detect(inputs, pyramid, above)
        for one, others in zip(few, every, strict=True):
            kept = others[others.scores > above]
            assert torch.equal(one.scores, kept.scores)
            assert torch.equal(one.pred_classes, kept.pred_classes)
            assert torch.equal(one.pred_boxes.tensor, kept.pred_boxes.tensor)
            if detector == "mask_rcnn":
                assert torch.equal(one.pred_masks, kept.pred_masks)
    assert sum(map(len, few)) < sum(map(len, every))
    again = student.teacher.detect(inputs, pyramid)
    assert [len(x) for x in again] == [len(x) for x in every]
    with torch.autocast("cpu", torch.bfloat16):  # as a student with SOLVER.AMP calls it
        precise = student.teacher.detect(inputs, pyramid)
    for one, other in zip(precise, every, strict=True):
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
        assert torch.equal(one.scores, other.scores)


def test_keypoints_of_a_plain_teacher_without_distillation(student_config, config, batch):
    points = ["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 2]
    points += ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,), "KD.LOSSES", []]
    student = build(student_config(*points, *labels_of("mask_rcnn")))
    student.set_teacher(Teacher(build(config("hr", *points)), branch="hr", scale=2))
    student.unlabeled = replace(student.unlabeled, scores=(0.05,), ignore_score=0.0)
    first, *others = batch(student_config(), "lr", count=3)
    labels = first["instances"]
    labels.gt_keypoints = Keypoints(torch.full((len(labels), 2, 3), 2.0))
    found, _ = step(student, [first, *unlabeled(others)])
    assert found["loss_keypoint_unlabeled"] > 0 and not any("kd" in name for name in found)
    points[3] = 3
    with pytest.raises(InputError, match="NUM_KEYPOINTS is 3 in the teacher and 2 in the student"):
        student.set_teacher(Teacher(build(config("hr", *points)), branch="hr", scale=2))


@pytest.mark.parametrize(
    ("role", "keys", "words"),
    [
        ("faster_rcnn", [], "MODEL.MASK_ON too, but the teacher predicts no masks"),
        ("mask_rcnn", ["MODEL.KEYPOINT_ON", True], "KEYPOINT_ON too, .* predicts no keypoints"),
        ("mask_rcnn", ["MODEL.ROI_HEADS.NUM_CLASSES", 5], "the teacher has 8 classes and .* 5"),
        ("mask_rcnn", ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"], "Cascade.* ignore no boxes"),
    ],
)
def test_teachers_whose_detections_are_no_labels(config, files_of, role, keys, words):
    settings, cascade = UnlabeledImages(pseudo_labels=True), "CascadeROIHeads" in keys
    agnostic = ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True] if cascade else []
    student = build(config("lr", *keys, *agnostic))
    teacher = build(config("hr", "MODEL.MASK_ON", role == "mask_rcnn"))
    with pytest.raises(InputError, match=f"PSEUDO_LABELS is True.*{words}"):
        settings.connect(student, teacher)
