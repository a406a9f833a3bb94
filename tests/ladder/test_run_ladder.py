"""The ladder: stages are read, run one after another, resumed, and not confused with others."""

import gc
import shutil
import weakref

import pytest
import torch
from detectron2.modeling import build_model
from helpers import differing
from ladders import STAGES, students

from msad_kd.distill.teacher import Teacher
from msad_kd.engine.trainer import KDTrainer
from msad_kd.ladder.run import run_ladder
from msad_kd.utils.errors import InputError


class Killed(Exception):
    pass


def killed_in(monkeypatch, cfg, stage, iteration, resume=False):
    """Run a ladder until this iteration of this stage."""
    step = KDTrainer.run_step

    def dying(self):
        if f"_{stage}" in self.cfg.OUTPUT_DIR and self.iter == iteration:
            raise Killed
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(KDTrainer, "run_step", dying)
        with pytest.raises(Killed):
            run_ladder(cfg, resume=resume)


def test_killed_in_the_second_stage_and_resumed_is_bitwise_the_whole(
    trained, ladder_config, stages, config_files, monkeypatch, resume, files_read
):
    del stages[2:]
    whole, cut = ladder_config("whole"), ladder_config("cut")
    shutil.copytree(trained, whole.OUTPUT_DIR)
    files_read.clear()
    killed_in(monkeypatch, cut, "second", 1)  # before its first checkpoint
    assert files_read == [str(config_files["teacher"])] * 2  # once a stage
    killed_in(monkeypatch, cut, "second", 3, resume=True)  # after it
    log = resume(cut)
    assert "Stage 1, 'first', is done: skipped" in log
    assert "Starting training from iteration 2" in log
    for one, other in zip(students(whole, 2), students(cut, 2), strict=True):
        assert differing(one, other) == []
    stock = build_model(ladder_config("x", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"))
    assert students(whole, 1)[0].keys() == stock.state_dict().keys()  # no adapters, no generators
    again = ladder_config("whole")
    files_read.clear()
    log = resume(again)
    assert log.count("is done: skipped") == 2 and "Starting training" not in log
    assert files_read == [str(config_files["teacher"])] * 2


@pytest.mark.long
def test_what_comes_after_a_stage_that_was_run_again_is_trained_anew(
    trained, ladder_config, stages, monkeypatch, resume
):
    stages[0]["base_lr"] = 0.05  # another student, from which the later stages are to start
    whole, cut = ladder_config("whole"), ladder_config("cut")
    shutil.copytree(trained, cut.OUTPUT_DIR)
    run_ladder(whole, resume=False)
    shutil.rmtree(f"{cut.OUTPUT_DIR}/stage_01_first")
    for stage, iteration in (("second", 1), ("third", 0)):  # before its first new checkpoint
        killed_in(monkeypatch, cut, stage, iteration, resume=True)
    log = resume(cut)
    assert [f"'{name}', is done: skipped" in log for name in STAGES] == [True, True, False]
    assert log.count("Starting training from iteration 0") == 1
    for one, other in zip(students(whole), students(cut), strict=True):
        assert differing(one, other) == []


@pytest.mark.long
def test_a_ladder_begun_again_and_killed_does_not_resume_from_the_old_one(
    trained, ladder_config, stages, monkeypatch, resume
):
    del stages[2:]
    cfg = ladder_config()
    shutil.copytree(trained, cfg.OUTPUT_DIR)
    killed_in(monkeypatch, cfg, "first", 1)
    assert resume(cfg).count("Starting training from iteration 0") == 2


@pytest.mark.long
def test_one_teacher_at_a_time(ladder_config, stages, monkeypatch):
    del stages[2:]
    alive, init = [], Teacher.__init__

    def counting(self, model, **keywords):
        if not next(model.parameters()).is_meta:  # else it is the check beforehand
            gc.collect()
            assert [teacher for teacher in alive if teacher() is not None] == []
            alive.append(weakref.ref(model))
        init(self, model, **keywords)

    monkeypatch.setattr(Teacher, "__init__", counting)
    run_ladder(ladder_config("ladder", "SOLVER.MAX_ITER", 1), resume=False)
    assert len(alive) == 2


GONE = "for the {} of stage '{}' does not exist"
RANDOM = "In stage 'first' the student starts from random weights"
PART = "MODEL.META_ARCHITECTURE"
P9 = [{"name": "l1", "weight": 1.0, "levels": ["p9"]}]


@pytest.mark.parametrize(
    ("changes", "words"),  # of the third stage, or, as a tuple, of the ladder's config
    [
        ({"weights": "gone.pth"}, GONE.format("teacher", "third")),
        ({"start": "gone.pth"}, GONE.format("start", "third")),
        ({"config_file": "gone.yaml"}, "stage 'third': .* file 'gone.yaml' does not exist"),
        ({"opts": ["KD.SCAEL", 2]}, "'third': .* unknown config key: KD.SCAEL; did you mean"),
        ({"opts": [PART, "GeneralizedRCNN"]}, "stage 'third': KD.TEACHER.BRANCH is 'fused', but"),
        ({"opts": [PART, "MultiResolutionRNN"]}, "'third': .* did you mean MultiResolutionRCNN"),
        ({"opts": ["KD.SCALE", 4]}, "stage 'third': KD.SCALE is 4 in the teacher's config"),
        ({"losses": P9}, "stage 'third': .*'p9' of 'l1' has no partner"),
        (("MODEL.WEIGHTS", "gone.pth"), GONE.format("start", "first")),
        ((PART, "GeneralizedRCNN"), f"a GeneralizedRCNN learns from no teacher; set {PART}"),
    ],
)
def test_what_a_stage_lacks_is_told_before_the_first_one(
    ladder_config, stages, tmp_path, caplog, changes, words
):
    stages[0]["start"] = "previous"
    of_a_stage = isinstance(changes, dict)
    stages[2] |= changes if of_a_stage else {}
    with pytest.raises(InputError, match=words):
        run_ladder(ladder_config("ladder", *(() if of_a_stage else changes)), resume=False)
    assert not (tmp_path / "ladder").exists()  # nothing was trained
    assert (RANDOM in caplog.text) == of_a_stage and "In stage 'second'" not in caplog.text


def test_the_classes_of_all_teachers_are_checked_before_the_first_stage(
    ladder_config, stages, teacher_weights, tmp_path
):
    contents = {**torch.load(teacher_weights), "classes": ["ant", "bee"]}
    torch.save(contents, tmp_path / "teacher.pth")
    stages[2] |= {"weights": str(tmp_path / "teacher.pth"), "start": "teacher"}
    with pytest.raises(InputError, match="stage 'third': the teacher .* trained on other classes"):
        run_ladder(ladder_config(), resume=False)
    assert not (tmp_path / "ladder").exists()  # nothing was trained


def test_a_stage_may_start_from_any_student_before_it(
    trained, ladder_config, stages, tmp_path, resume
):
    shutil.copytree(trained, tmp_path / "ladder")
    shutil.rmtree(tmp_path / "ladder" / "stage_03_third")
    stages[2]["start"] = f"{tmp_path}/ladder/stage_01_first/student.pth"
    # fvcore's line; git main's Detectron2 writes another like it.
    assert f"[Checkpointer] Loading from {stages[2]['start']}" in resume(ladder_config())
