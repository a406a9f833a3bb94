"""The ladder: stages are read, run one after another, resumed, and not confused with others."""

import gc
import json
import logging
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.modeling import build_model
from helpers import differing

from msad_kd.config.build import build_config
from msad_kd.config.changes import neutral_config
from msad_kd.config.stages import read_stages, stage_config
from msad_kd.distill.teacher import Teacher, TeacherSpec
from msad_kd.engine.trainer import KDTrainer
from msad_kd.ladder import run as ladder
from msad_kd.ladder.run import STATE, run_ladder
from msad_kd.utils.errors import InputError
from msad_kd.utils.hashes import hash_file

STAGES = ("first", "second", "third")
MGD = [{"name": "mgd", "weight": 1e-4}, {"name": "l1", "weight": 0.1, "adapter": True}]


@pytest.fixture
def stages(config_files, teacher_weights):
    """Three stages: the fused teacher, its high-resolution branch, the fused one again."""
    common = {"config_file": str(config_files["teacher"]), "weights": str(teacher_weights)}
    return [
        {**common, "name": "first", "losses": MGD, "iterations": 2, "start": "teacher"},
        {**common, "name": "second", "kind": "plain", "image": "hr", "losses": MGD},
        {**common, "name": "third", "iterations": 1, "base_lr": 0.0005},
    ]


@pytest.fixture
def ladder_config(config_files, stages, tmp_path):
    """ladder_config(folder, KEY, VALUE, ...): a frozen config of the three stages."""

    def make(folder="ladder", *options):
        keys = ["KD.LADDER.STAGES", stages, "OUTPUT_DIR", str(tmp_path / folder)]
        keys += ["SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", []]
        keys += ["KD.TEACHER.EVAL_BEFORE_TRAIN", False]
        cfg = build_config(str(config_files["student"]), [*keys, *options])
        cfg.freeze()
        return cfg

    return make


def students(cfg, count=3):
    folders = [f"stage_0{i}_{name}" for i, name in enumerate(STAGES[:count], 1)]
    return [
        torch.load(f"{cfg.OUTPUT_DIR}/{name}/student.pth", weights_only=True)["model"]
        for name in folders
    ]


@pytest.fixture
def resume(caplog):
    """resume(cfg): resume a ladder, and return what it logs."""

    def run(cfg):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            run_ladder(cfg, resume=True)
        return caplog.text

    return run


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
    ladder_config, stages, config_files, monkeypatch, resume, files_read
):
    del stages[2:]
    whole, cut = ladder_config("whole"), ladder_config("cut")
    files_read.clear()
    run_ladder(whole, resume=False)
    assert files_read == [str(config_files["teacher"])] * 2  # once a stage
    killed_in(monkeypatch, cut, "second", 1)  # before its first checkpoint
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


def test_what_comes_after_a_stage_that_was_run_again_is_trained_anew(
    ladder_config, stages, monkeypatch, resume
):
    run_ladder(ladder_config("cut"), resume=False)
    stages[0]["base_lr"] = 0.05  # another student, from which the later stages are to start
    whole, cut = ladder_config("whole"), ladder_config("cut")
    run_ladder(whole, resume=False)
    shutil.rmtree(f"{cut.OUTPUT_DIR}/stage_01_first")
    for stage, iteration in (
        ("second", 1),
        ("third", 0),
    ):  # before the stage's first new checkpoint
        killed_in(monkeypatch, cut, stage, iteration, resume=True)
    log = resume(cut)
    assert [f"'{name}', is done: skipped" in log for name in STAGES] == [True, True, False]
    assert log.count("Starting training from iteration 0") == 1
    for one, other in zip(students(whole), students(cut), strict=True):
        assert differing(one, other) == []


def test_a_ladder_begun_again_and_killed_does_not_resume_from_the_old_one(
    ladder_config, stages, monkeypatch, resume
):
    del stages[2:]
    cfg = ladder_config()
    run_ladder(cfg, resume=False)
    killed_in(monkeypatch, cfg, "first", 1)
    assert resume(cfg).count("Starting training from iteration 0") == 2


@pytest.fixture
def finished(ladder_config, stages):
    """The config of a ladder of one stage that has been run."""
    del stages[1:]
    cfg = ladder_config()
    run_ladder(cfg, resume=False)
    return cfg


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


@pytest.mark.parametrize("key", ["start", "start#", "MODEL.WEIGHTS"])
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


def test_a_stage_may_start_from_any_student_before_it(ladder_config, stages, tmp_path, caplog):
    first = f"{tmp_path}/ladder/stage_01_first/student.pth"
    stages[2]["start"] = first
    with caplog.at_level(logging.INFO):
        run_ladder(ladder_config(), resume=False)
    # fvcore's line; git main's Detectron2 writes another like it.
    assert caplog.text.count(f"[Checkpointer] Loading from {first}") == 2


def hash_of(cfg, index):
    stage_cfg = stage_config(cfg, read_stages(cfg.KD.LADDER.STAGES), index)
    return ladder._hash_sources(stage_cfg, TeacherSpec.from_config(stage_cfg))["config_sha256"]


def test_the_hash_does_not_depend_on_the_folder(ladder_config):
    assert len({hash_of(ladder_config(folder), 1) for folder in "ab"}) == 1


def test_the_hash_depends_on_newer_keys_only_if_they_are_set(ladder_config):
    older = neutral_config(ladder_config())  # as before there were these keys
    assert not {"CLASSES", "INVALID_ANNOTATIONS"} & older.DATASETS.keys()
    assert not {"COLOR", "MIXUP"} & older.INPUT.keys()
    keys = ([], ["DATASETS.INVALID_ANNOTATIONS", "drop"], ["DATASETS.CLASSES", ["ant"]])
    keys += (["INPUT.COLOR.CONTRAST", 0.1], ["INPUT.MIXUP.PROB", 0.1])
    assert len({hash_of(ladder_config("x", *options), 1) for options in keys}) == 5


def test_the_hash_leaves_out_what_changes_no_result(ladder_config, stages):
    del stages[1:]
    tested = ["DATASETS.TEST", ["tiny_val"]]
    others = ["SOLVER.CHECKPOINT_PERIOD", 1, "DATALOADER.NUM_WORKERS", 1, "TEST.EVAL_PERIOD", 1]
    others += ["KD.DIAGNOSTICS_PERIOD", 1, "KD.GRADIENT_RATIO_PERIOD", 1, "VIS_PERIOD", 2]
    others += ["TEST.COCO_EVALUATOR", "pycocotools"]
    one = ladder_config("one", *tested)
    other = ladder_config("other", *tested, *others, "KD.TEACHER.EVAL_BEFORE_TRAIN", True)
    found = [(run_ladder(cfg, resume=False), *students(cfg, 1)) for cfg in (one, other)]
    assert repr(found[0][0]) == repr(found[1][0]) and "bbox" in found[0][0]  # AP of no box is NaN
    assert differing(found[0][1], found[1][1]) == []
    states = [
        json.loads(Path(cfg.OUTPUT_DIR, "ladder_state.json").read_text()) for cfg in (one, other)
    ]
    assert states[0]["first"]["config_sha256"] == states[1]["first"]["config_sha256"]


def test_the_hash_depends_on_when_the_statistics_are_recomputed(ladder_config):
    precise = ["TEST.PRECISE_BN.ENABLED", True, "TEST.EVAL_PERIOD"]
    assert len({hash_of(ladder_config("x", *precise, period), 0) for period in (1, 2)}) == 2
