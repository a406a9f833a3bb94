"""TEST.AUG: after a training, with --eval-only, and for models without it."""

import json

import pytest
from helpers import train, train_net_main

from msad_kd import KDTrainer, build_config
from msad_kd.utils.errors import InputError

AUGMENTED = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (32, 40), "TEST.AUG.MAX_SIZE", 128]


@pytest.fixture(scope="module")
def trained(config_files, tmp_path_factory):
    """The folder of a model that was trained for a step and evaluated both ways."""
    folder = tmp_path_factory.mktemp("augmented")
    options = [*AUGMENTED, "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", str(folder)]
    train(build_config(str(config_files["lr"]), options))
    return folder


def evaluate(file, folder, *options):
    return train_net_main("--eval-only", "--config-file", file, "OUTPUT_DIR", folder, *options)


def test_after_a_training_the_metrics_are_logged(trained):
    lines = (trained / "metrics.json").read_text().splitlines()
    logged = set().union(*map(json.loads, lines))
    assert {"bbox/AP", "segm/AP", "bbox_TTA/AP", "segm_TTA/AP"} <= logged
    results = (trained.glob(f"{x}/coco_instances_results.json") for x in ("inference", "*_TTA"))
    plain, augmented = (json.loads(next(paths).read_text()) for paths in results)
    assert plain and augmented and plain != augmented


def test_eval_only(trained, config_files, tmp_path):
    weights = ["MODEL.WEIGHTS", trained / "model_final.pth"]
    plain = evaluate(config_files["lr"], tmp_path / "plain", *weights)
    both = evaluate(config_files["lr"], tmp_path / "both", *weights, *AUGMENTED)
    assert plain.keys() == {"bbox", "segm"}
    assert both.keys() == {"bbox", "segm", "bbox_TTA", "segm_TTA"}
    for task in plain:
        assert both[task] == pytest.approx(plain[task], nan_ok=True)
    sets = ["DATASETS.TEST", "('tiny_val', 'tiny_train')"]
    several = evaluate(config_files["lr"], tmp_path / "several", *weights, *AUGMENTED, *sets)
    assert several.keys() == {"tiny_val", "tiny_train"}
    assert all(tasks.keys() == both.keys() for tasks in several.values())


@pytest.mark.parametrize(
    ("role", "options", "named"),
    [
        ("teacher", [], "MultiResolutionRCNN"),
        ("lr", ["MODEL.META_ARCHITECTURE", "RetinaNet"], "RetinaNet"),
        ("lr", ["MODEL.KEYPOINT_ON", True], "GeneralizedRCNN"),
    ],
)
def test_models_without_it(config, config_files, tmp_path, role, options, named):
    words = f"TEST.AUG.ENABLED is True, but a {named} cannot .*; set it to False"
    with pytest.raises(InputError, match=words):
        KDTrainer(config(role, *AUGMENTED, *options))
    with pytest.raises(InputError, match=words):
        evaluate(config_files[role], tmp_path, *AUGMENTED, *options)
