"""KD.LOSSES: the warm-up of a weight, and how fields are checked against the loss's signature."""

import inspect
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from msad_kd.distill.distiller import Distiller
from msad_kd.losses import (
    DENSE_LOSS_REGISTRY,
    DISTILL_LOSS_REGISTRY,
    ROI_LOSS_REGISTRY,
    LossTerm,
    RoIPredictions,
    read_losses,
)
from msad_kd.utils.errors import InputError


def test_the_weight_rises_linearly_during_the_warm_up():
    term = LossTerm("l1", weight=2.0, warmup_iters=4)
    assert [term.warmup_weight(i) for i in range(6)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert LossTerm("l1", weight=2.0).warmup_weight(0) == 2.0


def test_numbers_that_yaml_reads_as_text():
    entry = {"name": "ssim", "weight": "5e-7", "exponents": ["5e-1", 1, 0], "levels": ["p2"]}
    (term,) = read_losses([entry])
    assert (term.weight, term.levels, term.arguments) == (5e-7, ("p2",), {"exponents": [0.5, 1, 0]})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "sssim"}, "no loss 'sssim'; known: .*; did you mean ssim"),
        ({"weigth": 2}, "'ssim' has no field 'weigth'; known: .*; did you mean weight"),
        ({"exponents": [1, 1]}, r"exponents of 'ssim' should be a list of 3 numbers.* \[1, 1\]"),
        ({"levels": [2]}, r"levels of 'ssim' should be a list of different texts, not \[2\]"),
        ({"levels": ["p2", "p2"]}, "levels of 'ssim' should be a list of different texts"),
        ({"proposals": "teacher"}, "'ssim' has no field 'proposals'; known: "),
        ({"adapter": 1}, "adapter of 'ssim' should be auto, true or false, not 1"),
    ],
)
def test_fields_that_a_loss_refuses(fields, words):
    with pytest.raises(InputError, match=f"KD.LOSSES: .*{words}"):
        read_losses([{"name": "ssim", "weight": 1.0, **fields}])


NAN, INFINITE = float("nan"), float("inf")
NO_WEIGHTS = [-1, -1e-9, NAN, INFINITE, -INFINITE, True, "x", None, [1.0], 10**400]
NOT_POSITIVE = [0, -1.5, NAN, INFINITE, True, 1e-300, 1e300, "1e999"]
# A loss's fields with values that it cannot have.
OUT_OF_RANGE = {
    ("l1", "weight"): NO_WEIGHTS,
    ("roi_box", "weight"): NO_WEIGHTS,
    ("l1", "warmup_iters"): [-1, 2.5, True, NAN],
    ("ssim", "rescale"): ["pixel", 3, None],
    ("ssim", "exponents"): [[1, 1], [1, 1, -1], [1, 1, NAN], [True, 1, 1], 1, []],
    ("ssim", "window_size"): [0, -11, 10, 7.5, True, NAN, "11", None],
    ("ssim", "sigma"): NOT_POSITIVE,
    ("ssim", "data_range"): NOT_POSITIVE,
    ("ssim", "padding"): ["circular", 0],
    ("pkd", "eps"): [0, -1e-6, NAN, 1e-300, 2, True],
    ("cwd", "tau"): NOT_POSITIVE,
    ("mgd", "mask_ratio"): [1.5, 1, -0.1, NAN, True, "much"],
    ("roi_class", "temperature"): NOT_POSITIVE,
    ("roi_keypoint", "temperature"): NOT_POSITIVE,
    ("roi_class", "class_weights"): [[1, -1], [1, NAN], [0, 0], [], 1, "x", [[1]], [True, 1]],
    ("roi_class", "proposals"): ["theirs", None, True, ["student"]],
    ("roi_mask", "proposals"): ["students"],
    ("cross_head", "convs"): [-1, 2.5, True],
    ("cross_head", "box_weight"): NO_WEIGHTS,
    ("cross_head", "centerness_weight"): NO_WEIGHTS,
    ("l1", "background"): NO_WEIGHTS,
    ("ssim", "focus"): ["box", None, 1],
}


@pytest.mark.parametrize(("name", "field"), OUT_OF_RANGE)
def test_values_out_of_a_fields_range(name, field):
    for value in OUT_OF_RANGE[name, field]:
        with pytest.raises(InputError, match=f"KD.LOSSES: {field} of '{name}' should be"):
            read_losses([{"name": name, "weight": 1.0, field: value}])


def test_every_number_of_a_loss_has_a_range():
    for name, loss in (*DISTILL_LOSS_REGISTRY, *ROI_LOSS_REGISTRY, *DENSE_LOSS_REGISTRY):
        fields = inspect.signature(loss).parameters.values()
        for field in (x for x in fields if x.default is not x.empty and x.name != "weights"):
            assert (name, field.name) in OUT_OF_RANGE
            assert read_losses([{"name": name, "weight": 0, field.name: field.default}])


@pytest.mark.parametrize("extreme", [1e-6, 1e6])
def test_losses_are_finite_at_both_ends_of_their_ranges(extreme):
    maps = torch.randn(2, 1, 3, 8, 9, generator=torch.manual_seed(0)) * 10
    predictions = [RoIPredictions(x[0, :, 0], None, None) for x in maps]
    fields = {"ssim": ("sigma", "data_range"), "cwd": ("tau",), "roi_class": ("temperature",)}
    eps = 1e-12 if extreme < 1 else 1.0
    cases = [(name, {field: extreme}) for name in fields for field in fields[name]]
    for name, arguments in [*cases, ("pkd", {"eps": eps})]:
        function = read_losses([{"name": name, "weight": 1, **arguments}])[0].function
        inputs = predictions if name == "roi_class" else maps
        leaf = (inputs[0].classes if name == "roi_class" else maps[0]).clone().requires_grad_()
        student = replace(predictions[0], classes=leaf) if name == "roi_class" else leaf
        loss = function(student, inputs[1], **arguments)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.isfinite() and gradient.isfinite().all(), (name, arguments)


@contextmanager
def registered(loss):
    DISTILL_LOSS_REGISTRY.register(loss)
    try:
        yield
    finally:
        DISTILL_LOSS_REGISTRY._obj_map.pop(loss.__name__)


def test_a_users_loss_that_cannot_be_called():
    def mine(student, teacher, gamma):
        return gamma

    with registered(mine), pytest.raises(InputError, match="'mine' .* argument: 'gamma'; its oth"):
        read_losses([{"name": "mine", "weight": 1}])

    def weighted(student, teacher, weights):
        return weights

    entry = {"name": "weighted", "weight": 1}
    with registered(weighted):
        read_losses([{**entry, "focus": "boxes"}])  # which gives it weights
        with pytest.raises(InputError, match="'weighted' .* argument: 'weights'"):
            read_losses([entry])

    def own(student):
        return student.mean()

    with registered(own), pytest.raises(InputError, match="'own' .* too many positional arg"):
        read_losses([{"name": "own", "weight": 1}])


@pytest.mark.parametrize(
    ("value", "words"), [(torch.ones(2, 3), r"a tensor \(2, 3\)"), (None, "None"), (0.5, "0.5")]
)
def test_a_users_loss_that_returns_no_scalar(value, words):
    def mine(student, teacher):
        return value

    with registered(mine), pytest.raises(InputError, match=f"'mine' on level p2 returns {words},"):
        Distiller.evaluate(LossTerm("mine", 1), None, None, where=" on level p2")


def test_a_users_loss_without_annotations():
    def scaled(student, teacher, scale=2, mode="a", **others):
        return scale

    with registered(scaled):
        entry = {"name": "scaled", "weight": 1, "scale": 0.5, "mode": None, "other": "1e2"}
        assert read_losses([entry])[0].arguments == {"scale": 0.5, "mode": None, "other": 100.0}
        with pytest.raises(InputError, match="scale of 'scaled' should be a number, not 'big'"):
            read_losses([{**entry, "scale": "big"}])
