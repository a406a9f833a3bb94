"""What differs between versions of the libraries below us, and the patches they need.

Supported are Detectron2 0.6 and its git main. A patch is a context manager, and its docstring says
which version needs it.
"""

from contextlib import AbstractContextManager
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation import coco_evaluation


def repeat_factor_options(cfg: CfgNode) -> dict[str, bool]:
    """Return the options of ``repeat_factors_from_category_frequency`` that this version takes.

    Git main has DATALOADER.REPEAT_SQRT. Detectron2 0.6 has no such key and always takes the root.
    """
    return {"sqrt": cfg.DATALOADER.REPEAT_SQRT} if "REPEAT_SQRT" in cfg.DATALOADER else {}


def coco_eval_class(cls: type) -> AbstractContextManager:
    """Let ``COCOEvaluator`` compute AP by ``cls`` where it would use its own C++ code.

    Neither version has an option for this.
    """
    return mock.patch.object(coco_evaluation, "COCOeval_opt", cls)


def numpy_with_in1d(module: ModuleType) -> AbstractContextManager:
    """Give a module that has NumPy as ``np`` one with ``in1d``; no other module sees it.

    cityscapesScripts 2.3 calls ``in1d``, which NumPy 2.4 dropped.
    """
    return mock.patch.object(module, "np", SimpleNamespace(**{**vars(np), "in1d": np.isin}))
