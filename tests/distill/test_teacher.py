"""The teacher: loaded to the last key or not at all, frozen, aligned with any student's batch."""

import random
import re

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from helpers import build_student, differing, losses_of

from msad_kd.distill.teacher import Teacher
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.losses.feature import l1, pkd, ssim
from msad_kd.utils.errors import InputError
from msad_kd.utils.replaced import replaced

ODD_SIZES = [[(61, 83)], [(33, 31), (40, 97)], [(64, 64)], [(95, 129), (1, 7)]]


def odd_batch(sizes, scale):
    generator = torch.Generator().manual_seed(0)

    def noise(height, width):
        return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)

    return [{"image": noise(h, w), "image_hr": noise(scale * h, scale * w)} for h, w in sizes]


def build_teacher(cfg):
    return TeacherSpec.from_config(cfg).build()


def strides(levels):
    return {name: shape.stride for name, shape in levels.items()}


def distance(found, expected):
    """The relative distance of two pyramids, in fp32."""
    assert found.keys() == expected.keys()
    assert {level.dtype for level in found.values()} == {torch.float32}
    one, other = (torch.cat([x[n].flatten() for n in expected]) for x in (found, expected))
    return ((one - other).norm() / other.norm()).item()


def padded_of(student, inputs):
    return tuple(student.preprocess_image(inputs).tensor.shape[-2:])


@pytest.mark.parametrize("branch", ["fused", "hr", "lr"])
@pytest.mark.parametrize("scale", [2, 4])
def test_levels_have_the_students_shapes(config, scale, branch):
    levels = [f"p{s + scale // 2}" for s in range(2, 7)]
    heads = ["MODEL.RPN.IN_FEATURES", levels, "MODEL.ROI_HEADS.IN_FEATURES", levels[:-1]]
    model = build_model(config("teacher", "KD.SCALE", scale, *heads))
    teacher = Teacher(model, branch=branch, scale=scale)
    student = build_model(config("lr")).eval()
    for inputs in (odd_batch(sizes, scale) for sizes in ODD_SIZES):
        found = teacher.pyramid(inputs, padded_of(student, inputs))
        with torch.no_grad():
            expected = student.backbone(student.preprocess_image(inputs).tensor)
        shapes = {name: level.shape for name, level in found.items()}
        assert shapes == dict(zip(levels, (expected[f"p{s}"].shape for s in range(2, 7))))


@pytest.mark.parametrize(("branch", "factor"), [("hr", 1), ("lr", 2)])
def test_a_single_resolution_teacher(config, branch, factor):
    model = build_model(config("hr"))
    teacher = Teacher(model, branch=branch, scale=2)
    assert strides(teacher.levels()) == {f"p{s}": factor * 2**s for s in range(2, 7)}
    inputs = odd_batch([(61, 83), (40, 97)], 2)
    found = teacher.pyramid(inputs, (64, 128))
    assert found["p2"].shape == (2, 16, 32 // factor, 64 // factor)
    padded = torch.zeros(2, 3, 128 // factor, 256 // factor)
    for slot, entry in zip(padded, inputs):
        image = entry["image_hr" if branch == "hr" else "image"]
        slot[:, : image.shape[1], : image.shape[2]] = (image - 120.0) / 64.0
    with torch.no_grad():
        assert distance(found, model.backbone(padded)) < 1e-5


def test_strides_are_in_pixels_of_the_high_resolution(config):
    teacher = Teacher(build_model(config("teacher")), branch="fused", scale=2)
    assert strides(teacher.levels()) == {f"p{s}": 2**s for s in range(3, 8)}


@pytest.mark.parametrize("options", [[], ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"]])
@pytest.mark.parametrize("branch", ["hr", "lr"])
def test_on_the_meta_device_it_has_the_same_levels(student_config, branch, options):
    cfg = student_config("KD.TEACHER.BRANCH", branch, "KD.TEACHER.OPTS", options)
    spec = TeacherSpec.from_config(cfg)
    teacher = Teacher(build_model(spec.cfg), branch=branch, scale=2)
    before = torch.get_rng_state()
    assert spec.build_on_meta().levels() == teacher.levels()
    assert torch.equal(torch.get_rng_state(), before)
    assert {shape.channels for shape in teacher.levels().values()} == {16}


AMP = [("", 1e-5), ("bf16", 0.1)]  # tiny networks: 50 layers of 8 channels average little out


@pytest.mark.parametrize(("amp", "most"), AMP)
def test_the_fused_pyramid_is_the_trained_models(
    student_config, teacher_weights, config, batch, amp, most
):
    teacher = build_teacher(student_config("KD.TEACHER.AMP", amp))
    model = build_model(config("teacher")).eval()
    model.load_state_dict(torch.load(teacher_weights, weights_only=False)["model"])
    inputs = batch(config("student"), "lr")
    found = teacher.pyramid(inputs, (32, 64))
    images = [{"image": x["image_hr"], "image_lr": x["image"]} for x in inputs]
    high = model.preprocess_image(images)
    low = torch.zeros(2, 3, 32, 64)
    low[..., :48] = (torch.stack([x["image"] for x in inputs]) - 120.0) / 64.0
    with torch.no_grad():
        expected = model.pyramids(high.tensor, low, high.image_sizes, ("fused",))["fused"]
    assert distance(found, expected) < most
    assert differing(teacher.model.state_dict(), model.state_dict()) == []


@pytest.mark.parametrize(("amp", "most"), [("", 1e-5), ("bf16", 2e-2)])
def test_levels_and_losses_of_a_network_of_full_width(config, amp, most):
    sizes = ["STEM_OUT_CHANNELS", 64, "RES2_OUT_CHANNELS", 256, "WIDTH_PER_GROUP", 64]
    keys = [f"MODEL.RESNETS.{x}" if isinstance(x, str) else x for x in sizes]
    model = build_model(config("hr", *keys, "MODEL.RESNETS.NORM", "FrozenBN"))
    inputs, padded = odd_batch([(61, 83)], 2), (64, 96)
    plain, teacher = (Teacher(model, branch="hr", scale=2, amp=x) for x in ("", amp))
    with replaced(plain, prepared=lambda: model.backbone):
        expected = plain.pyramid(inputs, padded)
    found = teacher.pyramid(inputs, padded)
    assert 0 < distance(found, expected) < most
    student = {name: torch.randn_like(level) for name, level in expected.items()}
    for loss in (l1, ssim, pkd):
        for name, x in student.items():
            values = loss(x, found[name]), loss(x, expected[name])
            torch.testing.assert_close(*values, rtol=most, atol=0)


@pytest.mark.parametrize(("amp", "most"), AMP)
def test_the_losses_are_those_of_the_plain_teacher(student_config, batch, amp, most):
    terms = [{"name": name, "weight": 1.0} for name in ("l1", "ssim", "pkd", "roi_class")]
    cfg = student_config("KD.LOSSES", terms, "KD.TEACHER.AMP", amp)
    student, inputs = build_student(cfg), batch(cfg, "lr")
    found = losses_of(student, inputs)
    with replaced(student.teacher, amp="", prepared=lambda: student.teacher.model.backbone):
        expected = losses_of(student, inputs)
    assert sum(name.startswith("loss_kd_") for name in found) == 4
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=most, atol=most * 1e-2)


def test_frozen_and_without_graph(student_config, batch):
    cfg = student_config()
    teacher = build_teacher(cfg)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not any(module.training for module in teacher.model.modules())
    pyramid = teacher.pyramid(batch(cfg, "lr"), (32, 64))
    assert not any(level.requires_grad for level in pyramid.values())


def test_every_weight_is_the_checkpoints(student_config, teacher_weights):
    saved = torch.load(teacher_weights, weights_only=False)["model"]
    loaded = build_teacher(student_config()).model.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name].to(loaded[name]), loaded[name]) for name in saved)


def test_building_draws_no_random_number(student_config):
    cfg = student_config()
    draws = []
    for build in (lambda: None, lambda: build_teacher(cfg)):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        build()
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_its_config(student_config):
    options = ["MODEL.MULTI_RESOLUTION.FUSED_WEIGHT", 0.7]
    cfg = student_config("DATASETS.TEST", ("coco_2017_val",), "KD.TEACHER.OPTS", options)
    teacher_cfg = TeacherSpec.from_config(cfg).cfg
    assert teacher_cfg.DATASETS == cfg.DATASETS and teacher_cfg.MODEL.DEVICE == cfg.MODEL.DEVICE
    assert teacher_cfg.INPUT.MIN_SIZE_TEST == 2 * cfg.INPUT.MIN_SIZE_TEST
    assert teacher_cfg.MODEL.MULTI_RESOLUTION.FUSED_WEIGHT == 0.7


def opts(*pairs):
    return ["KD.TEACHER.OPTS", list(pairs)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["KD.TEACHER.CONFIG_FILE", ""], "CONFIG_FILE is empty; to train a DistilledRCNN"),
        (["KD.TEACHER.WEIGHTS", ""], "KD.TEACHER.WEIGHTS is empty; to train a DistilledRCNN"),
        (["KD.TEACHER.CONFIG_FILE", "gone.yaml"], "config file 'gone.yaml' does not exist"),
        (["KD.TEACHER.WEIGHTS", "gone.pth"], "'gone.pth' for .*teacher.yaml' does not exist"),
        (["KD.TEACHER.WEIGHTS", __file__], "test_teacher.py' .*cannot be read"),
        (["KD.TEACHER.BRANCH", "both"], "BRANCH is 'both', but a MultiRes.* hr, lr, fused"),
        (opts("MODEL.WIEGHTS", "x"), "MODEL.WIEGHTS; did you mean MODEL.WEIGHTS"),
        (opts("MODEL.ROI_HEADS.NAME", "Heads"), "KD.TEACHER: .*NAME: 'Heads' is not registered"),
        (opts("INPUT.FORMAT", "BGR"), "INPUT.FORMAT is BGR in the teacher's config .* and RGB"),
        (opts("KD.SCALE", 4), "KD.SCALE is 4 in the teacher's config .* and 2"),
        (opts("MODEL.PIXEL_STD", [1.0, 1.0, 9.0]), r"PIXEL_STD is \[1.0, 1.0, 9.0\] in the teach"),
        (
            opts("MODEL.FPN.NORM", "BN"),
            "model_final.pth' does not fit .*teacher.yaml'.*, e.g. backbone.fpn_lateral2.norm",
        ),
        (opts("MODEL.ROI_HEADS.NUM_CLASSES", 3), r"shape.*roi_heads.*\(9, 16\).*\(4, 16\)"),
        (opts("MODEL.RESNETS.DEPTH", 101), "absent from it, e.g. backbone.bottom_up.res4"),
        (opts("MODEL.MASK_ON", False), "not in the model, e.g. roi_heads.mask_head"),
    ],
)
def test_a_teacher_that_cannot_be_built(student_config, options, words):
    with pytest.raises(InputError, match=words):
        build_teacher(student_config(*options))


def test_a_single_resolution_model_has_no_fused_branch(config):
    with pytest.raises(InputError, match="BRANCH is 'fused', but a GeneralizedRCNN .* hr, lr$"):
        Teacher(build_model(config("hr")), branch="fused", scale=2)


def test_data_of_the_stock_mapper_are_refused(student_config, batch):
    cfg = student_config()
    with pytest.raises(InputError, match="'image_hr'.*TwoResolutionMapper"):
        build_teacher(cfg).pyramid(batch(cfg, None), (32, 64))


def test_images_that_do_not_belong_together_are_refused(student_config, batch):
    cfg = student_config()
    inputs = batch(cfg, "lr")
    inputs[1]["image_hr"] = inputs[1]["image_hr"][:, :-1]
    with pytest.raises(InputError, match=r"\(63, 96\) px should have \(64, 96\)"):
        build_teacher(cfg).pyramid(inputs, (32, 64))


def test_what_is_learned_from_is_what_is_evaluated(student_config):
    for branch in ("hr", "lr", "fused"):
        teacher = build_teacher(student_config("KD.TEACHER.BRANCH", branch))
        assert teacher.model.test_branch == teacher.branch == branch


def test_a_single_resolution_teacher_has_the_students_scale(student_config):
    stock = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"]
    cfg = student_config("KD.SCALE", 4, "KD.TEACHER.OPTS", stock, "KD.TEACHER.BRANCH", "hr")
    assert TeacherSpec.from_config(cfg).cfg.KD.SCALE == 4


def test_a_plain_teacher_computes_what_the_losses_read(student_config, config, batch):
    cfg = student_config("KD.LOSSES", [{"name": "l1", "weight": 1.0, "levels": ["p2", "p4"]}])
    student, teacher = build_model(cfg), Teacher(build_model(config("hr")), branch="hr", scale=2)
    inputs = batch(cfg, "lr")
    whole = teacher.pyramid(inputs, (32, 64))
    student.set_teacher(teacher)
    needed = teacher.pyramid(inputs, (32, 64))
    assert [name for name, level in needed.items() if level is None] == ["p2", "p4", "p6"]
    for name in ("p3", "p5"):
        assert torch.equal(needed[name], whole[name])


def test_a_student_teaches_without_a_teacher_of_its_own(student_config, config_files, tmp_path):
    weights = tmp_path / "student.pth"
    cfg = student_config("KD.LOSSES", [{"name": "mgd", "weight": 1.0}])
    student = build_model(cfg)
    student.set_teacher(build_teacher(cfg))
    torch.save({"model": student.state_dict()}, weights)
    keys = ["KD.TEACHER.CONFIG_FILE", str(config_files["student"]), "KD.TEACHER.BRANCH", "lr"]
    model = build_teacher(student_config(*keys, "KD.TEACHER.WEIGHTS", str(weights))).model
    assert not any(key.startswith("distiller") for key in model.state_dict())


FCOS = ["MODEL.META_ARCHITECTURE", "MultiResolutionFCOS"]  # which has no anchors


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        ([], ""),
        (["INPUT.MIN_SIZE_TEST", 48], "96 px, but .* has INPUT.MIN_SIZE_TRAIN .64,."),
        (["INPUT.MIN_SIZE_TEST", 0], ""),  # images as they are
        (["INPUT.MIN_SIZE_TRAIN", (24, 48)], "gets images of 96 px, but"),
        (["INPUT.MIN_SIZE_TRAIN", (24, 32)], ""),
        (["MODEL.ANCHOR_GENERATOR.SIZES", [[4.0000001], [8], [16], [32], [64]]], ""),
        (["MODEL.ANCHOR_GENERATOR.SIZES", [8, 16]], "not 2 times the student's .*8, 16"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", [[8]] * 5, "KD.TEACHER.OPTS", FCOS], ""),
        (["MODEL.ANCHOR_GENERATOR.SIZES", [[8]] * 5], "teacher.yaml', not 2 times the student's"),
    ],
)
def test_a_student_of_other_sizes_than_the_teachers_is_warned_of(
    student_config, caplog, opts, words
):
    cfg = student_config(*opts)
    caplog.clear()
    TeacherSpec.from_config(cfg)
    assert re.search(words, caplog.text) if words else not caplog.text
