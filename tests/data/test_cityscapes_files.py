"""Files of Cityscapes that cannot be used are named, one sentence each."""

import json
import multiprocessing
import re
import signal
import threading
import time

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import cityscapes
from detectron2.data.datasets.cityscapes import load_cityscapes_instances
from helpers import load_tool
from PIL import Image

from msad_kd.data import cityscapes_files
from msad_kd.data.cityscapes_files import INSTANCES, faults
from msad_kd.data.dict_checks import explain_missing_data
from msad_kd.evaluation.cityscapes import CityscapesEvaluator
from msad_kd.utils.errors import InputError
from msad_kd.utils.signals import heed_parent_alone, on_signal, stop
from projects.Shapes.generate import generate

pytest.importorskip("cityscapesscripts")


@pytest.fixture
def city(tmp_path):
    """The folder of the ground truth of the one city of the data set "streets"."""
    root = tmp_path / "datasets" / "cityscapes"
    generate(root.parent, train=1, val=2, size=(64, 128), format="cityscapes", progress=False)
    images, labels = (str(root / part / "val") for part in ("leftImg8bit", "gtFine"))
    DatasetCatalog.register("streets", lambda: load_cityscapes_instances(images, labels))
    classes = MetadataCatalog.get("cityscapes_fine_instance_seg_val").thing_classes
    facts = {"evaluator_type": "cityscapes_instance", "thing_classes": classes}
    MetadataCatalog.get("streets").set(image_dir=images, gt_dir=labels, **facts)
    yield next((root / "gtFine" / "val").iterdir())
    DatasetCatalog.remove("streets")
    MetadataCatalog.remove("streets")


def spoiled(**changes):
    """Return what changes the first object, or keys of a file of polygons; None removes a key."""

    def spoil(text):
        content = json.loads(text)
        for key, value in changes.items():
            target = content if key in content else content["objects"][0]
            target[key] = value
            if value is None:
                del target[key]
        return json.dumps(content)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda text: text[:40], "Unterminated|Expecting"),
        (lambda _: "", "Expecting value"),
        (lambda _: "[]", "indices must be integers"),
        (spoiled(imgHeight=None), "it has no 'imgHeight'"),
        (spoiled(label=3), "'int' object has no attribute"),
        (spoiled(label="dragon"), "object 1 has the unknown label 'dragon'"),
        (spoiled(polygon=[[0, 0], [9, 9]]), "the polygon of object 1 has fewer than 3 points"),
    ],
)
def test_a_file_of_polygons(city, spoil, words):
    assert not [*faults("streets")]
    file = sorted(city.glob("*_polygons.json"))[1]
    file.write_text(spoil(file.read_text()))
    found = rf"data set 'streets': '{file}' cannot be used \(.*({words}).*\); replace it"
    with pytest.raises(InputError, match=found), explain_missing_data(("streets",)):
        DatasetCatalog.get("streets")


def test_files_and_folders_that_do_not_belong_there(city):
    cities = city.parents[2] / "leftImg8bit" / "val"
    stray = {
        cities / ".DS_Store": "is no folder of a city",
        cities / city.name / "Thumbs.db": "is no",
    }
    for file, words in stray.items():
        file.touch()
        found = f"'{re.escape(str(file))}' {words}.*; remove it"
        with pytest.raises(InputError, match=found), explain_missing_data(("streets",)):
            DatasetCatalog.get("streets")
        file.unlink()


def test_a_folder_that_is_missing(city):
    city.parent.rename(city.parent.with_name("coarse"))
    found = "gtFine/val' does not exist; set DETECTRON2_DATASETS to the folder that has 'city"
    with pytest.raises(InputError, match=found), explain_missing_data(("streets",)):
        DatasetCatalog.get("streets")


def test_distill_knows_when_a_file_has_changed(city, config):
    hashes = load_tool("tools.distill").hash_annotations
    cfg = config("lr", "DATASETS.TRAIN", ("streets",), "DATASETS.TEST", ("streets",))
    before = hashes(cfg)
    assert len(before) == 4  # polygons and instances of two scenes
    file = next(city.glob("*_polygons.json"))
    file.write_text(file.read_text() + " ")
    after = hashes(cfg)
    assert [x for x in before if after[x] != before[x]] == [str(file)]


def test_no_process_that_read_it_stays(city):
    with on_signal(stop):
        for _ in range(5):
            with explain_missing_data(("streets",)):
                assert len(DatasetCatalog.get("streets")) == 2
                children = multiprocessing.active_children()
                assert {type(x).__name__ for x in children} == {"ForkProcess"}
            assert not multiprocessing.active_children()


def test_a_process_that_starts_late_ends_too(monkeypatch):
    """The caller's handler, which a fork inherits, does not swallow what ends it."""

    def late(parent):
        time.sleep(0.5)
        heed_parent_alone(parent)

    monkeypatch.setattr(cityscapes_files, "heed_parent_alone", late)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with cityscapes_files.ending_pools():
            cityscapes.mp.Pool(processes=2)  # is ended at once
            workers = multiprocessing.active_children()
            killer = threading.Timer(20, lambda: [worker.kill() for worker in workers])
            killer.start()
        killer.cancel()
        assert [worker.exitcode for worker in workers] == [0, 0]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_other_errors_stay_what_they_are(city):
    with pytest.raises(ValueError, match="^mine$"), explain_missing_data(("streets",)):
        raise ValueError("mine")


def test_instance_images_are_read_before_the_training(city):
    first, second = sorted(city.glob(f"*{INSTANCES}"))
    CityscapesEvaluator("streets")
    whole = first.read_bytes()
    first.write_bytes(whole[:-40])
    with pytest.raises(InputError, match=f"'{first}' cannot be read"):
        CityscapesEvaluator("streets")
    first.write_bytes(whole)
    Image.fromarray(np.zeros((32, 64), np.uint16)).save(second)
    words = f"'{second}' has 64 x 32 px, and its image 128 x 64 px; replace it"
    with pytest.raises(InputError, match=words):
        CityscapesEvaluator("streets")


def test_predictions_are_kept_where_there_is_no_ap(city, tmp_path, caplog):
    for file in city.glob(f"*{INSTANCES}"):
        Image.fromarray(np.zeros((64, 128), np.uint16)).save(file)
    evaluator = CityscapesEvaluator("streets", str(tmp_path / "inference"))
    evaluator.reset()
    for name in (x.name.removesuffix(INSTANCES) for x in city.glob(f"*{INSTANCES}")):
        (tmp_path / evaluator._temp_dir / f"{name}_leftImg8bit_pred.txt").touch()
    evaluator.evaluate()
    assert "'streets' has no objects, so there is no AP; the predictions are in" in caplog.text
    assert len([*(tmp_path / "inference" / "cityscapes").iterdir()]) == 2
