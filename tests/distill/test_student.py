"""The student: a stock detector but for the losses it has in training."""

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, build_model
from detectron2.utils.events import EventStorage
from helpers import WARMUP, build, differing, losses_of, same_instances, tensors_of

from msad_kd import DistilledMixin, DistilledRCNN, KDTrainer, attach_teacher
from msad_kd.checkpoint.strip import strip_checkpoint
from msad_kd.distill.student import last_layer
from msad_kd.distill.teacher import Teacher
from msad_kd.losses.feature import DISTILL_LOSS_REGISTRY
from msad_kd.utils.errors import InputError


@pytest.fixture
def student(student_config):
    cfg = student_config()
    model = build(cfg)
    attach_teacher(model, cfg)
    return model


def test_keys_are_the_stock_models(student, config):
    stock = build(config("lr"))
    assert list(student.state_dict()) == list(stock.state_dict())
    assert tensors_of(student).keys() == tensors_of(stock).keys()
    assert {id(p) for p in student.teacher.model.parameters()}.isdisjoint(
        id(p) for p in student.parameters()
    )


def test_initial_weights_are_the_stock_models(student_config, config):
    assert differing(tensors_of(build(student_config())), tensors_of(build(config("lr")))) == []


def test_losses_are_the_stock_ones_and_the_distillations(student, config, batch):
    cfg = config("student")
    inputs = batch(cfg, "lr")
    found = losses_of(student, inputs, WARMUP)
    expected = losses_of(build(config("lr")), inputs)
    assert found.keys() == expected.keys() | {"loss_kd_l1"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found["loss_kd_l1"] > 0


def test_the_distillation_loss_is_that_of_the_two_pyramids(student, config, batch):
    inputs = batch(config("student"), "lr")
    found = losses_of(student, inputs, WARMUP)["loss_kd_l1"]
    images = student.preprocess_image(inputs).tensor
    mine = build(config("lr")).train().backbone(images)
    theirs = student.teacher.pyramid(inputs, tuple(images.shape[-2:]))
    sums = [(mine[f"p{s}"] - theirs[f"p{s + 1}"]).abs().mean() for s in range(2, 7)]
    torch.testing.assert_close(found, 0.6 * sum(sums))


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


def test_the_teacher_is_bitwise_unchanged(student, config, batch):
    teacher = student.teacher.model
    before = tensors_of(teacher)
    mine = tensors_of(student)
    inputs = batch(config("student"), "lr")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    for _ in range(2):
        sum(losses_of(student, inputs, WARMUP).values()).backward()
        optimizer.step()
        with torch.no_grad():
            student.eval()(inputs)
    assert differing(tensors_of(teacher), before) == []
    changed = differing(tensors_of(student), mine)
    assert any(name.endswith("running_mean") for name in changed)  # the student's own do move


def test_in_evaluation_it_is_the_stock_detector(student_config, config, batch):
    model = build(student_config()).eval()
    assert model.teacher is None  # and none is needed
    inputs = batch(config("lr"), None, count=3, is_train=False)
    with torch.no_grad():
        found, expected = model(inputs), build(config("lr")).eval()(inputs)
    for one, other in zip(found, expected, strict=True):
        assert same_instances(one["instances"], other["instances"])


def test_every_image_of_a_batch_has_its_own_predictions(student, config, batch):
    inputs = batch(config("lr"), None, count=3, is_train=False)
    inputs[1]["image"] = inputs[1]["image"][:, :, :40]  # of different sizes, so padded
    inputs[2].update(height=128, width=192)
    with torch.no_grad():
        together = [x["instances"] for x in student.eval()(inputs)]
        alone = [student([x])[0]["instances"] for x in inputs]
    assert len(together) == 3
    for one, other in zip(together, alone):
        assert len(one) > 5
        torch.testing.assert_close(one.scores, other.scores)
        torch.testing.assert_close(one.pred_boxes.tensor, other.pred_boxes.tensor)
    assert not torch.equal(together[0].scores, together[1].scores)
    assert together[2].image_size == (128, 192)


def test_without_a_teacher_it_cannot_be_trained(student_config, batch):
    cfg = student_config()
    with pytest.raises(RuntimeError, match="no teacher; call .*attach_teacher"):
        losses_of(build(cfg), batch(cfg, "lr"))


def test_levels_that_cannot_meet_are_named(student_config):
    # The student's finest level then has stride 4 x 64, the teacher's coarsest has 64.
    plain = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"]
    plain += ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"]
    cfg = student_config("KD.SCALE", 64, "KD.TEACHER.BRANCH", "hr", "KD.TEACHER.OPTS", plain)
    with pytest.raises(InputError, match="no level of the student.*'p2': 256.*KD.SCALE"):
        build(cfg)
    hr = build_model(student_config("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"))
    with pytest.raises(InputError, match="no level of the student.*'p2': 8.*'p2': 256.*KD.SCALE"):
        build(student_config()).set_teacher(Teacher(hr, branch="lr", scale=64))


def test_maps_of_unequal_width_are_named(student_config):
    never = [{"name": "l1", "weight": 1.0, "adapter": False}]
    cfg = student_config("MODEL.FPN.OUT_CHANNELS", 8, "KD.LOSSES", never)
    with pytest.raises(InputError, match="level p2 .* 8 channels, and level p3 .* with 16"):
        attach_teacher(build(cfg), cfg)


def test_a_narrower_student_has_adapters_and_exports_without(student_config, batch, tmp_path):
    width = ["MODEL.FPN.OUT_CHANNELS", 8]
    cfg = student_config(*width)
    model = build(cfg)
    attach_teacher(model, cfg)
    own = [key for key in model.state_dict() if key.startswith("distiller.")]
    assert own == [f"distiller.adapters.p{s}.{x}" for s in range(2, 7) for x in ("weight", "bias")]
    sum(losses_of(model, batch(cfg, "lr"), WARMUP).values()).backward()
    assert all(p.grad is not None for p in model.distiller.parameters())
    torch.save({"model": model.state_dict()}, tmp_path / "trained.pth")
    strip_checkpoint(tmp_path / "trained.pth", tmp_path / "student.pth")
    exported = torch.load(tmp_path / "student.pth", weights_only=True)["model"]
    stock = build(student_config("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", *width))
    assert set(exported) == set(stock.state_dict())


def test_the_gradients_are_compared_where_the_bottom_up_path_is_frozen(student_config, batch):
    finest = [{"name": "l1", "weight": 1.0, "levels": ["p2"]}]
    frozen = ["MODEL.BACKBONE.FREEZE_AT", 5, "KD.LOSSES", finest]
    cfg = student_config("KD.GRADIENT_RATIO_PERIOD", 1, *frozen)
    model = build(cfg)
    attach_teacher(model, cfg)
    assert last_layer(model.backbone) is model.backbone.fpn_lateral5.weight
    with EventStorage(WARMUP) as storage:
        model.train()(batch(cfg, "lr"))
    assert storage.latest()["kd/gradient_ratio"][0] > 0


def test_the_gradients_of_both_kinds_are_compared(student_config, batch):
    cfg = student_config("KD.GRADIENT_RATIO_PERIOD", 2, "KD.DIAGNOSTICS_PERIOD", 0)
    model = build(cfg)
    attach_teacher(model, cfg)
    inputs = batch(cfg, "lr")
    logged = []
    for iteration in (2 * WARMUP, 2 * WARMUP + 1):
        torch.manual_seed(1)
        with EventStorage(iteration) as storage:
            losses = model.train()(inputs)
        logged.append(storage.latest())
    assert "kd/gradient_ratio" not in logged[0]
    ratio = logged[1]["kd/gradient_ratio"][0]
    assert all(p.grad is None for p in model.parameters())
    layer = last_layer(model.backbone)
    assert layer is model.backbone.bottom_up.res5[-1].conv3.weight
    norms = {}
    for kind in (True, False):
        model.zero_grad()
        mine = [v for k, v in losses.items() if k.startswith("loss_kd_") is kind]
        sum(mine).backward(retain_graph=True)
        norms[kind] = layer.grad.norm().item()
    assert ratio == pytest.approx(norms[True] / norms[False], rel=1e-5)


def test_where_gradients_are_compared_if_the_bottom_up_path_is_frozen(config):
    backbone = KDTrainer.build_model(config("lr")).backbone
    backbone.bottom_up.requires_grad_(False)
    layer = last_layer(backbone)
    assert layer.requires_grad and any(layer is p for p in backbone.parameters())
    backbone.requires_grad_(False)
    with pytest.raises(InputError, match="all of them are frozen; set it to 0"):
        last_layer(backbone)


def test_without_a_loss_no_gradients_are_compared(student_config, batch):
    cfg = student_config("KD.LOSSES", [], "KD.GRADIENT_RATIO_PERIOD", 1)
    model = build(cfg)
    attach_teacher(model, cfg)
    assert not any(name.startswith("loss_kd") for name in losses_of(model, batch(cfg, "lr"), 1))


def test_comparing_the_gradients_does_not_change_them(student_config, batch):
    cfg = student_config("KD.GRADIENT_RATIO_PERIOD", 2)
    model = build(cfg)
    attach_teacher(model, cfg)
    inputs, found = batch(cfg, "lr"), []
    for iteration in (2 * WARMUP, 2 * WARMUP + 1):  # without, and with it
        torch.manual_seed(1)
        model.zero_grad()
        sum(losses_of(model, inputs, iteration).values()).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert found[0] and all(map(torch.equal, *found))


@pytest.mark.parametrize("branch", ["hr", "lr", "fused"])
def test_it_learns_from_any_branch(student_config, batch, branch):
    cfg = student_config("KD.TEACHER.BRANCH", branch)
    model = build(cfg)
    assert attach_teacher(model, cfg).branch == branch
    assert model.distiller.pairs == {f"p{s}": f"p{s + 1}" for s in range(2, 7)}
    assert losses_of(model, batch(cfg, "lr"), WARMUP)["loss_kd_l1"] > 0


@pytest.mark.parametrize("name", sorted(name for name, _ in DISTILL_LOSS_REGISTRY))
def test_every_loss_is_one_override_away(student_config, batch, name):
    cfg = student_config("KD.LOSSES", [{"name": name, "weight": 0.01}])
    model = build(cfg)
    attach_teacher(model, cfg)
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
        model = build(cfg)
        attach_teacher(model, cfg)
        assert {"loss_mine", "loss_kd_l1", "loss_mask"} <= losses_of(model, batch(cfg, "lr")).keys()
    finally:
        META_ARCH_REGISTRY._obj_map.pop("DistilledLouder")


def test_it_is_a_stock_mask_rcnn():
    assert issubclass(DistilledRCNN, GeneralizedRCNN)
    assert DistilledRCNN.inference is GeneralizedRCNN.inference
