"""Values that a config cannot have, and lists in YAML on the command line."""

import logging

import pytest
from detectron2.utils import comm

from msad_kd.config import values
from msad_kd.config.build import build_config
from msad_kd.config.stages import read_stages, stage_config
from msad_kd.losses import LossTerm
from msad_kd.utils.errors import InputError
from msad_kd.utils.flat_config import flatten_config

COLOURS = ("BRIGHTNESS", "CONTRAST", "SATURATION")
# Keys with values that cannot be, and some that can.
VALUES = {
    "DATASETS.INVALID_ANNOTATIONS": (["skip"], ["drop"]),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": (["nom"], ["full_model"]),
    "INPUT.JITTER.SCALES": ([[2.0], [0.0, 1.0], [2.0, 1.0]], [[1.0, 1.0]]),
    "KD.TEACHER.AMP": (["fp8"], ["bf16"]),
    "SOLVER.MAX_ITER": ([0, -5, True, "0"], [1]),
    "SOLVER.IMS_PER_BATCH": ([0, -8], [1]),
    "SOLVER.UNLABELED_PER_BATCH": ([-1, True], [0]),
    "SOLVER.ACCUMULATE": ([0, -1, 1.5, True], [1]),
    "SOLVER.CHECKPOINT_PERIOD": ([0, -1], [1]),
    "SOLVER.STEPS": (
        [(0,), (-3,), (40, 20), (20, 20), (2.5,), (True,), ("x",), (40000,)],
        [(), (1,), (20, 40), (20, 50000)],
    ),
    "SOLVER.BASE_LR": ([-0.1, float("nan"), float("inf"), True], [0.0]),
    "SOLVER.GAMMA": ([-0.1, float("nan")], [1.0]),
    "SOLVER.MOMENTUM": ([-0.1, 1.0, float("nan")], [0.0]),
    "SOLVER.WEIGHT_DECAY": ([-0.1], [0.0]),
    "SOLVER.WARMUP_ITERS": ([-1], [0]),
    "SOLVER.WARMUP_FACTOR": ([-0.1, 2.0], [0.0, 1.0]),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": ([0.0, -1.0], [0.1]),
    "SOLVER.REFERENCE_WORLD_SIZE": ([-1], [0]),
    "DATALOADER.NUM_WORKERS": ([-1], [0]),
    "DATALOADER.RANDOM_SUBSET_RATIO": ([0.0, -0.5, 1.5, float("nan")], [1.0]),
    "DATALOADER.REPEAT_THRESHOLD": ([-0.1], [0.0]),
    "INPUT.MIN_SIZE_TRAIN": ([(), (-1,), (3.5,)], [(0,)]),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": (["foo", "range"], ["choice"]),  # a range of two sides
    "INPUT.RANDOM_FLIP": (["both"], ["vertical"]),
    "INPUT.CROP.TYPE": (["foo"], ["absolute"]),
    "INPUT.MIN_SIZE_TEST": ([-1], [0]),
    "INPUT.MAX_SIZE_TRAIN": ([0, -1], [1]),
    "INPUT.MAX_SIZE_TEST": ([0, -1], [1]),
    "INPUT.JITTER.SIZE": ([-1], [0]),
    **{f"INPUT.COLOR.{x}": ([-0.1, 1.0], [0.0, 0.9]) for x in COLOURS},
    "INPUT.MIXUP.PROB": ([-0.1, 1.1, float("nan")], [0.0, 1.0]),
    "INPUT.MIXUP.ALPHA": ([0.0, -1.5, float("inf")], [0.1]),
    "MODEL.MULTI_RESOLUTION.FUSED_WEIGHT": ([-0.1], [0.0]),
    "MODEL.MULTI_RESOLUTION.REDUCTION": ([0], [1]),
    "KD.UNLABELED.WEIGHT": ([-0.5, float("nan")], [0.0]),
    "KD.UNLABELED.SCORE": ([(), (1.5,), (-0.1,), ("x",)], [(1.0,), (0.4,) * 80]),
    "KD.UNLABELED.IGNORE_SCORE": ([-0.1, 1.1], [0.0]),
    "KD.DIAGNOSTICS_PERIOD": ([-1], [0]),
    "KD.GRADIENT_RATIO_PERIOD": ([-1], [0]),
    "TEST.EVAL_PERIOD": ([-1], [0]),
    "TEST.PATIENCE": ([-1], [0]),
}


def test_steps_that_the_schedule_does_not_read():
    options = ["SOLVER.MAX_ITER", 30000, "SOLVER.STEPS", (30000,), "SOLVER.LR_SCHEDULER_NAME"]
    build_config("", [*options, "WarmupCosineLR"])
    with pytest.raises(InputError, match="as late as the end"):
        build_config("", [*options, "WarmupMultiStepLR"])


def test_every_value_is_tried():
    assert set(VALUES) == set(values._VALUES)


@pytest.mark.parametrize("key", VALUES)
def test_values_that_cannot_be(key):
    wrong, right = VALUES[key]
    for value in wrong:
        # Detectron2 itself refuses a value of another type.
        with pytest.raises(InputError, match=f"{key} is |mismatch.*config key: {key}"):
            build_config("", [key, value])
    for value in right:
        build_config("", [key, value])


@pytest.mark.parametrize(
    ("key", "name"),
    [("SOLVER.LR_SCHEDULER_NAME", "WarmupLinearLR"), ("SOLVER.WARMUP_METHOD", "sine")],
)
def test_unknown_schedules(key, name):
    with pytest.raises(InputError, match=f"SOLVER: there is no such schedule: .*{name}"):
        build_config("", [key, name])


TERM = {"name": "mse", "weight": 0.5, "levels": ["p2"]}
FORMAT = {"name": "mine", "json": "a.json", "images": "b"}
STAGE = {"name": "a", "config_file": "t.yaml", "weights": "t.pth", "opts": ["KD.SCALE", 4]}
YAML_LISTS = {
    "KD.LOSSES": ("[{name: mse, weight: 5e-1, levels: [p2]}]", [TERM | {"weight": "5e-1"}]),
    "KD.LADDER.STAGES": (
        "[{name: a, config_file: t.yaml, weights: t.pth, opts: [KD.SCALE, 4]}]",
        [STAGE],
    ),
    "DATASETS.COCO_FORMAT": ("[{name: mine, json: a.json, images: b}]", [FORMAT]),
    "KD.TEACHER.OPTS": ("[MODEL.WEIGHTS, x.pth]", ["MODEL.WEIGHTS", "x.pth"]),
    "KD.TEACHER.OPTS ": ("[KD.LOSSES, '[{name: l1}]']", ["KD.LOSSES", "[{name: l1}]"]),
    "DATASETS.TRAIN": ("[coco_2017_train]", ("coco_2017_train",)),
    "SOLVER.STEPS": ("[20, 40]", (20, 40)),
}


@pytest.mark.parametrize("key", YAML_LISTS)
def test_a_list_may_be_yaml_or_python(key):
    text, expected = YAML_LISTS[key]
    key = key.strip()
    for value in (text, repr(expected)):
        assert flatten_config(build_config("", [key, value]))[key] == expected
    for tag in ("!!python/object/apply:os.abort []", "!!python/name:os.abort"):
        with pytest.raises(InputError, match=f"{key}: .* is not a list in YAML"):
            build_config("", [key, f"[{tag}]"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[{name: l1", "KD.LOSSES: .* is not a list in YAML"),
        ("[" * 1500, "KD.LOSSES: .* is not a list in YAML"),
        ("{name: l1, weight: 1}", "cannot be read: .* KD.LOSSES$"),
        ("l1", "cannot be read: .* KD.LOSSES$"),
        ("[l1]", "KD.LOSSES: 'l1' should be a dict"),
        ("[{name: l1, wieght: 1}]", "KD.LOSSES: .*did you mean weight"),
    ],
)
def test_lists_that_cannot_be_read(text, words):
    with pytest.raises(InputError, match=words) as error:
        build_config("", ["KD.LOSSES", text])
    assert "\n" not in str(error.value)


def test_periods_that_round_to_zero_become_one(monkeypatch):
    keys = ["SOLVER.REFERENCE_WORLD_SIZE", 1, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER"]
    monkeypatch.setattr(comm, "get_world_size", lambda: 8)
    for period, scaled in ((3, 1), (80, 10), (0, 0)):
        cfg = build_config("", [*keys, 800, "SOLVER.STEPS", (), "TEST.EVAL_PERIOD", period])
        assert (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (1, scaled)
    with pytest.raises(InputError, match="SOLVER.MAX_ITER is 0"):
        build_config("", [*keys, 3])
    with pytest.raises(InputError, match=r"SOLVER.STEPS is \(1, 1\)"):
        build_config("", [*keys, 80, "SOLVER.STEPS", (8, 9)])


def test_a_stage_too_short_for_its_steps():
    keys = ["SOLVER.STEPS", (60, 80), "SOLVER.MAX_ITER", 90, "KD.LADDER.STAGES"]
    for iterations, words in ((10, ""), (3, "as late as the end"), (1, r"STEPS is \(1, 1\)")):
        cfg = build_config("", [*keys, [{**STAGE, "iterations": iterations}]])
        stages = read_stages(cfg.KD.LADDER.STAGES)
        if not words:
            assert stage_config(cfg, stages, 0).SOLVER.STEPS == (7, 9)
            continue
        with pytest.raises(InputError, match=f"KD.LADDER.STAGES: stage 'a': SOLVER.*{words}"):
            stage_config(cfg, stages, 0)


def test_warm_ups_that_do_not_end_are_warned_of(caplog):
    cfg = build_config("", ["SOLVER.MAX_ITER", 50, "SOLVER.WARMUP_ITERS", 50])
    for warmups, words in (((50, 50), []), ((51, 50), ["WARMUP_ITERS 51"]), ((50, 51), ["l1 "])):
        caplog.clear()
        cfg.SOLVER.WARMUP_ITERS, warmup = warmups
        with caplog.at_level(logging.WARNING):
            values.warn_of_long_warmups(cfg, [LossTerm("l1", 1.0, warmup_iters=warmup)])
        assert len(caplog.messages) == len(words)
        assert all(word in caplog.text for word in words)
