#!/usr/bin/env python
"""Export a detector for stock Detectron2, as TorchScript or as ONNX.

    python tools/export_model.py --config-file my/student.yaml \
        --weights output/mine/student/model_final.pth --output exported --format onnx

TorchScript and ONNX are compared with PyTorch on images at three sizes: parity.json and a table say
how much they differ and how long they take. The exit code is 1 if they differ too much.
docs/export.md says what the files hold.
"""

import argparse
import json
import os
import sys
from contextlib import suppress

import torch

from msad_kd import InputError, KDTrainer, build_config
from msad_kd.checkpoint.checkpoint import TRAINING_PREFIX, save_model
from msad_kd.checkpoint.files import replacing, write_json
from msad_kd.config.imports import add_code_options
from msad_kd.data.classes import model_classes, with_classes_of
from msad_kd.export.metadata import describe_model
from msad_kd.export.onnx import OnnxDetector, export_onnx, import_onnx
from msad_kd.export.parity import at_three_sizes, compare, read_images, table
from msad_kd.export.stock import lazy_config, stock_config
from msad_kd.export.tracing import ExportableDetector, export_torchscript
from msad_kd.modeling.classes import is_a
from msad_kd.modeling.fcos import FCOS
from msad_kd.modeling.multi_resolution import MultiResolutionMixin
from msad_kd.utils.arguments import positive
from msad_kd.utils.errors import in_one_sentence
from msad_kd.utils.signals import Stopped, on_signal, stop

FORMATS = ("detectron2", "torchscript", "onnx")
FILES = {"torchscript": "model.ts", "onnx": "model.onnx"}


def remove_earlier(folder, *names):
    """Remove the files of an earlier export, so that nobody takes them for those of this one."""
    for name in names:
        with suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))


def as_arrays(model):
    """Return a detector of tensors as one of arrays."""

    def detect(image):
        with torch.no_grad():
            return [output.numpy() for output in model(torch.as_tensor(image).float())]

    return detect


def export_detectron2(cfg, model, folder):
    """Write model.pth, and the config with which stock Detectron2 builds the model."""
    weights = os.path.join(folder, "model.pth")
    fcos = is_a(cfg, FCOS)
    text = lazy_config(cfg, model, weights) if fcos else stock_config(cfg, weights).dump()
    names = model_classes(with_classes_of(cfg, model))[0]
    remove_earlier(folder, "config.yaml", "config.py", "model.pth", "metadata.json")
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(TRAINING_PREFIX)}
    save_model(state, weights, names)
    with replacing(os.path.join(folder, "config.py" if fcos else "config.yaml")) as part:
        part.write_text(text)
    return describe_model(cfg, model, "detectron2")


def export_traced(cfg, model, args):
    """Write the traced model, compare it, and return its metadata and the parity report."""
    sizes = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    resize = args.resize and sizes[0] > 0  # 0: images keep their size
    detector = ExportableDetector(model, sizes if resize else None).eval()
    metadata = describe_model(cfg, model, args.format, resize=resize)
    images = read_images(cfg, args.images, args.count)
    pixels = at_three_sizes(images[0], metadata)[0]
    remove_earlier(args.output, FILES[args.format], "parity.json", "metadata.json")
    path = os.path.join(args.output, f"unchecked_{FILES[args.format]}")
    export = {"onnx": export_onnx, "torchscript": export_torchscript}[args.format]
    export(detector, torch.as_tensor(pixels).float(), path, metadata)
    loaded = OnnxDetector(path, 1) if args.format == "onnx" else as_arrays(torch.jit.load(path))
    return metadata, compare(as_arrays(detector), loaded, images, metadata, args.runs)


def export_model(args):
    """Export as the arguments say; return the parity report, None for stock Detectron2.

    Raises:
        InputError: if the model cannot be exported, or a file cannot be read.
    """
    check_folder(args.output, args.format)
    if args.format == "onnx":
        import_onnx()  # before anything is loaded
    if args.format not in FILES and args.resize:
        raise InputError("--resize is for onnx and torchscript; Detectron2's predictor resizes")
    torch.set_num_threads(1)
    # Models are traced on the CPU, which has no AMP.
    on_cpu = ["MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", False] if args.format in FILES else []
    cfg = build_config(args.config_file, [*args.opts, *on_cpu])
    if is_a(cfg, MultiResolutionMixin):
        raise InputError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, a teacher that reads two "
            "images; export its student, or a model that started from its weights"
        )
    model = KDTrainer.load_model(cfg, args.weights, f"the config '{args.config_file}'")
    os.makedirs(args.output, exist_ok=True)
    if args.format == "detectron2":
        metadata, report = export_detectron2(cfg, model, args.output), None
    else:
        metadata, report = export_traced(cfg, model, args)
        write_json(os.path.join(args.output, "parity.json"), report)
        print(table(report))
    write_json(os.path.join(args.output, "metadata.json"), metadata)
    if report:
        take_if_equal(report, args.output, FILES[args.format])
    return report


def check_folder(folder, format):
    """Check that a folder has no model in another format: metadata.json is of one."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise InputError(f"--output: '{folder}' is no folder")
    file = os.path.join(folder, "metadata.json")
    found = format
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # it is no such file
        with open(file) as opened:
            found = json.load(opened)["format"]
    if found != format:
        words = f"is of a model in the format {found}; name another folder for {format}"
        raise InputError(f"--output: '{file}' {words}")


def take_if_equal(report, folder, name):
    """Give a traced model its own name if it passed; otherwise say how much it differs."""
    path, unchecked = os.path.join(folder, name), os.path.join(folder, f"unchecked_{name}")
    if report["passed"]:
        os.replace(unchecked, path)
        return
    words = ", ".join(f"{k} {v:.3g} ({report['limits'][k]})" for k, v in report["largest"].items())
    raise InputError(
        f"the exported model differs from PyTorch's; largest (limit): {words}; it is kept as "
        f"'{unchecked}'"
    )


def main(arguments=None):
    """Run the command line; an expected error ends it with one sentence and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--config-file", required=True, help="the model's config")
    add("--weights", required=True, help="its checkpoint")
    add("--output", required=True, help="the folder to write to")
    add("--format", choices=FORMATS, default="onnx", help="what to write (default: onnx)")
    add("--resize", action="store_true", help="let the traced model resize images itself")
    add("--images", help="folder of images to compare on; default: DATASETS.TEST")
    add("--count", type=positive, default=4, help="how many of them (default: 4)")
    add("--runs", type=positive, default=5, help="runs of which a latency is the median")
    add_code_options(parser)
    add("opts", nargs="*", help="KEY VALUE pairs on top of the config")
    args = parser.parse_args(arguments)
    try:
        with in_one_sentence(parser.prog), on_signal(stop):
            export_model(args)
    except Stopped:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        raise
    print(f"Written to {args.output}")


if __name__ == "__main__":
    main()
