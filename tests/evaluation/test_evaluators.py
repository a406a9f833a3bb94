"""The evaluator for a data set."""

import pytest
from detectron2.data import MetadataCatalog
from detectron2.evaluation import CityscapesInstanceEvaluator, COCOEvaluator

from msad_kd.evaluation.build import build_evaluator
from msad_kd.utils.errors import InputError


@pytest.fixture
def kind():
    """kind(evaluator type): the name of a data set of that kind."""
    names = []

    def make(value):
        names.append(f"only_a_name_{len(names)}")
        MetadataCatalog.get(names[-1]).set(evaluator_type=value, thing_classes=["a"])
        return names[-1]

    yield make
    for name in names:
        MetadataCatalog.remove(name)


def test_coco_format(config):
    evaluator = build_evaluator(config("lr"), "tiny_val")
    assert isinstance(evaluator, COCOEvaluator)


def test_cityscapes(config, kind):
    pytest.importorskip("cityscapesscripts")
    evaluators = build_evaluator(config("lr"), kind("cityscapes_instance"))._evaluators
    assert [isinstance(each, CityscapesInstanceEvaluator) for each in evaluators] == [True]


def test_another_kind_is_refused(config, kind):
    with pytest.raises(InputError, match="evaluator 'lvis'; only coco and cityscapes"):
        build_evaluator(config("lr"), kind("lvis"))
