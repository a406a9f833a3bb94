"""Resuming with another config, and runs that are killed while they write a checkpoint."""

import logging
import math
import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import NO_TEST, differing, train

from msad_kd import KDTrainer
from msad_kd.config.build import build_config
from msad_kd.config.changes import find_changes
from msad_kd.utils.errors import InputError

ADAPTED = [{"name": "l1", "weight": 0.6, "adapter": True}]
WARNS = "msad_kd.engine.resume"


@pytest.fixture(scope="module")
def runs(files_of, tmp_path_factory):
    """runs(optimizer): the folder of a detector's run of four steps by this optimizer."""
    folders = {}

    def folder(optimizer):
        if optimizer not in folders:
            folders[optimizer] = tmp_path_factory.mktemp(optimizer)
            keys = ["OUTPUT_DIR", str(folders[optimizer]), "SOLVER.OPTIMIZER", optimizer, *NO_TEST]
            torch.manual_seed(0)
            train(build_config(str(files_of("mask_rcnn")["lr"]), keys))
        return folders[optimizer]

    return folder


@pytest.fixture
def resumed(runs, config, tmp_path):
    """resumed(KEY, VALUE, ...): the trainer of the run, resumed after two steps of four."""

    def resume(*keys, optimizer="SGD", iteration=1):
        folder = tmp_path / "resumed"
        if not folder.exists():
            folder.mkdir()
            shutil.copy(runs(optimizer) / f"model_{iteration:07d}.pth", folder)
        cut = ["OUTPUT_DIR", str(folder), "SOLVER.OPTIMIZER", optimizer, *NO_TEST]
        trainer = KDTrainer(config("lr", *cut, *keys))
        trainer.resume_or_load(resume=True)
        return trainer

    return resume


def messages(caplog):
    return [r.getMessage() for r in caplog.records if r.name == WARNS]


def momenta(trainer):
    """The optimizer's buffers, by the parameter's name."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    kept = ("momentum_buffer", "exp_avg", "exp_avg_sq")
    return {
        f"{names[parameter]}.{key}": state[key]
        for parameter, state in trainer.optimizer.state.items()
        for key in kept
        if key in state
    }


@pytest.mark.parametrize("optimizer", [pytest.param("SGD", marks=pytest.mark.long), "ADAMW"])
def test_without_a_change_nothing_is_said_and_the_end_is_the_same(resumed, runs, caplog, optimizer):
    trainer = resumed("TEST.EVAL_PERIOD", 2, "DATALOADER.NUM_WORKERS", 1, optimizer=optimizer)
    assert messages(caplog) == [] and trainer.start_iter == 2
    trainer.train()
    whole, again = (
        torch.load(folder / "model_final.pth", weights_only=True)
        for folder in (runs(optimizer), Path(trainer.cfg.OUTPUT_DIR))
    )
    assert differing(whole["model"], again["model"]) == []
    states = [x["trainer"]["_trainer"]["optimizer"]["state"] for x in (whole, again)]
    assert all(differing(states[0][i], states[1][i]) == [] for i in states[0])


GROUPED = ["SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.WEIGHT_DECAY_NORM", 0.01]
GROUPED += ["SOLVER.BIAS_LR_FACTOR", 2.0]


@pytest.mark.parametrize(
    ("optimizer", "keys"),
    [
        ("SGD", ["SOLVER.BASE_LR", 0.5]),
        ("ADAMW", ["SOLVER.BASE_LR", 0.5]),
        ("ADAMW", ["SOLVER.WEIGHT_DECAY", 0.125]),
        ("SGD", ["SOLVER.MOMENTUM", 0.5]),
        ("SGD", ["SOLVER.MAX_ITER", 8, "SOLVER.STEPS", (2,), "SOLVER.GAMMA", 0.25]),
        ("ADAMW", ["SOLVER.WARMUP_ITERS", 6, "SOLVER.WARMUP_FACTOR", 0.5]),
        ("SGD", ["SOLVER.CLIP_GRADIENTS.ENABLED", True]),
        ("SGD", GROUPED),  # which groups the parameters in another way
        ("ADAMW", GROUPED),
    ],
)
def test_the_present_solver_wins_and_the_optimizers_state_is_kept(
    resumed, runs, config, caplog, optimizer, keys
):
    trainer = resumed(*keys, optimizer=optimizer)
    (said,) = messages(caplog)
    assert "new one wins" in said and all(f"{key}: " in said for key in keys[::2])
    # What a run of this config would have at this iteration.
    fresh = KDTrainer(config("lr", "SOLVER.OPTIMIZER", optimizer, *keys, *NO_TEST))
    for _ in range(2):
        fresh.scheduler.step()
    ours, expected = (
        [{**group, "params": len(group["params"])} for group in x.optimizer.param_groups]
        for x in (trainer, fresh)
    )
    assert ours == expected
    before = resumed_state(runs(optimizer), config, optimizer)
    assert before and differing(momenta(trainer), before) == []
    if keys is GROUPED:
        trainer.max_iter = 3
        trainer.train()
        assert trainer.iter == 3


def resumed_state(folder, config, optimizer):
    """The optimizer's buffers after two steps, read by a trainer whose config has no changes."""
    trainer = KDTrainer(config("lr", "SOLVER.OPTIMIZER", optimizer, *NO_TEST))
    state = torch.load(folder / "model_0000001.pth", weights_only=True)["trainer"]
    trainer.optimizer.load_state_dict(state["_trainer"]["optimizer"])
    return momenta(trainer)


def test_the_present_seed_and_data_win(resumed, caplog):
    trainer = resumed("SEED", 4, "INPUT.MIN_SIZE_TRAIN", (24,), "MODEL.WEIGHTS", "elsewhere.pth")
    applied, begun = messages(caplog)
    assert "SEED: 3 -> 4" in applied and "INPUT.MIN_SIZE_TRAIN: [32] -> [24]" in applied
    assert "MODEL.WEIGHTS: '' -> 'elsewhere.pth'" in begun and "no effect" in begun
    (seeds,) = [h for h in trainer._hooks if type(h).__name__ == "SeedEachStep"]
    assert seeds.seed == 4


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["SOLVER.OPTIMIZER", "ADAMW"], "SOLVER.OPTIMIZER ADAMW; .*SOLVER.OPTIMIZER: 'SGD'"),
        (["MODEL.FPN.OUT_CHANNELS", 8], "another shape .*; .*MODEL.FPN.OUT_CHANNELS: 16 -> 8"),
        (["MODEL.MASK_ON", False], "trained .* weights.*MODEL.MASK_ON: True -> False"),
        (["MODEL.META_ARCHITECTURE", "ProposalNetwork"], "MODEL.META_ARCHITECTURE: 'Generali"),
        (["MODEL.BACKBONE.FREEZE_AT", 2], "trained .* MODEL.BACKBONE.FREEZE_AT: 0 -> 2"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", 9], "another shape .*MODEL.ROI_HEADS.NUM_CLASSES: 8 -> 9"),
        (["SOLVER.IMS_PER_BATCH", 1], "had 2 images a batch and is resumed with 1"),
        (["SOLVER.MAX_ITER", 1], "SOLVER.MAX_ITER is 1, but the run in .* has done 2 iterations"),
    ],
)
def test_what_cannot_be_applied_is_refused(resumed, keys, words):
    with pytest.raises(InputError, match=words):
        resumed(*keys)


def test_another_precision_is_refused(resumed):
    trainer = resumed()
    state = trainer.state_dict()
    state["_trainer"]["grad_scaler"] = {}
    with pytest.raises(InputError, match="SOLVER.AMP.ENABLED differs"):
        trainer.check_state_dict(state)


@pytest.mark.parametrize(
    ("before", "now"), [([], ADAPTED), pytest.param(ADAPTED, [], marks=pytest.mark.long)]
)
def test_losses_with_parameters_are_refused(student_config, before, now):
    losses = [[*x, {"name": "mse", "weight": 1.0}] for x in (before, now)]
    cfg = student_config("KD.LOSSES", losses[0], "SOLVER.MAX_ITER", 2, *NO_TEST)
    train(cfg)
    keys = ["OUTPUT_DIR", cfg.OUTPUT_DIR, "KD.LOSSES", losses[1], "SOLVER.MAX_ITER", 4, *NO_TEST]
    with pytest.raises(InputError, match=r"cannot be resumed: .*KD.LOSSES: \["):
        train(student_config(*keys), resume=True)


DAMAGES = {
    "another shape": lambda x: x["_trainer"]["optimizer"]["state"][0].update(
        momentum_buffer=torch.zeros(1, 2)
    ),
    "no groups": lambda x: x["_trainer"]["optimizer"].pop("param_groups"),
    "empty groups": lambda x: x["_trainer"]["optimizer"].update(param_groups=[]),
    "no optimizer": lambda x: x["_trainer"].pop("optimizer"),
    "no state": lambda x: x["_trainer"]["optimizer"].pop("state"),
    "text": lambda x: x.update(_trainer="text"),
    "no scheduler": lambda x: x["hooks"].update(LRScheduler=None),
    "hooks": lambda x: x.update(hooks=[]),
}


@pytest.fixture(scope="module", params=[0.001, 0.5], ids=["same", "changed"])
def trainer(request, files_of, tmp_path_factory):
    """A trainer whose learning rate is that of the run, or another."""
    keys = ["OUTPUT_DIR", str(tmp_path_factory.mktemp("trainer")), *NO_TEST]
    keys += ["SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", request.param]
    return KDTrainer(build_config(str(files_of("mask_rcnn")["lr"]), keys))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_is_one_sentence(runs, trainer, damage):
    state = torch.load(runs("SGD") / "model_0000001.pth", weights_only=True)["trainer"]
    damage(state)
    with pytest.raises(InputError, match="cannot be resumed: the state of its .* is damaged"):
        trainer.check_state_dict(state)
        trainer.load_state_dict(state)


def test_a_checkpoint_without_config_is_resumed_as_before(resumed, tmp_path, runs, caplog):
    folder = tmp_path / "resumed"
    folder.mkdir()
    contents = torch.load(runs("SGD") / "model_0000001.pth", weights_only=True)
    del contents["trainer"]["config"], contents["classes"]
    torch.save(contents, folder / "model_0000001.pth")
    trainer = resumed("SOLVER.BASE_LR", 0.5)
    assert trainer.optimizer.param_groups[0]["initial_lr"] == 0.001
    (said,) = messages(caplog)
    assert "did not keep the config" in said


def test_a_scaled_config_is_the_same(config):
    keys = ["SOLVER.REFERENCE_WORLD_SIZE", 2, "SOLVER.BASE_LR", 0.1, "SOLVER.MAX_ITER", 8]
    scaled = config("lr", *keys)  # to one process
    assert (scaled.SOLVER.IMS_PER_BATCH, scaled.SOLVER.REFERENCE_WORLD_SIZE) == (1, 1)
    scaled.merge_from_list(["SOLVER.REFERENCE_WORLD_SIZE", 0])
    assert find_changes(config("lr", *keys).dump(), scaled) == {}
    assert find_changes(config("lr", *keys, "SEED", 9).dump(), scaled) == {"SEED": (9, 3)}


def test_a_complete_run_says_so_and_gets_its_last_file(resumed, runs, caplog):
    trainer = resumed(iteration=3)  # killed between the last two files
    assert "complete: nothing is left to train, because SOLVER.MAX_ITER is 4" in caplog.text
    trainer.train()
    folder = Path(trainer.cfg.OUTPUT_DIR)
    last = (folder / "model_final.pth").read_bytes()
    assert last == (runs("SGD") / "model_0000003.pth").read_bytes()
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"


def test_the_classes_are_kept(runs):
    contents = torch.load(runs("SGD") / "model_final.pth", weights_only=True)
    assert len(contents["classes"]) == 8 and all(isinstance(x, str) for x in contents["classes"])


def test_weights_that_become_nan_end_the_run_and_are_not_kept(config):
    cfg = config("lr", "SOLVER.MAX_ITER", 4, *NO_TEST)
    step = KDTrainer.run_step

    def spoil(self):
        step(self)
        if self.iter == 2:
            torch.nn.init.constant_(self.model.backbone.fpn_output2.bias, math.nan)
        if self.iter == 3:
            pytest.fail("a step with such weights was not noticed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KDTrainer, "run_step", spoil)
        cfg.SOLVER.CHECKPOINT_PERIOD = 1
        with pytest.raises(InputError, match="fpn_output2.bias.*the last .*model_0000001.pth"):
            train(cfg)
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    assert train(cfg, resume=True).start_iter == 2


def test_a_fresh_run_in_an_old_folder_is_not_mixed_with_it(config, caplog):
    cfg = config("lr", *NO_TEST)
    folder = Path(cfg.OUTPUT_DIR)
    with caplog.at_level(logging.INFO):
        torch.manual_seed(0)
        train(cfg)
        old = {x.name: x.read_bytes() for x in folder.iterdir() if x.is_file()}
        torch.manual_seed(1)
        again = train(cfg)  # a trainer's own script: metrics.json is open before it starts
    assert again.start_iter == 0
    aside = {x.name: x.read_bytes() for x in (folder / "previous_run_1").iterdir()}
    weights = {name for name in old if name.endswith((".pth", ".sha256")) or name == "metrics.json"}
    assert len(weights) > 6 and {name: aside[name] for name in weights} == {
        name: old[name] for name in weights
    }
    assert len((folder / "metrics.json").read_text().splitlines()) == 1
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1


# ---- Kills ----


def die_at(cfg, moment, resume):
    """Train, and kill this process at a moment of writing: the n-th time a file is synced.

    Each checkpoint syncs six times: itself, its checksum and last_checkpoint, before and after each
    is renamed. A negative moment is the middle of the file that would be synced then.
    """
    sync, count = os.fsync, iter(range(1000))

    def dying(descriptor):
        if next(count) == abs(moment):
            if moment < 0 and not os.path.isdir(f"/proc/self/fd/{descriptor}"):
                path = os.readlink(f"/proc/self/fd/{descriptor}")
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = dying
    torch.manual_seed(0)
    train(cfg, resume=resume)


def killed(cfg, moment, resume=False):
    child = multiprocessing.get_context("fork").Process(target=die_at, args=(cfg, moment, resume))
    child.start()
    child.join(120)
    return child.exitcode


@pytest.fixture(scope="module")
def whole(runs):
    return torch.load(runs("ADAMW") / "model_final.pth", weights_only=True)


def check_kill(config, whole, moments):
    cfg = config("lr", "SOLVER.OPTIMIZER", "ADAMW", *NO_TEST)
    for number, moment in enumerate(moments):
        assert killed(cfg, moment, resume=number > 0) == -signal.SIGKILL
    torch.manual_seed(0)
    train(cfg, resume=True)
    again = torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)
    assert differing(whole["model"], again["model"]) == []
    assert again["trainer"]["iteration"] == 3


def test_killed_while_it_writes_its_second_checkpoint(config, whole):
    check_kill(config, whole, [-6])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_random_moments_of_writing(config, whole, seed):
    generator = random.Random(seed)
    moment = generator.choice([1, -1]) * generator.randrange(18)  # three checkpoints
    check_kill(config, whole, [moment, *([generator.randrange(5)] if moment < 12 else [])])


# ---- Mutated states ----

VALUES = [None, "text", -1, 1 << 40, 0.5, [], {}, [1, 2], {"a": 1}, torch.zeros(3), True]


def mutate(state, generator):
    """Replace, remove or add one value somewhere in nested containers; return where and what."""
    node, path = state, []
    while True:
        key = generator.choice(list(node) if isinstance(node, dict) else range(len(node)))
        path.append(key)
        below = node[key]
        if not isinstance(below, (dict, list)) or not below or generator.random() < 0.3:
            break
        node = below
    action = generator.choice(["replace", "replace", "remove", "add"])
    value = generator.choice(VALUES)
    if action == "replace":
        node[key] = value
    elif action == "remove":
        del node[key]
    elif isinstance(node, dict):
        node["more"] = value
    else:
        node.append(value)
    return f"{action} {path} {value!r}"


def copy_containers(node):
    if isinstance(node, dict):
        return {key: copy_containers(value) for key, value in node.items()}
    return list(map(copy_containers, node)) if isinstance(node, list) else node


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.long)])
def test_a_mutated_state_is_resumed_or_refused(runs, trainer, count):
    generator, refused = random.Random(count), 0
    original = torch.load(runs("SGD") / "model_0000001.pth", weights_only=True)["trainer"]
    groups = [dict(group) for group in trainer.optimizer.param_groups]
    parameters = [x for group in groups for x in group["params"]]
    original.pop("iteration")  # checked when the file is found
    for _ in range(count):
        trainer.optimizer.param_groups = [dict(group) for group in groups]
        trainer.optimizer.state.clear()
        state = copy_containers(original)
        what = mutate(state, generator)
        state["iteration"] = 1
        try:
            trainer.check_state_dict(state)
            trainer.load_state_dict(state)
            for parameter in parameters:  # a step shows whether the optimizer can go on
                parameter.grad = torch.zeros_like(parameter)
            trainer.optimizer.step()
            trainer.scheduler.step()
        except InputError as error:
            assert "\n" not in str(error), what
            refused += 1
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
    assert 0.1 * count < refused < 0.9 * count
