"""Resuming with another config."""

import json
import logging
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import NO_TEST, cut_off, differing, tensors_of, train

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


def test_a_resume_that_gets_other_batches_says_so(resumed, caplog):
    resumed("SEED", -1)
    assert "gets other batches" in caplog.text and "SEED is negative" in caplog.text
    caplog.clear()
    trainer = resumed()
    state = trainer.state_dict()
    assert state["processes"] == 1 and "gets other batches" not in caplog.text
    trainer.check_state_dict({**state, "processes": 2, "iteration": 1})
    assert "it had 2 processes and now has 1" in caplog.text


GROUPED = ["SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.WEIGHT_DECAY_NORM", 0.01]
GROUPED += ["SOLVER.BIAS_LR_FACTOR", 2.0]


@pytest.mark.parametrize(
    ("optimizer", "keys"),
    [
        pytest.param("SGD", ["SOLVER.BASE_LR", 0.5], marks=pytest.mark.long),
        ("ADAMW", ["SOLVER.BASE_LR", 0.5]),
        pytest.param("ADAMW", ["SOLVER.WEIGHT_DECAY", 0.125], marks=pytest.mark.long),
        ("SGD", ["SOLVER.MOMENTUM", 0.5]),
        ("SGD", ["SOLVER.MAX_ITER", 8, "SOLVER.STEPS", (2,), "SOLVER.GAMMA", 0.25]),
        pytest.param(
            *("ADAMW", ["SOLVER.WARMUP_ITERS", 6, "SOLVER.WARMUP_FACTOR", 0.5]),
            marks=pytest.mark.long,
        ),
        pytest.param("SGD", ["SOLVER.CLIP_GRADIENTS.ENABLED", True], marks=pytest.mark.long),
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


def test_classes_of_another_order_are_refused_in_a_resume_and_warned_of_at_a_start(
    runs, resumed, config, data, caplog
):
    content = json.loads((data / "annotations" / "instances_train.json").read_text())
    names = [category["name"] for category in content["categories"]]
    keys = ["DATASETS.CLASSES", names[::-1]]
    with pytest.raises(InputError, match=f"the classes {names[0]}, .* in this order; resume it"):
        resumed(*keys)
    weights = ["MODEL.WEIGHTS", str(runs("SGD") / "model_final.pth")]
    KDTrainer(config("lr", *weights, *keys, *NO_TEST)).resume_or_load(resume=False)
    assert re.search(f"model_final.pth' was trained on the classes {names[0]}", caplog.text)


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


def test_precise_statistics_are_of_the_same_images(config, tmp_path):
    keys = ["TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2, "TEST.EVAL_PERIOD", 1]
    whole = train(config("lr", *keys, *NO_TEST))
    folder = cut_off(whole.cfg.OUTPUT_DIR, tmp_path / "cut_off")
    again = train(config("lr", *keys, *NO_TEST, "OUTPUT_DIR", folder), resume=True)
    assert again.start_iter == 2
    assert differing(tensors_of(whole.model), tensors_of(again.model)) == []
