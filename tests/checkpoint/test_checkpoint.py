"""Starting from a teacher, and weights for other programs."""

import logging
import runpy
import sys

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from helpers import ROOT, differing
from torch import nn

from msad_kd.checkpoint.checkpoint import check_exists, load_strictly
from msad_kd.checkpoint.start import init_from_teacher
from msad_kd.checkpoint.strip import strip_checkpoint
from msad_kd.utils.errors import InputError


class Net(nn.Module):
    def __init__(self, outputs=2, extra=False):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, outputs)
        if extra:
            self.distiller = nn.Linear(3, 3)


def test_a_student_inherits_weights_and_buffers():
    teacher, student = Net(), Net(extra=True)
    teacher.norm.running_mean.fill_(7.0)
    assert init_from_teacher(student, teacher) == []
    inherited = {k: v for k, v in student.state_dict().items() if not k.startswith("distiller")}
    assert differing(inherited, teacher.state_dict()) == []
    teacher.head.weight.data.zero_()
    assert student.head.weight.any()  # a copy, not the same tensors


def test_what_is_not_inherited_is_named_once(caplog):
    student = Net(outputs=5)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        assert init_from_teacher(student, Net()) == ["head.weight", "head.bias"]
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "head.weight, head.bias" in record.getMessage()
    assert torch.equal(student.head.weight, before["head.weight"])


def test_a_student_inherits_all_of_an_aligned_teacher(config):
    teacher, student = build_model(config("teacher")), build_model(config("student"))
    assert init_from_teacher(student, teacher) == []


class Detector(nn.Module):
    def __init__(self, stages=1, frozen=False):
        super().__init__()
        self.backbone = nn.Module()
        norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
        self.backbone.bottom_up = nn.Sequential(*(norm(3) for _ in range(stages)))
        self.backbone.neck, self.head = nn.Linear(3, 3), nn.Linear(3, 3)


def test_a_backbone_of_another_net_is_refused_unless_it_stays_behind(caplog):
    for teacher, student in ((Detector(2), Detector()), (Detector(), Detector(2))):
        with pytest.raises(InputError, match="(in 4|5) weights, e.g. .*bottom_up.1.*INIT_BACKBONE"):
            init_from_teacher(student, teacher)
        with caplog.at_level(logging.WARNING):
            assert init_from_teacher(student, teacher, backbone=False) == []
        assert not caplog.records and torch.equal(student.head.weight, teacher.head.weight)
    init_from_teacher(Detector(frozen=True), Detector())  # the same net


def save(net, path, **more):
    torch.save({"model": net.state_dict(), **more}, path)
    return str(path)


def test_strict_loading_takes_what_fits(tmp_path):
    net, other = Net(), Net()
    load_strictly(other, save(net, tmp_path / "a.pth", iteration=3), "x")
    assert differing(net.state_dict(), other.state_dict()) == []


def test_strict_loading_allows_a_students_distiller(tmp_path):
    net = Net()
    load_strictly(net, save(Net(extra=True), tmp_path / "a.pth"), "x")


def test_strict_loading_allows_what_old_checkpoints_hold(tmp_path):
    net = Net()
    state = {
        **net.state_dict(),
        "pixel_mean": torch.zeros(3, 1, 1),
        "pixel_std": torch.ones(3, 1, 1),
    }
    torch.save({"model": state}, tmp_path / "a.pth")
    load_strictly(net, str(tmp_path / "a.pth"), "x")


@pytest.mark.parametrize(
    ("saved", "built", "words"),
    [
        ({"outputs": 4}, {}, r"2 of its keys have another shape.*head.weight \(4, 3\) -> \(2, 3\)"),
        ({}, {"extra": True}, "2 keys of the model are absent from it, e.g. distiller.weight"),
    ],
)
def test_strict_loading_counts_and_names_what_does_not_fit(tmp_path, saved, built, words):
    path = save(Net(**saved), tmp_path / "a.pth")
    with pytest.raises(InputError, match=f"'{path}' does not fit my.yaml: {words}.*another config"):
        load_strictly(Net(**built), path, "my.yaml")


@pytest.mark.parametrize("half", [False, True])
def test_export_is_the_model_alone(tmp_path, half):
    net = Net(extra=True)
    source = save(net, tmp_path / "train.pth", optimizer={"state": [1]}, iteration=9)
    target = tmp_path / "model.pth"
    strip_checkpoint(source, str(target), half=half)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pth", "train.pth"]
    content = torch.load(target, weights_only=True)
    assert content.keys() == {"model"}
    assert content["model"].keys() == Net().state_dict().keys()
    assert content["model"]["head.weight"].dtype == (torch.half if half else torch.float)
    other = Net()
    DetectionCheckpointer(other).load(str(target))
    assert other.head.weight.dtype == torch.float
    tolerance = 1e-3 if half else 0
    torch.testing.assert_close(other.head.weight, net.head.weight, atol=tolerance, rtol=tolerance)
    assert torch.equal(other.norm.num_batches_tracked, net.norm.num_batches_tracked)


def test_export_that_fails_leaves_no_half_file(tmp_path, monkeypatch):
    source = save(Net(), tmp_path / "train.pth")
    target = tmp_path / "model.pth"

    def fail(state, path):
        open(path, "wb").close()
        raise OSError("the disk is full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="full"):
        strip_checkpoint(source, str(target))
    assert not target.exists()


def test_export_keeps_what_fp16_cannot_hold(tmp_path):
    net = Net()
    net.norm.running_var.fill_(1e6)
    strip_checkpoint(save(net, tmp_path / "train.pth"), str(tmp_path / "model.pth"), half=True)
    found = torch.load(tmp_path / "model.pth", weights_only=True)["model"]["norm.running_var"]
    assert torch.equal(found, net.norm.running_var)


def test_export_of_something_else(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="list.pth' is not a Detectron2 checkpoint"):
        strip_checkpoint(str(tmp_path / "list.pth"), str(tmp_path / "model.pth"))


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="'nowhere.pth' does not exist"):
        strip_checkpoint("nowhere.pth", str(tmp_path / "model.pth"))
    (tmp_path / "short.pth").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(InputError, match="short.pth' cannot be read as a checkpoint"):
        strip_checkpoint(str(tmp_path / "short.pth"), str(tmp_path / "model.pth"))
    assert [path.name for path in tmp_path.iterdir()] == ["short.pth"]


def test_the_export_tool(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["strip_checkpoint.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", [*sys.path])
        runpy.run_path(str(ROOT / "tools" / "strip_checkpoint.py"), run_name="__main__")

    source, target = save(Net(extra=True), tmp_path / "train.pth"), tmp_path / "new" / "model.pth"
    run(source, target, "--half")
    state = torch.load(target, weights_only=True)["model"]
    assert state.keys() == Net().state_dict().keys() and state["head.weight"].dtype == torch.half
    assert f"{target}: 0.0 MiB" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        run("nowhere.pth", target)
    assert "the file 'nowhere.pth' does not exist" in capsys.readouterr().err


def test_no_checkpoint_named_or_there():
    with pytest.raises(InputError, match="no checkpoint is named for the model; give"):
        check_exists("", "the model")
    with pytest.raises(InputError, match="'nowhere.pth' for the model does not exist"):
        check_exists("nowhere.pth", "the model")
    check_exists("detectron2://fetched/later.pkl", "the model")
