"""Dense heads and RPNs that are compared anchor by anchor, and across heads."""

import pytest
import torch
from detectors import DENSE
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from helpers import build, build_student, differing, losses_of, tensors_of, train
from torch.testing import assert_close

from msad_kd.distill.dense_distiller import Head, predict_across
from msad_kd.distill.student import check_losses
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.utils.errors import InputError

LOSSES = ("cross_head", "dense_class", "dense_box")
BOTH = pytest.mark.parametrize("detector", DENSE, indirect=True)


def terms(*names, **fields):
    return [{"name": name, "weight": 1.0, **fields} for name in names]


def convs(detector, count):
    """Options for towers of this many convolutions, in student and teacher."""
    key = [f"MODEL.{detector.upper()}.NUM_CONVS", count]
    return [*key, "KD.TEACHER.OPTS", key]


def rebuilt_teacher(cfg, path):
    """Write a checkpoint of the teacher that a config describes, and name it in the config."""
    cfg.defrost()
    cfg.KD.TEACHER.WEIGHTS = "none"
    torch.manual_seed(5)
    model = build_model(TeacherSpec.from_config(cfg).cfg)
    torch.save({"model": model.state_dict()}, path)
    cfg.KD.TEACHER.WEIGHTS = str(path)
    return cfg


@BOTH
def test_a_student_has_the_stock_losses_and_these(student_config, config, batch, detector):
    cfg = student_config("KD.LOSSES", terms(*LOSSES))
    cfg.KD.LOSSES[0]["convs"] = 1
    inputs = batch(cfg, "lr")
    model = build_student(cfg)
    found, expected = losses_of(model, inputs), losses_of(build(config("lr")), inputs)
    names = {f"loss_kd_{name}" for name in LOSSES}
    assert found.keys() == expected.keys() | names
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[name] > 0 for name in names)
    sum(found[name] for name in names).backward()
    assert model.head.cls_subnet[0].weight.grad.abs().max() > 0
    assert next(model.backbone.bottom_up.parameters()).grad.abs().max() > 0
    assert all(p.grad is None for p in model.teacher.model.parameters())
    gone = [x.pop("instances") for x in inputs]
    for sample, instances in zip(inputs, gone):  # images without boxes
        sample["instances"] = instances[:0]
    losses = losses_of(model, inputs)
    assert all(losses[name].isfinite() and losses[name] > 0 for name in names)


@BOTH
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_student_with_the_teachers_head_and_pyramid_loses_nothing(
    student_config, batch, detector, depth, tmp_path
):
    cfg = student_config("KD.LOSSES", terms("cross_head", convs=depth) + terms(*LOSSES[1:]))
    cfg.merge_from_list(convs(detector, 2))
    model = build_student(rebuilt_teacher(cfg, tmp_path / "teacher.pth")).train()
    model.head.load_state_dict(model.teacher.model.head.state_dict())
    inputs = batch(cfg, "lr")
    padded = tuple(model.preprocess_image(inputs).tensor.shape[-2:])
    pyramid = model.teacher.pyramid(inputs, padded)
    with model.dense_distiller.recording() as seen:
        model.head([pyramid[level] for level in model.dense_distiller.heads[1].levels])
    with EventStorage(4):
        losses = model.dense_distiller(seen, pyramid, 4)
    for name in LOSSES:
        assert losses[f"loss_kd_{name}"].item() == pytest.approx(0, abs=1e-5)


@BOTH
def test_to_predict_across_is_to_predict_with_the_rest_of_the_head(config, detector):
    """Worked out by hand: both towers' first convolution, then the other head's second."""
    models = [build(config("lr", f"MODEL.{detector.upper()}.NUM_CONVS", 2)) for _ in range(2)]
    torch.manual_seed(7)
    for parameter in models[1].head.parameters():
        parameter.data.normal_(std=0.1)
    mine, theirs = (Head.of(model).module for model in models)
    features = [torch.randn(2, 16, 3, 5), torch.randn(2, 16, 2, 3)]
    cut = len(mine.cls_subnet) // 2
    inner = [[tower[:cut](x) for x in features] for tower in (mine.cls_subnet, mine.bbox_subnet)]
    found = predict_across(theirs, inner, 1)
    expected = [theirs.cls_score(theirs.cls_subnet[cut:](x)) for x in inner[0]]
    assert all(map(torch.equal, found[0], expected))
    boxes = [theirs.bbox_subnet[cut:](x) for x in inner[1]]
    assert all(map(torch.equal, found[1], [theirs.bbox_pred(x) for x in boxes]))
    if detector == "fcos":
        assert all(map(torch.equal, found[2], [theirs.ctrness(x) for x in boxes]))


@BOTH
def test_training_leaves_the_teacher_as_it_is_and_the_student_stock(
    student_config, config, detector
):
    cfg = student_config("KD.LOSSES", terms("cross_head", convs=1), "SOLVER.MAX_ITER", 2)
    teacher = TeacherSpec.from_config(cfg).build()
    trainer = train(cfg)
    assert not differing(tensors_of(trainer.teacher.model), tensors_of(teacher.model))
    assert trainer.model.state_dict().keys() == build(config("lr")).state_dict().keys()


def test_the_order_of_the_images_does_not_matter(student_config, batch):
    cfg = student_config("KD.LOSSES", terms("rpn_class", "rpn_box"))
    inputs = batch(cfg, "lr")
    model = build_student(cfg)
    found, turned = losses_of(model, inputs), losses_of(model, inputs[::-1])
    for name in ("loss_kd_rpn_class", "loss_kd_rpn_box"):
        assert found[name] > 0
        assert_close(turned[name], found[name])


def test_an_rpn_is_read_as_detectron2_reads_it(config, batch):
    """Decoded boxes and scores are those that its proposals are made of."""
    model = build(config("lr")).eval()
    head = Head.of(model)
    images = model.preprocess_image(batch(config("lr")))
    features = model.backbone(images.tensor)
    maps = [features[level] for level in head.levels]
    found = head.read(head.module(maps), head.anchors(maps))
    rpn, captured = model.proposal_generator, {}
    original = rpn.predict_proposals

    def keep(anchors, logits, deltas, sizes):
        captured["boxes"] = torch.cat(rpn._decode_proposals(anchors, deltas), dim=1)
        captured["logits"] = torch.cat(logits, dim=1)
        return original(anchors, logits, deltas, sizes)

    rpn.predict_proposals = keep
    with torch.no_grad():
        rpn(images, features)
    assert_close(found.boxes, captured["boxes"].flatten(0, 1))
    assert_close(found.classes[:, 0], captured["logits"].flatten())
    assert found.centerness is None


@pytest.mark.parametrize(
    ("detector", "losses", "opts", "words"),
    [
        ("mask_rcnn", terms("cross_head"), [], "'cross_head' needs the head of RetinaNet or FCOS"),
        ("fcos", terms("rpn_box"), [], "'rpn_box' needs an RPN, which the student lacks"),
        ("fcos", terms("cross_head"), [], "'convs' of 'cross_head' is 3, but a tower has 1"),
        (
            "fcos",
            terms("cross_head", convs=1),
            ["MODEL.FPN.OUT_CHANNELS", 8],
            "same channels in the tower .* 8 in the student and 16",
        ),
        (
            "fcos",
            terms("dense_class"),
            ["KD.TEACHER.OPTS", ["MODEL.META_ARCHITECTURE", "MultiResolutionRetinaNet"]],
            "same kind of head",
        ),
        (
            "retinanet",
            terms("dense_class"),
            ["MODEL.RETINANET.NUM_CLASSES", 9],
            "number of classes in both heads; it is 9 in the student and 8",
        ),
        (
            "retinanet",
            terms("dense_box"),
            ["MODEL.RETINANET.BBOX_REG_WEIGHTS", [2.0] * 4],
            "units of boxes in both heads",
        ),
        (
            "retinanet",
            terms("dense_class"),
            ["MODEL.ANCHOR_GENERATOR.SIZES", [[4], [8], [16], [32], [64]]],
            "anchors per cell and level in both heads; it is .3, 3, 3, 3, 3. in the student",
        ),
        (
            "mask_rcnn",
            terms("rpn_box"),
            ["MODEL.ANCHOR_GENERATOR.OFFSET", 0.5],
            "same MODEL.ANCHOR_GENERATOR.OFFSET in both heads; it is 0.5 in the student and 0.0",
        ),
        (
            "mask_rcnn",
            terms("rpn_class"),
            ["MODEL.RPN.IN_FEATURES", ["p3", "p4", "p5", "p6", "p6"]],
            "whose head reads levels of 2 times the student's strides .8, 16, 32, 64, 64.",
        ),
    ],
    indirect=["detector"],
)
def test_heads_that_cannot_be_compared(student_config, losses, opts, words):
    cfg = student_config("KD.LOSSES", losses, *opts)
    with pytest.raises(InputError, match=words):
        check_losses(cfg, TeacherSpec.from_config(cfg))


@pytest.mark.parametrize("name", ["rpn_class", "rpn_box"])
def test_anchors_that_are_not_the_teachers(student_config, name):
    ratios = ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[2.0, 1.0, 0.5]]]  # in another order
    with pytest.raises(InputError, match=f"'{name}' needs a teacher whose anchors are 2 times"):
        build_student(student_config("KD.LOSSES", terms(name), *ratios))


def test_instances_are_not_needed_for_a_value(student_config, batch):
    """The same value with any ground truth: it is the teacher that decides what matters."""
    cfg = student_config("KD.LOSSES", terms("rpn_class"))
    inputs = batch(cfg, "lr")
    model = build_student(cfg)
    value = losses_of(model, inputs)["loss_kd_rpn_class"]
    for sample in inputs:
        truth = Instances(sample["instances"].image_size)
        truth.gt_boxes, truth.gt_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0).long()
        truth.gt_masks = sample["instances"].gt_masks[:0]
        sample["instances"] = truth
    assert torch.equal(losses_of(model, inputs)["loss_kd_rpn_class"], value)
