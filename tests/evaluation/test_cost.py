"""Multiply-adds and latency: toy models by hand, and detectors at a fixed number of detections."""

import numpy as np
import pytest
import torch

from msad_kd import KDTrainer
from msad_kd.checkpoint.checkpoint import load_strictly
from msad_kd.evaluation import cost


def test_what_torchs_counter_leaves_out_on_a_cpu():
    heads = torch.ones(1, 2, 8, 4)
    with cost.counting_flops() as counter:
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
    assert counter.get_total_flops() == 2 * 2 * (2 * 8 * 8 * 4)  # two products of 2 heads
    maps, weight = torch.ones(1, 3, 5, 7), torch.ones(4, 3, 1, 1)
    with cost.counting_flops() as counter:
        torch.mkldnn_convolution(maps, weight, None, (0, 0), (1, 1), (1, 1), 1)
    assert counter.get_total_flops() == 2 * 3 * 4 * 5 * 7


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
    assert len({pair[0][0] for pair in rounds}) == 2  # the first model changes


@pytest.mark.parametrize(
    ("branch", "sides"), [("hr", "128"), ("lr", "64"), ("fused", "128 + 64"), (None, "128")]
)
def test_sides_that_a_branch_reads(branch, sides):
    inputs = {"image": torch.zeros(3, 128, 256)}
    if branch:
        inputs["image_lr"] = torch.zeros(3, 64, 128)
    assert cost.input_sides(inputs, branch) == sides


def built(cfg):
    """A model in eval mode, and mapped test images."""
    loader = KDTrainer.build_test_loader(cfg, "tiny_val")
    return KDTrainer.build_model(cfg).eval(), next(iter(loader))


def test_with_fixed_detections_costs_do_not_depend_on_training(config, teacher_weights):
    cfg = config("teacher")
    gmacs = {}
    for name, cost_cfg in {"free": cfg, "fixed": cost.fix_detections(cfg, 7)}.items():
        untrained, inputs = built(cost_cfg)
        trained, _ = built(cost_cfg)
        load_strictly(trained, str(teacher_weights), "the test")
        gmacs[name] = [cost.count_gmacs(model, inputs) for model in (untrained, trained)]
        with torch.no_grad():  # now the model is sure that there is nothing
            trained.roi_heads.box_predictor.cls_score.bias[-1] += 1000
        gmacs[name].append(cost.count_gmacs(trained, inputs))
    assert gmacs["free"][2] < gmacs["free"][1] and len(set(gmacs["fixed"])) == 1
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 20  # the config is left alone


@pytest.mark.parametrize("detector", ["mask_rcnn", "retinanet", "fcos"], indirect=True)
def test_every_detector_keeps_the_fixed_number_of_detections(config, detector):
    model, inputs = built(cost.fix_detections(config("hr"), 3))
    kept = []  # before empty boxes are dropped, which costs nothing
    part, method = model, "forward_inference"
    if detector == "mask_rcnn":
        part, method = model.roi_heads, "forward_with_given_boxes"
    stock = getattr(part, method)
    setattr(part, method, lambda *args: kept.extend(stock(*args)) or kept)
    with torch.no_grad():
        model(inputs[:1])
    assert [len(instances) for instances in kept] == [3]
