"""Training runs: what distillation changes, what it must not, and that they can be interrupted."""

import shutil

import pytest
import torch
from detectron2.data import DatasetMapper
from helpers import differing, tensors_of, train

from msad_kd import KDTrainer, TwoResolutionMapper
from msad_kd.errors import InputError
from msad_kd.seed import derive_seed
from msad_kd.teacher import Teacher
from msad_kd.trainer import build_mapper

NO_TEST = ["DATASETS.TEST", []]
FAST = [*NO_TEST, "SOLVER.MAX_ITER", 20]


def loss(weight, **more):
    return ["KD.LOSSES", [{"name": "l1", "weight": weight, "warmup_iters": 2, **more}]]


@pytest.fixture(scope="module")
def runs():
    """Weights after training, by name, so that a run is made once."""
    return {}


def weights_after(runs, name, cfg):
    if name not in runs:
        runs[name] = tensors_of(train(cfg).model)
    return runs[name]


def stock_run(runs, config, teacher_weights):
    """20 steps of plain Detectron2 from the teacher's weights."""
    cfg = config("lr", "MODEL.WEIGHTS", str(teacher_weights), *FAST)
    assert cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    return weights_after(runs, "stock", cfg)


def test_weight_0_is_bitwise_the_stock_run(runs, config, student_config, teacher_weights):
    expected = stock_run(runs, config, teacher_weights)
    found = weights_after(runs, "weight 0", student_config(*FAST, *loss(0.0)))
    assert differing(found, expected) == []


def test_another_weight_is_another_run(runs, config, student_config, teacher_weights):
    expected = stock_run(runs, config, teacher_weights)
    found = weights_after(runs, "weight 0.6", student_config(*FAST, *loss(0.6)))
    changed = differing(found, expected)
    assert any(name.startswith("backbone") and name.endswith("weight") for name in changed)
    assert any(name.startswith("roi_heads") for name in changed)


def test_a_run_can_be_repeated(runs, student_config):
    found = weights_after(runs, "weight 0.6", student_config(*FAST, *loss(0.6)))
    again = tensors_of(train(student_config(*FAST, *loss(0.6))).model)
    assert differing(found, again) == []


@pytest.fixture(scope="module")
def interrupted():
    """Keys of a run of 6 steps that keeps its state after the third."""
    return ["SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 3, *NO_TEST]


def resumed(whole, into, cfg):
    """A run that was cut off after step 3, in a folder of its own, resumed to the end."""
    into.mkdir()
    shutil.copy(f"{whole}/model_0000002.pth", into)
    (into / "last_checkpoint").write_text("model_0000002.pth")
    cfg.OUTPUT_DIR = str(into)
    trainer = train(cfg, resume=True)
    assert trainer.start_iter == 3
    return trainer


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_resuming_is_bitwise_the_uninterrupted_run(
    config, student_config, interrupted, tmp_path, role
):
    def fresh(*more):
        keys = [*interrupted, *more]
        return student_config(*keys) if role == "student" else config(role, *keys)

    cfg = fresh()
    whole = train(cfg)
    # The evaluations in between draw random numbers, and must change nothing.
    again = resumed(
        cfg.OUTPUT_DIR,
        tmp_path / "resumed",
        fresh("DATASETS.TEST", ("tiny_val",), "TEST.EVAL_PERIOD", 1, "DATALOADER.NUM_WORKERS", 1),
    )
    assert differing(tensors_of(whole.model), tensors_of(again.model)) == []
    assert whole.optimizer.state_dict()["state"].keys() == again.optimizer.state_dict()["state"].keys()


def test_resuming_does_not_initialise_the_student_again(student_config, interrupted):
    cfg = student_config(*interrupted)
    trained = tensors_of(train(cfg).model)
    trainer = KDTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 6
    assert differing(tensors_of(trainer.model), trained) == []
    # Without --resume the same folder is a fresh start.
    trainer.resume_or_load(resume=False)
    inherited = trainer.teacher.model.state_dict()
    assert all(torch.equal(v, inherited[k]) for k, v in trainer.model.state_dict().items())


def test_without_init_the_student_keeps_its_own_weights(student_config, config):
    torch.manual_seed(0)
    trainer = KDTrainer(student_config("KD.TEACHER.INIT_STUDENT", False))
    trainer.resume_or_load(resume=False)
    torch.manual_seed(0)
    assert differing(tensors_of(trainer.model), tensors_of(KDTrainer.build_model(config("lr")))) == []


def test_the_teacher_is_no_part_of_the_run(student_config):
    cfg = student_config("SOLVER.MAX_ITER", 3, "TEST.EVAL_PERIOD", 2)
    trainer = KDTrainer(cfg)
    trainer.resume_or_load(resume=False)
    teacher = trainer.teacher.model
    before = tensors_of(teacher)
    trainer.train()
    assert differing(tensors_of(teacher), before) == []
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    mine = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert mine == {id(p) for p in trainer.model.parameters()}
    assert mine.isdisjoint(id(p) for p in teacher.parameters())
    saved = torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=False)
    assert saved["model"].keys() == trainer.model.state_dict().keys()
    assert not any("fusion" in name or "teacher" in name for name in saved["model"])


def test_the_teacher_is_evaluated_before_the_first_step(student_config, monkeypatch):
    evaluated = []
    stock = KDTrainer.test.__func__

    def spy(cls, cfg, model, evaluators=None):
        evaluated.append((cfg.OUTPUT_DIR, model))
        return stock(cls, cfg, model, evaluators)

    monkeypatch.setattr(KDTrainer, "test", classmethod(spy))
    cfg = student_config("SOLVER.MAX_ITER", 1, "KD.TEACHER.EVAL_BEFORE_TRAIN", True)
    trainer = train(cfg)
    assert [model for _, model in evaluated] == [trainer.teacher.model, trainer.model]
    assert evaluated[0][0] == f"{cfg.OUTPUT_DIR}/teacher" and evaluated[1][0] == cfg.OUTPUT_DIR
    evaluated.clear()
    trainer = KDTrainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    assert trainer.teacher.model not in [model for _, model in evaluated]
    evaluated.clear()
    train(student_config("SOLVER.MAX_ITER", 1, "KD.TEACHER.EVAL_BEFORE_TRAIN", False))
    assert len(evaluated) == 1


def test_evaluating_the_teacher_changes_nothing(student_config):
    found = [
        tensors_of(
            train(student_config("SOLVER.MAX_ITER", 2, "KD.TEACHER.EVAL_BEFORE_TRAIN", first)).model
        )
        for first in (True, False)
    ]
    assert differing(*found) == []


def test_each_step_has_its_own_seed(config):
    trainer = KDTrainer(config("lr", *NO_TEST))
    seeds = []
    (hook,) = [h for h in trainer._hooks if type(h).__name__ == "SeedEachStep"]
    for trainer.iter in (0, 1):
        hook.before_step()
        seeds.append(torch.initial_seed())
    assert seeds == [derive_seed(3, 0, 0), derive_seed(3, 0, 1)]


@pytest.mark.parametrize(("name", "kind"), [("SGD", torch.optim.SGD), ("ADAMW", torch.optim.AdamW)])
def test_optimizers(config, name, kind):
    trainer = KDTrainer(config("lr", "SOLVER.OPTIMIZER", name, *NO_TEST))
    assert isinstance(trainer.optimizer, kind)
    norms = [
        group["weight_decay"]
        for group in trainer.optimizer.param_groups
        for p in group["params"]
        if p is trainer.model.backbone.bottom_up.stem.conv1.norm.weight
    ]
    assert norms == [0.0]  # SOLVER.WEIGHT_DECAY_NORM


def test_gradients_are_clipped_with_adamw_too(config):
    keys = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1e-9]
    trainer = KDTrainer(config("lr", *keys, *NO_TEST))
    for p in trainer.model.parameters():
        p.grad = torch.ones_like(p)
    trainer.optimizer.step()
    assert max(p.grad.abs().max() for p in trainer.model.parameters()) <= 1e-9


def test_an_unknown_optimizer(config):
    with pytest.raises(InputError, match="SOLVER.OPTIMIZER is 'LION'; use SGD or ADAMW"):
        KDTrainer(config("lr", "SOLVER.OPTIMIZER", "LION"))


def test_each_model_gets_its_mapper(config):
    for role, is_train, frame in (
        ("lr", True, None),
        ("hr", False, None),
        ("student", True, "lr"),
        ("student", False, None),
        ("teacher", True, "hr"),
        ("teacher", False, "hr"),
    ):
        mapper = build_mapper(config(role), is_train)
        assert type(mapper) is (TwoResolutionMapper if frame else DatasetMapper)
        assert frame is None or mapper.augmentations.frame == frame


def test_a_teacher_is_built_for_students_only(config, monkeypatch):
    monkeypatch.setattr(Teacher, "__init__", lambda *_, **__: pytest.fail("a teacher was built"))
    assert KDTrainer(config("lr")).teacher is None
