"""TEST.LOSS: it is the stock loss, and the training does not notice it."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.utils.events import EventStorage
from helpers import build, build_student, differing, tensors_of, train

from msad_kd.engine.validation import ValidationLoss
from msad_kd.modeling.loss_normalizer import get_normalizer, set_normalizer
from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import seed_all

LONG = pytest.param("mask_rcnn", marks=pytest.mark.long)


@pytest.mark.parametrize("detector", [LONG, "retinanet"], indirect=True)
def test_the_training_is_bitwise_the_same(config, detector):
    runs = []
    for keys in ([], ["TEST.LOSS", True]):
        seed_all(0)  # and no step is seeded: it would hide what validation has drawn
        trainer = train(config("lr", "TEST.EVAL_PERIOD", 2, "SEED", -1, *keys))
        states = trainer.optimizer.state_dict()["state"]
        model = trainer.checkpointer.model
        runs.append((tensors_of(model), states, get_normalizer(model), torch.rand(3)))
    (one, states, *rest), (other, other_states, *other_rest) = runs
    assert differing(one, other) == []
    assert all(differing(states[i], other_states[i]) == [] for i in states)
    assert rest[0] == other_rest[0] and torch.equal(rest[1], other_rest[1])
    lines = Path(trainer.cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()
    found = [x for x in map(json.loads, lines) if "validation/total_loss" in x]
    assert len(found) == 2 and all("bbox/AP" in x for x in found)
    terms = [found[0][x] for x in found[0] if x.startswith("validation/loss_")]
    assert sum(terms) == pytest.approx(found[0]["validation/total_loss"])
    assert not any("kd" in x for x in found[0])


@pytest.mark.parametrize("detector", ["retinanet"], indirect=True)
def test_it_is_the_mean_of_the_stock_losses(student_config, config, detector):
    """Losses of distillation, augmentation and batch statistics have no part in it."""
    cfg = student_config("INPUT.RANDOM_FLIP", "horizontal", "INPUT.COLOR.CONTRAST", 0.5)
    student, stock = build_student(cfg).eval(), build(config("lr"))
    set_normalizer(student, 50.0)
    found = ValidationLoss(cfg, student)._func()["validation"]
    assert get_normalizer(student) == 50 and not any(x.training for x in student.modules())
    stock.train().backbone.eval()
    set_normalizer(stock, 25.0)  # of one image: training batches have two
    mapper = DatasetMapper(config("lr", "INPUT.RANDOM_FLIP", "none"), True)
    with EventStorage():
        losses = [stock([mapper(entry)]) for entry in DatasetCatalog.get("tiny_val")]
    means = {name: sum(x[name].item() for x in losses) / len(losses) for name in losses[0]}
    assert found == pytest.approx({**means, "total_loss": sum(means.values())})


def test_data_without_annotations_are_refused(config):
    cfg = config("lr")
    (name,) = cfg.DATASETS.TEST
    bare = [{k: v for k, v in x.items() if k != "annotations"} for x in DatasetCatalog.get(name)]
    DatasetCatalog.data["unannotated"] = lambda: bare
    cfg.DATASETS.TEST = ("unannotated",)
    with pytest.raises(InputError, match="TEST.LOSS .* 'unannotated' has no annotations"):
        ValidationLoss(cfg, None)
