"""Every detector beside Mask R-CNN as a teacher and as a student: Faster R-CNN, RetinaNet, FCOS."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from detectors import DENSE, DETECTORS, write_configs
from detectron2.layers import get_norm
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.meta_arch import fcos
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from helpers import WARMUP, differing, same_instances, tensors_of, train

from msad_kd import KDTrainer, attach_teacher, init_from_teacher
from msad_kd.errors import InputError
from msad_kd.fcos import group_norm
from msad_kd.hooking import answering
from msad_kd.multi_resolution import BRANCHES, MultiResolutionMixin
from msad_kd.normalizer import get_normalizer
from msad_kd.pyramid import shift_levels
from msad_kd.seed import seed_all
from msad_kd.setup import build_config
from msad_kd.teacher import Teacher

NO_TEST = ("DATASETS.TEST", ())


@pytest.fixture(scope="session")
def folders(data, tmp_path_factory):
    """Detector to the folder of its config files."""
    made = {}
    for detector in DETECTORS:
        made[detector] = tmp_path_factory.mktemp(detector)
        write_configs(made[detector], data, detector)
    return made


@pytest.fixture(params=list(DETECTORS))
def detector(request):
    return request.param


@pytest.fixture
def config(folders, detector, tmp_path):
    """config(role, KEY, VALUE, ...) of the detector, with an OUTPUT_DIR of its own."""
    made = []

    def make(role, *opts):
        made.append(tmp_path / f"{role}_{len(made)}")
        file = folders[detector] / f"{role}.yaml"
        return build_config(str(file), ["OUTPUT_DIR", str(made[-1]), *opts])

    return make


@pytest.fixture(scope="session")
def trained_teachers(folders):
    """weights(detector): the checkpoint of a teacher that was trained for two steps."""
    made = {}

    def weights(detector):
        if detector not in made:
            output = folders[detector] / "teacher"
            options = ["OUTPUT_DIR", str(output), "SOLVER.MAX_ITER", 2, *NO_TEST]
            torch.manual_seed(0)
            train(build_config(str(folders[detector] / "teacher.yaml"), options))
            made[detector] = str(output / "model_final.pth")
        return made[detector]

    return weights


@pytest.fixture
def student_config(config, detector, trained_teachers):
    def make(*opts):
        return config("student", "KD.TEACHER.WEIGHTS", trained_teachers(detector), *opts)

    return make


def build(cfg):
    torch.manual_seed(0)
    return build_model(cfg)


def losses_of(model, inputs, iteration=WARMUP):
    torch.manual_seed(1)  # RoI heads sample proposals
    with EventStorage(iteration):
        return model.train()(inputs)


def without_boxes(inputs):
    for entry in inputs:
        entry["instances"] = entry["instances"][[]]
    return inputs


# ---- A teacher and a student are trained, resumed and evaluated ----


def test_a_student_is_trained_resumed_and_evaluated(student_config, tmp_path, detector):
    whole = train(student_config())
    assert whole.storage.latest()["loss_kd_l1"][0] > 0
    assert "bbox/AP" in whole.storage.latest()
    folder = tmp_path / "cut_off"
    folder.mkdir()
    shutil.copy(f"{whole.cfg.OUTPUT_DIR}/model_0000001.pth", folder)
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    again = train(student_config("OUTPUT_DIR", str(folder), *NO_TEST), resume=True)
    assert again.start_iter == 2
    assert differing(tensors_of(whole.model), tensors_of(again.model)) == []
    assert get_normalizer(whole.model) == get_normalizer(again.model)
    assert (get_normalizer(whole.model) is not None) == (detector in DENSE)


def test_a_teacher_is_resumed_and_evaluated(config, trained_teachers, detector, folders):
    trained_teachers(detector)
    output = config("teacher").OUTPUT_DIR
    shutil.copytree(folders[detector] / "teacher", output)
    again = train(config("teacher", "OUTPUT_DIR", output, "SOLVER.MAX_ITER", 3), resume=True)
    assert again.start_iter == 2 and "bbox/AP" in again.storage.latest()
    torch.manual_seed(0)
    whole = train(config("teacher", "SOLVER.MAX_ITER", 3, *NO_TEST))
    assert differing(tensors_of(whole.model), tensors_of(again.model)) == []


def test_a_checkpoint_keeps_the_normalizer_apart_from_the_model(trained_teachers, detector):
    saved = torch.load(trained_teachers(detector), weights_only=False)
    assert not any("normalizer" in name for name in saved["model"])
    assert ("KeepNormalizer" in saved["trainer"].get("hooks", {})) == (detector in DENSE)


# ---- The student is a stock detector ----


def test_a_student_is_the_stock_detector_but_for_its_loss(student_config, config, batch):
    cfg = student_config()
    student, stock = build(cfg), build(config("lr"))
    attach_teacher(student, cfg)
    assert list(student.state_dict()) == list(stock.state_dict())
    inputs = batch(cfg, "lr")
    found, expected = losses_of(student, inputs), losses_of(stock, inputs)
    assert found.keys() == expected.keys() | {"loss_kd_l1"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert student.distiller.pairs == {f"p{s}": f"p{s + 1}" for s in range(2, 7)}


def called(model, inputs):
    """How often each module is called to evaluate a batch, and the predictions."""
    calls, handles = Counter(), []
    for name, module in model.named_modules():
        count = lambda *_, name=name: calls.update([name])  # noqa: E731
        handles.append(module.register_forward_hook(count))
    with torch.no_grad():
        predictions = model.eval()(inputs)
    for handle in handles:
        handle.remove()
    return calls, predictions


def test_in_evaluation_a_student_calls_what_the_stock_detector_calls(
    config, batch, monkeypatch, detector
):
    monkeypatch.setattr(Teacher, "__init__", lambda *_, **__: pytest.fail("a teacher was built"))
    student, stock = build(config("student")), build(config("lr"))
    inputs = batch(config("lr"), None, count=3, is_train=False)
    (calls, found), (expected_calls, expected) = called(student, inputs), called(stock, inputs)
    assert calls == expected_calls
    assert calls["backbone"] == 1 and not any("distiller" in name for name in calls)
    for one, other in zip(found, expected, strict=True):
        assert len(one["instances"]) > 0
        assert same_instances(one["instances"], other["instances"])


def test_a_student_inherits_all_of_its_teacher(config):
    teacher, student = build(config("teacher")), build_model(config("student"))
    assert init_from_teacher(student, teacher) == []
    inherited = teacher.state_dict()
    assert all(torch.equal(v, inherited[k]) for k, v in student.state_dict().items())


@pytest.mark.parametrize("role", ["lr", "student", "teacher", "hr"])
def test_every_parameter_that_trains_gets_a_gradient(role, student_config, config, batch):
    # With one that gets none, DistributedDataParallel stops at the second step.
    cfg = student_config() if role == "student" else config(role)
    model = build(cfg)
    if role == "student":
        attach_teacher(model, cfg)
    inputs = batch(cfg, getattr(model, "frame", None))
    sum(losses_of(model, inputs).values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


# ---- The teacher ----


def test_a_teacher_has_three_branches(config, batch):
    losses = losses_of(build(config("teacher")), batch(config("teacher"), "hr"))
    names = {name.rpartition("_")[0] for name in losses}
    assert losses.keys() == {f"{name}_{branch}" for name in names for branch in BRANCHES}
    assert all(loss.isfinite() for loss in losses.values())


def test_the_lr_branch_is_the_low_resolution_detector(config, batch):
    model = build(config("teacher", "MODEL.MULTI_RESOLUTION.TEST_BRANCH", "lr")).eval()
    stock = build_model(config("lr")).eval()
    assert not stock.load_state_dict(model.state_dict(), strict=False).missing_keys
    with torch.no_grad():
        found = model(batch(config("teacher"), "hr", count=3, is_train=False))
        expected = stock(batch(config("lr"), None, count=3, is_train=False))
    for one, other in zip(found, expected, strict=True):
        assert len(one["instances"]) > 0
        assert same_instances(one["instances"], other["instances"])


@pytest.mark.parametrize("detector", DENSE, indirect=True)
def test_the_normalizer_of_a_teacher_moves_once_a_step(config, batch):
    """Alike in all branches, and as in the stock detector, whose positives are as many."""
    cfg = config("teacher")
    teacher, stock = build(cfg), build(config("lr"))
    stock.load_state_dict(teacher.state_dict(), strict=False)
    inputs = []
    for role, frame in (("teacher", "hr"), ("lr", None)):
        seed_all(0)  # the same flips
        inputs.append(batch(config(role), frame))
    for _ in range(2):
        losses, expected = losses_of(teacher, inputs[0]), losses_of(stock, inputs[1])
        assert get_normalizer(teacher) == get_normalizer(stock)
    assert all(torch.equal(losses[f"{name}_lr"], expected[name]) for name in expected)


@pytest.mark.parametrize("detector", DENSE, indirect=True)
def test_levels_that_no_branch_has_are_refused(config, detector):
    levels = ["p2", "p3", "p4", "p5", "p6"]
    with pytest.raises(InputError, match="reads p2, but .* p3, p4, p5, p6, p7"):
        build(config("teacher", f"MODEL.{detector.upper()}.IN_FEATURES", levels))


# ---- Images without boxes ----


@pytest.mark.parametrize("role", ["lr", "teacher"])
@pytest.mark.parametrize("detector", DENSE, indirect=True)
def test_images_without_boxes(config, batch, role):
    cfg = config(role)
    model = build(cfg)
    inputs = batch(cfg, getattr(model, "frame", None))
    losses = losses_of(model, [inputs[0], *without_boxes(inputs[1:])])  # one of two
    assert all(loss.isfinite() for loss in losses.values())
    model = build(cfg)
    losses = losses_of(model, without_boxes(inputs))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    located = [v for k, v in losses.items() if "cls" not in k]
    assert located and not any(located)  # only the classification has something to learn


# ---- FCOS ----


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (64, 32), (48, 16), (16, 8), (1, 1)])
def test_groups_of_narrow_maps(channels, groups):
    norm = group_norm(channels)
    assert (norm.num_groups, norm.num_channels) == (groups, channels)
    if channels % 64 == 0:
        assert str(norm) == str(get_norm("GN", channels))


@pytest.mark.parametrize("detector", ["fcos"], indirect=True)
@pytest.mark.parametrize(("norm", "kind"), [("GN", "GroupNorm"), ("", ""), ("BN", "BatchNorm2d")])
def test_the_normalisation_of_a_head(config, norm, kind):
    head = build(config("lr", "MODEL.FCOS.NORM", norm)).head
    found = {type(m).__name__ for m in head.modules() if "Norm" in type(m).__name__}
    assert found - {"CycleBatchNormList"} == ({kind} if kind else set())


@pytest.mark.parametrize("detector", ["fcos"], indirect=True)
def test_fcos_is_detectron2s(config, batch):
    """Built by hand, without this project's class, it has the same keys and predictions."""
    cfg = config("lr", "MODEL.FCOS.NORM", "")
    mine = build(cfg).eval()
    shapes = [mine.backbone.output_shape()[name] for name in cfg.MODEL.FCOS.IN_FEATURES]
    stock = fcos.FCOS(
        backbone=build_backbone(cfg),
        head=fcos.FCOSHead(input_shape=shapes, num_classes=8, conv_dims=[16]),
        head_in_features=cfg.MODEL.FCOS.IN_FEATURES,
        num_classes=8,
        test_score_thresh=0.0,
        max_detections_per_image=20,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    ).eval()
    stock.load_state_dict(mine.state_dict())
    inputs = batch(cfg)
    with torch.no_grad():
        for one, other in zip(mine(inputs), stock(inputs), strict=True):
            assert len(one["instances"]) > 0
            assert same_instances(one["instances"], other["instances"])
    found, expected = losses_of(mine, inputs), losses_of(stock, inputs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


# ---- The two frames ----

CORNERS = np.array([[3, 5, 40, 61], [20, 11, 93, 30], [50, 40, 57, 49], [0, 0, 90, 62]])


def in_frame(factor, masks):
    """Two images, of 64 x 96 px times ``factor``, with boxes."""
    inputs = []
    for corners in (CORNERS, CORNERS[1:]):
        size, corners = (64 * factor, 96 * factor), corners * factor
        truth = Instances(size)
        truth.gt_boxes = Boxes(torch.tensor(corners, dtype=torch.float32))
        truth.gt_classes = torch.arange(len(corners))
        if masks:
            truth.gt_masks = PolygonMasks(
                [[np.array([x0, y0, x1, y0, x1, y1], np.float64)] for x0, y0, x1, y1 in corners]
            )
        inputs.append({"image": torch.zeros(3, *size), "instances": truth})
    return inputs


def run(model, pyramid, factor, train):
    """The stock part of a detector, given the features."""
    masks = getattr(getattr(model, "roi_heads", None), "mask_on", False)
    stock = super(MultiResolutionMixin, model).forward if factor > 1 else model.forward
    torch.manual_seed(1)
    with EventStorage(), answering(model.train(train).backbone, pyramid):
        return stock(in_frame(factor, masks))


@pytest.mark.parametrize("detector", [*DETECTORS, "mask_rcnn"], indirect=True)
@pytest.mark.parametrize("scale", [2, 4])
def test_both_frames_agree(scale, detector, folders, data, tmp_path):
    opts = {"lr": [], "teacher": ["KD.SCALE", scale]}
    shift = scale.bit_length() - 1
    levels = [f"p{s + shift}" for s in range(2, 7)]
    if detector in DENSE:
        opts["teacher"] += [f"MODEL.{detector.upper()}.IN_FEATURES", levels]
    else:
        opts["teacher"] += ["MODEL.RPN.IN_FEATURES", levels]
        opts["teacher"] += ["MODEL.ROI_HEADS.IN_FEATURES", levels[:-1]]
        for role in opts:
            opts[role] += ["MODEL.MASK_ON", detector == "mask_rcnn"]
    folder = folders["faster_rcnn" if detector == "mask_rcnn" else detector]
    low = build_config(str(folder / "lr.yaml"), opts["lr"])
    high = build_config(str(folder / "teacher.yaml"), opts["teacher"])
    sizes = [[scale * side for side in level] for level in low.MODEL.ANCHOR_GENERATOR.SIZES]
    high.MODEL.ANCHOR_GENERATOR.SIZES = sizes
    low, high = build(low), build(high)
    with torch.no_grad():
        for parameter in low.parameters():
            if parameter.dim() > 1:  # so that predictions differ from each other
                parameter.normal_(std=0.1)
    assert not set(high.load_state_dict(low.state_dict(), strict=False).missing_keys) - {
        "fusion.squeeze.weight",
        "fusion.excite.weight",
    }
    pyramid = {f"p{s}": torch.randn(2, 16, 64 >> s, 96 >> s) for s in range(2, 6)}
    pyramid["p6"] = torch.randn(2, 16, 1, 2)
    expected = run(low, pyramid, 1, True)
    found = run(high, shift_levels(pyramid, shift), scale, True)
    assert {n: loss.item() for n, loss in found.items()} == {
        n: loss.item() for n, loss in expected.items()
    }
    assert all(loss > 0 for loss in expected.values())
    with torch.no_grad():
        expected = run(low, pyramid, 1, False)
        found = run(high, shift_levels(pyramid, shift), scale, False)
    for one, other in zip(expected, found, strict=True):
        one, other = one["instances"], other["instances"]
        assert len(one) > 5
        assert torch.equal(scale * one.pred_boxes.tensor, other.pred_boxes.tensor)
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.pred_classes, other.pred_classes)


# ---- Plain teachers ----


@pytest.mark.parametrize("detector", DENSE, indirect=True)
@pytest.mark.parametrize(
    ("scale", "branch", "dropped"),
    [
        (2, "hr", ""),  # p2..p6 at strides 8..128 of the high resolution, where p3..p7 are
        (4, "hr", "p6"),
        (2, "lr", "p2"),  # p3..p7 of the student's own resolution
    ],
)
def test_a_plain_teacher_on_p3_to_p7(
    config, batch, tmp_path, folders, detector, scale, branch, dropped, caplog
):
    hr = build(config("hr"))
    assert sorted(hr.backbone.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]
    torch.save({"model": hr.state_dict()}, tmp_path / "hr.pth")
    cfg = config(
        *("student", "KD.SCALE", scale, "KD.TEACHER.BRANCH", branch),
        *("KD.TEACHER.CONFIG_FILE", str(folders[detector] / "hr.yaml")),
        *("KD.TEACHER.WEIGHTS", str(tmp_path / "hr.pth"), "SOLVER.MAX_ITER", 1, *NO_TEST),
        *("INPUT.MIN_SIZE_TRAIN", (64 // scale,)),
    )
    trainer = train(cfg)
    shift = scale.bit_length() - 1 if branch == "hr" else 0
    kept = [f"p{s}" for s in range(2, 7) if f"p{s}" != dropped]
    assert trainer.model.distiller.pairs == {name: f"p{int(name[1]) + shift}" for name in kept}
    warnings = [r.getMessage() for r in caplog.records if "no partner" in r.getMessage()]
    assert len(warnings) == bool(dropped) and all(f"levels {dropped} have" in w for w in warnings)
    assert losses_of(trainer.model, batch(cfg, "lr"))["loss_kd_l1"] > 0


# ---- Four times the resolution; other backbones ----


def test_at_four_times_the_resolution(config, tmp_path, detector):
    levels = ["p4", "p5", "p6", "p7", "p8"]
    if detector in DENSE:
        heads = [f"MODEL.{detector.upper()}.IN_FEATURES", levels]
    else:
        heads = ["MODEL.RPN.IN_FEATURES", levels, "MODEL.ROI_HEADS.IN_FEATURES", levels[:-1]]
    common = ["KD.SCALE", 4, "SOLVER.MAX_ITER", 1, *NO_TEST]
    teacher = train(config("teacher", *common, *heads))
    student = train(
        config(
            *("student", *common, "INPUT.MIN_SIZE_TRAIN", (16,), "INPUT.MIN_SIZE_TEST", 16),
            *("KD.TEACHER.WEIGHTS", f"{teacher.cfg.OUTPUT_DIR}/model_final.pth"),
            *("KD.TEACHER.OPTS", ["KD.SCALE", 4, *heads]),
        )
    )
    assert student.model.distiller.pairs == {f"p{s}": f"p{s + 2}" for s in range(2, 7)}
    assert "loss_kd_l1" in student.storage.latest()


@pytest.mark.parametrize("detector", ["fcos"], indirect=True)
def test_a_student_of_another_depth_and_width(student_config, caplog):
    other = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    trainer = train(student_config(*other, "SOLVER.MAX_ITER", 2, *NO_TEST))
    assert trainer.storage.latest()["loss_kd_l1"][0] > 0
    (told,) = [r.getMessage() for r in caplog.records if "Not in the teacher" in r.getMessage()]
    assert "bottom_up.res2.0.conv1.weight" in told and "head." not in told


# ---- The teacher is evaluated beforehand, or not ----


def test_a_teacher_of_other_classes_is_not_evaluated(
    student_config, config, tmp_path, detector, caplog
):
    part = {"retinanet": "RETINANET", "fcos": "FCOS"}.get(detector, "ROI_HEADS")
    classes = [f"MODEL.{part}.NUM_CLASSES", 5]
    torch.save({"model": build(config("teacher", *classes)).state_dict()}, tmp_path / "five.pth")
    cfg = student_config(
        *("KD.TEACHER.WEIGHTS", str(tmp_path / "five.pth"), "KD.TEACHER.OPTS", classes),
        *("KD.TEACHER.EVAL_BEFORE_TRAIN", True, "SOLVER.MAX_ITER", 1, *NO_TEST),
    )
    trainer = KDTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert "predicts 5 classes, the student 8: the teacher is not evaluated" in caplog.text
