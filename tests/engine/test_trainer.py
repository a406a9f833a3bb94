"""Training runs: what distillation changes, what it must not, and that they can be interrupted."""

import logging
from pathlib import Path

import pytest
import torch
from detectron2.engine.hooks import IterationTimer, LRScheduler, PeriodicCheckpointer
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.utils import comm
from helpers import NO_TEST, cut_off, differing, tensors_of, train

from msad_kd import KDTrainer, TwoResolutionMapper
from msad_kd.data.mapper import CheckedDatasetMapper, build_mapper
from msad_kd.distill.teacher import Teacher
from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import derive_seed


def loss(weight):
    return ["KD.LOSSES", [{"name": "l1", "weight": weight, "warmup_iters": 2}]]


@pytest.fixture
def stock_run(config, teacher_weights):
    """The trainer of 20 steps of plain Detectron2 from the teacher's weights."""
    keys = ["SOLVER.MAX_ITER", 20, "SOLVER.CHECKPOINT_PERIOD", 5, *NO_TEST]
    cfg = config("lr", "MODEL.WEIGHTS", str(teacher_weights), *keys)
    assert cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    return train(cfg)


def test_weight_0_is_bitwise_the_stock_run_and_another_is_not(stock_run, student_config):
    without = train(student_config("SOLVER.MAX_ITER", 20, *NO_TEST, *loss(0.0)))
    assert differing(tensors_of(without.model), tensors_of(stock_run.model)) == []
    distilled = train(student_config("SOLVER.MAX_ITER", 5, *NO_TEST, *loss(0.6)))
    after_5 = torch.load(f"{stock_run.cfg.OUTPUT_DIR}/model_0000004.pth", weights_only=False)
    changed = differing(distilled.model.state_dict(), after_5["model"])
    assert any(name.startswith("backbone") and name.endswith("weight") for name in changed)
    assert any(name.startswith("roi_heads") for name in changed)


def test_a_teacher_is_read_once_and_no_backbone_is_built_for_its_shapes(
    student_config, config_files, files_read, monkeypatch
):
    cfg = student_config("SOLVER.MAX_ITER", 1, "KD.TEACHER.EVAL_BEFORE_TRAIN", True)
    built, get = [], BACKBONE_REGISTRY.get

    def recording(name):
        return lambda *arguments: built.append(name) or get(name)(*arguments)

    monkeypatch.setattr(BACKBONE_REGISTRY, "get", recording)
    files_read.clear()
    trainer = train(cfg)
    assert files_read == [str(config_files["teacher"])]
    student, teacher = (x.MODEL.BACKBONE.NAME for x in (cfg, trainer.teacher_spec.cfg))
    assert built == [student, teacher]


def test_a_warm_up_that_does_not_end_is_warned_of(student_config, caplog):
    slow = {"name": "l1", "weight": 0.6, "warmup_iters": 500}
    terms = [slow, {"name": "mse", "weight": 1.0, "warmup_iters": 4}]
    KDTrainer(student_config("KD.LOSSES", terms, *NO_TEST))
    (record,) = [r for r in caplog.records if "KD.LOSSES" in r.message]
    assert "l1 (warmup_iters 500)" in record.message and "mse" not in record.message


def test_a_stock_detector_has_no_teacher_and_one_that_is_named_is_warned_of(
    config, caplog, monkeypatch
):
    monkeypatch.setattr(Teacher, "__init__", lambda *_, **__: pytest.fail("a teacher was built"))
    assert KDTrainer(config("lr", *NO_TEST)).teacher is None
    assert "KD.TEACHER is not used" not in caplog.text
    KDTrainer(config("lr", "KD.TEACHER.CONFIG_FILE", "teacher.yaml", *NO_TEST))
    assert "KD.TEACHER is not used: a GeneralizedRCNN is trained without" in caplog.text


def test_precise_statistics_of_two_resolutions_are_the_tools(config):
    with pytest.raises(
        InputError, match="TEST.PRECISE_BN.ENABLED .* tools/analysis/precise_statistics.py"
    ):
        KDTrainer(config("teacher", "TEST.PRECISE_BN.ENABLED", True, *NO_TEST))


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(student_config, tmp_path):
    losses = [
        {"name": "mgd", "weight": 1e-4, "levels": ["p2", "p3"]},
        {"name": "l1", "weight": 0.1, "adapter": True},
    ]
    keys = ["SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 2, "KD.LOSSES", losses]
    whole = train(student_config(*keys, *NO_TEST))
    # Cut off after the second step. The evaluations, which draw random numbers, the workers and
    # the start must change nothing.
    more = ["OUTPUT_DIR", cut_off(whole.cfg.OUTPUT_DIR, tmp_path / "cut_off")]
    more += ["TEST.EVAL_PERIOD", 2, "DATALOADER.NUM_WORKERS", 1]
    again = train(student_config(*keys, *more), resume=True)
    assert again.start_iter == 2
    assert differing(tensors_of(whole.model), tensors_of(again.model)) == []
    states = (t.optimizer.state_dict()["state"].values() for t in (whole, again))
    for one, other in zip(*states, strict=True):
        assert differing(one, other) == []
    trained = {k: v for k, v in tensors_of(whole.model).items() if k.startswith("distiller.")}
    assert {k.split(".")[1] for k in trained} == {"adapters", "parts"}
    early = torch.load(f"{whole.cfg.OUTPUT_DIR}/model_0000001.pth", weights_only=False)["model"]
    assert differing({k: early[k] for k in trained}, trained) == list(trained)


def test_resuming_does_not_initialise_the_student_again(student_config):
    cfg = student_config("SOLVER.MAX_ITER", 2, *NO_TEST)
    trained = tensors_of(train(cfg).model)
    trainer = KDTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
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
    stock = KDTrainer.build_model(config("lr"))
    assert differing(tensors_of(trainer.model), tensors_of(stock)) == []


def test_weights_that_the_teachers_replace_are_named(student_config, teacher_weights, caplog):
    trainer = KDTrainer(student_config("MODEL.WEIGHTS", str(teacher_weights)))
    trainer.resume_or_load(resume=False)
    assert f"replace those of MODEL.WEIGHTS '{teacher_weights}'" in caplog.text


def test_initial_weights_that_are_missing(config):
    trainer = KDTrainer(config("lr", "MODEL.WEIGHTS", "nowhere.pth"))
    with pytest.raises(InputError, match="'nowhere.pth' for MODEL.WEIGHTS does not exist"):
        trainer.resume_or_load(resume=False)


def test_the_teacher_is_no_part_of_the_run(student_config):
    cfg = student_config("SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1)
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


def test_the_teacher_is_evaluated_before_the_first_step(student_config, monkeypatch, caplog):
    evaluated, test = [], KDTrainer.test.__func__

    def recording(cls, cfg, model, evaluators=None):
        evaluated.append((cfg.OUTPUT_DIR, model))
        return test(cls, cfg, model, evaluators)

    monkeypatch.setattr(KDTrainer, "test", classmethod(recording))
    cfg = student_config("SOLVER.MAX_ITER", 1, "KD.TEACHER.EVAL_BEFORE_TRAIN", True)
    with caplog.at_level(logging.INFO):
        seen = train(cfg)
    folder = cfg.OUTPUT_DIR
    assert evaluated == [(f"{folder}/teacher", seen.teacher.model), (folder, seen.model)]
    assert "Evaluating the teacher's branch 'fused'" in caplog.text
    evaluated.clear()
    resumed = train(cfg, resume=True)
    assert evaluated == [(folder, resumed.model)]
    evaluated.clear()
    unseen = train(student_config("SOLVER.MAX_ITER", 1, "KD.TEACHER.EVAL_BEFORE_TRAIN", False))
    assert [model for _, model in evaluated] == [unseen.model]
    assert differing(tensors_of(unseen.model), tensors_of(seen.model)) == []


def test_each_step_has_its_own_seed(config):
    trainer = KDTrainer(config("lr", *NO_TEST))
    seeds = []
    (hook,) = [h for h in trainer._hooks if type(h).__name__ == "SeedEachStep"]
    for trainer.iter in (0, 1):
        hook.before_step()
        seeds.append(torch.initial_seed())
    assert seeds == [derive_seed(3, 0, 0), derive_seed(3, 0, 1)]


@pytest.mark.parametrize("main", [True, False])
def test_hooks_come_before_what_they_prepare(student_config, monkeypatch, main):
    """Only the main process saves and writes."""
    options = ["TEST.AUG.ENABLED", True, "KD.TEACHER.EVAL_BEFORE_TRAIN", True]
    options += ["TEST.EVAL_PERIOD", 1, "TEST.LOSS", True]
    trainer = KDTrainer(student_config(*options))
    monkeypatch.setattr(comm, "is_main_process", lambda: main)
    names = [type(hook).__name__ for hook in trainer.build_hooks() if hook is not None]
    assert names == [
        *("EvaluateTeacher", "SeedEachStep", "IterationTimer", "LRScheduler"),
        *("KeepNormalizer", "WatchLosses", *["PeriodicCheckpointer"] * main),
        *("StopOnSignal", "EvalHook", "ValidationLoss", "KeepBest", "EvalHook"),
        *["PeriodicWriter"] * main,
    ]


class OwnSchedule(LRScheduler):
    pass


@pytest.mark.parametrize("hooks", [[], [OwnSchedule()]])
def test_a_subclass_may_have_hooks_of_its_own(config, hooks):
    class Own(KDTrainer):
        def build_hooks(self):
            period = self.cfg.SOLVER.CHECKPOINT_PERIOD
            return [IterationTimer(), *hooks, PeriodicCheckpointer(self.checkpointer, period)]

    cfg = config("lr", "SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1)
    trainer = Own(cfg)
    trainer.resume_or_load(resume=False)
    before = tensors_of(trainer.model)
    assert trainer.train() == {}
    assert differing(tensors_of(trainer.model), before) != []
    Path(cfg.OUTPUT_DIR, "last_checkpoint").write_text("model_0000000.pth")
    again = Own(cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == 1
    assert again.train() == {}


def test_a_schedule_that_keeps_no_state_cannot_be_resumed(config):
    class Own(KDTrainer):
        @classmethod
        def build_lr_scheduler(cls, cfg, optimizer):
            return torch.optim.lr_scheduler.MultiStepLR(optimizer, [1])

    cfg = config("lr", "SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1, *NO_TEST)
    trainer = Own(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    with pytest.raises(InputError, match="such as the MultiStepLR of build_lr_scheduler"):
        Own(cfg).resume_or_load(resume=True)


@pytest.mark.parametrize(("name", "kind"), [("SGD", torch.optim.SGD), ("ADAMW", torch.optim.AdamW)])
def test_optimizers_clip_gradients_and_do_not_decay_norms(config, name, kind):
    keys = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1e-9]
    trainer = KDTrainer(config("lr", "SOLVER.OPTIMIZER", name, *keys, *NO_TEST))
    assert isinstance(trainer.optimizer, kind)
    norm = trainer.model.backbone.bottom_up.stem.conv1.norm.weight
    groups = trainer.optimizer.param_groups
    (decay,) = [x["weight_decay"] for x in groups if any(p is norm for p in x["params"])]
    assert decay == 0.0  # SOLVER.WEIGHT_DECAY_NORM
    for p in trainer.model.parameters():
        p.grad = torch.ones_like(p)
    trainer.optimizer.step()
    assert max(p.grad.abs().max() for p in trainer.model.parameters()) <= 1e-9


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
        assert type(mapper) is (TwoResolutionMapper if frame else CheckedDatasetMapper)
        assert frame is None or mapper.augmentations.frame == frame
