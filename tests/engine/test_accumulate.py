"""SOLVER.ACCUMULATE: the update of the larger batch, in smaller ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils.events import EventStorage
from helpers import NO_TEST, differing, tensors_of, train
from torch import nn
from two_processes import start

from msad_kd import KDTrainer
from msad_kd.engine.accumulate import accumulating, split_batch
from msad_kd.utils.errors import InputError, NotFiniteError

# As many proposals in each image, and none left to chance: the losses are means over images.
ALL = [
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 10000, "MODEL.RPN.NMS_THRESH", 1.0),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0),
    *("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False, "MODEL.RESNETS.NORM", "FrozenBN"),
]
SGD = ["SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 0.01, "SOLVER.MOMENTUM", 0.9]
CLIP = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_norm"]
CLIP += ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5]
UNLABELED = ["DATASETS.UNLABELED", ["tiny_val"], "SOLVER.UNLABELED_PER_BATCH"]
TWICE = ["SOLVER.ACCUMULATE", 2]


def test_each_part_has_its_share_of_both_kinds_of_images():
    batch = [{"id": i} for i in range(4)] + [{"id": i, "unlabeled": True} for i in range(4, 6)]
    ids = [[x["id"] for x in part] for part in split_batch(batch, 2)]
    assert ids == [[0, 1, 4], [2, 3, 5]] and split_batch(batch, 1) == [batch]


class OwnLoader(KDTrainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg)


def test_another_loader_does_not_accumulate_and_says_so_when_resumed(config, caplog):
    with pytest.raises(InputError, match="ACCUMULATE is 2, .* ignores this key; return"):
        OwnLoader(config("lr", *NO_TEST, *TWICE))
    cfg = config("lr", *NO_TEST, "SOLVER.MAX_ITER", 1)
    OwnLoader(cfg).train()
    assert "other batches" not in caplog.text
    cfg.defrost()
    cfg.SOLVER.MAX_ITER = 2
    OwnLoader(cfg).resume_or_load(resume=True)
    assert "gets other batches than a run without interruption" in caplog.text


@pytest.mark.parametrize("detector", ["faster_rcnn"], indirect=True)
def test_the_update_is_that_of_the_larger_batch(student_config, detector):
    weights, logged = [], []
    for images, keys in ((4, []), (2, TWICE)):
        keys = [*keys, "SOLVER.IMS_PER_BATCH", images, *UNLABELED, images // 2]
        options = [*ALL, *SGD, "KD.TEACHER.INIT_STUDENT", False, *NO_TEST]
        cfg = student_config(*options, "SOLVER.MAX_ITER", 3, *keys)
        torch.manual_seed(0)
        trainer = train(cfg)
        weights.append(tensors_of(trainer.model))
        line = Path(trainer.cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()[-1]
        logged.append({k: v for k, v in json.loads(line).items() if "loss" in k})
    torch.manual_seed(0)
    start = tensors_of(KDTrainer.build_model(trainer.cfg))
    moved = max((weights[0][k] - start[k]).abs().max() for k in start)
    off = max((x - weights[1][k]).abs().max() for k, x in weights[0].items())
    assert moved > 1e-3 and off < 1e-6, (moved, off)
    assert logged[0] == pytest.approx(logged[1], rel=1e-4) and "loss_kd_l1_unlabeled" in logged[0]


@pytest.mark.parametrize("detector", ["retinanet"], indirect=True)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(config, tmp_path, detector):
    keys = [*TWICE, "SOLVER.MAX_ITER", 3, *NO_TEST]
    whole = train(config("lr", *keys))
    folder = tmp_path / "cut_off"
    folder.mkdir()
    shutil.copy(f"{whole.cfg.OUTPUT_DIR}/model_0000001.pth", folder)
    output = ["OUTPUT_DIR", str(folder)]
    with pytest.raises(InputError, match="had 4 images a batch and is resumed with 6"):
        KDTrainer(config("lr", *keys, *output, "SOLVER.ACCUMULATE", 3)).resume_or_load()
    # The same images in a step, in another number of parts.
    other = KDTrainer(config("lr", *NO_TEST, *output, "SOLVER.IMS_PER_BATCH", 4))
    other.resume_or_load()
    assert [x["file_name"] for x in next(iter(other.data_loader))] == [
        x["file_name"] for x in next(iter(_from(whole, 2)))
    ]
    again = train(config("lr", *keys, *output), resume=True)
    assert again.start_iter == 2
    assert differing(tensors_of(whole.model), tensors_of(again.model)) == []


def _from(trainer, iteration):
    trainer.data_loader.start = iteration
    return trainer.data_loader


def test_a_loss_that_is_not_finite_names_the_images_of_all_parts(config, monkeypatch):
    from detectron2.modeling.proposal_generator import RPN

    losses, calls = RPN.losses, []

    def spoiled(self, *args):
        calls.append(1)
        found = losses(self, *args)
        return found if len(calls) != 3 else {**found, "loss_rpn_loc": torch.tensor(float("nan"))}

    monkeypatch.setattr(RPN, "losses", spoiled)
    with pytest.raises(NotFiniteError, match="iteration 1: loss_rpn_loc$") as error:
        train(config("lr", *TWICE, *NO_TEST))
    assert str(error.value).count("/train/") == 4


class Mean(nn.Module):
    """Its loss is its weight times the mean of a batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch):
        return {"loss": self.weight * sum(x["value"] for x in batch) / len(batch)}


@pytest.mark.parametrize("kind", [SimpleTrainer, AMPTrainer])  # without a GPU, AMP scales by 1
def test_one_step_by_hand(kind):
    model, batch = Mean(), [{"value": value} for value in (1.0, 2.0, 3.0, 6.0)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = accumulating(kind(model, [batch, batch], optimizer), 2)
    with EventStorage(0) as storage:
        trainer.run_step()
        assert storage.latest()["total_loss"][0] == 3.0
        assert model.weight.item() == pytest.approx(1 - 0.1 * 3)
        trainer.run_step()  # the gradients of the last step are gone
    assert model.weight.item() == pytest.approx(1 - 0.2 * 3)
    assert ("grad_scaler" in trainer.state_dict()) == (kind is AMPTrainer)


@pytest.mark.long
def test_two_processes_exchange_the_gradients_once(config_files, teacher_weights, tmp_path):
    models = []
    for images, parts in ((8, 1), (4, 2)):
        keys = [*ALL, *SGD, *CLIP, *NO_TEST, "MODEL.MASK_ON", False]
        keys += ["KD.TEACHER.INIT_STUDENT", False]
        keys += ["KD.TEACHER.WEIGHTS", teacher_weights, "SOLVER.ACCUMULATE", parts]
        keys += ["SOLVER.IMS_PER_BATCH", images, "KD.LOSSES", [{"name": "l1", "weight": 0.6}]]
        start(config_files["student"], tmp_path / str(parts), *keys)
        models.append(torch.load(tmp_path / str(parts) / "model_final.pth")["model"])
    off = max((x.float() - models[1][k].float()).abs().max() for k, x in models[0].items())
    assert off < 1e-5
