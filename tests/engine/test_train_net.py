"""train_net.py end to end: a teacher, a student that is killed and resumed, and its evaluation.

The student has the RoI heads of users_module.py, which kill its process at the iteration DIE_AT.
"""

import json
import signal

import pytest
import torch
from helpers import ROOT, TEST_SCENES, WARMUP, differing, run_script, train, train_net_main

from msad_kd.config.build import build_config
from msad_kd.distill.teacher import Teacher
from msad_kd.utils.errors import InputError

STEPS, KEPT, DIE_AT = WARMUP + 2, 2, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train_net")


@pytest.fixture(scope="module")
def run(folder):
    """run(argument, ...): train_net.py as a process of its own, from another folder."""

    def call(*arguments, **options):
        path = f"{ROOT}/tests:{ROOT}"
        return run_script("train_net.py", *arguments, cwd=folder, PYTHONPATH=path, **options)

    return call


@pytest.fixture(scope="module")
def teacher(run, folder, config_files):
    """The folder of a teacher that was trained for two steps."""
    options = ["SOLVER.MAX_ITER", 2, "OUTPUT_DIR", folder / "teacher"]
    run("--config-file", config_files["teacher"], *options)
    return folder / "teacher"


@pytest.fixture(scope="module")
def student_options(folder, teacher):
    return [
        *("KD.TEACHER.WEIGHTS", f"{teacher}/model_final.pth", "OUTPUT_DIR", f"{folder}/student"),
        *("KD.TEACHER.EVAL_BEFORE_TRAIN", "True"),
        *("SOLVER.MAX_ITER", str(STEPS), "SOLVER.CHECKPOINT_PERIOD", str(KEPT)),
    ]


@pytest.fixture(scope="module")
def killed(run, folder, config_files, student_options):
    """What was in a student's folder when its process was killed."""
    heads = ["MODEL.ROI_HEADS.NAME", "UsersHeads"]
    run(
        *("--config-file", config_files["student"], "--import", "users_module"),
        *(*student_options, *heads),
        DISTURB=f"0 {DIE_AT} SIGKILL",
        code=-signal.SIGKILL,
    )
    return sorted(path.name for path in (folder / "student").iterdir())


@pytest.fixture(scope="module")
def student(run, folder, config_files, student_options, killed):
    """The folder of the student that was killed and resumed, after it came to its end."""
    before = (folder / "student" / "teacher").stat().st_mtime_ns
    process = run(
        *("--config-file", config_files["student"], "--import", "users_module", "--resume"),
        *(*student_options, "MODEL.ROI_HEADS.NAME", "UsersHeads"),
    )
    assert f"Starting training from iteration {KEPT}" in process.stdout
    assert "Evaluating the teacher" not in process.stdout
    assert (folder / "student" / "teacher").stat().st_mtime_ns == before
    return folder / "student"


def metrics(folder):
    """The last value of everything that was logged."""
    merged = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        merged |= json.loads(line)
    return merged


def test_a_teacher_is_trained_and_evaluated(teacher):
    branches = {"loss_mask_hr", "loss_mask_lr", "loss_mask_fused"}
    assert branches | {"bbox/AP", "segm/AP"} <= metrics(teacher).keys()


def test_the_killed_student_had_evaluated_its_teacher_and_kept_a_checkpoint(killed, folder):
    assert f"model_{KEPT - 1:07d}.pth" in killed and "model_final.pth" not in killed
    assert (folder / "student" / "teacher" / "inference" / "coco_instances_results.json").exists()


def test_a_users_head_was_distilled(student):
    last = metrics(student)
    assert last["loss_kd_l1"] > 0 and "bbox/AP" in last
    assert "UsersHeads" in (student / "log.txt").read_text()


def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(
    student, config_files, student_options, tmp_path
):
    options = [*student_options, "OUTPUT_DIR", str(tmp_path), "KD.TEACHER.EVAL_BEFORE_TRAIN", False]
    whole = train(build_config(str(config_files["student"]), [*options, "DATASETS.TEST", ()]))
    state = torch.load(student / "model_final.pth", weights_only=False)["model"]
    assert differing(state, whole.model.state_dict()) == []


def evaluate(config_file, folder, weights, *flags):
    """The results of --eval-only, in this process, with a teacher that does not exist."""
    arguments = [
        *("--eval-only", "--config-file", config_file, "MODEL.WEIGHTS", weights),
        *("KD.TEACHER.WEIGHTS", "nowhere.pth", "KD.TEACHER.CONFIG_FILE", "nowhere.yaml"),
        *("OUTPUT_DIR", folder),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "__init__", lambda *_, **__: pytest.fail("a teacher was built"))
        return train_net_main(*flags, *arguments)


@pytest.fixture(scope="module")
def evaluated(student, folder, config_files):
    weights = student / "model_final.pth"
    return evaluate(config_files["student"], folder / "evaluated", weights)


def test_eval_only_finds_what_the_training_run_found_without_a_teacher(
    evaluated, student, folder, config_files
):
    assert {"bbox", "segm"} <= evaluated.keys()
    results = [
        json.loads((run / "inference" / "coco_instances_results.json").read_text())
        for run in (student, folder / "evaluated")
    ]
    assert len({result["image_id"] for result in results[0]}) == TEST_SCENES
    assert results[0] == results[1]
    assert "name: l1" in (folder / "evaluated" / "config.yaml").read_text()  # the whole config
    again = evaluate(config_files["student"], student, "", "--resume")  # the last checkpoint
    assert again["bbox"] == pytest.approx(evaluated["bbox"], nan_ok=True)


@pytest.mark.parametrize(
    ("weights", "flags", "words"),
    [
        ("", (), "no checkpoint is named"),
        ("", ("--resume",), "no checkpoint is named"),
        ("nowhere.pth", (), "'nowhere.pth' .* does not exist"),
        ("configs", (), "'configs' for .* is a folder; name the file in it"),
    ],
)
def test_eval_only_without_weights(config_files, tmp_path, weights, flags, words):
    with pytest.raises(InputError, match=words):
        evaluate(config_files["student"], tmp_path, weights, *flags)


def test_eval_only_with_weights_of_another_model(config_files, tmp_path, teacher_weights):
    with pytest.raises(InputError, match="does not fit .*student.yaml'.* e.g. fusion"):
        evaluate(config_files["student"], tmp_path, teacher_weights)


def test_a_mistake_is_told_in_one_sentence(run, folder, config_files):
    gone = {"name": "gone", "json": "gone/annotations.json", "images": "gone"}
    options = ["DATASETS.COCO_FORMAT", [gone], "DATASETS.TRAIN", ("gone",), "DATASETS.TEST", ()]
    command = ["--config-file", config_files["lr"], *options]
    process = run(*command, DETECTRON2_DATASETS="here", code=1)
    assert "Traceback" not in process.stderr
    (sentence,) = [line for line in process.stderr.splitlines() if line.startswith("train_net.py:")]
    assert "the annotation file 'here/gone/annotations.json' does not exist" in sentence
