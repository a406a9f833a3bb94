"""projects/MTPD: its recipes can be built, stage by stage, and its controls are configs."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from detectron2.model_zoo import get_checkpoint_url
from detectron2.modeling import META_ARCH_REGISTRY
from helpers import ROOT, run_script

from msad_kd.config import stages
from msad_kd.config.build import build_config
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.utils.errors import InputError
from projects.MTPD import controls

CONFIGS = ROOT / "projects" / "MTPD" / "configs"
LADDERS = sorted(CONFIGS.rglob("*ladder.yaml"))
ZOO = ("mask_rcnn_R_101_FPN_3x", "mask_rcnn_X_101_32x8d_FPN_3x", "retinanet_R_101_FPN_3x")
PAPERS = {  # loss, and the levels of the released configs
    "retinanet": ({"name": "mgd", "weight": 2e-5, "mask_ratio": 0.65}, "p3 p4 p5 p6 p7"),
    "mask_rcnn": ({"name": "mgd", "weight": 5e-7, "mask_ratio": 0.45}, "p2 p3 p4 p5"),
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Configs name each other by paths from the repository's root."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", LADDERS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_stage_can_be_built(path):
    cfg = build_config(str(path), ["SOLVER.REFERENCE_WORLD_SIZE", 0, "MODEL.DEVICE", "cpu"])
    ladder = stages.read_stages(cfg.KD.LADDER.STAGES)
    assert len(ladder) == 2
    for index, stage in enumerate(ladder):
        stage_cfg = stages.stage_config(cfg, ladder, index)
        spec = TeacherSpec.from_config(stage_cfg)
        trained = f"{spec.cfg.OUTPUT_DIR.removeprefix('./')}/model_final.pth"
        zoo = build_config(stage.config_file, []).MODEL.WEIGHTS
        assert stage.weights in (trained, zoo) or (ROOT / stage.weights).is_file()
        with torch.device("meta"):
            student = META_ARCH_REGISTRY.get(stage_cfg.MODEL.META_ARCHITECTURE)(stage_cfg)
            student.set_teacher(spec.build_on_meta())
        (term,), pairs = student.distiller.terms, student.distiller.pairs
        assert len(pairs) >= 4
        if cfg.KD.SCALE == 1:  # the paper's own
            loss, levels = PAPERS[path.name.split("_R_50_")[0]]
            assert loss.items() <= stage_cfg.KD.LOSSES[0].items()
            assert list(term.levels or pairs) == levels.split()
            clip = cfg.SOLVER.CLIP_GRADIENTS
            assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE) == (True, "full_norm", 35)


@pytest.mark.parametrize("name", ZOO)
def test_model_zoo_weights(name):
    weights = yaml.safe_load((CONFIGS / "COCO" / f"{name}.yaml").read_text())["MODEL"]["WEIGHTS"]
    folder = "COCO-Detection" if name.startswith("retinanet") else "COCO-InstanceSegmentation"
    url = get_checkpoint_url(f"{folder}/{name}.yaml")
    assert weights == "detectron2://" + url.split("/detectron2/")[1]


def test_controls_are_configs(tmp_path):
    ladder = "projects/MTPD/configs/Shapes/ladder.yaml"
    options = [ladder, "--output", tmp_path, "--start", "start.pth"]
    printed = run_script("projects/MTPD/controls.py", *options).stdout
    assert build_config(str(tmp_path / "no_kd.yaml"), []).MODEL.WEIGHTS == "start.pth"
    files = sorted(tmp_path.glob("*.yaml"))
    assert len(files) == 6
    ladder_cfg = build_config(ladder, [])
    for file in files:
        assert f"--config-file {file}" in printed
        cfg = build_config(str(file), [])
        control = stages.read_stages(cfg.KD.LADDER.STAGES)
        iterations = [stage.iterations for stage in control] or [cfg.SOLVER.MAX_ITER]
        assert sum(iterations) == 1200
        assert cfg.DATASETS == ladder_cfg.DATASETS and cfg.SEED == ladder_cfg.SEED
        student = "GeneralizedRCNN" if file.stem == "no_kd" else "DistilledRCNN"
        assert cfg.MODEL.META_ARCHITECTURE == student
        assert file.stem == "no_kd" or control[0].start == str(tmp_path / "start.pth")
    # They start with what the ladder starts with, which has the statistics of its resolution.
    start = torch.load(tmp_path / "start.pth", weights_only=True)["model"]
    teacher = torch.load("projects/Shapes/checkpoints/teacher_one_size.pth", weights_only=True)
    key = "backbone.bottom_up.stem.conv1.norm.running_mean"
    torch.testing.assert_close(start[key], teacher["model"][f"{key}_lr"].float())
    assert not any(key.endswith("_lr") for key in start)


def test_what_has_no_controls():
    with pytest.raises(InputError, match="'GeneralizedRCNN' is not a student"):
        controls.stock_name("GeneralizedRCNN")
    args = SimpleNamespace(ladder="configs/Shapes/student_one_size.yaml")
    with pytest.raises(InputError, match="student_one_size.yaml' has no KD.LADDER.STAGES"):
        controls.main(args)
    args = SimpleNamespace(
        ladder="projects/MTPD/configs/Shapes/ladder.yaml", start=None, output=None
    )
    with pytest.raises(InputError, match="no_kd has no teacher .*--start WEIGHTS"):
        controls.main(args)
