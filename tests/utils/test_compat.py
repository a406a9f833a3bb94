"""What differs between versions, and patches that end with their block."""

from types import SimpleNamespace

import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation import coco_evaluation

from msad_kd.utils.compat import coco_eval_class, numpy_with_in1d, repeat_factor_options


def test_the_square_root_is_an_option_where_the_config_has_its_key():
    loader = CfgNode()
    assert repeat_factor_options(CfgNode({"DATALOADER": loader})) == {}
    loader.REPEAT_SQRT = False
    assert repeat_factor_options(CfgNode({"DATALOADER": loader})) == {"sqrt": False}


def test_patches_end_with_their_block():
    module, stock = SimpleNamespace(np=np), coco_evaluation.COCOeval_opt
    with numpy_with_in1d(module), coco_eval_class(int):
        assert module.np.in1d([1, 2], [2]).tolist() == [False, True]
        assert module.np.float32 is np.float32 and coco_evaluation.COCOeval_opt is int
    assert module.np is np and coco_evaluation.COCOeval_opt is stock
