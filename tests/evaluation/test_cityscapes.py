"""Cityscapes' AP by cityscapesScripts and by COCO's rules, on generated data."""

import glob
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import detectron2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import register_all_cityscapes
from detectron2.data.datasets.cityscapes import load_cityscapes_instances
from detectron2.evaluation import CityscapesInstanceEvaluator
from detectron2.structures import BitMasks, Instances
from detectron2.utils import comm
from helpers import ROOT, evaluate, names_of, run_script
from PIL import Image

from msad_kd import KDTrainer
from msad_kd.evaluation import coco as module
from msad_kd.evaluation.build import build_evaluator, metric_names
from msad_kd.evaluation.cityscapes import (
    CityscapesCOCOEvaluator,
    CityscapesEvaluator,
    cityscapes_as_coco,
)
from msad_kd.evaluation.coco import IMPLEMENTATIONS
from msad_kd.utils.errors import InputError
from projects.Shapes.generate import generate

pytest.importorskip("cityscapesscripts")

NAME = "cityscapes_of_shapes"
TRAINED_ON_IT = ("DATASETS.TRAIN", (NAME,))
SIZE = 160, 320
INSTALLED = [name for name in IMPLEMENTATIONS if module._is_installed(name)]
CLASSES = list(MetadataCatalog.get("cityscapes_fine_instance_seg_val").thing_classes)
SUFFIX = "gtFine_instanceIds.png"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder with `cityscapes/` in it; its validation set is registered as NAME."""
    folder = tmp_path_factory.mktemp("tree") / "datasets"
    shapes = {"min_radius": 10, "max_radius": 30, "max_shapes": 7}
    generate(folder, train=4, val=5, size=SIZE, format="cityscapes", progress=False, **shapes)
    images, labels = (f"{folder}/cityscapes/{part}/val" for part in ("leftImg8bit", "gtFine"))
    make_group_and_void(labels)
    DatasetCatalog.register(NAME, lambda: load_cityscapes_instances(images, labels))
    metadata = {"evaluator_type": "cityscapes_instance", "thing_classes": CLASSES}
    MetadataCatalog.get(NAME).set(gt_dir=labels, **metadata)
    yield folder
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def instances_of(ids):
    """The instances, without groups, in an image of ids: (id, mask)."""
    return [(number, ids == number) for number in np.unique(ids).tolist() if number >= 1000]


def make_group_and_void(labels):
    """Turn the first instance of the first image into a group, and the second into void."""
    path = min(glob.glob(f"{labels}/*/*{SUFFIX}"))
    ids = np.array(Image.open(path))
    (group, where), (_, void) = instances_of(ids)[:2]
    ids[where], ids[void] = group // 1000, 3  # `out of roi`, which is ignored
    Image.fromarray(ids.astype(np.uint16)).save(path)


def predict(change=lambda mask: mask, spurious=()):
    """The ground truth with each mask changed, and spurious (class, mask) in the first image.

    Returns (inputs, outputs) of each image.
    """
    from cityscapesscripts.helpers.labels import id2label

    pairs = []
    for number, entry in enumerate(sorted(DatasetCatalog.get(NAME), key=lambda e: e["file_name"])):
        truth = entry["file_name"].replace("leftImg8bit/", "gtFine/")
        ids = np.array(Image.open(truth.replace("leftImg8bit.png", SUFFIX)))
        objects = [
            (CLASSES.index(id2label[number // 1000].name), change(mask))
            for number, mask in instances_of(ids)
        ]
        objects += spurious if number == 0 else []
        labels, masks = zip(*objects)
        masks = torch.from_numpy(np.stack(masks))
        found = Instances(
            ids.shape,
            pred_boxes=BitMasks(masks).get_bounding_boxes(),
            scores=torch.linspace(0.9, 0.5, len(objects)),
            pred_classes=torch.tensor(labels),
            pred_masks=masks,
        )
        pairs.append(([entry], [{"instances": found}]))
    return pairs


def eroded(mask):
    return cv2.erode(mask.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0


def first_image():
    first = min(glob.glob(f"{MetadataCatalog.get(NAME).gt_dir}/*/*{SUFFIX}"))
    return np.array(Image.open(first))


def test_a_perfect_prediction_scores_100(tree, tmp_path):
    pairs = predict()
    found = evaluate(pairs, CityscapesEvaluator(NAME))["segm"]
    assert found.keys() == {"AP", "AP50"} | {f"AP-{name}" for name in CLASSES}
    occurring = np.array([value for value in found.values() if not np.isnan(value)])
    assert len(occurring) > 4 and occurring == pytest.approx(100.0)
    for name in INSTALLED:
        coco = CityscapesCOCOEvaluator(NAME, implementation=name, output_dir=str(tmp_path))
        found = evaluate(pairs, coco)
        assert found.keys() == {"bbox", "segm_coco"}
        for metrics in found.values():
            assert (metrics["AP"], metrics["AP75"]) == pytest.approx((100.0, 100.0))


@pytest.mark.skipif(not hasattr(np, "in1d"), reason="stock Detectron2 fails with numpy 2.4")
def test_same_ap_as_detectron2s_evaluator(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # cityscapesScripts writes matches.json there
    pairs = predict(eroded, [(0, first_image() == 7)])
    stock = evaluate(pairs, CityscapesInstanceEvaluator(NAME))["segm"]
    assert 5 < stock["AP"] < 95
    (tmp_path / "matches.json").unlink()
    ours = evaluate(pairs, CityscapesEvaluator(NAME))["segm"]
    assert {name: ours[name] for name in stock} == pytest.approx(stock)
    assert list(tmp_path.iterdir()) == []


def test_numpy_without_in1d(tree, monkeypatch):
    expected = evaluate(predict(eroded), CityscapesEvaluator(NAME))["segm"]
    from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as scripts

    monkeypatch.setattr(scripts, "np", np)
    monkeypatch.delattr(np, "in1d", raising=False)
    found = evaluate(predict(eroded), CityscapesEvaluator(NAME))["segm"]
    assert found == pytest.approx(expected, nan_ok=True)
    assert not hasattr(np, "in1d")


def test_predictions_on_groups_and_void_and_of_other_classes_do_not_count(tree, tmp_path):
    ids = first_image()
    (group,) = [label for label in np.unique(ids) if 24 <= label < 1000]
    on_group = [(CLASSES.index("person") + int(group) - 24, ids == group)]
    of_no_class, elsewhere = ([(label, ids == 7)] for label in (8, 0))  # both on the road
    for spurious, perfect in ((on_group, True), (of_no_class, True), (elsewhere, False)):
        pairs = predict(spurious=spurious)
        for _, outputs in pairs:  # the spurious one first: a mistake costs precision
            outputs[0]["instances"].scores = outputs[0]["instances"].scores.flip(0)
        own = evaluate(pairs, CityscapesEvaluator(NAME))["segm"]["AP"]
        coco = CityscapesCOCOEvaluator(NAME, output_dir=str(tmp_path))
        cocos = evaluate(pairs, coco)["segm_coco"]["AP"]
        assert (own == pytest.approx(100)) == (cocos == pytest.approx(100)) == perfect


def test_missing_ground_truth(tree, tmp_path):
    name = "cityscapes_nowhere"
    MetadataCatalog.get(name).set(gt_dir=str(tmp_path), thing_classes=CLASSES)
    with pytest.raises(InputError, match="'cityscapes_nowhere': there is no .*DETECTRON2_DATASETS"):
        CityscapesCOCOEvaluator(name, output_dir=str(tmp_path))
    with pytest.raises(InputError, match="'cityscapes_nowhere': there is no"):
        evaluate([], CityscapesEvaluator(name))
    MetadataCatalog.remove(name)


def test_several_machines(tree, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)
    monkeypatch.setattr(comm, "get_local_size", lambda: 2)
    with pytest.raises(InputError, match=f"'{NAME}' cannot be evaluated on several machines"):
        CityscapesEvaluator(NAME)


def test_the_ground_truth_is_read_again_in_another_folder(tree, tmp_path):
    assert len(cityscapes_as_coco(NAME)["images"]) == 5
    other = shutil.copytree(f"{tree}/cityscapes/gtFine/val", tmp_path / "val")
    next(other.glob(f"*/*{SUFFIX}")).unlink()
    vars(MetadataCatalog.get(NAME)).update(gt_dir=str(other))
    assert len(cityscapes_as_coco(NAME)["images"]) == 4


@pytest.mark.parametrize(
    ("options", "tasks"),
    [
        ((), {"segm"}),
        (("TEST.CITYSCAPES_COCO", True), {"bbox", "segm", "segm_coco"}),
        (("MODEL.MASK_ON", False), {"bbox"}),
        (("MODEL.META_ARCHITECTURE", "RetinaNet"), {"bbox"}),
    ],
)
def test_evaluators_of_a_config(tree, config, options, tasks):
    evaluator = build_evaluator(config("lr", *TRAINED_ON_IT, *options), NAME)
    pairs = predict()
    if "segm" not in tasks:
        for _, outputs in pairs:
            outputs[0]["instances"].remove("pred_masks")
    found = evaluate(pairs, evaluator)
    assert found.keys() == tasks and sorted(metric_names(evaluator)) == names_of(found)


def test_masks_of_a_low_resolution_model_have_the_images_size(tree, config):
    cfg = config("lr", *TRAINED_ON_IT)
    model = KDTrainer.build_model(cfg).eval()
    inputs = next(iter(KDTrainer.build_test_loader(cfg, NAME)))
    assert min(inputs[0]["image"].shape[-2:]) == 32
    with torch.no_grad():
        assert model(inputs)[0]["instances"].pred_masks.shape[-2:] == SIZE


def test_without_cityscapesscripts(tree, config, monkeypatch):
    module = "cityscapesscripts.helpers.labels"
    for name in {module, *(name for name in sys.modules if name.endswith(f".{module}"))}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=f"data set {NAME}: .*install .*cityscapesScripts"):
        KDTrainer.build_test_loader(config("lr", *TRAINED_ON_IT), NAME)


# Run with a Detectron2 that imports the scripts as git main does, {imports} being its statements.
ON_GIT_MAIN = """
import detectron2, msad_kd.utils.compat
from detectron2.data.datasets.builtin import register_all_cityscapes
from detectron2.data.datasets.cityscapes import load_cityscapes_instances
assert detectron2.__file__.startswith({folder!r}), detectron2.__file__
assert len(load_cityscapes_instances({images!r}, {labels!r})) == 5
{imports}
from cityscapesscripts.helpers import labels
from {package}.helpers import labels as same
assert same is labels and labels.__spec__.name == "cityscapesscripts.helpers.labels"
try:
    import {package}.nothing
except ModuleNotFoundError as error:
    assert error.name == "cityscapesscripts.nothing", error
"""


@pytest.mark.long
def test_the_scripts_are_found_where_git_main_imports_them(tree, tmp_path):
    package = "deeplearning.projects.cityscapesApi.cityscapesscripts"
    skipped = shutil.ignore_patterns("configs", "projects")
    installed = Path(detectron2.__file__).parent
    main = shutil.copytree(installed, tmp_path / "detectron2", ignore=skipped)
    imports = []
    for file in ("data/datasets/cityscapes.py", "evaluation/cityscapes_evaluation.py"):
        old = r"(from|import) [\w.]*cityscapesscripts\."
        text = re.sub(old, rf"\1 {package}.", (main / file).read_text())
        (main / file).write_text(text)
        imports += re.findall(rf"^ *((?:from|import) {package}.*)$", text, re.MULTILINE)
    assert len(imports) >= 6
    images, labels = (f"{tree}/cityscapes/{part}/val" for part in ("leftImg8bit", "gtFine"))
    values = {"imports": "\n".join(imports), "folder": str(tmp_path), "package": package}
    code = ON_GIT_MAIN.format(**values, images=images, labels=labels)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_student_is_trained_and_evaluated_on_the_tree(
    tree, config_files, teacher_weights, tmp_path
):
    """Run train_net.py with Detectron2's names of the data sets."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in [x for x in catalog.list() if x.startswith("cityscapes_fine")]:
            catalog.remove(name)
    register_all_cityscapes(str(tree))  # as in a process whose DETECTRON2_DATASETS it is
    # The teacher was trained on eight other classes. Without their names, it may teach these.
    teacher, weights = torch.load(teacher_weights), tmp_path.parent / f"{tmp_path.name}.pth"
    torch.save({"model": teacher["model"]}, weights)
    options = [
        *("--config-file", str(config_files["student"])),
        *("DATASETS.TRAIN", "('cityscapes_fine_instance_seg_train',)"),
        *("DATASETS.TEST", "('cityscapes_fine_instance_seg_val',)"),
        *("TEST.CITYSCAPES_COCO", "True", "SOLVER.MAX_ITER", "2"),
        *("KD.TEACHER.WEIGHTS", str(weights), "KD.TEACHER.EVAL_BEFORE_TRAIN", "True"),
        *("OUTPUT_DIR", str(tmp_path / "student")),
    ]
    run_script("train_net.py", *options, cwd=tmp_path)
    metrics = {}
    for line in (tmp_path / "student/metrics.json").read_text().splitlines():
        metrics |= json.loads(line)
    assert {"loss_kd_l1", "segm/AP", "segm/AP50", "segm_coco/AP", "bbox/AP"} <= metrics.keys()
    assert (tmp_path / "student/teacher/inference").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]
