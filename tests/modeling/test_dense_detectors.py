"""RetinaNet and FCOS: the loss normalizer, levels p3..p7, images without boxes."""

import pytest
import torch
from detectors import DENSE, reading
from helpers import NO_TEST, build, losses_of, train

from msad_kd.modeling.loss_normalizer import get_normalizer
from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import seed_all

pytestmark = pytest.mark.parametrize("detector", DENSE, indirect=True)


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


def test_levels_that_no_branch_has_are_refused(config, detector):
    heads = reading(detector, ["p2", "p3", "p4", "p5", "p6"])
    with pytest.raises(InputError, match="reads p2, but .* p3, p4, p5, p6, p7"):
        build(config("teacher", *heads))


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
    assert len(warnings) == bool(dropped) and all(f"levels {dropped} have" in w for w in warnings)
    assert losses_of(trainer.model, batch(cfg, "lr"))["loss_kd_l1"] > 0


def without_boxes(inputs):
    for entry in inputs:
        entry["instances"] = entry["instances"][[]]
    return inputs


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
