"""What differs between versions, and patches that end with their block."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.evaluation import coco_evaluation

from msad_kd.utils.compat import (
    coco_eval_class,
    find_cityscapes_scripts,
    images_read_by,
    numpy_with_in1d,
    repeat_factor_options,
)

PATH = "deeplearning.projects.cityscapesApi.cityscapesscripts"


def test_the_square_root_is_an_option_where_the_config_has_its_key():
    loader = CfgNode()
    assert repeat_factor_options(CfgNode({"DATALOADER": loader})) == {}
    loader.REPEAT_SQRT = False
    assert repeat_factor_options(CfgNode({"DATALOADER": loader})) == {"sqrt": False}


def test_patches_end_with_their_block():
    module, stock = SimpleNamespace(np=np), coco_evaluation.COCOeval_opt
    read = detection_utils.read_image
    with numpy_with_in1d(module), coco_eval_class(int), images_read_by(min):
        assert detection_utils.read_image is min
        assert module.np.in1d([1, 2], [2]).tolist() == [False, True]
        assert module.np.float32 is np.float32 and coco_evaluation.COCOeval_opt is int
    assert module.np is np and coco_evaluation.COCOeval_opt is stock
    assert detection_utils.read_image is read


def test_nothing_is_done_for_a_detectron2_that_imports_the_scripts_themselves(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = list(sys.meta_path)
    find_cityscapes_scripts("from cityscapesscripts.helpers.labels import labels")
    assert sys.meta_path == before
    for _ in range(2):
        find_cityscapes_scripts(f"from {PATH}.helpers.labels import labels")
        finders = [type(finder).__name__ for finder in sys.meta_path]
        assert finders.count("_CityscapesScripts") == 1
    assert importlib.util.find_spec("deeplearning.elsewhere") is None
