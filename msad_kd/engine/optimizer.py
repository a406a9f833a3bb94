"""The optimizer: SGD or AdamW, with Detectron2's gradient clipping or that of the total norm."""

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from msad_kd.utils.errors import InputError

_TOTAL = ("full_norm", "full_model")


def check_optimizer(cfg: CfgNode) -> None:
    """Raise an InputError if SOLVER.OPTIMIZER is none that ``build_optimizer`` builds.

    ``build_config`` does not: a user's trainer may build others.
    """
    if cfg.SOLVER.OPTIMIZER not in ("SGD", "ADAMW"):
        raise InputError(f"SOLVER.OPTIMIZER is '{cfg.SOLVER.OPTIMIZER}'; use SGD or ADAMW")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of SOLVER.OPTIMIZER.

    SOLVER.CLIP_GRADIENTS.CLIP_TYPE may be "full_norm", beside Detectron2's "value" and "norm":
    it clips the norm of all gradients together, where "norm" clips each parameter's. "full_model",
    its name in projects on Detectron2, means the same.

    Raises:
        InputError: if the optimizer is unknown.
    """
    check_optimizer(cfg)
    clip = cfg.SOLVER.CLIP_GRADIENTS
    total = clip.ENABLED and clip.CLIP_TYPE in _TOTAL
    if total:  # unknown to Detectron2
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    if cfg.SOLVER.OPTIMIZER == "SGD":
        optimizer = build_sgd(cfg, model)
    else:
        parameters = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
            # Swin's authors do not decay it either.
            overrides={"relative_position_bias_table": {"weight_decay": 0.0}},
        )
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(
            parameters, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY
        )

    def clip_total_norm(optimizer: torch.optim.Optimizer, *_) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

    if total:
        # Under AMP the gradients are unscaled already: GradScaler does it before it calls step.
        optimizer.register_step_pre_hook(clip_total_norm)
    return optimizer
