"""Regions that the teacher proposes, and losses that compare predictions for them."""

import copy

import pytest
import torch
from detectron2.utils.events import EventStorage
from helpers import WARMUP, build, build_student, differing, losses_of, tensors_of
from torch.testing import assert_close

from msad_kd.distill.regions import recording_regions
from msad_kd.distill.roi_distiller import RoIDistiller
from msad_kd.distill.student import check_losses
from msad_kd.distill.teacher import Teacher
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.losses.terms import read_losses
from msad_kd.modeling.capture import recording
from msad_kd.utils.errors import InputError

NAMES = ("roi_class", "roi_box", "roi_mask")
STUDENT, TEACHER, BOTH = (
    [{"name": name, "weight": 1.0, "proposals": source} for name in NAMES]
    for source in ("student", "teacher", "both")
)
COUNT, POSITIVES = 16, 4  # BATCH_SIZE_PER_IMAGE of the tiny student, and a quarter of it


def find_objects(teacher):
    """Let a teacher take all of its proposals for objects."""
    teacher.model.roi_heads.box_predictor.cls_score.bias.data[-1] -= 50


@pytest.fixture
def student(student_config):
    """student(losses, *opts): a student whose teacher finds objects everywhere."""

    def make(losses, *opts):
        model = build_student(student_config("KD.LOSSES", losses, *opts))
        find_objects(model.teacher)
        return model

    return make


@pytest.fixture
def inputs(student_config, batch):
    return batch(student_config(), "lr")


def sizes_of(inputs):
    return [tuple(x["image"].shape[-2:]) for x in inputs]


def predicted(model, inputs):
    """Returns what ``RoIDistiller.predict`` finds in a training step."""
    torch.manual_seed(1)
    with recording(model.roi_distiller) as call, EventStorage(WARMUP):
        model.train()(inputs)
    return model.roi_distiller.predict(*call.inputs[:-1])


def same_regions(one, other):
    return all(torch.equal(x.tensor, y.tensor) for x, y in zip(one, other, strict=True))


def test_the_regions_are_the_teachers_best_proposals_in_the_students_frame(student, inputs):
    model = student(TEACHER)
    with recording(model.teacher.model.proposal_generator) as call:
        found = predicted(model, inputs)
    assert found.keys() == {"teacher"}
    seen, ours, theirs = found["teacher"]
    for boxes, proposals, (height, width) in zip(seen.boxes, call.output[0], sizes_of(inputs)):
        assert proposals.image_size == (2 * height, 2 * width)
        scores = proposals.objectness_logits
        assert torch.equal(scores, scores.sort(descending=True).values)
        assert len(boxes) == min(COUNT, len(proposals)) and len(proposals) > POSITIVES
        assert_close(2 * boxes.tensor, proposals.proposal_boxes.tensor[:COUNT])
        assert 0 < boxes.tensor[:, 2].max() <= width
    assert len(ours.classes) == len(theirs.classes) == sum(map(len, seen.boxes))
    assert ours.classes.requires_grad and not theirs.classes.requires_grad


def test_a_stock_detector_proposes_what_it_proposes_in_inference(
    config, config_files, batch, monkeypatch
):
    weights = config("hr").OUTPUT_DIR + ".pth"
    torch.save({"model": build(config("hr")).state_dict()}, weights)
    keys = ["KD.TEACHER.WEIGHTS", weights, "KD.TEACHER.BRANCH", "hr"]
    keys += ["KD.TEACHER.CONFIG_FILE", str(config_files["hr"]), "KD.LOSSES", TEACHER]
    cfg = config("student", *keys)
    model, inputs = build_student(cfg), batch(cfg, "lr")
    assert "p6" in model.teacher.needed  # which the RPN alone reads
    stock = model.teacher.model
    images = [{"image": x["image_hr"]} for x in inputs]
    with (
        monkeypatch.context() as patch,
        recording(stock.proposal_generator) as call,
        recording(stock.backbone) as levels,
    ):
        patch.setattr(type(stock.backbone), "size_divisibility", 64)  # twice the student's
        stock.inference(images)
    expected = [x.proposal_boxes[:COUNT] for x in call.output[0]]
    seen, _, theirs = predicted(model, inputs)["teacher"]
    for boxes, others in zip(seen.boxes, expected, strict=True):
        assert_close(2 * boxes.tensor, others.tensor)
    heads = stock.roi_heads
    pooled = heads.box_pooler([levels.output[x] for x in heads.box_in_features], expected)
    assert_close(heads.box_predictor(heads.box_head(pooled))[0], theirs.classes)


def test_proposals_of_the_student_alone_need_no_level_of_the_rpn(student):
    levels = [student(losses).teacher.needed for losses in (STUDENT, TEACHER, BOTH)]
    assert levels == [{"p3", "p4", "p5", "p6"}, *[{"p3", "p4", "p5", "p6", "p7"}] * 2]


def test_masks_are_of_what_the_teacher_takes_for_objects(student, inputs):
    model = student(TEACHER)
    seen, ours, theirs = predicted(model, inputs)["teacher"]
    best = theirs.classes.argmax(dim=1)
    assert (best < 8).all()
    per_image = best.split([len(boxes) for boxes in seen.boxes])
    assert torch.equal(seen.classes, torch.cat([classes[:POSITIVES] for classes in per_image]))
    assert same_regions(seen.masked, [boxes[:POSITIVES] for boxes in seen.boxes])
    assert len(ours.masks) == len(theirs.masks) == len(seen.classes) == 2 * POSITIVES
    model.teacher.model.roi_heads.box_predictor.cls_score.bias.data[-1] += 100  # sees no object
    seen, ours, theirs = predicted(model, inputs)["teacher"]
    assert len(ours.masks) == len(theirs.masks) == sum(map(len, seen.masked)) == 0
    assert losses_of(model, inputs)["loss_kd_roi_mask"] == 0


def test_the_regions_of_both_are_those_of_one_and_the_other(student, inputs):
    """The loss is the mean over all of them."""
    values = [losses_of(student(losses), inputs) for losses in (STUDENT, TEACHER, BOTH)]
    found = predicted(student(BOTH), inputs)
    assert list(found) == ["student", "teacher"]
    for name in NAMES:
        counts = [
            len(pair[1].masks if name == "roi_mask" else pair[1].classes) for pair in found.values()
        ]
        one, other, both = (x[f"loss_kd_{name}"] for x in values)
        assert one > 0 and other > 0 and one != other
        assert_close(both, (counts[0] * one + counts[1] * other) / sum(counts))


def test_a_step_predicts_once_for_the_same_regions(student, inputs):
    model, calls = student([*STUDENT, *TEACHER, *BOTH]), []
    for heads in (model.roi_heads, model.teacher.model.roi_heads):
        for part in (heads.box_predictor, heads.mask_head.predictor):
            part.register_forward_hook(lambda part, *_: calls.append(part))
    losses_of(model, inputs)
    assert len(calls) == 8 and all(calls.count(part) == 2 for part in calls)


def test_the_detection_pass_stays_as_it_is(student, inputs):
    """Bit for bit: losses, random numbers, and statistics of normalised heads."""
    norm = ["MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.ROI_BOX_HEAD.CONV_DIM", 8]
    norm += ["MODEL.ROI_BOX_HEAD.NORM", "BN"]
    steps = []
    for losses in ([], TEACHER, BOTH):
        model = student(losses, *norm)
        theirs = tensors_of(model.teacher.model)
        values = losses_of(model, inputs)
        assert model.roi_heads.training and model.roi_heads.box_head.conv1.norm.training
        steps.append((values, torch.get_rng_state(), dict(model.named_buffers())))
        sum(values.values()).backward()
        assert differing(tensors_of(model.teacher.model), theirs) == []
        assert all(p.grad is None for p in model.teacher.model.parameters())
    stock = steps[0]
    for values, rng, buffers in steps[1:]:
        assert all(torch.equal(values[name], value) for name, value in stock[0].items())
        assert torch.equal(rng, stock[1]) and differing(buffers, stock[2]) == []


def test_images_without_boxes_and_without_proposals(student, inputs):
    for sample in inputs:
        sample["instances"] = sample["instances"][:0]
    model = student(TEACHER)
    losses = losses_of(model, inputs)
    assert all(losses[f"loss_kd_{name}"] > 0 for name in NAMES)
    model.teacher.model.proposal_generator.min_box_size = 1e6
    losses = losses_of(model, inputs)
    assert all(losses[f"loss_kd_{name}"] == 0 for name in NAMES)
    sum(losses.values()).backward()  # every process of a run has the same graph
    parts = model.roi_heads.box_predictor, model.roi_heads.mask_head
    assert all(p.grad is not None for part in parts for p in part.parameters())


@pytest.fixture
def twins(config, batch):
    """twins(losses): a distiller of two detectors with equal weights, and its arguments."""
    cfg = config("lr")
    inputs = batch(cfg)
    model = build(cfg).train()
    with recording(model.backbone) as call, recording_regions(model.roi_heads) as seen:
        with EventStorage():
            model(inputs)

    def make(losses):
        distiller = RoIDistiller(read_losses(losses))
        teacher = Teacher(copy.deepcopy(model), branch="lr", scale=2)
        find_objects(teacher)
        model.load_state_dict(teacher.model.state_dict())
        assert distiller.connect(model, teacher)
        pyramid = {name: level.detach() for name, level in call.output.items()}
        features = {name: level.clone().requires_grad_() for name, level in pyramid.items()}
        return distiller, (seen, features, pyramid, sizes_of(inputs), WARMUP)

    return make


def test_equal_heads_have_no_loss_and_no_gradient(twins):
    distiller, arguments = twins(TEACHER)
    losses = distiller(*arguments)
    assert losses["loss_kd_roi_class"].abs() < 1e-7 and losses["loss_kd_roi_box"] == 0
    levels = list(arguments[1].values())
    for value in losses.values():  # roi_mask is the teacher's entropy
        for gradient in torch.autograd.grad(value, levels, retain_graph=True, allow_unused=True):
            assert gradient is None or gradient.abs().max() < 1e-7


@pytest.mark.parametrize(
    ("fields", "opts", "message"),
    [
        ({"class_weights": [1.0] * 8}, [], "class_weights of 'roi_class' has 8 .* K = 8 classes"),
        (
            {"proposals": "both"},
            ["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"],
            "'proposals: teacher' and 'both' need a teacher with an RPN",
        ),
    ],
)
def test_what_cannot_be_compared(student_config, fields, opts, message):
    entry = {"name": "roi_class", "weight": 1.0, **fields}
    cfg = student_config("KD.LOSSES", [entry], "KD.TEACHER.OPTS", opts)
    with pytest.raises(InputError, match=f"KD.LOSSES: {message}"):
        check_losses(cfg, TeacherSpec.from_config(cfg))
