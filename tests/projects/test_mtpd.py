"""projects/MTPD: its recipes can be built, stage by stage, and its controls are configs."""

import json
import runpy
import sys

import pytest
import torch
import yaml
from detectron2.model_zoo import get_checkpoint_url
from detectron2.modeling import META_ARCH_REGISTRY
from helpers import ROOT

from msad_kd.config import stages
from msad_kd.config.build import build_config
from msad_kd.distill.teacher import teacher_config
from msad_kd.utils.errors import InputError
from projects.MTPD import controls

CONFIGS = ROOT / "projects" / "MTPD" / "configs"
LADDERS = sorted(CONFIGS.rglob("*ladder.yaml"))
ZOO = sorted(CONFIGS.glob("COCO/*_101_*_3x.yaml"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Configs name each other by paths from the repository's root."""
    monkeypatch.chdir(ROOT)


def name_of(path):
    return str(path.relative_to(CONFIGS))


@pytest.mark.parametrize("path", LADDERS, ids=name_of)
def test_every_stage_can_be_built(path):
    cfg = build_config(str(path), ["SOLVER.REFERENCE_WORLD_SIZE", 0, "MODEL.DEVICE", "cpu"])
    read = stages.read_stages(cfg.KD.LADDER.STAGES)
    assert len(read) == 2
    for index, stage in enumerate(read):
        own = stages.stage_config(cfg, read, index)
        teacher = teacher_config(own)
        written = f"{teacher.OUTPUT_DIR.removeprefix('./')}/model_final.pth"
        told = build_config(stage.config_file, []).MODEL.WEIGHTS
        assert stage.weights in (written, told) or (ROOT / stage.weights).is_file()
        with torch.device("meta"):
            student = META_ARCH_REGISTRY.get(own.MODEL.META_ARCHITECTURE)(own)
        assert len(student.distiller.pairs) >= 4
        for term in student.distiller.terms:
            assert set(term.levels) <= set(student.distiller.pairs)


@pytest.mark.parametrize("path", ZOO, ids=name_of)
def test_the_zoos_weights(path):
    text = yaml.safe_load(path.read_text())
    name = path.stem
    folder = "COCO-Detection" if name.startswith("retinanet") else "COCO-InstanceSegmentation"
    url = get_checkpoint_url(f"{folder}/{name}.yaml")
    assert text["MODEL"]["WEIGHTS"] == "detectron2://" + url.split("/detectron2/")[1]


def test_the_stock_detector_of_a_student():
    assert controls.stock_name("DistilledRCNN") == "GeneralizedRCNN"
    with pytest.raises(InputError, match="'GeneralizedRCNN' is no student"):
        controls.stock_name("GeneralizedRCNN")


def test_controls_are_configs(tmp_path, capsys):
    ladder = CONFIGS / "Shapes" / "ladder.yaml"
    arguments = type("", (), {"ladder": str(ladder), "output": str(tmp_path / "controls")})
    controls.main(arguments)
    printed = capsys.readouterr().out
    files = sorted((tmp_path / "controls").glob("*.yaml"))
    assert len(files) == 6
    whole = build_config(str(ladder), [])
    for file in files:
        assert f"--config-file {file}" in printed
        cfg = build_config(str(file), [])
        own = stages.read_stages(cfg.KD.LADDER.STAGES)
        total = sum(stage.iterations for stage in own) if own else cfg.SOLVER.MAX_ITER
        assert total == 1200
        assert cfg.DATASETS == whole.DATASETS and cfg.SEED == whole.SEED
        student = "GeneralizedRCNN" if file.stem == "no_kd" else "DistilledRCNN"
        assert cfg.MODEL.META_ARCHITECTURE == student
        json.dumps(cfg.KD.LADDER.STAGES)
    arguments.ladder = str(ROOT / "configs" / "Shapes" / "student_one_size.yaml")
    with pytest.raises(InputError, match="student_one_size.yaml' has no KD.LADDER.STAGES"):
        controls.main(arguments)


def test_its_help_says_who_is_strongest(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["controls.py", "--help"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "projects" / "MTPD" / "controls.py"), run_name="__main__")
    assert "`strongest` means the last stage's teacher" in " ".join(capsys.readouterr().out.split())
