"""The student: its losses in training, its teacher, its adapters, and the detectors it can be."""

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, build_model
from detectron2.utils.events import EventStorage
from helpers import WARMUP, build, build_student, losses_of

from msad_kd import DistilledMixin, attach_teacher
from msad_kd.checkpoint.strip import strip_checkpoint
from msad_kd.distill.teacher import Teacher
from msad_kd.losses.feature import DISTILL_LOSS_REGISTRY
from msad_kd.utils.errors import InputError


@pytest.fixture
def student(student_config):
    return build_student(student_config())


def test_the_distillations_loss_is_the_mean_difference_of_each_level(student, config, batch):
    inputs = batch(config("student"), "lr")
    found = losses_of(student, inputs, WARMUP)["loss_kd_l1"]
    images = student.preprocess_image(inputs).tensor
    mine = student.backbone(images)
    theirs = student.teacher.pyramid(inputs, tuple(images.shape[-2:]))
    differences = [(mine[f"p{s}"] - theirs[f"p{s + 1}"]).abs().mean() for s in range(2, 7)]
    torch.testing.assert_close(found, 0.6 * sum(differences))


def test_it_warms_up_by_the_trainers_iteration(student, config, batch):
    inputs = batch(config("student"), "lr")
    losses = [
        losses_of(student.eval(), inputs, i)["loss_kd_l1"].item() for i in (0, WARMUP, WARMUP // 2)
    ]
    assert losses[0] == 0 < losses[1]
    assert losses[2] == pytest.approx(losses[1] / 2, rel=1e-6)


def test_its_gradient_reaches_the_backbone_and_nothing_else(student, config, batch):
    losses_of(student, batch(config("student"), "lr"), WARMUP)["loss_kd_l1"].backward()
    assert student.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0
    heads = [*student.roi_heads.parameters(), *student.proposal_generator.parameters()]
    assert all(p.grad is None for p in [*heads, *student.teacher.model.parameters()])


def test_the_teacher_stays_in_eval_mode(student):
    for mode in (True, False, True):
        student.train(mode)
        assert not any(module.training for module in student.teacher.model.modules())
    student.requires_grad_(True)
    assert not any(p.requires_grad for p in student.teacher.model.parameters())


def test_without_a_teacher_it_cannot_be_trained(student_config, config, batch):
    cfg = student_config()
    with pytest.raises(RuntimeError, match="no teacher; call .*attach_teacher"):
        losses_of(build(cfg), batch(cfg, "lr"))
    with pytest.raises(InputError, match="a GeneralizedRCNN takes no teacher"):
        attach_teacher(build(config("lr")), cfg)


def test_levels_that_cannot_meet_are_named(student_config):
    hr = build_model(student_config("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"))
    with pytest.raises(InputError, match="no level of the student.*'p2': 8.*'p2': 256.*KD.SCALE"):
        build(student_config()).set_teacher(Teacher(hr, branch="lr", scale=64))


def test_a_narrower_student_has_adapters_and_exports_without(student_config, batch, tmp_path):
    width = ["MODEL.FPN.OUT_CHANNELS", 8]
    cfg = student_config(*width)
    model = build_student(cfg)
    own = [key for key in model.state_dict() if key.startswith("distiller.")]
    assert own == [f"distiller.adapters.p{s}.{x}" for s in range(2, 7) for x in ("weight", "bias")]
    sum(losses_of(model, batch(cfg, "lr"), WARMUP).values()).backward()
    assert all(p.grad is not None for p in model.distiller.parameters())
    torch.save({"model": model.state_dict()}, tmp_path / "trained.pth")
    strip_checkpoint(tmp_path / "trained.pth", tmp_path / "student.pth")
    exported = torch.load(tmp_path / "student.pth", weights_only=True)["model"]
    stock = build(student_config("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", *width))
    assert set(exported) == set(stock.state_dict())


@pytest.mark.parametrize("branch", ["hr", "lr", "fused"])
def test_it_learns_from_any_branch(student_config, batch, branch):
    cfg = student_config("KD.TEACHER.BRANCH", branch)
    model = build_student(cfg)
    assert model.teacher.branch == branch
    assert model.distiller.pairs == {f"p{s}": f"p{s + 1}" for s in range(2, 7)}
    assert losses_of(model, batch(cfg, "lr"), WARMUP)["loss_kd_l1"] > 0


@pytest.mark.parametrize("name", sorted(name for name, _ in DISTILL_LOSS_REGISTRY))
def test_every_loss_is_one_override_away(student_config, batch, name):
    cfg = student_config("KD.LOSSES", [{"name": name, "weight": 0.01}])
    model = build_student(cfg)
    torch.manual_seed(1)
    with EventStorage(19) as storage:
        losses = model.train()(batch(cfg, "lr"))
    losses[f"loss_kd_{name}"].backward()
    for parameters in (model.backbone, model.distiller):
        assert all(p.grad.isfinite().all() for p in parameters.parameters() if p.grad is not None)
    assert model.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0
    logged = {key.removesuffix(f"_p{s}") for key in storage.latest() for s in range(2, 7)}
    own = {f"kd/{name}"} | ({"kd/ssim_blind_share"} if name == "ssim" else set())
    assert {key for key in logged if key.startswith("kd/") and key[-3:-1] != "_p"} == own


def test_without_a_loss_the_teacher_does_not_run(student_config, config, batch, monkeypatch):
    cfg = student_config("KD.LOSSES", [])
    model, inputs = build_student(cfg), batch(cfg, "lr")
    monkeypatch.setattr(model.teacher, "pyramid", lambda *_: pytest.fail("it has run"))
    found, expected = losses_of(model, inputs), losses_of(build(config("lr")), inputs)
    assert found == expected


def test_any_detector_becomes_a_student_in_three_lines(student_config, batch):
    class Louder(GeneralizedRCNN):
        def forward(self, batched_inputs):
            losses = super().forward(batched_inputs)
            return {**losses, "loss_mine": torch.zeros(())} if self.training else losses

    @META_ARCH_REGISTRY.register()
    class DistilledLouder(DistilledMixin, Louder):
        pass

    try:
        cfg = student_config("MODEL.META_ARCHITECTURE", "DistilledLouder")
        model = build_student(cfg)
        assert {"loss_mine", "loss_kd_l1", "loss_mask"} <= losses_of(model, batch(cfg, "lr")).keys()
    finally:
        META_ARCH_REGISTRY._obj_map.pop("DistilledLouder")
