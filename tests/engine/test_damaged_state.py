"""Resuming from a checkpoint whose state of the training is damaged: one sentence, or a run."""

import json
import random
from pathlib import Path

import pytest
import torch
from helpers import NO_TEST, train

from msad_kd import KDTrainer
from msad_kd.config.build import build_config
from msad_kd.engine.best import KeepBest
from msad_kd.utils.errors import InputError


@pytest.fixture(scope="module")
def make_config(files_of, tmp_path_factory):
    """make_config(KEY, VALUE, ...): a config with a folder of its own."""

    def make(*keys):
        folder = ["OUTPUT_DIR", str(tmp_path_factory.mktemp("run")), *NO_TEST]
        options = [*folder, "SOLVER.OPTIMIZER", "SGD", *keys]
        return build_config(str(files_of("mask_rcnn")["lr"]), options)

    return make


@pytest.fixture(scope="module")
def state(make_config):
    """The state of a run after two of its four steps."""
    folder = train(make_config()).cfg.OUTPUT_DIR
    return torch.load(f"{folder}/model_0000001.pth", weights_only=True)["trainer"]


@pytest.fixture(scope="module", params=[0.001, 0.5], ids=["same", "changed"])
def trainer(request, make_config):
    """A trainer whose learning rate is that of the run, or another."""
    return KDTrainer(make_config("SOLVER.BASE_LR", request.param))


def copy_containers(node):
    if isinstance(node, dict):
        return {key: copy_containers(value) for key, value in node.items()}
    return list(map(copy_containers, node)) if isinstance(node, list) else node


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
    "config": lambda x: x.update(config="["),
    "hooks": lambda x: x.update(hooks=[]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_is_one_sentence(state, trainer, damage):
    state = copy_containers(state)
    damage(state)
    with pytest.raises(InputError, match="cannot be resumed: the state of its .* is damaged"):
        trainer.check_state_dict(state)
        trainer.load_state_dict(state)


BEST = {"metric": "bbox/AP", "value": 1.0, "iteration": 1}


@pytest.mark.parametrize("record", ["{", "[]", BEST, {**BEST, "since": ["x"]}])
def test_a_damaged_record_of_the_best_model_is_told_and_forgotten(make_config, record, caplog):
    cfg = make_config("TEST.EVAL_PERIOD", 1)
    text = record if isinstance(record, str) else json.dumps(record)
    Path(cfg.OUTPUT_DIR, "model_best.json").write_text(text)
    hook = KeepBest(cfg, None)
    assert not hook.resume(2) and (hook.best_iter, hook.since) == (None, [])
    assert "model_best.json' cannot be read: which model is best is not known" in caplog.text


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


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.long)])
def test_a_mutated_state_is_resumed_or_refused(state, trainer, count):
    generator, refused = random.Random(count), 0
    groups = [dict(group) for group in trainer.optimizer.param_groups]
    parameters = [x for group in groups for x in group["params"]]
    original = {key: value for key, value in state.items() if key != "iteration"}
    for _ in range(count):
        trainer.optimizer.param_groups = [dict(group) for group in groups]
        trainer.optimizer.state.clear()
        state = copy_containers(original)
        what = mutate(state, generator)
        state["iteration"] = 1  # it is checked when the file is found
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
