"""The gradient norm of the distillation losses over that of the detection losses."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from helpers import WARMUP, build, losses_of

from msad_kd import KDTrainer, attach_teacher
from msad_kd.distill.gradient_ratio import last_layer
from msad_kd.utils.errors import InputError


def build_student(cfg):
    model = build(cfg)
    attach_teacher(model, cfg)
    return model


def test_the_ratio_of_the_norms_at_the_last_layer(student_config, batch):
    cfg = student_config("KD.GRADIENT_RATIO_PERIOD", 2, "KD.DIAGNOSTICS_PERIOD", 0)
    model = build_student(cfg)
    inputs = batch(cfg, "lr")
    logged = []
    for iteration in (2 * WARMUP, 2 * WARMUP + 1):
        torch.manual_seed(1)
        with EventStorage(iteration) as storage:
            losses = model.train()(inputs)
        logged.append(storage.latest())
    assert "kd/gradient_ratio" not in logged[0]
    assert all(p.grad is None for p in model.parameters())
    layer = last_layer(model.backbone)
    assert layer is model.backbone.bottom_up.res5[-1].conv3.weight
    norms = {}
    for distillation in (True, False):
        model.zero_grad()
        part = [v for k, v in losses.items() if k.startswith("loss_kd_") is distillation]
        sum(part).backward(retain_graph=True)
        norms[distillation] = layer.grad.norm().item()
    ratio = logged[1]["kd/gradient_ratio"][0]
    assert ratio == pytest.approx(norms[True] / norms[False], rel=1e-5)


def test_with_a_frozen_bottom_up_path(student_config, config, batch):
    finest = [{"name": "l1", "weight": 1.0, "levels": ["p2"]}]
    frozen = ["MODEL.BACKBONE.FREEZE_AT", 5, "KD.LOSSES", finest]
    cfg = student_config("KD.GRADIENT_RATIO_PERIOD", 1, *frozen)
    model = build_student(cfg)
    assert last_layer(model.backbone) is model.backbone.fpn_lateral5.weight
    with EventStorage(WARMUP) as storage:
        model.train()(batch(cfg, "lr"))
    assert storage.latest()["kd/gradient_ratio"][0] > 0
    backbone = KDTrainer.build_model(config("lr")).backbone
    backbone.requires_grad_(False)
    with pytest.raises(InputError, match="all of them are frozen; set it to 0"):
        last_layer(backbone)


def test_without_a_loss_there_is_no_ratio(student_config, batch):
    cfg = student_config("KD.LOSSES", [], "KD.GRADIENT_RATIO_PERIOD", 1)
    losses = losses_of(build_student(cfg), batch(cfg, "lr"), 1)
    assert not any(name.startswith("loss_kd") for name in losses)


def test_it_changes_no_gradient(student_config, batch):
    cfg = student_config("KD.GRADIENT_RATIO_PERIOD", 2)
    model = build_student(cfg)
    inputs, gradients = batch(cfg, "lr"), []
    for iteration in (2 * WARMUP, 2 * WARMUP + 1):  # without, and with it
        model.zero_grad()
        sum(losses_of(model, inputs, iteration).values()).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert gradients[0] and all(map(torch.equal, *gradients))
