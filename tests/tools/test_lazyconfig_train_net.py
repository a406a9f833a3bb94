"""LazyConfig students: the shipped one, and its script."""

import os
import subprocess
import sys

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import default_argument_parser
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from helpers import ROOT, load_tool

from msad_kd.config.build import build_config
from msad_kd.distill import FeatureDistiller, RoIDistiller
from msad_kd.losses.terms import LossTerm, read_losses
from msad_kd.utils.errors import InputError

CONFIG = ROOT / "configs" / "lazy" / "mask_rcnn_R_50_FPN_student_1x.py"
EXPONENTS = [1.0, 1.0, 0.5]
COCO = ROOT.parent / "shared" / "data" / "coco_100"

# A user's config on top of the shipped one: a tiny net on tiny data.
USERS = """
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone

from msad_kd import build_config
from msad_kd.distill import RoIDistiller

_cfg = LazyConfig.load({shipped!r})
dataloader, lr_multiplier, optimizer = _cfg.dataloader, _cfg.lr_multiplier, _cfg.optimizer
model, teacher, train = _cfg.model, _cfg.teacher, _cfg.train


def _tiny_backbone(file):
    return build_backbone(build_config(file, []))


teacher.config_file = {teacher!r}
teacher.cfg.opts[1] = {weights!r}
train.update(device="cpu", output_dir={output!r}, max_iter=3, eval_period=2)
train.checkpointer.period = 2
dataloader.train.update(total_batch_size=2, num_workers=0)
dataloader.train.dataset.names, dataloader.test.dataset.names = "tiny_train", "tiny_val"
dataloader.train.mapper.augmentations[0].update(short_edge_length=[32], max_size=128)
dataloader.test.mapper.augmentations[0].update(short_edge_length=32, max_size=128)
dataloader.train.mapper.image_format = model.input_format = "RGB"
dataloader.test.num_workers = 0
model.backbone = L(_tiny_backbone)(file={lr!r})
model.pixel_mean, model.pixel_std = [120.0] * 3, [64.0] * 3
model.proposal_generator.head.in_channels = 16
model.proposal_generator.anchor_generator.sizes = [[4], [8], [16], [32], [64]]
heads = model.roi_heads
heads.num_classes = 8
heads.box_head.update(input_shape=ShapeSpec(channels=16, height=7, width=7), fc_dims=[16, 16])
heads.box_predictor.input_shape = ShapeSpec(channels=16)
heads.mask_head.update(
    input_shape=ShapeSpec(channels=16, height=14, width=14), conv_dims=[8, 8]
)
for name, level in model.distiller.student.items():
    model.distiller.student[name] = ShapeSpec(channels=16, stride=level.stride)
model.roi_distiller = L(RoIDistiller)(terms=[dict(name="roi_class", weight=1.0)])
"""


def run(*arguments):
    parsed = default_argument_parser().parse_args(["--config-file", *map(str, arguments)])
    return load_tool("tools.lazyconfig_train_net").main(parsed)


def test_a_tiny_student_is_trained_resumed_and_evaluated(
    config, config_files, teacher_weights, data, tmp_path
):
    config("lr")  # registers the data
    files = {"teacher": str(config_files["teacher"]), "lr": str(config_files["lr"])}
    output = tmp_path / "out"
    names = {"shipped": str(CONFIG), "weights": str(teacher_weights), "output": str(output)}
    (tmp_path / "mine.py").write_text(USERS.format(**files, **names))
    model = run(tmp_path / "mine.py")
    metrics = (output / "metrics.json").read_text()
    assert "loss_kd_l1" in metrics and "loss_kd_roi_class" in metrics and "segm/AP" in metrics
    log = (output / "log.txt").read_text()
    assert log.index("model_0000001.pth") < log.index("Start inference")
    assert model.state_dict().keys() == build_model(config("lr")).state_dict().keys()
    run(tmp_path / "mine.py", "--resume", "train.max_iter=4")
    assert "Starting training from iteration 3" in (output / "log.txt").read_text()
    with pytest.raises(InputError, match="train.init_checkpoint is empty; name the weights"):
        run(tmp_path / "mine.py", "--eval-only", "train.init_checkpoint=")
    last = f"train.init_checkpoint={output / 'model_final.pth'}"
    assert {"bbox", "segm"} <= run(tmp_path / "mine.py", "--eval-only", last).keys()


def test_without_a_gpu_the_device_is_the_cpu(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    read = load_tool("lazyconfig_train_net").read_config
    cfg = read(str(CONFIG), ["train.max_iter=5", "train.seed=1", "train.amp.enabled=True"])
    assert (cfg.train.device, cfg.train.seed, cfg.train.amp.enabled) == ("cpu", 1, True)
    assert caplog.messages == ["No GPU is available: train.device is cpu"]


@pytest.mark.parametrize(
    ("file", "overrides", "words"),
    [
        ("configs/Shapes/lr.yaml", [], "no Python config .*; train a YAML config by train_net.py"),
        ("", [], "'' does not exist; name one by --config-file"),
        (str(CONFIG), ["train.amp.enabld=True"], "'train.amp.enabld'; did you mean train.amp.ena"),
        ("nowhere.py", [], "'nowhere.py' does not exist"),
        (str(CONFIG), ["train.max_itr=5"], "'train.max_itr'; did you mean train.max_iter"),
        (str(CONFIG), [f"train.output_dir={CONFIG}"], "student_1x.py' is no folder"),
    ],
)
def test_configs_that_cannot_be_trained(file, overrides, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=words):
        load_tool("lazyconfig_train_net").read_config(file, overrides)


def test_the_shipped_config_is_the_yaml_student(monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = LazyConfig.load(str(CONFIG))
    file = "configs/COCO/mask_rcnn_R_50_FPN_student_1x.yaml"
    yaml = build_config(file, ["SOLVER.REFERENCE_WORLD_SIZE", 0])
    with torch.device("meta"):
        lazy, expected = instantiate(cfg.model), META_ARCH_REGISTRY.get("DistilledRCNN")(yaml)
        teacher = instantiate(cfg.teacher)
    shapes = [{k: v.shape for k, v in x.state_dict().items()} for x in (lazy, expected)]
    assert shapes[0] == shapes[1]
    lazy.set_teacher(teacher.build_on_meta())
    expected.set_teacher(teacher.build_on_meta())
    assert lazy.distiller.pairs == expected.distiller.pairs
    assert lazy.distiller.terms == expected.distiller.terms
    resize = cfg.dataloader.train.mapper.augmentations[0]
    assert tuple(resize.short_edge_length) == yaml.INPUT.MIN_SIZE_TRAIN
    assert cfg.optimizer.lr == yaml.SOLVER.BASE_LR and cfg.train.max_iter == 90000


@pytest.mark.parametrize(
    "term",
    [
        {"name": "ssim", "weight": 2.0, "levels": ["p2"], "exponents": EXPONENTS},
        L(LossTerm)(name="ssim", weight=2.0, levels=["p2"], arguments={"exponents": EXPONENTS}),
    ],
)
def test_losses_in_a_lazy_call(term):
    student = {"p2": ShapeSpec(channels=3, stride=8)}
    distiller = instantiate(L(FeatureDistiller)(terms=[term], student=student))
    distiller.connect({"p3": ShapeSpec(channels=3, stride=8)})
    (found,) = distiller.terms
    assert isinstance(found, LossTerm) and found.arguments == {"exponents": EXPONENTS}
    one, other = torch.rand(2, 1, 3, 16, 16)
    assert distiller({"p2": one}, {"p3": other}, 0)["loss_kd_ssim"] > 0
    assert instantiate(L(RoIDistiller)(terms=[])).terms == []
    with pytest.raises(InputError, match="there is no loss 'l3'"):
        instantiate(L(RoIDistiller)(terms=[{"name": "l3", "weight": 1.0}]))
    assert read_losses([found]) == [found]


@pytest.mark.long
@pytest.mark.skipif(not COCO.exists(), reason=f"{COCO}, images of COCO, is not there")
def test_the_shipped_config_trains_on_coco(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "coco").symlink_to(COCO)
    teacher = build_model(build_config("configs/COCO/mask_rcnn_R_50_FPN_teacher_1x.yaml", []))
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    mapper = "mapper.augmentations.0.short_edge_length"
    small = [
        f"teacher.cfg.opts.1={tmp_path / 'teacher.pth'}",
        f"train.output_dir={tmp_path / 'out'}",
    ]
    small += ["train.max_iter=2", "train.device=cpu", "dataloader.train.num_workers=0"]
    small += [f"dataloader.train.{mapper}=[64]", f"dataloader.test.{mapper}=64"]
    # Activations of frozen statistics that belong to no weights are huge.
    small += ["dataloader.train.total_batch_size=2", "optimizer.lr=1e-6"]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path)}
    command = ["tools/lazyconfig_train_net.py", "--config-file", CONFIG, *small]
    subprocess.run([sys.executable, *map(str, command)], env=environment, check=True)
    assert (tmp_path / "out" / "model_final.pth").is_file()
    assert "loss_kd_l1" in (tmp_path / "out" / "metrics.json").read_text()
