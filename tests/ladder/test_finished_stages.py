"""A finished stage of a ladder: what it leaves, and when it is not taken for what it was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import differing
from ladders import MGD, students

from msad_kd.config.build import build_config
from msad_kd.config.stages import read_stages, stage_config
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.ladder import run as ladder
from msad_kd.ladder.run import STATE, run_ladder
from msad_kd.utils.errors import InputError
from msad_kd.utils.hashes import hash_file


def test_what_a_finished_stage_leaves(finished):
    folder = f"{finished.OUTPUT_DIR}/stage_01_first"
    state = json.loads(Path(finished.OUTPUT_DIR, "ladder_state.json").read_text())
    hashes = {f"{source}_sha256" for source in ("config", "teacher", "start", "student")}
    assert state["first"].keys() == {"folder", "results"} | hashes
    trained = torch.load(f"{folder}/model_final.pth", weights_only=False)
    assert trained["iteration"] == 1 and any(k.startswith("distiller") for k in trained["model"])
    stage_cfg = build_config(f"{folder}/config.yaml", [])
    keys = (stage_cfg.SOLVER.MAX_ITER, stage_cfg.KD.LOSSES, stage_cfg.KD.LADDER.STAGES)
    assert keys == (2, MGD, [])


def test_a_finished_stage_whose_config_or_files_changed_is_refused(
    finished, ladder_config, tmp_path
):
    folder = tmp_path / "ladder"
    with pytest.raises(InputError, match="stage_01_first' .* its config or its teacher's has chan"):
        run_ladder(ladder_config("ladder", "SOLVER.BASE_LR", 0.123), resume=True)
    student = folder / "stage_01_first" / "student.pth"
    state = torch.load(student, weights_only=True)
    torch.save({"model": {key: value + 1 for key, value in state["model"].items()}}, student)
    with pytest.raises(InputError, match="its student.pth has changed since"):
        run_ladder(finished, resume=True)
    text = (folder / "ladder_state.json").read_text()
    recorded = json.loads(text)
    recorded["first"]["teacher_sha256"] = "0" * 64
    (folder / "ladder_state.json").write_text(json.dumps(recorded))
    with pytest.raises(InputError, match="its teacher, '.*model_final.pth', has changed since"):
        run_ladder(finished, resume=True)


def test_a_finished_stage_whose_teachers_config_changed_is_refused(
    ladder_config, stages, tmp_path, resume
):
    del stages[1:]
    teacher = yaml.safe_load(Path(stages[0]["config_file"]).read_text())
    file = tmp_path / "teacher.yaml"
    stages[0]["config_file"] = str(file)
    file.write_text(yaml.safe_dump(teacher))
    cfg = ladder_config()
    run_ladder(cfg, resume=False)
    file.write_text(f"# a remark\n{yaml.safe_dump({**teacher, 'OUTPUT_DIR': 'elsewhere'})}")
    assert "Stage 1, 'first', is done: skipped" in resume(cfg)
    teacher["MODEL"]["MULTI_RESOLUTION"] = {"MASK_PADDING": False}
    file.write_text(yaml.safe_dump(teacher))
    with pytest.raises(InputError, match="its config or its teacher's has changed since"):
        run_ladder(cfg, resume=True)


@pytest.mark.parametrize(
    "key",
    [*(pytest.param(x, marks=pytest.mark.long) for x in ("start", "MODEL.WEIGHTS")), "start#"],
)
def test_a_finished_stage_whose_start_changed_is_refused(
    ladder_config, stages, tmp_path, teacher_weights, resume, key
):
    start = tmp_path / "start.pth"
    shutil.copy(teacher_weights, start)
    del stages[1:]
    path = f"{start}#sha256={hash_file(start)}" if key == "start#" else str(start)
    stages[0]["start"] = "previous" if key == "MODEL.WEIGHTS" else path
    cfg = ladder_config("ladder", *(["MODEL.WEIGHTS", path] if key == "MODEL.WEIGHTS" else []))
    run_ladder(cfg, resume=False)
    assert "Stage 1, 'first', is done: skipped" in resume(cfg)
    torch.save({"model": {}}, start)
    with pytest.raises(InputError, match="starts from, '.*start.pth.*', has changed since"):
        run_ladder(cfg, resume=True)


def test_a_finished_stage_of_which_a_file_is_lost_is_refused(finished, tmp_path):
    student, state = (tmp_path / "ladder" / x for x in ("stage_01_first/student.pth", STATE))
    content = student.read_bytes()
    for lose, name in {
        student.unlink: "student.pth",
        lambda: student.write_bytes(content) and state.write_text("{"): STATE,
        lambda: state.write_text('["first"]'): STATE,
        state.unlink: STATE,
    }.items():
        lose()
        with pytest.raises(InputError, match=f"done, but its .*{name} is missing; del"):
            run_ladder(finished, resume=True)


def test_a_ladder_may_be_moved(finished, ladder_config, tmp_path, resume):
    shutil.move(finished.OUTPUT_DIR, tmp_path / "elsewhere")
    assert "Stage 1, 'first', is done: skipped" in resume(ladder_config("elsewhere"))


def hash_of(cfg, index):
    stage_cfg = stage_config(cfg, read_stages(cfg.KD.LADDER.STAGES), index)
    return ladder._hash_sources(stage_cfg, TeacherSpec.from_config(stage_cfg))["config_sha256"]


OTHERS = ["SOLVER.CHECKPOINT_PERIOD", 1, "DATALOADER.NUM_WORKERS", 1, "TEST.EVAL_PERIOD", 1]
OTHERS += ["KD.DIAGNOSTICS_PERIOD", 1, "KD.GRADIENT_RATIO_PERIOD", 1, "VIS_PERIOD", 2]
OTHERS += ["TEST.COCO_EVALUATOR", "pycocotools", "KD.TEACHER.EVAL_BEFORE_TRAIN", True]


def test_the_hash_does_not_depend_on_the_folder_and_on_what_changes_no_result(ladder_config):
    configs = ladder_config("a"), ladder_config("b"), ladder_config("a", *OTHERS)
    assert len({hash_of(cfg, 1) for cfg in configs}) == 1


def test_the_hash_depends_on_what_changes_the_result(ladder_config):
    keys = ([], ["DATASETS.INVALID_ANNOTATIONS", "drop"], ["DATASETS.CLASSES", ["ant"]])
    keys += (["INPUT.COLOR.CONTRAST", 0.1], ["INPUT.MIXUP.PROB", 0.1], ["KD.TEACHER.AMP", "bf16"])
    assert len({hash_of(ladder_config("x", *options), 1) for options in keys}) == 6


@pytest.mark.long
def test_what_the_hash_leaves_out_changes_no_result(ladder_config, stages):
    del stages[1:]
    tested = ["DATASETS.TEST", ["tiny_val"]]
    one, other = ladder_config("one", *tested), ladder_config("other", *tested, *OTHERS)
    found = [(run_ladder(cfg, resume=False), *students(cfg, 1)) for cfg in (one, other)]
    assert repr(found[0][0]) == repr(found[1][0]) and "bbox" in found[0][0]  # AP of no box is NaN
    assert differing(found[0][1], found[1][1]) == []


def test_the_hash_depends_on_when_the_statistics_are_recomputed(ladder_config):
    precise = ["TEST.PRECISE_BN.ENABLED", True, "TEST.EVAL_PERIOD"]
    assert len({hash_of(ladder_config("x", *precise, period), 0) for period in (1, 2)}) == 2
