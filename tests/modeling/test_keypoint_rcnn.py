"""Keypoint R-CNN as teacher, student and baseline, on corners of boxes as keypoints."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from helpers import WARMUP, build, build_student, evaluate, load_tool, losses_of, names_of, train
from torch.testing import assert_close

from msad_kd import TwoResolutionMapper
from msad_kd.distill.regions import predict_regions, recording_regions
from msad_kd.distill.student import check_losses
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.engine.trainer import KDTrainer
from msad_kd.engine.validation import ValidationLoss
from msad_kd.losses.roi import roi_keypoint
from msad_kd.modeling.capture import recording
from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import seed_all

NAMES = ["left_top", "right_top", "left_bottom", "right_bottom"]
MODEL = ["MODEL.KEYPOINT_ON", True, "MODEL.MASK_ON", False]
MODEL += ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 4, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,)]
LOSSES = [{"name": "roi_keypoint", "weight": 1.0, "warmup_iters": WARMUP}]


@pytest.fixture(scope="module")
def options(data):
    """Options for a Keypoint R-CNN; the last keypoint is never labelled."""
    entries = []
    for split in ("train", "val"):
        content = json.loads((data / "annotations" / f"instances_{split}.json").read_text())
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            corners = [(x + i * width - 0.5, y + j * height - 0.5) for j in (0, 1) for i in (0, 1)]
            annotation["keypoints"] = [v for i, c in enumerate(corners) for v in (*c, 2 * (i < 3))]
        for category in content["categories"]:
            category["keypoints"] = NAMES
        file = data / "annotations" / f"corners_{split}.json"
        file.write_text(json.dumps(content))
        entries.append({"name": f"corners_{split}", "json": str(file), "images": str(data / split)})
    names = ["DATASETS.TRAIN", ("corners_train",), "DATASETS.TEST", ("corners_val",)]
    sigmas = ["TEST.KEYPOINT_OKS_SIGMAS", [0.1] * 4, "TEST.DETECTIONS_PER_IMAGE", 5]
    return [*MODEL, "DATASETS.COCO_FORMAT", entries, *names, *sigmas]


@pytest.fixture
def student(config, options, tmp_path):
    """student(KEY, VALUE, ...): the config of a student whose teacher was not trained."""

    def make(*opts, teacher=()):
        weights, own = str(tmp_path / "teacher.pth"), [*MODEL, *teacher]
        torch.save({"model": build_model(config("teacher", *options)).state_dict()}, weights)
        teaches = ["KD.TEACHER.WEIGHTS", weights, "KD.TEACHER.OPTS", own]
        return config("student", *options, *teaches, "KD.LOSSES", LOSSES, *opts)

    return make


def samples(cfg, frame="lr"):
    mapper = TwoResolutionMapper(cfg, True, frame=frame)
    return [mapper(entry) for entry in get_detection_dataset_dicts(["corners_train"])[:2]]


def corners_of(boxes):
    x0, y0, x1, y1 = boxes.tensor.unbind(dim=1)
    return torch.stack([x0, y0, x1, y0, x0, y1, x1, y1], dim=1).view(-1, 4, 2)


@pytest.mark.parametrize("frame", ["lr", "hr"])
def test_keypoints_are_scaled_and_flipped_with_the_image(config, options, frame):
    """A flip exchanges left and right, so that the corner without label becomes the left one."""
    cfg, seen = config(frame, *options), set()
    for seed in range(4):
        seed_all(seed)
        for sample in samples(cfg, frame):
            truth = sample["instances"].gt_keypoints.tensor
            labelled = truth[:, :, 2] > 0
            corners = corners_of(sample["instances"].gt_boxes)
            assert_close(truth[:, :, :2][labelled], corners[labelled])
            seen |= set((~labelled).nonzero()[:, 1].tolist())
    assert seen == {2, 3}


def test_it_is_a_teacher_and_a_student_that_is_trained_and_evaluated(config, options, student):
    teacher = build(config("teacher", *options))
    branches = {f"loss_keypoint_{branch}" for branch in ("hr", "lr", "fused")}
    assert branches <= losses_of(teacher, samples(config("teacher", *options), "hr")).keys()
    trained = train(student("SOLVER.MAX_ITER", 2))
    last = trained.storage.latest()
    assert last["loss_kd_roi_keypoint"][0] > 0 and "keypoints/AP" in last
    stock = build(config("lr", *options))
    assert stock.state_dict().keys() == trained.model.state_dict().keys()


@pytest.mark.parametrize(("sigma", "expected"), [(10.0, 100.0), (0.001, 0.0)])
def test_ap_follows_the_sigmas(config, options, sigma, expected):
    """Predictions that are off by 3 px."""
    cfg = config("lr", *options, "TEST.KEYPOINT_OKS_SIGMAS", [sigma] * 4)
    pairs = []
    for entry in get_detection_dataset_dicts(["corners_val"], filter_empty=False):
        found = Instances((entry["height"], entry["width"]))
        x, y, width, height = torch.tensor([x["bbox"] for x in entry["annotations"]]).T
        found.pred_boxes = Boxes(torch.stack([x, y, x + width, y + height], dim=1))
        found.pred_classes = torch.tensor([x["category_id"] for x in entry["annotations"]])
        found.scores = torch.ones(len(found))
        points = torch.ones(len(found), 4, 3)
        points[:, :, :2] = corners_of(found.pred_boxes) + 3
        found.pred_keypoints = points
        pairs.append(([entry], [{"instances": found}]))
    evaluator = KDTrainer.build_evaluator(cfg, "corners_val")
    results = evaluate(pairs, evaluator)
    assert sorted(evaluator.metric_names()) == names_of(results)
    assert results["keypoints"]["AP"] == pytest.approx(expected)
    assert results["bbox"]["AP"] == pytest.approx(100)
    nothing = Instances((8, 8), pred_boxes=Boxes([]), scores=torch.ones(0))
    nothing.pred_classes, nothing.pred_keypoints = torch.zeros(0).long(), torch.ones(0, 4, 3)
    empty = [(inputs, [{"instances": nothing}]) for inputs, _ in pairs]
    assert "keypoints" in evaluate(empty, KDTrainer.build_evaluator(cfg, "corners_val"))


def test_predictions_are_drawn_with_the_skeleton(config, options, tmp_path):
    cfg, weights = config("lr", *options), str(tmp_path / "model.pth")
    torch.save({"model": build(cfg).state_dict()}, weights)
    bones = [{**x, "skeleton": [["left_top", "right_top"]]} for x in cfg.DATASETS.COCO_FORMAT]
    pictures = []
    for entries in (cfg.DATASETS.COCO_FORMAT, bones):
        predictor = load_tool("tools.predictors").ConfigPredictor(
            config("lr", *options, "DATASETS.COCO_FORMAT", entries), weights
        )
        image = np.zeros((64, 96, 3), np.uint8)
        found = predictor(image)
        found.pred_keypoints[:, :, 2] = 1.0
        draw = load_tool("tools.prediction_files").draw
        pictures.append(draw(image, found, str, predictor.keypoints).astype(int))
    lines = (pictures[1] != pictures[0]).any(axis=2)
    assert len(found) and lines.any()


@pytest.fixture
def recorded(config, options):
    """A stock model, its pyramid and what it predicts for its regions in a training step."""
    cfg = config("lr", *options, "INPUT.RANDOM_FLIP", "none")
    model = build(cfg).train()
    with recording(model.backbone) as call, recording_regions(model.roi_heads) as seen:
        torch.manual_seed(0)
        with EventStorage():
            model(samples(cfg))
    return model.eval(), call.output, seen


def test_heads_of_both_resolutions_predict_the_same_for_visible_keypoints(
    recorded, config, options
):
    model, pyramid, seen = recorded
    heat_maps = seen.predictions.keypoints
    assert seen.visible[:, :3].any() and not seen.visible[:, 3].any()
    assert len(heat_maps) == seen.visible.sum() and sum(map(len, seen.pointed)) > 0
    assert torch.equal(predict_regions(model.roi_heads, pyramid, seen, 1).keypoints, heat_maps)
    heads = build(config("teacher", *options)).eval().roi_heads
    heads.load_state_dict(model.roi_heads.state_dict())
    renamed = {f"p{int(name[1:]) + 1}": each for name, each in pyramid.items()}
    assert_close(predict_regions(heads, renamed, seen, 2).keypoints, heat_maps)
    assert roi_keypoint(seen.predictions, predict_regions(heads, renamed, seen, 2)) < 1e-6


@pytest.mark.parametrize("proposals", ["student", "both"])
def test_the_gradient_reaches_the_student_alone(student, proposals):
    cfg = student("KD.LOSSES", [{**LOSSES[0], "proposals": proposals}])
    model = build_student(cfg)
    with recording(model.teacher.model.roi_heads.keypoint_head) as call:
        losses = losses_of(model, samples(cfg))
    assert call.output is None  # its layers alone are called
    losses["loss_kd_roi_keypoint"].backward()
    for part in (model.roi_heads.keypoint_head, model.backbone.bottom_up.stem):
        assert all(p.grad is not None and p.grad.any() for p in part.parameters() if p.dim() > 1)
    others = model.proposal_generator, model.roi_heads.box_predictor, model.teacher.model
    assert all(p.grad is None for part in others for p in part.parameters())


@pytest.mark.parametrize(("name", "predicted"), [("roi_class", False), ("roi_keypoint", True)])
def test_keypoints_that_no_loss_reads_are_not_predicted(student, name, predicted):
    cfg = student("KD.LOSSES", [{"name": name, "weight": 1.0}])
    model = build_student(cfg)
    with recording(model.teacher.model.roi_heads.keypoint_head.score_lowres) as call:
        losses_of(model, samples(cfg))
    assert (call.output is not None) == predicted


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "MODEL.KEYPOINT_ON",
            False,
            "'roi_keypoint' compares keypoints, and the teacher's MODEL.K",
        ),
        ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3, "NUM_KEYPOINTS in both .* it is 4 .* and 3"),
    ],
)
def test_teachers_of_other_keypoints(student, key, value, words):
    cfg = student(teacher=[key, value])
    with pytest.raises(InputError, match=words):
        check_losses(cfg, TeacherSpec.from_config(cfg))


def test_validation_losses_need_keypoints(config, options):
    cfg = config("lr", *options)
    bare = [
        {**x, "annotations": [{**x["annotations"][0]}]} for x in DatasetCatalog.get("corners_val")
    ]
    for entry in bare:
        del entry["annotations"][0]["keypoints"]
    DatasetCatalog.data["no_keypoints"] = lambda: bare
    cfg.DATASETS.TEST = ("no_keypoints",)
    with pytest.raises(InputError, match="'no_keypoints': .* keypoints"):
        ValidationLoss(cfg, None)
