"""MODEL.WEIGHTS: one line says how much of the model is in the file."""

import logging
import pickle

import numpy as np
import pytest
import torch
from checkpoints import Net
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone
from helpers import differing
from torch import nn

from msad_kd.checkpoint.checkpoint import SafeCheckpointer, load_strictly
from msad_kd.utils.errors import InputError

STATE = {key: value.clone() for key, value in Net().state_dict().items()}


def load(tmp_path, state, net=None, caplog=None):
    torch.save({"model": state}, tmp_path / "a.pth")
    with caplog.at_level(logging.INFO, "msad_kd"):
        SafeCheckpointer(net or Net()).load(str(tmp_path / "a.pth"))
    (record,) = [record for record in caplog.records if record.name.startswith("msad_kd")]
    assert "\n" not in record.getMessage()
    return record.levelname, record.getMessage()


class TestOneLineSaysWhatFits:
    def test_all(self, tmp_path, caplog):
        level, line = load(tmp_path, {f"module.{k}": v for k, v in STATE.items()}, caplog=caplog)
        assert level == "INFO" and "6 of the model's 6 weights are in" in line
        assert "a.pth' for MODEL.WEIGHTS" in line and "untrained" not in line

    def test_a_head_of_other_classes_starts_untrained(self, tmp_path, caplog):
        net = Net(classes=5)
        level, line = load(tmp_path, STATE, net, caplog)
        assert level == "WARNING" and "4 of the model's 6" in line
        assert "2 start untrained: head.weight (1), head.bias (1)" in line
        assert "head.weight (2, 3) -> (5, 3)" in line
        assert torch.equal(net.norm.weight, STATE["norm.weight"])

    def test_keys_of_one_side_only(self, tmp_path, caplog):
        state = {"body." + k if "head" in k else k: v for k, v in STATE.items()}
        _, line = load(tmp_path, state, caplog=caplog)
        assert "2 start untrained: head.weight (1), head.bias (1)" in line
        assert "2 of the file's are not in the model: body.head (2)" in line

    @pytest.mark.parametrize(
        "state",
        [
            {f"student.{key}": value for key, value in STATE.items()},
            {key: torch.ones(7) for key in STATE if "num" not in key},
            {"norm.num_batches_tracked": torch.tensor(3)},
        ],
    )
    def test_nothing(self, tmp_path, state):
        torch.save({"model": state}, tmp_path / "a.pth")
        words = f"none of the {len(state)} weights of '.*a.pth' for MODEL.WEIGHTS fits"
        with pytest.raises(InputError, match=words):
            SafeCheckpointer(Net()).load(str(tmp_path / "a.pth"))

    def test_an_averaged_counter_is_loaded(self, tmp_path, caplog):
        counter = {"norm.num_batches_tracked": torch.tensor(2.5)}  # of averaged checkpoints
        assert load(tmp_path, STATE | counter, caplog=caplog)[0] == "INFO"

    @pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_another_kind_of_numbers_is_refused(self, tmp_path, dtype, prefix):
        state = {prefix + key: value for key, value in STATE.items()}
        state[f"{prefix}head.weight"] = torch.ones(2, 3).to(dtype)
        torch.save({"model": state}, tmp_path / "a.pth")
        for load_file in (
            lambda path: SafeCheckpointer(Net()).load(path),
            lambda path: load_strictly(Net(), path, "MODEL.WEIGHTS"),
        ):
            with pytest.raises(InputError, match=f"for MODEL.WEIGHTS .*head.weight' .{dtype}"):
                load_file(str(tmp_path / "a.pth"))


def test_names_are_matched_as_detectron2_matches_them(tmp_path):
    cfg = get_cfg()
    cfg.MODEL.RESNETS.update(STEM_OUT_CHANNELS=4, RES2_OUT_CHANNELS=8, WIDTH_PER_GROUP=4)
    stock, safe, from_address = (build_resnet_backbone(cfg, ShapeSpec(channels=3)) for _ in "123")
    before = {key: value.clone() for key, value in stock.state_dict().items()}
    for net in (safe, from_address):
        net.load_state_dict(before)
    names = {
        "conv1_w": "stem.conv1.weight",
        "res_conv1_bn_s": "stem.conv1.norm.weight",
        "res2_0_branch2a_w": "res2.0.conv1.weight",
        "res2_0_branch2a_bn_b": "res2.0.conv1.norm.bias",
    }
    blobs = {name: np.random.rand(*before[key].shape).astype("f4") for name, key in names.items()}
    path = tmp_path / "R.pkl"
    path.write_bytes(pickle.dumps({"blobs": blobs}, 2))
    DetectionCheckpointer(stock).load(str(path))
    SafeCheckpointer(safe).load(str(path))
    assert differing(stock.state_dict(), safe.state_dict()) == []
    assert {*differing(stock.state_dict(), before)} >= {*names.values()}
    # Detectron2's git main takes this at the end of an address.
    state = {names[name]: torch.from_numpy(value) for name, value in blobs.items()}
    torch.save({"model": state}, tmp_path / "R.pth")
    body = nn.ModuleDict({"body": from_address})
    SafeCheckpointer(body).load(f"{tmp_path / 'R.pth'}?matching_heuristics=True")
    loaded = from_address.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
