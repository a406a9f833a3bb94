"""Strict loading, a student's start from its teacher, and stripped checkpoints."""

import logging

import pytest
import torch
from checkpoints import Net
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from helpers import differing, run_script
from torch import nn

from msad_kd.checkpoint.checkpoint import load_strictly
from msad_kd.checkpoint.start import init_from_teacher
from msad_kd.checkpoint.strip import strip_checkpoint
from msad_kd.utils.errors import InputError


def test_weights_and_buffers_are_copied():
    teacher, student = Net(), Net(more=["distiller"])
    teacher.norm.running_mean.fill_(7.0)
    assert init_from_teacher(student, teacher) == []
    copied = {k: v for k, v in student.state_dict().items() if not k.startswith("distiller")}
    assert differing(copied, teacher.state_dict()) == []
    teacher.head.weight.data.zero_()
    assert student.head.weight.any()  # a copy, not the same tensors


def test_what_is_not_copied_is_named_once(caplog):
    student = Net(classes=5)
    before = student.head.weight.clone()
    with caplog.at_level(logging.WARNING):
        assert init_from_teacher(student, Net()) == ["head.weight", "head.bias"]
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "head.weight, head.bias" in record.getMessage()
    assert torch.equal(student.head.weight, before)


CASCADE = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"]
CASCADE += ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]


@pytest.mark.parametrize("classes", [8, 5])
def test_a_student_takes_the_first_stage_of_a_cascade(config, classes):
    teacher = build_model(config("lr", *CASCADE))
    student = build_model(config("lr", "MODEL.ROI_HEADS.NUM_CLASSES", classes))
    kept = init_from_teacher(student, teacher)
    mine, theirs = student.roi_heads, teacher.roi_heads
    assert differing(mine.box_head.state_dict(), theirs.box_head[0].state_dict()) == []
    assert not torch.equal(mine.box_head.fc1.weight, theirs.box_head[1].fc1.weight)
    features = torch.randn(3, 16)
    (ours, deltas), (scores, agnostic) = (
        predictor(features) for predictor in (mine.box_predictor, theirs.box_predictor[0])
    )
    assert torch.equal(deltas.view(3, classes, 4), agnostic[:, None].expand(-1, classes, -1))
    if classes == 8:
        assert kept == [] and torch.equal(ours, scores)
    else:  # the teacher's scores and masks are of other classes
        parts = "roi_heads.box_predictor.cls_score", "roi_heads.mask_head.predictor"
        assert {key.rsplit(".", 1)[0] for key in kept} == set(parts)


def test_a_cascade_takes_all_stages_of_a_cascade(config):
    teacher, student = (build_model(config("lr", *CASCADE)) for _ in range(2))
    assert init_from_teacher(student, teacher) == []
    assert differing(student.state_dict(), teacher.state_dict()) == []


class Detector(nn.Module):
    def __init__(self, stages=1, frozen=False):
        super().__init__()
        self.backbone = nn.Module()
        norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
        self.backbone.bottom_up = nn.Sequential(*(norm(3) for _ in range(stages)))
        self.backbone.neck, self.head = nn.Linear(3, 3), nn.Linear(3, 3)


def test_another_backbone_is_refused_unless_it_is_left_out(caplog):
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


def test_strict_loading_ignores_a_distiller_and_what_old_checkpoints_hold(tmp_path):
    saved, loaded = Net(more=["distiller"]), Net()
    for name in ("pixel_mean", "pixel_std"):
        saved.register_buffer(name, torch.ones(3, 1, 1))
    load_strictly(loaded, save(saved, tmp_path / "a.pth", iteration=3), "x")
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, saved.state_dict()[key])


@pytest.mark.parametrize(
    ("saved", "built", "words"),
    [
        ({"classes": 4}, {}, r"2 of its keys have another shape.*head.weight \(4, 3\) -> \(2, 3\)"),
        (
            {},
            {"more": ["distiller"]},
            "2 keys of the model are absent from it, e.g. distiller.weight",
        ),
        ({"more": ["more"]}, {}, "2 of its keys are not in the model, e.g. more.weight"),
    ],
)
def test_strict_loading_counts_and_names_keys_that_do_not_fit(tmp_path, saved, built, words):
    path = save(Net(**saved), tmp_path / "a.pth")
    with pytest.raises(InputError, match=f"'{path}' does not fit my.yaml: {words}.*another config"):
        load_strictly(Net(**built), path, "my.yaml")


@pytest.mark.parametrize("half", [False, True])
def test_a_stripped_checkpoint_is_the_model_alone(tmp_path, half):
    net = Net(more=["distiller"])
    net.norm.running_var.fill_(1e6)  # beyond the range of fp16
    source = save(net, tmp_path / "train.pth", optimizer={"state": [1]}, iteration=9)
    target = tmp_path / "model.pth"
    strip_checkpoint(source, str(target), half=half)
    names = ["model.pth", "model.pth.sha256", "train.pth"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    content = torch.load(target, weights_only=True)
    assert content.keys() == {"model"}
    assert content["model"].keys() == Net().state_dict().keys()
    assert content["model"]["head.weight"].dtype == (torch.half if half else torch.float)
    other = Net()
    DetectionCheckpointer(other).load(str(target))
    assert other.head.weight.dtype == torch.float
    tolerance = 1e-3 if half else 0
    torch.testing.assert_close(other.head.weight, net.head.weight, atol=tolerance, rtol=tolerance)
    for name in ("num_batches_tracked", "running_var"):  # which stays in fp32
        assert torch.equal(getattr(other.norm, name), getattr(net.norm, name))


def test_the_tool(tmp_path):
    tool, target = "tools/strip_checkpoint.py", tmp_path / "new" / "model.pth"
    source = save(Net(more=["distiller"]), tmp_path / "train.pth")
    assert f"{target}: 0.0 MiB" in run_script(tool, source, target, "--half").stdout
    state = torch.load(target, weights_only=True)["model"]
    assert state.keys() == Net().state_dict().keys() and state["head.weight"].dtype == torch.half
    said = run_script(tool, "nowhere.pth", target, code=1).stderr
    assert "'nowhere.pth' for stripping does not exist" in said
    for part in (tmp_path / "a.pth.part", tmp_path / "a.safetensors.part"):
        part.symlink_to("no/such/place")  # so that it cannot be written, by root either
        said = run_script(tool, source, part.with_suffix(""), code=1).stderr
        assert str(part) in said and "Traceback" not in said
