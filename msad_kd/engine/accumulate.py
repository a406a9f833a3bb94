"""SOLVER.ACCUMULATE: several backward passes for one step of the optimizer."""

import time
from collections import Counter
from contextlib import nullcontext

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch.amp import GradScaler, autocast
from torch.nn.parallel import DistributedDataParallel


def split_batch(batch: list[dict], count: int) -> list[list[dict]]:
    """Split a batch into equal ones; each has its share of the images with ``unlabeled``: True."""
    kinds = [[x for x in batch if bool(x.get("unlabeled")) is kind] for kind in (False, True)]
    return [
        [x for kind in kinds for x in kind[len(kind) * i // count : len(kind) * (i + 1) // count]]
        for i in range(count)
    ]


class _Accumulating:
    """Makes a step of a trainer's optimizer out of the gradients of ``count`` batches."""

    def run_step(self) -> None:
        start = time.perf_counter()
        batches = split_batch(next(self._data_loader_iter), self.count)
        data_time = time.perf_counter() - start
        amp = isinstance(self, AMPTrainer)
        scaler = self.grad_scaler if amp else GradScaler(enabled=False)
        precision = getattr(self, "precision", torch.float16)
        distributed = isinstance(self.model, DistributedDataParallel)
        logged = Counter()
        self.optimizer.zero_grad()
        for number, batch in enumerate(batches, start=1):
            # Processes exchange the gradients once, with the last batch.
            alone = distributed and number < self.count
            with self.model.no_sync() if alone else nullcontext():
                with autocast("cuda", precision) if amp else nullcontext():
                    losses = self.model(batch)
                    if not isinstance(losses, dict):
                        losses = {"total_loss": losses}
                    losses = {name: loss / self.count for name, loss in losses.items()}
                    total = sum(losses.values())
                scaler.scale(total).backward()
            for name, loss in losses.items():
                logged[name] += loss.detach()
        self._write_metrics(dict(logged), data_time)
        scaler.step(self.optimizer)
        scaler.update()


def accumulating(trainer: SimpleTrainer, count: int) -> SimpleTrainer:
    """Return a trainer that splits each batch, and updates the weights by the sum of the gradients.

    Args:
        trainer: Detectron2's inner trainer, before its first step.
        count: the number of parts of a batch.
    """
    kind = type(trainer)
    accumulating = type(f"Accumulating{kind.__name__}", (_Accumulating, kind), {"count": count})
    return accumulating(trainer.model, trainer.data_loader, trainer.optimizer)
