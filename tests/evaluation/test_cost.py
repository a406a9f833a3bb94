"""Multiply-adds, parameters, activations and latency, worked out by hand and of real models."""

import numpy as np
import pytest
import torch
from torch import nn

from msad_kd import KDTrainer
from msad_kd.evaluation import cost


def test_gmacs_of_a_convolution_and_a_linear_layer():
    conv, linear = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Linear(4, 5)

    def model(batch):
        return linear(conv(batch[0]).mean(dim=(2, 3)))

    inputs = [torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 16)]
    macs = [side * 3 * 4 * 9 + 4 * 5 for side in (8 * 8, 8 * 16)]
    assert cost.count_gmacs(model, inputs) * 1e9 == pytest.approx(np.mean(macs))


def test_models_are_timed_in_turn_on_the_same_images():
    calls = []
    models = {name: lambda batch, name=name: calls.append((name, *batch)) for name in "ab"}
    times = cost.time_models(models, {name: [10, 20, 30] for name in "ab"})
    assert set(times) == {"a", "b"} and set(times["a"]) == {"median", "low", "high"}
    rounds = [calls[i : i + 2] for i in range(0, len(calls), 2)]
    assert len(rounds) == 3 + cost.WARM_UP_ROUNDS
    assert all(one[1] == other[1] and {one[0], other[0]} == {"a", "b"} for one, other in rounds)
    assert len({pair[0][0] for pair in rounds}) == 2  # neither is always the first


def test_sides_of_what_each_branch_sees():
    inputs = {"image": torch.zeros(3, 128, 256), "image_lr": torch.zeros(3, 64, 128)}
    assert cost.input_sides(inputs, "hr") == "128"
    assert cost.input_sides(inputs, "lr") == "64"
    assert cost.input_sides(inputs, "fused") == "128 + 64"
    assert cost.input_sides({"image": torch.zeros(3, 64, 80)}, None) == "64"


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.bottom_up = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.lateral = nn.Conv2d(4, 2, 1)

    def forward(self, image):
        return self.lateral(self.bottom_up(image))


class Toy(nn.Module):
    """A detector of three layers; its last matrix product is in no part."""

    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Linear(2, 5)
        self.distiller = nn.Linear(7, 7)

    def forward(self, batch):
        found = self.head(self.backbone(batch[0]).mean(dim=(2, 3)))
        return found.T @ found


def test_cost_by_part_by_hand():
    counted = cost.cost_by_part(Toy(), [torch.zeros(1, 3, 8, side) for side in (8, 16)])
    pixels = (8 * 8 + 8 * 16) / 2
    parts = {
        "gmacs": ([pixels * 3 * 4 * 9, pixels * 4 * 2, 2 * 5, 5 * 5], 1e9),
        "activations_m": ([pixels * 4, pixels * 2, 5, 0], 1e6),
        "params_m": ([3 * 4 * 9, 4 * 2 + 2, 2 * 5 + 5, 0], 1e6),
    }
    assert counted.keys() == parts.keys()
    for kind, (expected, unit) in parts.items():
        assert list(counted[kind]) == ["bottom-up", "FPN", "dense head", "rest", "total"]
        found = [unit * value for value in counted[kind].values()]
        assert found == pytest.approx([*expected, sum(expected)], abs=1e-3)


def test_parts_of_real_models_add_up(config):
    found = {}
    for role in ("lr", "student"):
        cfg = config(role)
        model = KDTrainer.build_model(cfg).eval()
        inputs = next(iter(KDTrainer.build_test_loader(cfg, "tiny_val")))
        found[role] = cost.cost_by_part(model, inputs)
        assert found[role]["gmacs"]["total"] == pytest.approx(cost.count_gmacs(model, inputs))
        for counted in found[role].values():
            assert list(counted) == ["bottom-up", "FPN", "RPN", "RoI heads", "rest", "total"]
            *parts, total = counted.values()
            assert sum(parts) == pytest.approx(total) and min(parts[:-1]) > 0
            assert counted["rest"] == pytest.approx(0, abs=1e-9)
    assert found["student"]["params_m"] == found["lr"]["params_m"]


def test_a_teacher_costs_what_its_branch_needs(config):
    cfg = config("teacher")
    model = KDTrainer.build_model(cfg).eval()
    inputs = next(iter(KDTrainer.build_test_loader(cfg, "tiny_val")))
    found = {}
    for model.test_branch in ("hr", "lr", "fused"):
        found[model.test_branch] = cost.cost_by_part(model, inputs)["gmacs"]
    for part in ("bottom-up", "FPN"):
        high, low, fused = (found[branch][part] for branch in ("hr", "lr", "fused"))
        assert 0 < low < high and fused == pytest.approx(high + low)
    assert found["hr"]["bottom-up"] == pytest.approx(4 * found["lr"]["bottom-up"])
    assert found["hr"]["fusion"] == found["lr"]["fusion"] == 0 < found["fused"]["fusion"]
