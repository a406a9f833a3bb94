"""projects/MTPD: its recipes can be built, stage by stage, and its controls are what they say."""

import json

import pytest
import torch
import yaml
from detectron2.model_zoo import get_checkpoint_url
from detectron2.modeling import META_ARCH_REGISTRY
from helpers import ROOT

from msad_kd import stages
from msad_kd.errors import InputError
from msad_kd.setup import build_config
from msad_kd.teacher import teacher_config
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


LADDER = [
    {"name": "a", "config_file": "a.yaml", "weights": "a.pth", "kind": "fused", "start": "teacher"},
    {"name": "b", "config_file": "b.yaml", "weights": "b.pth", "kind": "plain", "image": "hr"},
]
LADDER[0] |= {"iterations": 30, "base_lr": 0.1}
LADDER[1] |= {"losses": [{"name": "ssim", "weight": 4.0}]}


def test_controls_have_the_ladders_total_and_start():
    found = controls.control_stages(LADDER, max_iter=50)
    teachers = {name: [stage["weights"][0] for stage in own] for name, own in found.items()}
    assert teachers == {
        "no_kd_same_start": ["a"],
        "strongest": ["b"],
        "strongest_restarted": ["b", "b"],
        "first_restarted": ["a", "a"],
        "reversed": ["b", "a"],
    }
    for own in found.values():
        assert sum(stage.get("iterations", 50) for stage in own) == 80
        assert own[0]["start"] == "a.pth" and own[0]["base_lr"] == 0.1
        assert all("start" not in stage for stage in own[1:])
        assert len({stage["name"] for stage in own}) == len(own)
    assert found["reversed"][0]["losses"] == LADDER[1]["losses"]
    assert "losses" not in found["reversed"][1]
    assert [loss["weight"] for loss in found["no_kd_same_start"][0]["losses"]] == [0]
    heads = [{**LADDER[0], "start": "teacher_heads"}, LADDER[1]]
    assert controls.control_stages(heads, 50)["strongest"][0]["start"] == "teacher_heads"


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
    arguments.ladder = str(ROOT / "configs" / "Shapes" / "student.yaml")
    with pytest.raises(InputError, match="student.yaml' has no KD.LADDER.STAGES"):
        controls.main(arguments)
