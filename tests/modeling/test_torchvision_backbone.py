"""torchvision's networks: as backbones, and their weights for Detectron2's ResNet."""

import logging
from types import SimpleNamespace

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from helpers import differing, load_tool, tensors_of, train
from torch import nn
from torchvision.models import get_model
from torchvision.models.feature_extraction import create_feature_extractor

from msad_kd.modeling.torchvision_backbone import TorchvisionBackbone
from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import preserved_rng

STAGES = ["res2", "res3", "res4", "res5"]
MOBILE = [
    *("MODEL.TORCHVISION.NAME", "mobilenet_v2", "MODEL.TORCHVISION.ARGUMENTS", ["width_mult", 0.1]),
    *("MODEL.TORCHVISION.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0),
]
STUDENT = ["MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone", *MOBILE]
TEACHER = ["MODEL.BACKBONE.NAME", "build_aligned_torchvision_fpn_backbone", *MOBILE]


def backbone(name="resnet18", **arguments):
    defaults = {"arguments": {}, "norm": "BN", "freeze_at": 0, "out_features": STAGES}
    torch.manual_seed(0)
    return TorchvisionBackbone(name=name, **{**defaults, **arguments})


def test_the_maps_of_a_resnet_are_its_stages():
    found = backbone().train()
    torch.manual_seed(0)
    expected = create_feature_extractor(
        get_model("resnet18"), {f"layer{s - 1}": f"res{s}" for s in range(2, 6)}
    ).train()
    image = torch.randn(2, 3, 64, 96)
    for mode in (True, False):
        found.train(mode), expected.train(mode)
        with torch.no_grad():
            mine, theirs = found(image), expected(image)
        assert list(mine) == STAGES and differing(mine, theirs) == []
    shapes = {name: (shape.stride, shape.channels) for name, shape in found.output_shape().items()}
    assert shapes == {"res2": (4, 64), "res3": (8, 128), "res4": (16, 256), "res5": (32, 512)}
    names = [f"body.{name}" for name in get_model("resnet18").state_dict()]
    assert names[-1] == "body.fc.bias" and list(found.state_dict()) == names[:-2]


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("mobilenet_v3_small", (72, 96, 288, 576)),  # the expansions before it strides
        ("shufflenet_v2_x0_5", (24, 48, 96, 1024)),
    ],
)
def test_the_maps_of_other_networks(name, channels):
    found = backbone(name, out_features=STAGES)
    maps = found(torch.zeros(1, 3, 64, 96))
    for stride, channel, (feature, value) in zip((4, 8, 16, 32), channels, maps.items()):
        assert found.output_shape()[feature].stride == stride
        assert value.shape == (1, channel, 64 // stride, 96 // stride)
        assert found.output_shape()[feature].channels == channel


def test_looking_for_the_maps_draws_no_random_number_and_moves_no_statistics():
    with preserved_rng():
        torch.manual_seed(0)
        stock = get_model("resnet18")
        after = torch.rand(1)
        mine = backbone()
        assert torch.equal(torch.rand(1), after)
    kept = {f"body.{k}": v for k, v in stock.state_dict().items() if not k.startswith("fc")}
    assert differing(mine.state_dict(), kept) == []


def test_a_frozen_block_is_never_skipped():
    frozen, images = backbone("efficientnet_b0", freeze_at=5).train(), torch.rand(2, 3, 64, 64)
    kept = frozen(images)
    for _ in range(3):
        for name, value in frozen(images).items():
            assert torch.equal(value, kept[name])


@pytest.mark.parametrize("stages", [0, 1, 2, 3, 5])
def test_freezing_is_that_of_detectron2s_resnet(stages):
    found = backbone(freeze_at=stages)
    parts = [("body.conv1", "body.bn1"), *((f"body.layer{i}",) for i in (1, 2, 3, 4))]
    for i, names in enumerate(parts):
        trained = {p.requires_grad for n, p in found.named_parameters() if n.startswith(names)}
        assert trained == {i >= stages}
        norms = [m for n, m in found.named_modules() if n.startswith(names) and "Norm" in str(m)]
        frozen = {type(m) for m in norms if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))}
        assert frozen == {FrozenBatchNorm2d if i < stages else nn.BatchNorm2d}
    features = found.train()(torch.randn(2, 3, 64, 64))
    assert features["res5"].requires_grad == (stages < 5)


@pytest.mark.parametrize(
    ("norm", "kind"), [("FrozenBN", FrozenBatchNorm2d), ("SyncBN", nn.SyncBatchNorm)]
)
def test_its_normalisation_is_what_the_config_says(norm, kind):
    found = backbone(norm=norm)
    norms = {type(m) for m in found.modules() if "BatchNorm" in type(m).__name__}
    assert norms == {kind}
    stock = backbone()
    assert not set(found.state_dict()) - set(stock.state_dict())
    image = torch.randn(1, 3, 64, 64)
    for one, other in zip(found.eval()(image).values(), stock.eval()(image).values()):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "resnet19"}, "NAME: torchvision has no model 'resnet19'; did you mean resnet1"),
        ({"name": "vit_b_16"}, "NAME: 'vit_b_16' cannot be traced"),
        ({"name": "swin_t"}, r"'swin_t' has no feature map \(N, C, H, W\) of stride 8 for res3"),
        ({"arguments": {"width": 2}}, "ARGUMENTS: 'resnet18' cannot be built with .*width"),
        ({"norm": "GN"}, "NORM is 'GN'; use one of .*SyncBN"),
    ],
)
def test_networks_that_do_not_do(arguments, words):
    with pytest.raises(InputError, match=words):
        backbone(**arguments)


def test_arguments_that_are_no_pairs(config):
    with pytest.raises(InputError, match="ARGUMENTS: .'width_mult'. should be names and values"):
        build_backbone(config("lr", *STUDENT, "MODEL.TORCHVISION.ARGUMENTS", ["width_mult"]))


def test_a_student_and_its_teacher(config, batch, tmp_path):
    teacher, student = build_model(config("teacher", *TEACHER)), build_model(config("lr", *STUDENT))
    mine = {k for k in teacher.state_dict() if not k.startswith("fusion")}
    assert mine == set(student.state_dict())
    assert {k: s.stride for k, s in teacher.backbone.output_shape().items()} == {
        f"p{s}": 2**s for s in range(2, 8)
    }
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    options = ["KD.TEACHER.WEIGHTS", str(tmp_path / "teacher.pth"), "KD.TEACHER.OPTS", TEACHER]
    options += ["SOLVER.MAX_ITER", 2, "DATASETS.TEST", ()]
    before = teacher.state_dict()
    trainer = train(config("student", *STUDENT, *options))
    changed = differing(trainer.model.state_dict(), {k: before[k] for k in mine})
    assert any(name.startswith("backbone.bottom_up.body.features") for name in changed)


# ---- Weights ----


def random_classifier(name):
    """A network whose normalisation does something, as a trained one's does."""
    torch.manual_seed(0)
    net = get_model(name).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(std=0.1)
    return net


@pytest.fixture
def convert(capsys):
    """convert(source, target): runs the tool, and returns the KEY VALUE pairs it prints."""
    convert_torchvision = load_tool("convert_torchvision")

    def run(source, target, keep_names=False):
        capsys.readouterr()
        convert_torchvision.main(
            SimpleNamespace(source=str(source), target=str(target), keep_names=keep_names)
        )
        lines = capsys.readouterr().out.splitlines()
        return [word for line in lines[1:] for word in line.split(maxsplit=1)]

    return run


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_converted_resnet_has_torchvisions_features(name, config, convert, tmp_path, caplog):
    net = random_classifier(name)
    torch.save(net.state_dict(), tmp_path / "tv.pth")
    told = convert(tmp_path / "tv.pth", tmp_path / "d2.pth")
    assert ("MODEL.RESNETS.STRIDE_IN_1X1" in told) == (name == "resnet50")
    width = [*("MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.RESNETS.WIDTH_PER_GROUP", 64)]
    width += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 256]
    cfg = config("lr", *width, *told)
    assert (cfg.INPUT.FORMAT, cfg.MODEL.RESNETS.DEPTH) == ("RGB", int(name[6:]))
    model = nn.Module()
    model.backbone = build_backbone(cfg).eval()
    with caplog.at_level(logging.WARNING):
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    lacking = {word for r in caplog.records for word in r.getMessage().split() if "_" in word}
    assert all("fpn_" in word for word in lacking), lacking
    image = torch.randn(2, 3, 64, 96)
    stages = {f"layer{s - 1}": f"res{s}" for s in range(2, 6)}
    with torch.no_grad():
        expected = create_feature_extractor(net, stages)(image)
        found = model.backbone.bottom_up(image)
    for stage, features in expected.items():
        torch.testing.assert_close(found[stage], features, atol=1e-4, rtol=1e-4)
        assert features.std() > 0.01


def test_other_networks_keep_their_names(config, convert, tmp_path):
    net = get_model("mobilenet_v2", width_mult=0.1)
    torch.save(net.state_dict(), tmp_path / "tv.pth")
    told = convert(tmp_path / "tv.pth", tmp_path / "body.pth")
    assert told[:2] == ["MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone"]
    model = nn.Module()
    model.backbone = build_backbone(config("lr", *STUDENT))
    DetectionCheckpointer(model).load(str(tmp_path / "body.pth"))
    loaded, source = tensors_of(model.backbone.bottom_up.body), net.state_dict()
    assert len(loaded) > 100
    assert all(torch.equal(v, source[k]) for k, v in loaded.items())


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (None, "does not exist"),
        (b"PK\x03\x04 cut short", "cannot be read"),
        ([1, 2], "is no state_dict"),
        ({"layers": 3}, "is no state_dict"),
        (
            {f"layer{s}.{b}.conv1.weight": torch.zeros(1) for s in range(1, 5) for b in range(5)}
            | {"conv1.weight": torch.zeros(1)},
            "5, 5, 5, 5. blocks .* --keep-names",
        ),
    ],
)
def test_files_that_do_not_do(contents, words, convert, tmp_path):
    source = tmp_path / "tv.pth"
    if isinstance(contents, bytes):
        source.write_bytes(contents)
    elif contents is not None:
        torch.save(contents, source)
    with pytest.raises(InputError, match=words):
        convert(source, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_a_resnet_keeps_its_names_if_asked(convert, tmp_path):
    torch.save(get_model("resnet18").state_dict(), tmp_path / "tv.pth")
    told = convert(tmp_path / "tv.pth", tmp_path / "out.pth", keep_names=True)
    assert told[1] == "build_torchvision_fpn_backbone"
    names = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert "backbone.bottom_up.body.layer1.0.conv1.weight" in names
    assert not [name for name in names if "fc" in name or "num_batches" in name]
