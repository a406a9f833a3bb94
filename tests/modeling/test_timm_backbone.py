"""timm's classifiers as backbones of students and teachers, at any image size."""

import numpy as np
import pytest
import timm
import torch
from detectron2.modeling import build_model
from helpers import build, differing, ground_truth, losses_of, tensors_of
from timm.layers import FrozenBatchNormAct2d
from timm.layers.norm_act import FrozenBatchNorm2d
from timm_networks import FAMILIES, MOBILE, STAGES, SWIN, backbone, options
from torch import nn

from msad_kd import KDTrainer, attach_teacher, init_from_teacher
from msad_kd.distill.teacher import Teacher

FROZEN = (FrozenBatchNorm2d, FrozenBatchNormAct2d)
families = pytest.mark.parametrize("name", FAMILIES)


def scenes(frame):
    """Two images of 97 x 131 px, the same of twice the size, and boxes in the frame's pixels."""
    scale, other = (2, "image_lr") if frame == "hr" else (1, "image_hr")
    corners = scale * np.array([[3.0, 5, 40, 61], [20, 11, 93, 30], [50, 40, 57, 49]])
    truth = ground_truth((scale * 97, scale * 131), corners)
    torch.manual_seed(0)
    images = {k: torch.randint(0, 256, (2, 3, k * 97, k * 131)) for k in (1, 2)}
    pairs = zip(images[scale], images[3 - scale])
    return [{"image": image, other: same, "instances": truth} for image, same in pairs]


# ---- Students and teachers ----


@families
def test_a_step_of_a_teacher_and_of_its_student(config, tmp_path, name):
    def step(cfg, model, frame):
        optimizer, before = KDTrainer.build_optimizer(cfg, model), tensors_of(model)
        losses = losses_of(model, scenes(frame))
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        # DistributedDataParallel stops at a parameter without a gradient.
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        optimizer.step()
        moved = differing(before, tensors_of(model))
        assert any(key.startswith("backbone.bottom_up.body.") for key in moved)
        return losses

    opts = options(name, kind="aligned_")
    cfg = config("teacher", *opts)
    teacher = build(cfg)
    assert [s.stride for s in teacher.backbone.output_shape().values()] == [4, 8, 16, 32, 64, 128]
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    assert len(step(cfg, teacher, "hr")) == 15
    keys = ["KD.TEACHER.WEIGHTS", str(tmp_path / "teacher.pth"), "KD.TEACHER.OPTS", opts]
    cfg = config("student", *options(name), *keys)
    student = build(cfg)
    attach_teacher(student, cfg)
    assert step(cfg, student, "lr")["loss_kd_l1"] > 0
    only = teacher.state_dict().keys() - student.state_dict().keys()
    assert only == {"fusion.squeeze.weight", "fusion.excite.weight"}


@families
@pytest.mark.parametrize("size", [(97, 131), (1, 7)])
def test_any_image_size(name, size):
    net = backbone(name).eval()
    found = net(torch.randn(1, 3, *size))
    assert list(found) == STAGES
    for feature, shape in net.output_shape().items():
        cells = [-(-side // shape.stride) for side in size]
        assert found[feature].shape == (1, shape.channels, *cells)


@families
@torch.no_grad()
def test_the_maps_are_those_of_timms_features_only(name):
    arguments = dict(FAMILIES[name])
    if name == SWIN:
        arguments |= {"strict_img_size": False, "always_partition": True}
    theirs = timm.create_model(name, features_only=True, **arguments).eval()
    ours = backbone(name).eval()
    weights = ours.body.state_dict()
    weights |= {key.replace(".", "_", 1): value for key, value in weights.items()}  # layers_0...
    theirs.load_state_dict({key: weights[key] for key in theirs.state_dict()})
    image = torch.randn(2, 3, 64, 128)
    found = ours(image)
    for feature, value in zip(STAGES, theirs(image)[-4:], strict=True):
        if name == SWIN:
            value = value.permute(0, 3, 1, 2)
        if ours.norms:  # the nets without batch normalisation
            value = ours.norms[feature](value)
            assert value.mean(1).abs().max() < 1e-4
        torch.testing.assert_close(found[feature], value, atol=1e-5, rtol=1e-5)
    assert bool(ours.norms) == (name in (SWIN, "convnext_atto"))


@pytest.mark.parametrize("name", [*FAMILIES, "hrnet_w18_small"])
def test_every_trained_parameter_has_a_gradient(name):
    net = backbone(name, out_features=["res2", "res3"])
    sum(x.square().sum() for x in net(torch.randn(2, 3, 64, 64)).values()).backward()
    assert [n for n, p in net.named_parameters() if p.requires_grad != (p.grad is not None)] == []
    if name in FAMILIES:  # timm cuts what is coarser; an HRNet's branches depend on each other
        assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("name", [SWIN, "convnext_atto"])
def test_no_block_is_skipped_in_a_teacher(config, name):
    model = build_model(config("hr", *options(name, drop_path_rate=0.5)))
    teacher = Teacher(model.train(), branch="hr", scale=2)
    passes = [teacher.pyramid(scenes("lr"), (128, 160)) for _ in range(2)]
    assert differing(*passes) == []
    image = torch.randn(4, 3, 64, 64)
    one, other = (model.train().backbone(image) for _ in range(2))
    assert set(differing(one, other)) == {f"p{s}" for s in range(2, 7)}


def test_the_bias_of_positions_is_not_decayed(config):
    cfg = config("hr", *options(SWIN), "SOLVER.WEIGHT_DECAY", 0.05)
    model = build_model(cfg)
    groups = KDTrainer.build_optimizer(cfg, model).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    net = model.backbone.bottom_up
    block = net.body.layers[0].blocks[0]
    assert decay[id(block.attn.relative_position_bias_table)] == 0
    assert decay[id(block.norm1.weight)] == decay[id(net.norms["res2"].weight)] == 0
    assert decay[id(block.mlp.fc1.weight)] == 0.05


def test_each_resolution_has_its_statistics(config):
    separate = ("MODEL.MULTI_RESOLUTION.SEPARATE_STATISTICS", True)
    model = build(config("teacher", *options(kind="aligned_"), *separate))
    losses_of(model, scenes("hr"))
    norm = model.backbone.bottom_up.body.bn1
    assert norm.num_batches_tracked == norm.num_batches_tracked_lr == 1
    assert not torch.equal(norm.running_mean, norm.running_mean_lr)


def test_frozen_layers_have_the_same_statistics_at_both_resolutions(config):
    """They were trained with these, which a teacher and its student get from a checkpoint."""
    separate = ("MODEL.MULTI_RESOLUTION.SEPARATE_STATISTICS", True)
    frozen = options(kind="aligned_") + ["MODEL.BACKBONE.FREEZE_AT", 2]
    teacher = build(config("teacher", *frozen, *separate))
    trained = [key for key in teacher.state_dict() if key.endswith("running_mean_lr")]
    body = teacher.backbone.bottom_up.body
    assert trained and not any("body.bn1." in key for key in trained)
    body.bn1.running_mean.fill_(7.0)
    student = build(config("lr", *options(), "MODEL.BACKBONE.FREEZE_AT", 2))
    init_from_teacher(student, teacher)
    assert (student.backbone.bottom_up.body.bn1.running_mean == 7.0).all()


# ---- Freezing and normalisation ----


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 3, 5])
def test_freezing_is_that_of_detectron2s_resnet(freeze_at):
    net = backbone("resnet18", freeze_at=freeze_at).train()
    before = tensors_of(net)
    net(torch.randn(2, 3, 64, 64))
    moved = differing(before, tensors_of(net))
    for i, part in enumerate(["bn1", "layer1", "layer2", "layer3", "layer4"]):
        parameters = net.body.get_submodule(part).parameters()
        assert {p.requires_grad for p in parameters} == {i >= freeze_at}
        assert any(name.startswith(f"body.{part}.") for name in moved) == (i >= freeze_at)
    assert net.body.conv1.weight.requires_grad == (freeze_at == 0)


@pytest.mark.parametrize("name", [SWIN, "convnext_atto", "tf_efficientnet_lite0"])
def test_no_frozen_block_is_skipped(name):
    arguments = {**FAMILIES[name], "drop_path_rate": 0.9}
    net = backbone(name, arguments=arguments, freeze_at=4).train()
    one, other = (net(torch.ones(2, 3, 64, 64)) for _ in range(2))
    assert not {"res2", "res3", "res4"} & set(differing(one, other))
    assert [value.requires_grad for value in one.values()] == [False, False, False, True]


@pytest.mark.parametrize("name", ["resnet18", MOBILE])  # with and without BatchNormAct2d
@pytest.mark.parametrize(
    ("norm", "kinds"),
    [("FrozenBN", FROZEN), ("SyncBN", nn.SyncBatchNorm), ("BN", nn.BatchNorm2d)],
)
def test_batch_normalisation_is_what_the_config_says(name, norm, kinds):
    net, stock = backbone(name, norm=norm), backbone(name)
    norms = [m for m in net.modules() if "BatchNorm" in type(m).__name__]
    assert norms and all(isinstance(m, kinds) for m in norms)
    assert net.state_dict().keys() <= stock.state_dict().keys()
    image = torch.randn(1, 3, 64, 64)
    for one, other in zip(net.eval()(image).values(), stock.eval()(image).values()):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
