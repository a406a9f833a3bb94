"""Tiny configs of every detector, each in every role."""

import yaml
from helpers import ROOT, WARMUP, coco_format, input_sizes, tiny_model

TINY_HEAD = {"NUM_CLASSES": 8, "NUM_CONVS": 1, "SCORE_THRESH_TEST": 0.0}
# Detector to (the name of its base configs, its student's meta-architecture, its own MODEL keys).
DETECTORS = {
    "mask_rcnn": ("RCNN-FPN", "DistilledRCNN", {}),
    "faster_rcnn": ("RCNN-FPN", "DistilledRCNN", {"MASK_ON": False}),
    "retinanet": ("RetinaNet", "DistilledRetinaNet", {"RETINANET": TINY_HEAD}),
    "fcos": ("FCOS", "DistilledFCOS", {"FCOS": TINY_HEAD}),
}
OTHERS = ("faster_rcnn", "retinanet", "fcos")  # most test files are about Mask R-CNN
DENSE = ("retinanet", "fcos")


def reading(detector, levels):
    """Options that let the heads of a detector read five levels."""
    if detector in DENSE:
        return [f"MODEL.{detector.upper()}.IN_FEATURES", levels]
    return ["MODEL.RPN.IN_FEATURES", levels, "MODEL.ROI_HEADS.IN_FEATURES", levels[:-1]]


def write_configs(folder, data, detector):
    """Write <role>.yaml for "lr", "hr" (the stock model), "teacher" and "student" to a folder.

    The student's config names no checkpoint yet. Return role to file.
    """
    base, student, own = DETECTORS[detector]
    files = {role: folder / f"{role}.yaml" for role in ("lr", "hr", "teacher", "student")}

    def role(name, side, finest):
        anchors = [finest * 2**level for level in range(5)]
        model = {**tiny_model(*anchors), **own}
        if detector == "retinanet":
            octaves = [[side * 2 ** (i / 3) for i in range(3)] for side in anchors]
            model["ANCHOR_GENERATOR"] = {"SIZES": octaves}
        return {
            "_BASE_": str(ROOT / f"configs/Base-{base}-{name}.yaml"),
            "MODEL": model,
            "INPUT": input_sizes(side),
            "DATASETS": {
                "TRAIN": ["tiny_train"],
                "TEST": ["tiny_val"],
                "COCO_FORMAT": coco_format(data, "tiny"),
            },
            "DATALOADER": {"NUM_WORKERS": 0},
            "SOLVER": {
                "OPTIMIZER": "ADAMW",
                "BASE_LR": 0.001,
                "WARMUP_ITERS": 2,
                "STEPS": [],
                "IMS_PER_BATCH": 2,
                "REFERENCE_WORLD_SIZE": 0,
                "MAX_ITER": 4,
                "CHECKPOINT_PERIOD": 2,
            },
            "TEST": {"DETECTIONS_PER_IMAGE": 20},
            "SEED": 3,
        }

    contents = {
        "lr": role("LR", 32, 4),
        "hr": role("HR", 64, 8),
        "teacher": role("Teacher", 64, 8),
        "student": {
            "_BASE_": "lr.yaml",
            "MODEL": {"META_ARCHITECTURE": student},
            "KD": {
                "LOSSES": [{"name": "l1", "weight": 0.6, "warmup_iters": WARMUP}],
                "TEACHER": {"CONFIG_FILE": str(files["teacher"]), "EVAL_BEFORE_TRAIN": False},
            },
        },
    }
    for name, content in contents.items():
        files[name].write_text(yaml.safe_dump(content))
    return files
