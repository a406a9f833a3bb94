"""Swin backbones: torchvision's net at any image size, quiet when frozen, its weights loadable."""

import subprocess
import sys

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_backbone, build_model
from helpers import ROOT, differing, tensors_of, train

from msad_kd import KDTrainer
from msad_kd.distill.teacher import Teacher
from msad_kd.modeling.swin import SwinBackbone, convert_torchvision
from msad_kd.utils.errors import InputError

TINY = {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}
BUILDERS = {kind: f"build_{kind}swin_fpn_backbone" for kind in ("", "aligned_")}
BUILDERS["retinanet_"] = BUILDERS[""]


def options(builder=""):
    keys = [
        *("MODEL.BACKBONE.NAME", BUILDERS[builder], "MODEL.SWIN.EMBED_DIM", 24),
        *("MODEL.SWIN.DEPTHS", [1, 1, 2, 1], "MODEL.SWIN.NUM_HEADS", [1, 2, 4, 8]),
        *("MODEL.SWIN.WINDOW_SIZE", 4, "MODEL.SWIN.STOCHASTIC_DEPTH_PROB", 0.5),
    ]
    if builder == "retinanet_":
        stages = ["res3", "res4", "res5"]
        keys += ["MODEL.FPN.TOP_BLOCK", "conv_res5", "MODEL.FPN.IN_FEATURES", stages]
        keys += ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 8]
        keys += ["MODEL.RETINANET.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"]]
    return keys


def tiny(**changes):
    torch.manual_seed(0)
    return SwinBackbone(**{**TINY, **changes})


@pytest.mark.parametrize(
    ("builder", "levels", "divisibility"), [("", "23456", 32), ("aligned_", "234567", 64)]
)
def test_levels_and_strides(config, builder, levels, divisibility):
    backbone = build_backbone(config("hr", *options(builder))).eval()
    strides = {name: shape.stride for name, shape in backbone.output_shape().items()}
    assert strides == {f"p{s}": 2 ** int(s) for s in levels}
    assert backbone.size_divisibility == divisibility
    found = backbone(torch.zeros(2, 3, 128, 64))
    shapes = {name: tuple(x.shape) for name, x in found.items()}
    assert shapes == {n: (2, 16, -(-128 // s), -(-64 // s)) for n, s in strides.items()}


def test_levels_of_a_retinanet(config):
    backbone = build_backbone(config("hr", *options("retinanet_"))).eval()
    strides = {name: shape.stride for name, shape in backbone.output_shape().items()}
    assert strides == {f"p{s}": 2**s for s in range(3, 8)}
    found = backbone(torch.zeros(1, 3, 128, 64))
    assert {n: x.shape[-2] for n, x in found.items()} == {n: 128 // s for n, s in strides.items()}


def test_levels_above_p5_are_as_the_config_says(config):
    backbone = build_backbone(config("hr", *options("aligned_"), "MODEL.FPN.TOP_BLOCK", "conv_p5"))
    levels = backbone(torch.randn(1, 3, 128, 64))
    assert list(levels) == ["p2", "p3", "p4", "p5", "p6", "p7"]
    assert torch.equal(levels["p6"], backbone.top_block.p6(levels["p5"]))


def attention(module, x):
    """What the module should answer to (H, W, C), cell by cell.

    A cell attends to the cells of its window, those beyond the border (zeros) included, as far as
    the shift has not brought them from the other side of the map.
    """
    (window, _), (shift, _) = module.window_size, module.shift_size
    height, width, channels = x.shape
    rows, columns = (-(-side // window) * window for side in (height, width))
    # A side of one window only is not shifted.
    down, right = (shift if side > window else 0 for side in (rows, columns))
    padded = torch.zeros(rows, columns, channels)
    padded[:height, :width] = x
    heads = module.num_heads
    q, k, v = module.qkv(padded).view(rows, columns, 3, heads, -1).unbind(2)
    table = module.relative_position_bias_table.view(2 * window - 1, 2 * window - 1, heads)
    answers = torch.zeros(height, width, heads, channels // heads)

    def windows(i, moved):  # of a row or column, the same for cells that see each other
        return (i - moved) // window

    for r in range(height):
        for c in range(width):
            seen = [
                (i, j)
                for i in range(rows)
                for j in range(columns)
                if windows(i, down) == windows(r, down) and windows(j, right) == windows(c, right)
            ]
            scores = torch.stack(
                [
                    (q[r, c] * k[i, j]).sum(-1) * (channels // heads) ** -0.5
                    + table[r - i + window - 1, c - j + window - 1]
                    for i, j in seen
                ]
            )
            weights = scores.softmax(0)
            answers[r, c] = sum(w[:, None] * v[i, j] for w, (i, j) in zip(weights, seen))
    return module.proj(answers.flatten(2))


@pytest.mark.parametrize("size", [(8, 8), (5, 11), (9, 3), (7, 6)])
@pytest.mark.parametrize("block", [0, 1], ids=["plain", "shifted"])
@torch.no_grad()
def test_windows_are_padded_and_masked_rightly(size, block):
    module = tiny().features[5][block].attn
    assert (module.shift_size == [2, 2]) == bool(block)
    torch.nn.init.normal_(module.relative_position_bias_table)
    torch.nn.init.normal_(module.qkv.bias)
    x = torch.randn(*size, 96)
    assert torch.allclose(module(x[None])[0], attention(module, x), atol=1e-5)


@torch.no_grad()
def test_it_is_torchvisions_net():
    ours = tiny().eval()
    theirs = torchvision.models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=24,
        depths=TINY["depths"],
        num_heads=TINY["num_heads"],
        window_size=[4, 4],
    ).eval()
    missing = theirs.load_state_dict(ours.state_dict(), strict=False).missing_keys
    assert all(key.startswith(("norm.", "head.")) for key in missing)
    image = torch.randn(2, 3, 52, 100)
    found = ours(image)
    for name, end in (("res2", 2), ("res3", 4), ("res4", 6), ("res5", 8)):
        expected = ours.norms[name](theirs.features[:end](image)).permute(0, 3, 1, 2)
        assert torch.equal(found[name], expected)


@pytest.mark.parametrize("size", [(61, 83), (33, 31), (1, 7), (64, 96)])
@torch.no_grad()
def test_any_image_size(size):
    backbone = tiny().eval()
    image = torch.randn(1, 3, *size)
    found = backbone(image)
    sides = torch.tensor(size)
    for name, shape in backbone.output_shape().items():
        assert found[name].shape == (1, shape.channels, *(-(-sides // shape.stride)).tolist())
    padded = torch.zeros(1, 3, *(-(-sides // 4) * 4).tolist())
    padded[..., : size[0], : size[1]] = image
    assert differing(found, backbone(padded)) == []


def test_a_teachers_passes_are_identical_and_a_trained_models_are_not(config, batch):
    cfg = config("hr", *options())
    model = build_model(cfg)
    inputs = [{"image_hr": x["image_hr"], "image": x["image"]} for x in batch(config("lr"), "lr")]
    teacher = Teacher(model.train(), branch="hr", scale=2)
    passes = [teacher.pyramid(inputs, (32, 64)) for _ in range(2)]
    assert differing(*passes) == []
    image = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        one, other = (model.train().backbone(image) for _ in range(2))
    assert set(differing(one, other)) == {f"p{s}" for s in range(2, 7)}


@pytest.mark.parametrize(("freeze_at", "layers"), [(0, 0), (1, 1), (2, 2), (3, 4), (4, 6), (5, 8)])
def test_what_is_frozen_is_still(freeze_at, layers):
    backbone = tiny(freeze_at=freeze_at, stochastic_depth_prob=0.5).train()
    for i, layer in enumerate(backbone.features):
        assert all(p.requires_grad == (i >= layers) for p in layer.parameters())
        assert all(module.training == (i >= layers) for module in layer.modules())
    trained = [name for name, norm in backbone.norms.items() if norm.weight.requires_grad]
    assert trained == ["res2", "res3", "res4", "res5"][max(freeze_at - 1, 0) :]
    image = torch.randn(8, 3, 64, 64)
    one, other = backbone(image), backbone(image)
    assert torch.equal(one["res3"], other["res3"]) == (freeze_at >= 3)


@pytest.mark.parametrize("stages", [["res2", "res3"], ["res3", "res4", "res5"]])
def test_every_parameter_has_a_gradient(stages):
    backbone = tiny(out_features=stages)
    found = backbone(torch.randn(1, 3, 64, 64))
    assert list(found) == list(backbone.output_shape()) == stages
    sum(x.square().sum() for x in found.values()).backward()
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize(
    ("role", "builder"), [("hr", ""), ("hr", "retinanet_"), ("teacher", "aligned_")]
)
def test_a_detector_is_trained(config, role, builder):
    cfg = config(role, *options(builder), "SOLVER.MAX_ITER", 1, "DATASETS.TEST", ())
    torch.manual_seed(cfg.SEED)
    before = tensors_of(KDTrainer.build_model(cfg).backbone)
    trainer = train(cfg)
    moved = differing(before, tensors_of(trainer.model.backbone))
    assert {"bottom_up.features.0.0.weight", "bottom_up.norms.res5.bias"} <= set(moved)
    with torch.no_grad():
        assert len(trainer.model.eval()(next(iter(trainer.data_loader)))) == 2


def test_a_student_learns_from_a_swin(config, config_files, tmp_path):
    teacher = build_model(config("hr", *options()))
    torch.save({"model": teacher.state_dict()}, tmp_path / "swin.pth")
    cfg = config(
        "student",
        *("KD.TEACHER.CONFIG_FILE", str(config_files["hr"]), "KD.TEACHER.OPTS", options()),
        *("KD.TEACHER.WEIGHTS", str(tmp_path / "swin.pth")),
        *("KD.TEACHER.BRANCH", "hr", "KD.TEACHER.INIT_BACKBONE", False),
        *("SOLVER.MAX_ITER", 1, "DATASETS.TEST", ()),
    )
    before = tensors_of(teacher)
    trainer = train(cfg)
    assert isinstance(trainer.teacher.model.backbone.bottom_up, SwinBackbone)
    assert differing(before, tensors_of(trainer.teacher.model)) == []
    assert trainer.storage.history("loss_kd_l1").latest() >= 0


def test_the_bias_of_positions_is_not_decayed(config):
    cfg = config("hr", *options(), "SOLVER.WEIGHT_DECAY", 0.05)
    model = build_model(cfg)
    decay = {
        id(p): group["weight_decay"]
        for group in KDTrainer.build_optimizer(cfg, model).param_groups
        for p in group["params"]
    }
    block = model.backbone.bottom_up.features[1][0]
    assert decay[id(block.attn.relative_position_bias_table)] == 0
    assert decay[id(block.norm1.weight)] == 0
    assert decay[id(block.mlp[0].weight)] == 0.05


SIZES = {
    "t": {},
    "s": {"depths": [2, 2, 18, 2]},
    "b": {"depths": [2, 2, 18, 2], "embed_dim": 128, "num_heads": [4, 8, 16, 32]},
}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_torchvisions(config, size):
    keys = config("hr").MODEL.SWIN
    default = {
        "embed_dim": keys.EMBED_DIM,
        "depths": keys.DEPTHS,
        "num_heads": keys.NUM_HEADS,
        "window_size": keys.WINDOW_SIZE,
    }
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"swin_{size}")(weights=None)
        ours = SwinBackbone(**{**default, **SIZES[size]})
    shapes = {k: v.shape for k, v in ours.state_dict().items() if not k.startswith("norms.")}
    expected = {k: v.shape for k, v in theirs.state_dict().items() if k.startswith("features.")}
    assert shapes == expected


def convert(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "convert_swin.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_torchvisions_weights_are_converted_and_loaded(config, tmp_path):
    theirs = {
        **{name: value for name, value in tiny().state_dict().items() if "norms" not in name},
        **{"norm.weight": torch.ones(192), "head.bias": torch.zeros(1000)},
    }
    torch.save(theirs, tmp_path / "swin_t.pth")
    models = {}
    for image_format in ("BGR", "RGB"):
        target = tmp_path / "new" / f"{image_format}.pth"
        done = convert(tmp_path / "swin_t.pth", target, "--format", image_format)
        assert done.returncode == 0, done.stderr
        torch.manual_seed(1)
        model = build_model(config("hr", *options())).eval()
        names = {name for name in model.state_dict() if name.startswith("backbone.bottom_up.")}
        incompatible = DetectionCheckpointer(model).load(str(target))
        assert incompatible == {}
        loaded = torch.load(target, weights_only=True)["model"]
        assert {n for n in names - loaded.keys() if ".norms." not in n} == set()
        assert loaded.keys() <= names
        models[image_format] = model.backbone
    image = torch.randn(1, 3, 64, 64)
    found = models["BGR"](image)
    expected = models["RGB"](image.flip(1))
    assert all(torch.allclose(found[level], expected[level], atol=1e-5) for level in found)


def test_weights_that_cannot_be_converted(tmp_path):
    with pytest.raises(InputError, match="no weights of torchvision's Swin"):
        convert_torchvision({"conv1.weight": torch.zeros(1)}, "BGR")
    with torch.device("meta"):
        second = torchvision.models.swin_v2_t(weights=None).state_dict()
    with pytest.raises(InputError, match="Swin V2"):
        convert_torchvision(second, "BGR")
    assert "'gone.pth' does not exist" in convert("gone.pth", tmp_path / "x.pth").stderr
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 cut short")
    assert "cannot be read" in convert(tmp_path / "broken.pth", tmp_path / "x.pth").stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depths": [2, 2, 6]}, r"MODEL.SWIN.DEPTHS is \[2, 2, 6\]; give one number"),
        ({"num_heads": [1, 2]}, r"MODEL.SWIN.NUM_HEADS is \[1, 2\]"),
        ({"num_heads": [1, 5, 4, 8]}, "5 heads cannot share out the 48 channels of res3"),
        ({"out_features": ["stage2"]}, "MODEL.FPN.IN_FEATURES is .*use one or more of res2"),
        ({"out_features": []}, "MODEL.FPN.IN_FEATURES is"),
    ],
)
def test_what_cannot_be_built(changes, words):
    with pytest.raises(InputError, match=words):
        tiny(**changes)


def test_configs_that_cannot_be_built(config):
    grey = ["MODEL.PIXEL_MEAN", [120.0], "MODEL.PIXEL_STD", [64.0]]
    with pytest.raises(InputError, match="PIXEL_MEAN has 1 values"):
        build_backbone(config("hr", *options(), *grey))
