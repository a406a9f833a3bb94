"""AP with permuted, missing and renamed categories is the right value, or the file is refused."""

import json
import os
from contextlib import nullcontext

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from helpers import evaluate, train

from msad_kd import KDTrainer
from msad_kd.config.build import build_config
from msad_kd.data.classes import align_classes, class_names, with_classes_of
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.evaluation import coco as module
from msad_kd.evaluation.coco import IMPLEMENTATIONS
from msad_kd.utils.errors import InputError
from projects.Shapes.placement import CLASS_NAMES

INSTALLED = [name for name in IMPLEMENTATIONS if module._is_installed(name)]
NAMES = ["ant", "bee", "cat", "dog"]
# The objects of each image: class and box.
OBJECTS = [[("ant", (5, 5, 40, 30)), ("cat", (60, 10, 30, 30))], [("cat", (10, 10, 50, 40))]]
OBJECTS.append([("dog", (20, 20, 30, 40))])
MISSED = 1  # the image in which the predictions below lack the object
# For cats, precision is 1 at recalls 0, 0.01, ... 0.5: 51 of 101. No image has a bee.
RIGHT = {"AP-ant": 100, "AP-bee": float("nan"), "AP-cat": 5100 / 101, "AP-dog": 100}
RIGHT["AP"] = (100 + 5100 / 101 + 100) / 3
IDS = dict(zip(NAMES, (1, 2, 3, 4)))


def write(path, ids):
    """Write a file in COCO format with categories ``ids``: name to id, in the file's order."""
    images, annotations = [], []
    for number, objects in enumerate(OBJECTS, start=1):
        file = path.parent / f"{number}.png"
        file.touch()
        images.append({"id": number, "file_name": file.name, "height": 64, "width": 96})
        for name, box in objects:
            x, y, width, height = box
            polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
            entry = {"id": len(annotations) + 1, "image_id": number, "bbox": list(box)}
            entry |= {"segmentation": [polygon], "area": width * height, "iscrowd": 0}
            annotations += [{**entry, "category_id": ids[name]}] if name in ids else []
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))


@pytest.fixture
def lists(tmp_path):
    """lists(train, test, KEY, VALUE, ...): the categories of one or several files, and of one."""

    def make(train, test, *options):
        train = train if isinstance(train, list) else [train]
        files = {**{f"train{i}": ids for i, ids in enumerate(train)}, "test": test}
        for name, ids in files.items():
            write(tmp_path / f"{name}.json", ids)
        entries = [
            {"name": name, "json": str(tmp_path / f"{name}.json"), "images": str(tmp_path)}
            for name in files
        ]
        options = ["DATASETS.COCO_FORMAT", entries, *options]
        options += ["DATASETS.TRAIN", tuple(files)[:-1], "DATASETS.TEST", ("test",)]
        options += ["MODEL.ROI_HEADS.NUM_CLASSES", 5, "OUTPUT_DIR", str(tmp_path / "out")]
        return build_config("", options)

    return make


def predictions(classes=NAMES):
    """The predictions of a model with these classes: (inputs, outputs) of each image."""
    pairs = []
    for number, objects in enumerate(OBJECTS):
        objects = [] if number == MISSED else objects
        boxes = torch.tensor([box for _, box in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found = Instances((64, 96), pred_boxes=Boxes(boxes), scores=torch.ones(len(objects)))
        found.pred_classes = torch.tensor([classes.index(x) for x, _ in objects], dtype=torch.int64)
        pairs.append(([{"image_id": number + 1}], [{"instances": found}]))
    return pairs


def names_in_dicts(data_set, classes=NAMES):
    """The class names of a data set's dicts, image by image."""
    dicts = DatasetCatalog.get(data_set)
    return [[classes[x["category_id"]] for x in entry["annotations"]] for entry in dicts]


FIT = {
    "the same": IDS,
    "other ids": {"ant": 7, "bee": 18, "cat": 40, "dog": 99},
    "ids from 0": {"ant": 0, "bee": 1, "cat": 2, "dog": 3},
    "another order": {"dog": 1, "cat": 2, "bee": 3, "ant": 4},
    "another order in the file alone": dict(reversed(IDS.items())),
    "without the unused": {"ant": 1, "cat": 3, "dog": 4},
    "without the unused, in another order": {"dog": 0, "ant": 1, "cat": 2},
}


@pytest.mark.parametrize("implementation", INSTALLED)
@pytest.mark.parametrize("ids", FIT.values(), ids=FIT)
def test_classes_are_mapped_by_name(lists, tmp_path, ids, implementation):
    cfg = lists(IDS, ids, "TEST.COCO_EVALUATOR", implementation)
    KDTrainer.build_test_loader(cfg, "test")
    found = evaluate(predictions(), KDTrainer.build_evaluator(cfg, "test"))["bbox"]
    assert {key: found[key] for key in RIGHT} == pytest.approx(RIGHT, nan_ok=True)
    written = json.loads((tmp_path / "out/inference/coco_instances_results.json").read_text())
    assert {entry["category_id"] for entry in written} == {ids[x] for x in ("ant", "cat", "dog")}
    expected = [[name for name, _ in objects] for objects in OBJECTS]
    assert names_in_dicts("test") == names_in_dicts("test") == expected
    metadata = MetadataCatalog.get("test")
    assert metadata.thing_classes == NAMES
    assert sorted(metadata.thing_dataset_id_to_contiguous_id.values()) == [0, 1, 2, 3]


UNFIT = {
    "renamed": ({"ant": 1, "bee": 2, "cat": 3, "hound": 4}, "hound"),
    "one more": ({**IDS, "elk": 5}, "elk"),
    "in capitals": ({name.upper(): number for name, number in IDS.items()}, "ANT, BEE, CAT, DOG"),
}


@pytest.mark.parametrize(("ids", "unknown"), UNFIT.values(), ids=UNFIT)
def test_other_names_are_refused(lists, ids, unknown):
    cfg = lists(IDS, ids)
    words = rf"'test' \('.*test.json'\) has .* 'train0' \('.*train0.json'\) lacks: {unknown};"
    for use in (KDTrainer, lambda cfg: KDTrainer.build_test_loader(cfg, "test")):
        with pytest.raises(InputError, match=words):
            use(cfg)
    names = [*NAMES, *(name for name in ids if name not in NAMES)][:5]
    if set(ids) <= set(names):  # which this key allows
        cfg = lists(IDS, ids, "DATASETS.CLASSES", names)
        KDTrainer.build_test_loader(cfg, "test")
        assert MetadataCatalog.get("test").thing_classes == names


def test_several_data_sets_for_training(lists):
    cfg = lists([FIT["without the unused, in another order"], IDS], IDS)
    KDTrainer.build_train_loader(cfg)
    expected = [[name for name, _ in objects] for objects in OBJECTS]
    assert names_in_dicts("train0") == names_in_dicts("train1") == expected
    with pytest.raises(InputError, match="'train0'.* lacks: elk; give"):
        KDTrainer.build_train_loader(lists([{"elk": 1}, IDS], IDS))
    either = {"ant": 1, "bee": 2}, {"cat": 1, "bee": 2}
    with pytest.raises(InputError, match="'train1'.* that data set 'train0'.* lacks: cat"):
        KDTrainer.build_train_loader(lists([*either], {"bee": 1}))
    cfg = lists([*either], {"bee": 1}, "DATASETS.CLASSES", ["cat", "bee", "ant"])
    KDTrainer.build_train_loader(cfg)
    assert names_in_dicts("train0", ["cat", "bee", "ant"])[0] == ["ant"]
    assert names_in_dicts("train1", ["cat", "bee", "ant"])[0] == ["cat"]
    KDTrainer.build_train_loader(lists([either[1]], {"bee": 1}))  # another run's classes
    assert MetadataCatalog.get("train0").thing_classes == ["cat", "bee"]


@pytest.mark.parametrize("classes", [["dog", "cat", "bee", "ant"], ["ant", "dog", "elk", "cat"]])
def test_the_classes_of_a_checkpoint(lists, classes):
    """An evaluation takes them in place of TRAIN's."""
    model = torch.nn.Module()
    model.classes = classes
    cfg = with_classes_of(lists(IDS, FIT["without the unused"]), model)
    KDTrainer.build_test_loader(cfg, "test")
    found = evaluate(predictions(classes), KDTrainer.build_evaluator(cfg, "test"))["bbox"]
    expected = {key: value for key, value in RIGHT.items() if key != "AP-bee"}
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    with pytest.raises(InputError, match="'test'.* model .*checkpoint.* lacks: dog"):
        model.classes = NAMES[:3]
        KDTrainer.test(lists(IDS, IDS), model)
    with pytest.raises(InputError, match=r"CLASSES is \['a'\], but .*checkpoint.*'cat'\]; correct"):
        with_classes_of(lists(IDS, IDS, "DATASETS.CLASSES", ["a"]), model)


@pytest.mark.parametrize("classes", [["ant", "ant"], [1, 2]])
def test_a_wrong_list_of_classes(lists, classes):
    with pytest.raises(InputError, match="DATASETS.CLASSES is .*; it should be a list of"):
        KDTrainer.build_train_loader(lists(IDS, IDS, "DATASETS.CLASSES", classes))


def test_classes_that_nothing_names_cannot_be_mapped(lists):
    cfg = lists(IDS, IDS)
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(
        InputError, match="4 classes and the model 5, whose names are unknown; list"
    ):
        KDTrainer.build_evaluator(cfg, "test")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    found = evaluate(predictions(), KDTrainer.build_evaluator(cfg, "test"))["bbox"]
    assert {key: found[key] for key in RIGHT} == pytest.approx(RIGHT, nan_ok=True)


def test_classes_of_a_data_set_whose_file_is_gone(lists):
    """Detectron2 knows those of COCO, whatever is on the disk."""
    cfg = lists(IDS, {"cat": 17, "dog": 18, "bird": 16})
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    cfg.DATASETS.TRAIN = ("coco_2017_train",)
    classes = MetadataCatalog.get("coco_2017_train").thing_classes
    pairs = predictions(["ant", "bee", *classes])
    for _, (output,) in pairs:
        output["instances"].pred_classes -= 2
        output["instances"] = output["instances"][output["instances"].pred_classes >= 0]
    found = evaluate(pairs, KDTrainer.build_evaluator(cfg, "test"))["bbox"]
    assert (found["AP-cat"], found["AP-dog"]) == pytest.approx((RIGHT["AP-cat"], 100))


def test_a_data_set_without_a_file_keeps_its_order(lists):
    cfg = lists(IDS, IDS)
    DatasetCatalog.register(
        "file_without_names", lambda: [{"file_name": "1.png", "annotations": []}]
    )
    MetadataCatalog.get("file_without_names").thing_classes = NAMES[:3]
    align_classes(cfg, ("file_without_names",))
    assert class_names("file_without_names") == NAMES[:3]
    MetadataCatalog.get("moved").thing_classes = NAMES[1:]
    with pytest.raises(InputError, match="'moved' has its classes in another order than .*train0"):
        align_classes(cfg, ("moved",))


def test_categories_are_found_wherever_they_stand(lists, tmp_path):
    cfg = lists(IDS, IDS)
    file = tmp_path / "test.json"
    content = json.loads(file.read_text())
    first = {"categories": content.pop("categories")}
    entry = {"info": {"categories": [{"id": 1, "name": "wrong"}]}}
    texts = [{"id": str(i), "name": name} for i, name in zip((9, 11, 10, 100), "abdc")]
    for number, other in enumerate(({**first, **content}, {**entry, **content, **first}, [], {})):
        file.write_text(json.dumps(other))
        os.utime(file, ns=(number, number))
        assert class_names(cfg.DATASETS.TEST[0]) == (NAMES if number < 2 else [])
    file.write_text(json.dumps({"categories": texts}))
    assert class_names(cfg.DATASETS.TEST[0]) == ["a", "d", "b", "c"]


@pytest.fixture
def teacher(teacher_weights, tmp_path):
    """teacher(classes): the trained teacher's checkpoint, with other class names."""

    def write(classes):
        path = tmp_path / "teacher.pth"
        torch.save({"model": torch.load(teacher_weights)["model"], "classes": classes}, path)
        return "KD.TEACHER.WEIGHTS", str(path)

    return write


SHAPES = list(CLASS_NAMES)
L1, ROI = [{"name": "l1", "weight": 1.0}], [{"name": "roi_class", "weight": 1.0}]


@pytest.mark.parametrize(
    ("start", "losses", "words"),
    [
        (True, L1, "KD.TEACHER.INIT_STUDENT True needs the same in the same order"),
        (False, ROI, "the loss roi_class of KD.LOSSES needs the same"),
        (False, L1, None),
    ],
)
def test_a_teacher_of_other_classes(student_config, teacher, start, losses, words):
    options = ["KD.LOSSES", losses, "KD.TEACHER.INIT_STUDENT", start]
    other = {TeacherSpec.check_classes: ["ant", *SHAPES[1:]], TeacherSpec.build: SHAPES[::-1]}
    for check, classes in other.items():
        with pytest.raises(InputError, match=words) if words else nullcontext():
            check(TeacherSpec.from_config(student_config(*teacher(classes), *options)))
    for classes in (SHAPES, SHAPES[:3], []):
        TeacherSpec.from_config(student_config(*teacher(classes), *options)).check_classes()
    # What the sentence proposes.
    options += ["DATASETS.CLASSES", SHAPES[::-1]]
    TeacherSpec.from_config(student_config(*teacher(SHAPES[::-1]), *options)).check_classes()


def test_a_teacher_is_evaluated_by_its_own_classes(student_config, teacher, caplog, monkeypatch):
    used, build = [], KDTrainer.build_evaluator
    record = staticmethod(lambda cfg, *a: used.append(cfg.DATASETS.CLASSES) or build(cfg, *a))
    monkeypatch.setattr(KDTrainer, "build_evaluator", record)
    options = ["KD.LOSSES", L1, "KD.TEACHER.INIT_STUDENT", False, "SOLVER.MAX_ITER", 1]
    options += ["KD.TEACHER.EVAL_BEFORE_TRAIN", True]
    train(student_config(*teacher(SHAPES[::-1]), *options))
    assert used == [[], SHAPES[::-1], []]  # the check before the training, the teacher, the student
    used.clear()
    train(student_config(*teacher(SHAPES[:7]), *options))
    assert f"The teacher predicts no {SHAPES[7]}: the teacher is not evaluated" in caplog.text
    assert used == [[], []]
