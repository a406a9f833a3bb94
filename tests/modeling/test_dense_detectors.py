"""RetinaNet and FCOS: the loss normalizer, levels p3..p7, no boxes; FCOS equals Detectron2's."""

import pytest
import torch
from detectors import DENSE, reading
from detectron2.layers import get_norm
from detectron2.modeling import build_backbone
from detectron2.modeling.meta_arch import fcos
from helpers import NO_TEST, build, build_student, differing, losses_of, same_predictions, train

from msad_kd.modeling.fcos import _Box2BoxTransform as fcos_transform
from msad_kd.modeling.fcos import group_norm
from msad_kd.modeling.loss_normalizer import get_normalizer
from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import seed_all

dense, on_fcos = (
    pytest.mark.parametrize("detector", names, indirect=True) for names in (DENSE, ["fcos"])
)


@dense
def test_the_normalizer_of_a_teacher_moves_once_a_step(config, batch):
    """Alike in all branches, and as in the stock detector, whose positives are as many."""
    teacher, stock = build(config("teacher")), build(config("lr"))
    stock.load_state_dict(teacher.state_dict(), strict=False)
    inputs = []
    for role, frame in (("teacher", "hr"), ("lr", None)):
        seed_all(0)  # the same flips
        inputs.append(batch(config(role), frame))
    for _ in range(2):
        losses, expected = losses_of(teacher, inputs[0]), losses_of(stock, inputs[1])
        assert get_normalizer(teacher) == get_normalizer(stock)
    assert all(torch.equal(losses[f"{name}_lr"], expected[name]) for name in expected)


@dense
def test_levels_that_no_branch_has_are_refused(config, detector):
    heads = reading(detector, ["p2", "p3", "p4", "p5", "p6"])
    with pytest.raises(InputError, match="reads p2, but .* p3, p4, p5, p6, p7"):
        build(config("teacher", *heads))


@dense
@pytest.mark.parametrize(
    ("scale", "branch", "dropped"),
    [
        (2, "hr", ""),  # p2..p6 at strides 8..128 of the high resolution, where p3..p7 are
        (4, "hr", "p6"),
        (2, "lr", "p2"),  # p3..p7 of the student's own resolution
    ],
)
def test_a_plain_teacher_on_p3_to_p7(
    config, batch, tmp_path, files_of, detector, scale, branch, dropped, caplog
):
    hr = build(config("hr"))
    assert sorted(hr.backbone.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]
    torch.save({"model": hr.state_dict()}, tmp_path / "hr.pth")
    cfg = config(
        *("student", "KD.SCALE", scale, "KD.TEACHER.BRANCH", branch),
        *("KD.TEACHER.CONFIG_FILE", str(files_of(detector)["hr"])),
        *("KD.TEACHER.WEIGHTS", str(tmp_path / "hr.pth"), "SOLVER.MAX_ITER", 1, *NO_TEST),
        *("INPUT.MIN_SIZE_TRAIN", (64 // scale,)),
    )
    trainer = train(cfg)
    shift = scale.bit_length() - 1 if branch == "hr" else 0
    kept = [f"p{s}" for s in range(2, 7) if f"p{s}" != dropped]
    assert trainer.model.distiller.pairs == {name: f"p{int(name[1]) + shift}" for name in kept}
    warnings = [text for text in caplog.messages if "no partner" in text]
    assert len(warnings) == bool(dropped) and all(f"Levels {dropped} have" in w for w in warnings)
    assert losses_of(trainer.model, batch(cfg, "lr"))["loss_kd_l1"] > 0


def without_boxes(inputs):
    for entry in inputs:
        entry["instances"] = entry["instances"][[]]
    return inputs


@dense
@pytest.mark.parametrize("role", ["lr", "teacher"])
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


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (64, 32), (48, 16), (16, 8), (1, 1)])
def test_groups_of_narrow_maps(channels, groups):
    norm = group_norm(channels)
    assert (norm.num_groups, norm.num_channels) == (groups, channels)
    if channels % 64 == 0:
        assert str(norm) == str(get_norm("GN", channels))


@on_fcos
@pytest.mark.parametrize(("norm", "kind"), [("GN", "GroupNorm"), ("", ""), ("BN", "BatchNorm2d")])
def test_the_normalisation_of_a_head(config, norm, kind):
    head = build(config("lr", "MODEL.FCOS.NORM", norm)).head
    found = {type(m).__name__ for m in head.modules() if "Norm" in type(m).__name__}
    assert found - {"CycleBatchNormList"} == ({kind} if kind else set())


@on_fcos
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
        assert same_predictions(mine(inputs), stock(inputs))
    assert differing(losses_of(mine, inputs), losses_of(stock, inputs)) == []


@on_fcos
def test_no_distance_of_a_new_head_is_cut(config, batch):
    """One below 0 has no gradient. A box head where all were learned nothing."""
    cfg, distances = config("lr"), []
    model = build(cfg)
    model.head.bbox_pred.register_forward_hook(lambda *args: distances.append(args[-1]))
    losses_of(model, batch(cfg))
    assert len(distances) == 5 and all((level > 0).all() for level in distances)


@on_fcos
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_trains_in_16_bits(config, student_config, batch, dtype):
    for role, frame in (("lr", None), ("teacher", "hr"), ("student", "lr")):
        student = role == "student"
        cfg = student_config() if student else config(role)
        model, inputs = (build_student if student else build)(cfg), batch(cfg, frame)
        with torch.autocast("cpu", dtype):
            losses = losses_of(model, inputs)
        sum(losses.values()).backward()
        gradients = [x.grad for x in model.parameters() if x.grad is not None]
        assert gradients and all(torch.isfinite(x).all() for x in gradients)


def test_boxes_are_computed_in_32_bits():
    deltas, boxes = torch.tensor([[3.3, 3.3, 3.3, 3.3]]), torch.tensor([[1180.0, 0, 1188, 8]])
    transform = fcos_transform()
    exact, found = (
        transform.apply_deltas(deltas, boxes),
        transform.apply_deltas(deltas.half(), boxes),
    )
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 0.02


@on_fcos
def test_a_student_of_another_depth_and_width(student_config, caplog):
    other = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    other += ["SOLVER.MAX_ITER", 2, *NO_TEST]
    trainer = train(student_config(*other, "KD.TEACHER.INIT_BACKBONE", False))
    assert trainer.storage.latest()["loss_kd_l1"][0] > 0
    (warning,) = [text for text in caplog.messages if "Not in the teacher" in text]
    assert "fpn_lateral2.weight" in warning
    assert "bottom_up" not in warning and "head." not in warning
