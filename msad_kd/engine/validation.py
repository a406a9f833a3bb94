"""TEST.LOSS: the detection losses on the test data, beside AP."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from msad_kd.data.dict_checks import check_objects, explain_missing_data
from msad_kd.data.loader import build_test_loader
from msad_kd.data.mapper import build_mapper
from msad_kd.distill.student import DistilledMixin
from msad_kd.modeling.classes import has_masks
from msad_kd.modeling.loss_normalizer import get_normalizer, set_normalizer
from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import preserved_rng, seed_all


class ValidationLoss(EvalHook):
    """Computes the detection losses on DATASETS.TEST whenever AP is; the training does not notice.

    Args:
        cfg: the config of the run.
        model: the model, not wrapped in DistributedDataParallel.

    Raises:
        InputError: if a data set has no annotations.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module):
        loaders = [_build_loader(cfg, name) for name in cfg.DATASETS.TEST]
        batch = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
        super().__init__(cfg.TEST.EVAL_PERIOD, lambda: compute_losses(model, loaders, batch))


def _build_loader(cfg: CfgNode, name: str):
    """Build a loader of images as in the evaluation, with their annotations."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.MASK_ON = has_masks(cfg)
    mapper = build_mapper(cfg, is_train=False)
    mapper.is_train = True  # it keeps the annotations
    loader = build_test_loader(cfg, name, mapper)
    with explain_missing_data((name,)):
        dicts = DatasetCatalog.get(name)
    if not all("annotations" in entry for entry in dicts):
        raise InputError(f"TEST.LOSS is True, but data set '{name}' has no annotations; set False")
    check_objects(cfg, dicts, name, mapper)
    return loader


@contextmanager
def _giving_losses(model: nn.Module) -> Iterator[None]:
    """Let a model give losses, while its backbone, normalisation and dropout are as in a test."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    still = [x for x in model.modules() if isinstance(x, (_NormBase, _DropoutNd))]
    for module in (*still, *model.backbone.modules()):  # it may have other random layers
        module.training = False
    normalizer = get_normalizer(model)
    try:
        yield
    finally:
        set_normalizer(model, normalizer)
        for module, training in modes:
            module.training = training


@torch.no_grad()
def compute_losses(model: nn.Module, loaders: list, batch_size: int) -> dict[str, dict[str, float]]:
    """Return the means over all images of all processes, as an ``EvalHook`` expects them.

    Args:
        model: the model. Its weights, buffers, loss normalizer and modes stay as they are, and so
            do the random numbers that are drawn afterwards.
        loaders: yield batches of one image, with ``instances``.
        batch_size: the images of a training batch, which the loss normalizer counts.

    Returns:
        {"validation": {name of the loss: mean}} in the main process, {} in others.
    """
    stock = super(DistilledMixin, model) if isinstance(model, DistilledMixin) else model
    sums, images = Counter(), 0
    # The training's storage would log what the heads say of these images.
    with preserved_rng(), _giving_losses(model), EventStorage(1):
        seed_all(0)  # RPN and RoI heads sample
        if normalizer := get_normalizer(model):
            set_normalizer(model, normalizer / batch_size)  # it moves with images one by one
        for loader in loaders:
            for batch in loader:
                images += len(batch)
                for name, loss in stock.forward(batch).items():
                    sums[name] += float(loss) * len(batch)
    found = comm.gather((sums, images))
    if not comm.is_main_process():
        return {}
    images = sum(count for _, count in found)
    names = dict.fromkeys(name for some, _ in found for name in some)
    means = {name: sum(some[name] for some, _ in found) / images for name in names}
    return {"validation": {**means, "total_loss": sum(means.values())}}
