#!/usr/bin/env python
"""Say what a distillation step costs, part by part, next to plain steps of low and high resolution.

    python tools/benchmark.py --quick
    python tools/benchmark.py --config-file configs/COCO/mask_rcnn_R_50_FPN_student_1x.yaml

All sides run in one process, in turn, on the same images of DATASETS.TRAIN. A ratio is taken within
a round, so that other load on the machine hits both of its sides. Weights are random and stay as
they are (the learning rate is 0), so no checkpoint is needed. A step has one batch with labels: it
leaves out DATASETS.UNLABELED and SOLVER.ACCUMULATE.

"LR" and "HR" are the student's stock detector with Detectron2's own mapper, "plain teacher" is the
student with a teacher that runs as it was loaded, in fp32. It writes benchmark.md, .json and .png.
"""

import argparse
import os
import platform
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for projects.Shapes

import torch
from benchmark_report import draw, markdown
from benchmark_sides import Clock, PlainTeacher, Side, measure_product
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.modeling import META_ARCH_REGISTRY, build_model

from msad_kd import DistilledMixin, InputError, build_config
from msad_kd.checkpoint.files import write_json
from msad_kd.config.imports import add_code_options
from msad_kd.data.classes import align_classes
from msad_kd.data.dict_checks import explain_missing_data
from msad_kd.distill.teacher import Teacher
from msad_kd.evaluation.cost import device_name, fix_detections, time_models
from msad_kd.export.metadata import describe_model
from msad_kd.export.onnx import OnnxDetector, export_onnx
from msad_kd.export.tracing import ExportableDetector
from msad_kd.modeling.classes import anchor_sizes, number_of_classes
from msad_kd.utils.arguments import positive
from msad_kd.utils.errors import in_one_sentence
from msad_kd.utils.replaced import replaced
from projects.Shapes.generate import generate

STUDENT = "configs/COCO/mask_rcnn_R_50_FPN_student_1x.yaml"
QUICK = {"config_file": "configs/Shapes/student_multi_size.yaml", "image_sizes": (128, 64)}


def sized(cfg, side, scale, *opts):
    """Return a config whose images have shorter sides of ``side`` pixels, for random weights."""
    cfg = cfg.clone()
    cfg.defrost()
    inputs = {"MIN_SIZE_TRAIN": (side,), "MIN_SIZE_TEST": side}
    inputs |= dict.fromkeys(("MAX_SIZE_TRAIN", "MAX_SIZE_TEST"), round(side * 5 / 3))
    cfg.INPUT.update(inputs)
    cfg.INPUT.JITTER.SIZE, cfg.INPUT.CROP.ENABLED = 0, False
    cfg.KD.SCALE, cfg.KD.TEACHER.WEIGHTS, cfg.MODEL.TIMM.PRETRAINED = scale, "random", False
    cfg.merge_from_list(list(opts))
    return cfg


def build_sides(args):
    """Return the sides by name.

    Raises:
        InputError: if a config is no student's, or the images have classes that its model lacks.
    """
    sides = {}
    for name, file in (("student", args.config_file), ("vs", args.vs)):
        if not file:
            continue
        cfg = build_config(file, [*args.opts, "MODEL.DEVICE", args.device])
        kind = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
        if not issubclass(kind, DistilledMixin):
            raise InputError(f"'{file}' is a {kind.__name__}'s config; name a student's")
        low = max(cfg.INPUT.MIN_SIZE_TRAIN)
        high, low = args.image_sizes or (cfg.KD.SCALE * low, low)
        scale = high // low
        if scale < 1 or high % low:
            raise InputError(f"--image-sizes: {high} is not a multiple of {low}")
        if name == "student":
            align_classes(cfg, cfg.DATASETS.TRAIN)
            stock = next(x.__name__ for x in kind.__mro__ if not issubclass(x, DistilledMixin))
            plain = sized(cfg, low, scale, "MODEL.META_ARCHITECTURE", stock)
            sides = {"LR": Side(plain)}
            if not args.no_hr:
                anchors = "MODEL.ANCHOR_GENERATOR.SIZES", anchor_sizes(cfg, scale)
                sides["HR"] = Side(sized(plain, high, 1, *anchors))
            sides["plain teacher"] = Side(sized(cfg, low, scale), PlainTeacher)
            classes = number_of_classes(cfg)
        elif number_of_classes(cfg) != classes:
            words = f"has {number_of_classes(cfg)} classes, but the images have {classes}"
            raise InputError(f"--vs: '{file}' {words}; name a student of the same data set")
        sides[name] = Side(sized(cfg, low, scale), Teacher)
    return sides


def left_out(cfg):
    """Return the keys that a student's training reads and a measured step does not."""
    keys = {
        "DATASETS.UNLABELED": cfg.DATASETS.UNLABELED,
        "SOLVER.ACCUMULATE": cfg.SOLVER.ACCUMULATE > 1,
    }
    return [key for key, value in keys.items() if value]


def exported(cfg, model, image, threads):
    """Return a function that runs a detector as ONNX on mapped images, one at a time."""
    metadata = describe_model(cfg, model, "onnx")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(ExportableDetector(model), image.float(), path, metadata)
        detector = OnnxDetector(path, threads)
    return lambda batch: [detector(sample["image"].numpy()) for sample in batch]


def time_inference(sides, dicts, args):
    """Return the latencies of LR and HR by batch size and name; see ``time_models``.

    With ``--onnx``, LR runs in onnxruntime, too.
    """
    sides = {name: sides[name] for name in ("LR", "HR") if name in sides}
    models = {n: build_model(fix_detections(s.cfg, 10)).eval() for n, s in sides.items()}
    inputs = {}
    for name, side in sides.items():
        mapper = DatasetMapper(side.cfg, False)
        inputs[name] = [mapper(entry) for entry in dicts[:5]]
    if args.onnx:
        image = inputs["LR"][0]["image"]
        models["LR, onnxruntime"] = exported(sides["LR"].cfg, models["LR"], image, args.threads)
        inputs["LR, onnxruntime"] = inputs["LR"]
    latency = {}
    for count in args.inference or [1] * args.onnx:
        repeated = {n: lambda x, m=m, count=count: m(x * count) for n, m in models.items()}
        latency[str(count)] = time_models(repeated, inputs)
    return latency


def measure(args):
    """Return what is written as JSON; see ``main`` for the arguments."""
    torch.set_num_threads(args.threads)
    sides = build_sides(args)
    cfg, names = sides["LR"].cfg, list(sides)
    with explain_missing_data(cfg.DATASETS.TRAIN):
        dicts = get_detection_dataset_dicts(cfg.DATASETS.TRAIN)
    clock = Clock(cfg.MODEL.DEVICE.startswith("cuda"), args.cpu_time)
    speeds, work = [], []  # GFLOP/s of a plain product, and GFLOP of the teacher
    for turn in range(-2, args.rounds):  # the first is a warm-up
        batch = [dicts[(turn * args.batch + i) % len(dicts)] for i in range(args.batch)]
        first = turn % len(names)
        for side in (sides[name] for name in names[first:] + names[:first]):
            # Memory has a turn of its own, as giving it back to the system takes time.
            step = side.measure_memory if turn == -1 else side.step
            step(batch, turn + 2, clock)
        speeds.append(measure_product(cfg.MODEL.DEVICE, clock))
        if turn >= 0:
            work.append(sides["plain teacher"].count_teacher(batch))
    threads, versions = f"{args.threads} thread(s)", f"torch {torch.__version__}"
    machine = [platform.machine(), f"{os.cpu_count()} cores", threads, device_name(cfg), versions]
    return {
        "config": args.config_file,
        "vs": args.vs,
        "left_out": left_out(sides["student"].cfg),
        "options": args.opts,
        "machine": ", ".join(machine),
        "image_sizes": [max(side.cfg.INPUT.MIN_SIZE_TRAIN) for side in sides.values()],
        "batch": args.batch,
        "clock": "CPU time" if args.cpu_time else "wall time",
        "rounds": {name: side.rounds[1:] for name, side in sides.items()},
        "fp32_on_cpu": cfg.MODEL.DEVICE == "cpu" and not sides["student"].teacher.amp,
        "product_gflops": speeds[2:],
        "teacher_gflop": work,
        "memory": {name: side.memory for name, side in sides.items()},
        "latency_ms": time_inference(sides, dicts, args),
    }


def main(arguments=None):
    """Run the command line; an expected error ends it with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--config-file", help=f"a student's config (default: {STUDENT})")
    add("--vs", help="the config of another student to measure beside it")
    add(
        "--image-sizes",
        type=positive,
        nargs=2,
        metavar=("HR", "LR"),
        help="shorter sides in pixels",
    )
    add("--batch", type=positive, default=1, help="images a step (default: 1)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=positive, default=1, help="CPU threads of torch (default: 1)")
    add("--rounds", type=positive, default=5, help="measured steps per model (default: 5)")
    add("--cpu-time", action="store_true", help="measure CPU time, for a machine with other load")
    add("--no-hr", action="store_true", help="leave out the HR step, which takes longest")
    add(
        "--inference", type=positive, nargs="*", default=[], help="batch sizes to time inference at"
    )
    add("--onnx", action="store_true", help="time LR in onnxruntime, too; on a CPU")
    add("--quick", action="store_true", help="a tiny model of its own on generated images")
    add_code_options(parser)
    add("--output", type=Path, default=Path("output/benchmark"), help="folder to write to")
    add("opts", nargs="*", help="KEY VALUE pairs on top of the configs")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if args.quick:
            if args.config_file or args.image_sizes:
                parser.error("--quick has a config and sizes of its own; leave out the others")
            vars(args).update(QUICK)
            generate(Path(folder) / "shapes", train=4, val=1, classes=5, progress=False)
            environment = {**os.environ, "DETECTRON2_DATASETS": folder}
            stack.enter_context(replaced(os, environ=environment))
        args.config_file = args.config_file or STUDENT
        with in_one_sentence(parser.prog):
            args.output.mkdir(parents=True, exist_ok=True)
            result = measure(args)
    write_json(args.output / "benchmark.json", result)
    draw(result, args.output / "benchmark.png")
    (args.output / "benchmark.md").write_text((text := markdown(result)) + "\n")
    print(text)


if __name__ == "__main__":
    main()
