"""Configs that are derived from a detector's: equal to those that were written by hand."""

import contextlib

import pytest
from detectron2 import model_zoo
from detectron2.config import get_cfg
from helpers import ROOT

from msad_kd.config.build import build_config
from msad_kd.config.defaults import add_msad_kd_config
from msad_kd.config.derive import default_losses, derive_configs
from msad_kd.distill.student import check_losses
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.utils.errors import InputError
from msad_kd.utils.flat_config import flatten_config

# What a derived config chooses otherwise, or what a run adds.
OWN = ("KD.LOSSES", "KD.TEACHER", "KD.GRADIENT", "OUTPUT_DIR", "SEED", "MODEL.WEIGHTS")
OWN += ("MODEL.MULTI_RESOLUTION", "SOLVER.WARMUP", "SOLVER.BASE_LR", "TEST.AUG")
SHORT = ["SOLVER.MAX_ITER", 300, "SOLVER.REFERENCE_WORLD_SIZE", 0]


def config_of(name, *opts):
    return build_config(str(ROOT / "configs" / name), list(opts))


def differing_keys(one, other):
    one, other = flatten_config(one), flatten_config(other)
    assert one.keys() == other.keys()
    return {
        key: (one[key], other[key])
        for key in one
        if not key.startswith(OWN) and plain(one[key]) != plain(other[key])
    }


def plain(value):
    """Lists for tuples."""
    return [plain(x) for x in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize(
    "detector", ["mask_rcnn", "faster_rcnn", "keypoint_rcnn", "retinanet", "fcos"]
)
def test_they_are_those_that_were_written_by_hand(detector, monkeypatch):
    monkeypatch.chdir(ROOT)
    derived = derive_configs(config_of(f"COCO/{detector}_R_50_FPN_HR_1x.yaml"), 2)
    roles = {"teacher": "teacher", "control": "LR", "student": "student"}
    differences = {
        role: differing_keys(derived[role], config_of(f"COCO/{detector}_R_50_FPN_{name}_1x.yaml"))
        for role, name in roles.items()
    }
    assert differences == {role: {} for role in roles}


@pytest.mark.parametrize(
    "name",
    [
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml",
        "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml",
        "COCO-Detection/retinanet_R_50_FPN_3x.yaml",
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x.yaml",
    ],
)
def test_the_model_zoos_configs_become_pairs_that_can_be_distilled(name, tmp_path):
    with contextlib.redirect_stdout(None):
        content = model_zoo.get_config(name).dump()
    (tmp_path / "zoo.yaml").write_text(content)
    cfg = build_config(str(tmp_path / "zoo.yaml"), [])
    derived = derive_configs(cfg, 4)
    sizes = [[size / 4 for size in level] for level in cfg.MODEL.ANCHOR_GENERATOR.SIZES]
    for role in ("control", "student"):
        assert derived[role].INPUT.MIN_SIZE_TEST == 200 and derived[role].INPUT.MAX_SIZE_TEST == 334
        assert derived[role].MODEL.ANCHOR_GENERATOR.SIZES == sizes
        assert derived[role].TEST.AUG.MIN_SIZES == tuple(range(100, 301, 25))
    assert derived["teacher"].INPUT == cfg.INPUT
    assert derived["student"].SOLVER.BASE_LR == pytest.approx(cfg.SOLVER.BASE_LR / 3)
    spec = TeacherSpec(derived["teacher"], config_file="", branch="fused")
    check_losses(derived["student"], spec)  # aligned, with the same classes


@pytest.mark.parametrize(
    ("name", "scale"), [("lite0_fcos_hr", 2), ("lite0_retinanet_hr", 2), ("hr", 4)]
)
def test_nuclei_pairs_that_the_readme_derives(name, scale):
    random = ["MODEL.TIMM.PRETRAINED", False]
    derived = derive_configs(config_of(f"Nuclei/{name}.yaml", *random), scale)
    check_losses(
        derived["student"], TeacherSpec(derived["teacher"], config_file="", branch="fused")
    )


def test_anchors_of_a_flat_list():
    keys = "MODEL.ANCHOR_GENERATOR.SIZES", [32, 64]
    derived = derive_configs(config_of("COCO/mask_rcnn_R_50_FPN_HR_1x.yaml", *keys), 2)
    sizes = {role: x.MODEL.ANCHOR_GENERATOR.SIZES for role, x in derived.items()}
    assert sizes == {"teacher": [32, 64], "control": [[16, 32]], "student": [[16, 32]]}


@pytest.mark.parametrize("kind", ["absolute", "absolute_range"])
def test_crops_are_the_detectors(kind):
    keys = ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", kind, "INPUT.CROP.SIZE", [384, 600]]
    cfg = config_of("COCO/mask_rcnn_R_50_FPN_HR_1x.yaml", *keys)
    assert all(x.INPUT.CROP == cfg.INPUT.CROP for x in derive_configs(cfg, 2).values())


def test_a_warmup_fits_the_schedule_and_the_losses_fit_the_heads():
    cfg = config_of("COCO/mask_rcnn_R_50_FPN_HR_1x.yaml", *SHORT)
    derived = derive_configs(cfg, 2)
    assert {x.SOLVER.WARMUP_ITERS for x in derived.values()} == {30}
    names = [term["name"] for term in derived["student"].KD.LOSSES]
    assert names == ["roi_class", "roi_box", "roi_mask"]
    assert {term["warmup_iters"] for term in derived["student"].KD.LOSSES} == {30}
    student = derived["student"]
    student.MODEL.MASK_ON, student.MODEL.KEYPOINT_ON = False, True
    assert [x["name"] for x in default_losses(student)] == [*names[:2], "roi_keypoint"]
    student.MODEL.ROI_HEADS.NAME = "CascadeROIHeads"
    assert [x["name"] for x in default_losses(student)] == ["l1"]


@pytest.mark.parametrize(("given", "convs"), [(4, 3), (2, 1), (1, 1)])
def test_the_losses_of_a_retinanet(given, convs):
    options = ["MODEL.META_ARCHITECTURE", "DistilledRetinaNet", "MODEL.RETINANET.NUM_CONVS", given]
    ssim, head = default_losses(build_config("", options))
    assert ssim["name"] == "ssim" and (head["name"], head["convs"]) == ("cross_head", convs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["MODEL.BACKBONE.NAME", "build_resnet_backbone"], "C4 or DC5"),
        (["MODEL.META_ARCHITECTURE", "PanopticFPN"], "PanopticFPN: its levels cannot be aligned"),
        (["MODEL.META_ARCHITECTURE", "DistilledRCNN"], "DistilledRCNN: it is derived, not given"),
        (["MODEL.LOAD_PROPOSALS", True], "LOAD_PROPOSALS"),
        (["INPUT.MIN_SIZE_TRAIN", (0,)], "name the sizes"),
        (["INPUT.MIN_SIZE_TEST", 0, "INPUT.JITTER.SIZE", 1024], "name the sizes"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", [[3.0]]], "under 2 px"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", [32, 3.0]], "under 2 px"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64]]], "SIZES has 4 lists.* or 5"),
        (["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0], [2.0]]], "RATIOS has 2 lists.* or 5"),
    ],
)
def test_what_cannot_be_halved_is_refused(changes, words):
    cfg = get_cfg()
    add_msad_kd_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/COCO/mask_rcnn_R_50_FPN_HR_1x.yaml"))
    cfg.merge_from_list(changes)
    with pytest.raises(InputError, match=words):
        derive_configs(cfg, 2)


def test_a_scale_of_1_is_refused():
    with pytest.raises(InputError, match="the scale is 1"):
        derive_configs(config_of("COCO/mask_rcnn_R_50_FPN_HR_1x.yaml"), 1)
