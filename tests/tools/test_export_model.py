"""tools/export_model.py by its main(): the files, what they say of themselves, and every error."""

import json
import os
import re
import sys
import time
from signal import SIGTERM

import cv2
import onnx
import pytest
import torch
from helpers import ROOT, load_tool
from timm_networks import options

from msad_kd import KDTrainer, build_config
from msad_kd.export.onnx import OnnxDetector

tool = load_tool("export_model")
CLASSES = [*"abcdefgh"]


@pytest.fixture
def export(files_of, tmp_path, capsys):
    """export(format, ...): the folder to which a student of random weights was exported."""

    def run(format, *flags, role="student", opts=(), weights=None):
        file = str(files_of("mask_rcnn")[role])
        if weights is None:
            weights = tmp_path / "model.pth"
            model = KDTrainer.load_model(build_config(file, list(opts)), None, "it")
            torch.save({"model": model.state_dict(), "classes": CLASSES}, weights)
        arguments = ["--config-file", file, "--weights", str(weights), "--format", format]
        arguments += ["--output", str(tmp_path / "exported"), "--runs", "1", "--count", "1"]
        tool.main([*arguments, *flags, *map(str, opts)])
        return tmp_path / "exported"

    return run


def test_onnx_alone_says_what_it_is_and_the_snippet_of_the_docs_runs_it(
    export, data, monkeypatch, capsys
):
    folder = export("onnx", "--resize")
    about = json.loads((folder / "metadata.json").read_text())
    properties = onnx.load(folder / "model.onnx").metadata_props
    assert {x.key: json.loads(x.value) for x in properties} == {"msad_kd": about}
    assert about["classes"] == CLASSES and about["input_format"] == "RGB" and about["resizes"]
    assert (about["min_size"], about["max_size"], about["size_divisibility"]) == (32, 128, 32)
    assert about["masks"] and about["outputs"] == ["boxes", "scores", "classes", "masks"]
    report = json.loads((folder / "parity.json").read_text())
    assert report["passed"] and report["detections"] > 5
    assert {"pytorch_ms", "onnx_ms"} < report["sizes"][0].keys()
    assert "onnxruntime_ms" in capsys.readouterr().out
    photo = cv2.imread(str(next((data / "val").glob("*"))))
    cv2.imwrite(str(folder.parent / "photo.jpg"), photo)
    (folder.parent / "output/mine").mkdir(parents=True)
    (folder.parent / "output/mine/onnx").symlink_to(folder)
    monkeypatch.chdir(folder.parent)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)
    exec(next(block for block in blocks if "onnxruntime" in block), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5 and all(line.split()[0] in CLASSES for line in lines)


def test_torchscript(export, data):
    folder = export("torchscript", "--resize", "--images", str(data / "train"))
    extra = {"msad_kd": ""}
    torch.jit.load(folder / "model.ts", _extra_files=extra)
    assert json.loads(extra["msad_kd"]) == json.loads((folder / "metadata.json").read_text())
    assert json.loads((folder / "parity.json").read_text())["largest"]["boxes"] == 0


def test_nothing_of_an_earlier_export_is_taken_for_this_one(export, tmp_path):
    folder = export("torchscript")
    with pytest.raises(SystemExit, match="nothing scores above 0.99"):
        export("torchscript", opts=["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.999])
    assert [x.name for x in folder.iterdir()] == ["unchecked_model.ts"]


def test_an_export_that_is_refused_removes_nothing(export, tmp_path):
    names = sorted(x.name for x in export("detectron2").iterdir())
    with pytest.raises(SystemExit, match="build_timm_fpn_backbone"):
        export("detectron2", opts=options())
    assert sorted(x.name for x in (tmp_path / "exported").iterdir()) == names


def test_a_folder_is_of_one_format(export, capsys):
    folder = export("detectron2")
    assert f"Written to {folder}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="the format detectron2; name another folder for onnx"):
        export("onnx")


def test_a_model_that_differs_exits_with_1(export, monkeypatch, tmp_path):
    write = tool.export_torchscript

    def write_and_change(detector, *args):
        write(detector, *args)
        detector.model.roi_heads.box_predictor.cls_score.bias.data[0] += 0.1

    monkeypatch.setattr(tool, "export_torchscript", write_and_change)
    with pytest.raises(SystemExit, match="differs from PyTorch's.* scores 0.0") as stop:
        export("torchscript")
    assert isinstance(stop.value.code, str)  # Python prints it and exits with 1
    folder = tmp_path / "exported"
    assert not json.loads((folder / "parity.json").read_text())["passed"]
    assert (folder / "unchecked_model.ts").exists() and not (folder / "model.ts").exists()


@pytest.mark.parametrize(
    ("format", "flags", "changes", "words"),
    [
        ("onnx", (), {"role": "teacher"}, "MultiResolutionRCNN, a teacher that reads two images"),
        ("onnx", (), {"weights": "none.pth"}, "'none.pth' .* does not exist"),
        ("onnx", ("--images", "none"), {}, "--images: 'none' has no images"),
        ("onnx", (), {"opts": ["DATASETS.TEST", ()]}, "set DATASETS.TEST or give --images"),
        ("onnx", (), {"opts": ["DATASETS.TEST", ("coco_2014_minival_100",)]}, "100.* --images"),
        ("detectron2", ("--resize",), {}, "--resize is for onnx and torchscript"),
        ("onnx", ("--output", "README.md"), {}, "--output: 'README.md' is no folder"),
        ("detectron2", (), {"opts": options()}, "build_timm_fpn_backbone .*--format onnx"),
    ],
)
def test_what_cannot_be_exported(export, format, flags, changes, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=f"(?s){words}"):
        export(format, *flags, **changes)


def test_a_stopped_export_says_so(export, monkeypatch, capsys):
    def interrupted(*_, **__):
        os.kill(os.getpid(), SIGTERM)
        time.sleep(60)  # the signal's handler ends it

    monkeypatch.setattr(tool, "describe_model", interrupted)
    with pytest.raises(SystemExit) as stopped:
        export("onnx")
    assert stopped.value.code == 143 and "stopped" in capsys.readouterr().err


def test_without_onnx(export, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # importing it fails
    with pytest.raises(SystemExit, match="pip install onnx onnxruntime"):
        export("onnx")


def test_other_files_are_no_exported_models(tmp_path):
    ends = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "other", ends[:1], ends[1:])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "other.onnx"
    )
    (tmp_path / "broken.onnx").write_text("?")
    for name, words in (
        ("other", "has no 'msad_kd'"),
        ("broken", "cannot be read as an ONNX"),
        ("missing", "missing.onnx' does not exist"),
    ):
        with pytest.raises(tool.InputError, match=words):
            OnnxDetector(tmp_path / f"{name}.onnx")
