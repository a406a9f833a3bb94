"""FCOS equals Detectron2's; the normalisation of its head; a student unlike its teacher."""

import pytest
import torch
from detectron2.layers import get_norm
from detectron2.modeling import build_backbone
from detectron2.modeling.meta_arch import fcos
from helpers import NO_TEST, build, differing, losses_of, same_predictions, train

from msad_kd.modeling.fcos import group_norm
from msad_kd.utils.errors import InputError

on_fcos = pytest.mark.parametrize("detector", ["fcos"], indirect=True)


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (64, 32), (48, 16), (16, 8), (1, 1)])
def test_groups_of_narrow_maps(channels, groups):
    norm = group_norm(channels)
    assert (norm.num_groups, norm.num_channels) == (groups, channels)
    if channels % 64 == 0:
        assert str(norm) == str(get_norm("GN", channels))


@on_fcos
@pytest.mark.parametrize(("norm", "kind"), [("GN", "GroupNorm"), ("", ""), ("BN", "BatchNorm2d")])
def test_the_normalisation_of_a_head(config, norm, kind):
    head = build(config("lr", "MODEL.FCOS.NORM", norm)).head
    found = {type(m).__name__ for m in head.modules() if "Norm" in type(m).__name__}
    assert found - {"CycleBatchNormList"} == ({kind} if kind else set())


@on_fcos
def test_fcos_is_detectron2s(config, batch):
    """Built by hand, without this project's class, it has the same keys and predictions."""
    cfg = config("lr", "MODEL.FCOS.NORM", "")
    mine = build(cfg).eval()
    shapes = [mine.backbone.output_shape()[name] for name in cfg.MODEL.FCOS.IN_FEATURES]
    stock = fcos.FCOS(
        backbone=build_backbone(cfg),
        head=fcos.FCOSHead(input_shape=shapes, num_classes=8, conv_dims=[16]),
        head_in_features=cfg.MODEL.FCOS.IN_FEATURES,
        num_classes=8,
        test_score_thresh=0.0,
        max_detections_per_image=20,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    ).eval()
    stock.load_state_dict(mine.state_dict())
    inputs = batch(cfg)
    with torch.no_grad():
        assert same_predictions(mine(inputs), stock(inputs))
    assert differing(losses_of(mine, inputs), losses_of(stock, inputs)) == []


@on_fcos
def test_a_student_of_another_depth_and_width(student_config, caplog):
    other = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    other += ["SOLVER.MAX_ITER", 2, *NO_TEST]
    with pytest.raises(InputError, match="their backbones differ .*KD.TEACHER.INIT_BACKBONE False"):
        train(student_config(*other))
    trainer = train(student_config(*other, "KD.TEACHER.INIT_BACKBONE", False))
    assert trainer.storage.latest()["loss_kd_l1"][0] > 0
    (warning,) = [text for text in caplog.messages if "Not in the teacher" in text]
    assert "fpn_lateral2.weight" in warning
    assert "bottom_up" not in warning and "head." not in warning
