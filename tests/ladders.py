"""Helps the tests of ladders."""

import torch

STAGES = ("first", "second", "third")
MGD = [{"name": "mgd", "weight": 1e-4}, {"name": "l1", "weight": 0.1, "adapter": True}]


def students(cfg, count=3):
    folders = [f"stage_0{i}_{name}" for i, name in enumerate(STAGES[:count], 1)]
    return [
        torch.load(f"{cfg.OUTPUT_DIR}/{name}/student.pth", weights_only=True)["model"]
        for name in folders
    ]
