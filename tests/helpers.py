"""What several test files need, and is no fixture."""

import importlib
import logging
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import start_processes

import train_net
from msad_kd import KDTrainer, attach_teacher

ROOT = Path(__file__).resolve().parents[1]

# Scenes are 64 x 96 px: what the high-resolution models see; the low-resolution ones see 32 x 48.
SCENE_SIZE = (64, 96)
TRAIN_SCENES, TEST_SCENES = 6, 3
WARMUP = 4
NO_TEST = ("DATASETS.TEST", ())
REGISTERED = [(x, {*x.list()}) for x in (DatasetCatalog, MetadataCatalog)]  # by Detectron2

TINY_NET = {
    "WEIGHTS": "",
    "DEVICE": "cpu",
    "RESNETS": {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 16, "WIDTH_PER_GROUP": 8},
    "FPN": {"OUT_CHANNELS": 16},
    "ROI_BOX_HEAD": {"FC_DIM": 16},
    "ROI_MASK_HEAD": {"NUM_CONV": 1, "CONV_DIM": 8},
}


def tiny_model(*anchors):
    """The MODEL section of a tiny detector that can be trained from scratch."""
    return {
        **TINY_NET,
        "BACKBONE": {"FREEZE_AT": 0},
        "PIXEL_MEAN": [120.0, 120.0, 120.0],
        "PIXEL_STD": [64.0, 64.0, 64.0],
        "RESNETS": {**TINY_NET["RESNETS"], "NORM": "BN"},
        "ANCHOR_GENERATOR": {"SIZES": [[side] for side in anchors]},
        "RPN": {"POST_NMS_TOPK_TRAIN": 50, "POST_NMS_TOPK_TEST": 20, "BATCH_SIZE_PER_IMAGE": 32},
        "ROI_HEADS": {"NUM_CLASSES": 8, "BATCH_SIZE_PER_IMAGE": 16, "SCORE_THRESH_TEST": 0.0},
    }


def input_sizes(side):
    """The INPUT section for images whose shorter side is ``side``."""
    return {
        "FORMAT": "RGB",
        "MIN_SIZE_TRAIN": [side],
        "MAX_SIZE_TRAIN": 4 * side,
        "MIN_SIZE_TEST": side,
        "MAX_SIZE_TEST": 4 * side,
    }


def coco_format(data, prefix):
    """DATASETS.COCO_FORMAT for both splits of a data set: <prefix>_train and <prefix>_val."""
    return [
        {
            "name": f"{prefix}_{split}",
            "json": str(data / "annotations" / f"instances_{split}.json"),
            "images": str(data / split),
        }
        for split in ("train", "val")
    ]


def ground_truth(size, corners):
    """The ``Instances`` of an image: corners (N, 4) of boxes, with triangles as masks."""
    truth = Instances(size)
    truth.gt_boxes = Boxes(torch.tensor(corners, dtype=torch.float32))
    truth.gt_classes = torch.arange(len(corners))
    truth.gt_masks = PolygonMasks([[box[[0, 1, 2, 1, 2, 3]]] for box in corners.astype(float)])
    return truth


def build(cfg):
    """The same weights for the same architecture."""
    torch.manual_seed(0)
    return build_model(cfg)


def build_student(cfg):
    """The same, with its teacher."""
    model = build(cfg)
    attach_teacher(model, cfg)
    return model


def losses_of(model, inputs, iteration=WARMUP):
    torch.manual_seed(1)  # RoI heads sample proposals
    with EventStorage(iteration):
        return model.train()(inputs)


def train(cfg, resume=False, trainer=KDTrainer):
    """Train a config to its end, and return the trainer."""
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    trainer = trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def train_net_main(*arguments):
    """Call train_net.py's main with the arguments of a command line, in this process."""
    args = default_argument_parser().parse_args([*map(str, arguments)])
    return train_net.main(args)


def cut_off(run, folder):
    """Make a folder of a run that was cut off after two steps, and return it."""
    folder.mkdir(exist_ok=True)
    shutil.copy(f"{run}/model_0000001.pth", folder)
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    return str(folder)


def tensors_of(module):
    """A copy of all parameters and buffers, those which no state_dict holds included."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def differing(one, other):
    """The names of the tensors that are not bitwise equal in two dicts of tensors."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def same_instances(one, other):
    """Whether two ``Instances`` are exactly equal in every field."""

    def plain(field):
        if hasattr(field, "polygons"):
            return [[polygon.tolist() for polygon in polygons] for polygons in field.polygons]
        return getattr(field, "tensor", field).tolist()

    fields, others = ({k: plain(v) for k, v in x.get_fields().items()} for x in (one, other))
    return fields == others


def evaluate(pairs, evaluator):
    """Evaluate the predictions, (inputs, outputs) of each image."""
    evaluator.reset()
    for inputs, outputs in pairs:
        evaluator.process(inputs, outputs)
    return evaluator.evaluate()


def names_of(results):
    """The sorted names of the metrics in the results of an evaluation, as the log has them."""
    return sorted(f"{task}/{name}" for task, metrics in results.items() for name in metrics)


def same_predictions(found, expected):
    """Whether a model found something in every image, and the same as another bit for bit."""
    pairs = [(x["instances"], y["instances"]) for x, y in zip(found, expected, strict=True)]
    return all(len(one) and same_instances(one, other) for one, other in pairs)


class Forked(multiprocessing.get_context("fork").Process):
    """A process of its own that has imported what this one has, with the methods of Popen."""

    returncode = property(lambda self: self.exitcode)

    def poll(self):
        return self.exitcode

    def wait(self, timeout=None):
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired("it", timeout)
        return self.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)


def _as_a_program(call, outputs, cwd, environment):
    """Call a function in a process that has only imported what it shares with this one."""
    for number, (name, file) in enumerate(zip(("stdout", "stderr"), outputs), 1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        setattr(sys, name, open(number, "w", buffering=1, closefd=False))
    for name in [None, *logging.root.manager.loggerDict]:  # the logs of earlier tests
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    setup_logger.cache_clear()
    for catalog, names in REGISTERED:  # the data sets of earlier tests
        for name in {*catalog.list()} - names:
            catalog.remove(name)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    torch.multiprocessing.spawn = partial(start_processes, start_method="fork")  # as quickly
    os.environ.update(environment)
    os.chdir(cwd)
    call()


def _run_python(command, cwd):
    """Do what ``python SCRIPT ...`` and ``python -m MODULE ...`` do."""
    places = ("*.py", "tools/**/*.py", "tests/*.py")
    ours = {"projects", "tools"} | {path.stem for place in places for path in ROOT.glob(place)}
    for name in [x for x in sys.modules if x.split(".")[0] in ours]:
        del sys.modules[name]  # the script has to find them
    named = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    installed = [x for x in sys.path if not x.startswith(str(ROOT)) or "site-packages" in x]
    first, *arguments = command
    script = ROOT / first
    sys.path[:] = [str(cwd if first == "-m" else script.parent), *named, *installed]
    if first == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [str(script), *arguments]
        runpy.run_path(str(script), run_name="__main__")


def fork(call, outputs, cwd=ROOT, **environment):
    """Start a function as a process of its own, which writes to files for stdout and stderr.

    Importing Detectron2 takes seconds, which a fork saves.
    """
    process = Forked(target=_as_a_program, args=(call, outputs, cwd, environment))
    process.start()
    return process


def fork_python(command, outputs, cwd=ROOT, **environment):
    """Start Python with arguments, of which the first is a script of the repository or "-m"."""
    command = [*map(str, command)]
    return fork(lambda: _run_python(command, cwd), outputs, cwd, **environment)


def run_script(script, *arguments, code=0, **options):
    """Run one to its end, which has to have this exit code, if any; return it and what is said."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder, "stdout"), Path(folder, "stderr")
        process = fork_python([script, *arguments], outputs, **options)
        process.join(900)
        process.kill()
        returned = process.exitcode
        stdout, stderr = (file.read_text() for file in outputs)
    expected = returned is not None if code is None else returned == code
    assert expected, stdout[-2000:] + stderr[-4000:]
    return subprocess.CompletedProcess(script, returned, stdout, stderr)


def load_tool(name):
    """Import a module of tools/ or tools/analysis/."""
    return importlib.import_module(name)
