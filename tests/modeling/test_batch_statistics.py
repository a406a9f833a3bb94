"""Separate running statistics of batch normalisation for each resolution."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.utils import comm
from helpers import NO_TEST, load_tool, run_script, train
from torch import distributed as dist
from torch import nn

from msad_kd import KDTrainer, build_config
from msad_kd.checkpoint.start import init_from_teacher
from msad_kd.modeling.batch_statistics import (
    add_low_resolution_statistics,
    check_synchronised,
    low_resolution_statistics,
    share_statistics,
)
from msad_kd.utils.errors import InputError

SEPARATE = ("MODEL.MULTI_RESOLUTION.SEPARATE_STATISTICS", True)


def test_each_resolution_updates_and_uses_its_own():
    norm = nn.Sequential(nn.BatchNorm2d(1, momentum=1.0, eps=1e-12))
    with low_resolution_statistics(norm):  # without a second set nothing changes
        norm(torch.rand(2, 1, 3, 3))
    assert norm[0].num_batches_tracked == 1
    assert not any("_lr" in key for key in norm.state_dict())
    add_low_resolution_statistics(norm)
    high, low = torch.tensor([0.0, 2.0]), torch.tensor([10.0, 30.0])
    norm(high.reshape(1, 1, 1, 2))
    with low_resolution_statistics(norm):
        norm(low.reshape(1, 1, 1, 2))
    assert (norm[0].running_mean.item(), norm[0].running_mean_lr.item()) == (1.0, 20.0)
    norm.eval()
    norm[0].running_var.fill_(1.0)
    norm[0].running_var_lr.fill_(4.0)
    x = torch.full((1, 1, 1, 1), 20.0)
    assert norm(x).item() == 19.0
    with low_resolution_statistics(norm):
        assert norm(x).item() == 0.0
    assert norm(x).item() == 19.0  # the context ended


def test_the_weights_are_those_of_shared_statistics(config):
    """In training, batch normalisation reads no running statistics."""
    models = []
    for options in ((), SEPARATE):
        torch.manual_seed(0)
        models.append(train(config("teacher", *NO_TEST, *options)).model)
    shared, separate = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(shared[name], separate[name]) for name in shared)
    buffers = dict(models[1].named_buffers())
    name = "backbone.bottom_up.stem.conv1.norm.running_mean"
    assert not torch.equal(buffers[name], buffers[f"{name}_lr"])


def test_a_student_gets_those_of_its_resolution(config):
    teacher = KDTrainer.build_model(config("teacher", *SEPARATE))
    key = "bottom_up.stem.conv1.norm.running_mean"
    teacher.backbone.get_buffer(f"{key}_lr").fill_(7.0)
    student = KDTrainer.build_model(config("lr"))
    assert init_from_teacher(student, teacher) == []
    assert (student.backbone.get_buffer(key) == 7.0).all()


def test_the_tool_gives_them_to_a_teacher_that_shared(config_files, tmp_path):
    model = KDTrainer.build_model(build_config(str(config_files["teacher"]), []))
    source, target = tmp_path / "shared.pth", tmp_path / "precise.pth"
    torch.save({"model": model.state_dict()}, source)
    arguments = ["--config-file", config_files["teacher"], source, target, *SEPARATE]
    run_script("tools/analysis/precise_statistics.py", "--batches", 2, *arguments)
    state = torch.load(target, weights_only=True)["model"]
    name = "backbone.bottom_up.stem.conv1.norm.running_mean"
    assert state.keys() > model.state_dict().keys()
    assert not torch.equal(state[name], model.state_dict()[name])
    assert not torch.equal(state[name], state[f"{name}_lr"])
    assert all(torch.equal(state[key], value) for key, value in model.named_parameters())
    names = ["precise.pth", "precise.pth.sha256", "shared.pth"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize(
    ("role", "keys", "words"),
    [
        ("teacher", None, "source.pth' for its statistics does not exist"),
        ("lr", ["x"], "lr.yaml' is not a multi-resolution teacher"),
        ("teacher", ["x"], "does not fit the config .*keys of the model are absent"),
        ("folder", ["x"], "' is a folder; name a file to write"),
        ("shared", ["x"], "share their statistics; add MODEL.MULTI_RESOLUTION.SEPARATE_STATISTICS"),
    ],
)
def test_what_the_tool_cannot_do(role, keys, words, config_files, tmp_path):
    source = tmp_path / "source.pth"
    if keys is not None:
        torch.save({"model": dict.fromkeys(keys, torch.zeros(1))}, source)
    opts = [] if role == "shared" else [*map(str, SEPARATE)]
    file = config_files["lr" if role == "lr" else "teacher"]
    target = tmp_path / ("target.pth" if role != "folder" else "")
    paths = {"config_file": str(file), "source": str(source), "target": str(target)}
    with pytest.raises(InputError, match=words):
        load_tool("precise_statistics").main(SimpleNamespace(batches=1, opts=opts, **paths))
    assert not target.is_file()


def test_the_statistics_of_both_resolutions_are_shared(monkeypatch):
    module = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 1))
    add_low_resolution_statistics(module)
    sent = []
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: sent.append((tensor, source)))
    share_statistics(module)
    assert sent == []  # one process
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    share_statistics(module)
    assert [(id(x), 0) for x in module.buffers()] == [(id(x), source) for x, source in sent]
    assert len(sent) == 6


@pytest.mark.parametrize(
    "options",
    [
        {"MODEL.RESNETS.NORM": "SyncBN"},
        {"MODEL.RESNETS.NORM": "nnSyncBN", "MODEL.FPN.NORM": "SyncBN"},
        {"MODEL.ROI_BOX_HEAD.NORM": "SyncBN", "MODEL.ROI_BOX_HEAD.NUM_CONV": 1},
        {"MODEL.ROI_MASK_HEAD.NORM": "SyncBN"},
        {
            "MODEL.BACKBONE.NAME": "build_timm_fpn_backbone",
            "MODEL.TIMM.NORM": "SyncBN",
            "MODEL.TIMM.PRETRAINED": False,
        },
    ],
    ids=lambda options: "-".join(options),
)
def test_synchronised_statistics_need_gpus(config, monkeypatch, options):
    cfg = config("lr", *(x for pair in options.items() for x in pair))
    model = KDTrainer.build_model(cfg)
    check_synchronised(model, cfg)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    keys = ", ".join(sorted(k for k, v in options.items() if k.endswith("NORM")))
    with pytest.raises(InputError) as error:
        KDTrainer.build_optimizer(cfg, model)
    named, _, words = str(error.value).partition(": ")
    assert ", ".join(sorted(named.split(", "))) == keys
    assert "SyncBN needs GPUs, and 2 processes train on the CPU" in words
    cfg.MODEL.DEVICE = "cuda"
    check_synchronised(model, cfg)
