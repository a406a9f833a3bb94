"""Every detector as teacher and student; other files have more tests of Mask R-CNN."""

import shutil
from collections import Counter

import pytest
import torch
from detectors import DENSE, DETECTORS, OTHERS, reading
from detectron2.modeling import build_model
from helpers import (
    NO_TEST,
    build,
    cut_off,
    differing,
    losses_of,
    same_predictions,
    tensors_of,
    train,
)
from torch.nn.modules.module import register_module_forward_hook

from msad_kd import attach_teacher, init_from_teacher
from msad_kd.distill.teacher import Teacher
from msad_kd.modeling.loss_normalizer import get_normalizer

every_detector = pytest.mark.parametrize("detector", DETECTORS, indirect=True)
every_other_detector = pytest.mark.parametrize("detector", OTHERS, indirect=True)


@every_other_detector
def test_a_student_is_trained_resumed_and_evaluated(student_config, tmp_path, detector):
    whole = train(student_config())
    assert whole.storage.latest()["loss_kd_l1"][0] > 0
    assert "bbox/AP" in whole.storage.latest()
    folder = cut_off(whole.cfg.OUTPUT_DIR, tmp_path / "cut_off")
    again = train(student_config("OUTPUT_DIR", folder, *NO_TEST), resume=True)
    assert again.start_iter == 2
    assert differing(tensors_of(whole.model), tensors_of(again.model)) == []
    assert get_normalizer(whole.model) == get_normalizer(again.model)
    assert (get_normalizer(whole.model) is not None) == (detector in DENSE)


@every_other_detector
def test_a_teacher_is_resumed_and_evaluated(config, trained_teacher, detector):
    output = config("teacher").OUTPUT_DIR
    shutil.copytree(trained_teacher(detector).parent, output)
    again = train(config("teacher", "OUTPUT_DIR", output, "SOLVER.MAX_ITER", 5), resume=True)
    assert again.start_iter == 4 and "bbox/AP" in again.storage.latest()
    torch.manual_seed(0)
    whole = train(config("teacher", "SOLVER.MAX_ITER", 5, *NO_TEST))
    assert differing(tensors_of(whole.model), tensors_of(again.model)) == []
    saved = torch.load(trained_teacher(detector), weights_only=False)
    assert not any("normalizer" in name for name in saved["model"])  # it is kept apart
    assert ("KeepNormalizer" in saved["trainer"].get("hooks", {})) == (detector in DENSE)


@every_other_detector
def test_at_four_times_the_resolution(config, detector):
    heads = reading(detector, ["p4", "p5", "p6", "p7", "p8"])
    common = ["KD.SCALE", 4, "SOLVER.MAX_ITER", 1, *NO_TEST]
    teacher = train(config("teacher", *common, *heads))
    student = train(
        config(
            *("student", *common, "INPUT.MIN_SIZE_TRAIN", (16,), "INPUT.MIN_SIZE_TEST", 16),
            *("KD.TEACHER.WEIGHTS", f"{teacher.cfg.OUTPUT_DIR}/model_final.pth"),
            *("KD.TEACHER.OPTS", ["KD.SCALE", 4, *heads]),
        )
    )
    assert student.model.distiller.pairs == {f"p{s}": f"p{s + 2}" for s in range(2, 7)}
    assert "loss_kd_l1" in student.storage.latest()


@every_other_detector
def test_a_teacher_of_other_classes_is_not_evaluated(
    student_config, config, tmp_path, detector, caplog
):
    part = {"retinanet": "RETINANET", "fcos": "FCOS"}.get(detector, "ROI_HEADS")
    classes = [f"MODEL.{part}.NUM_CLASSES", 5]
    torch.save({"model": build(config("teacher", *classes)).state_dict()}, tmp_path / "five.pth")
    cfg = student_config(
        *("KD.TEACHER.WEIGHTS", str(tmp_path / "five.pth"), "KD.TEACHER.OPTS", classes),
        *("KD.TEACHER.EVAL_BEFORE_TRAIN", True, "SOLVER.MAX_ITER", 1, *NO_TEST),
    )
    train(cfg)
    assert "predicts 5 classes, the student 8: the teacher is not evaluated" in caplog.text


@every_detector
def test_a_student_is_the_stock_detector_but_for_its_loss(student_config, config, batch):
    cfg = student_config()
    student, stock = build(cfg), build(config("lr"))
    attach_teacher(student, cfg)
    assert list(student.state_dict()) == list(stock.state_dict())
    assert differing(tensors_of(student), tensors_of(stock)) == []
    inputs = batch(cfg, "lr")
    found, expected = losses_of(student, inputs), losses_of(stock, inputs)
    assert found.keys() == expected.keys() | {"loss_kd_l1"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert student.distiller.pairs == {f"p{s}": f"p{s + 1}" for s in range(2, 7)}
    sum(found.values()).backward()
    # With a parameter that gets none, DistributedDataParallel stops at the second step.
    assert [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None] == []


def called(model, inputs):
    """How often each module is called to evaluate a batch, and the predictions."""
    calls, names = Counter(), {module: name for name, module in model.named_modules()}
    hook = register_module_forward_hook(lambda module, *_: calls.update([names.get(module)]))
    with torch.no_grad(), hook:
        predictions = model.eval()(inputs)
    return calls, predictions


@every_detector
def test_in_evaluation_a_student_calls_what_the_stock_detector_calls(
    config, batch, monkeypatch, detector
):
    monkeypatch.setattr(Teacher, "__init__", lambda *_, **__: pytest.fail("a teacher was built"))
    student, stock = build(config("student")), build(config("lr"))
    inputs = batch(config("lr"), None, count=3, is_train=False)
    (calls, found), (expected_calls, expected) = called(student, inputs), called(stock, inputs)
    assert calls == expected_calls
    assert calls["backbone"] == 1 and not any("distiller" in name for name in calls)
    assert same_predictions(found, expected)


@every_detector
def test_a_student_inherits_all_of_its_teacher(config):
    teacher, student = build(config("teacher")), build_model(config("student"))
    assert init_from_teacher(student, teacher) == []
    inherited = teacher.state_dict()
    assert all(torch.equal(v, inherited[k]) for k, v in student.state_dict().items())


@every_other_detector
@pytest.mark.parametrize("role", ["lr", "teacher", "hr"])
def test_every_parameter_that_trains_gets_a_gradient(role, config, batch):
    cfg = config(role)
    model = build(cfg)
    inputs = batch(cfg, getattr(model, "frame", None))
    sum(losses_of(model, inputs).values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
