#!/usr/bin/env python
"""Find objects in images and videos, and draw them: names, scores and masks.

    python tools/predict.py --config-file my/lr.yaml --weights student.pth photos/ --output found
    python tools/predict.py --weights student.onnx "photos/**/*.jpg" clip.mp4 --output found --json

An input is a file, a folder, or a pattern. --json also writes the detections in COCO format:
predictions.json for images, and CLIP.json for each video. A student's config needs no teacher. An
input that cannot be read is named in a warning, and the others go on; the exit code is 1 if none
could be read.
"""

import argparse
import os
import sys
import time
from collections import defaultdict
from contextlib import contextmanager

from detectron2.data.detection_utils import convert_image_to_rgb, convert_PIL_to_numpy
from PIL import Image
from prediction_files import (
    CocoFile,
    VideoFile,
    draw,
    find_inputs,
    is_video,
    targets_of,
    write_picture,
)
from predictors import ConfigPredictor, OnnxPredictor
from tqdm import tqdm

from msad_kd import InputError, build_config
from msad_kd.config.imports import add_code_options
from msad_kd.data.images import REMEDY, ImageError, read_image
from msad_kd.utils.errors import in_one_sentence
from msad_kd.utils.signals import Stopped, on_signal, stop


class Run:
    """Finds objects in files and writes pictures; counts what was done, and its time."""

    def __init__(self, predictor, score: float, bar: tqdm):
        self.predictor, self.score, self.bar = predictor, score, bar
        self.done, self.detections = 0, 0
        self.seconds = defaultdict(float)  # of each kind of work

    @contextmanager
    def timing(self, work: str):
        """Add the time of a block to that of a kind of work."""
        start = time.perf_counter()
        yield
        self.seconds[work] += time.perf_counter() - start

    def warn(self, words: str) -> None:
        """Print a warning above the progress bar."""
        self.bar.write(f"warning: {words}", file=sys.stderr)

    def name(self, index: int) -> str:
        """Return the name of a class."""
        names = self.predictor.classes
        return names[index] if index < len(names) else f"class {index}"

    def find(self, image, file_name: str, found: CocoFile):
        """Add the detections in an image of the model's format to a file, and draw them."""
        with self.timing("model"):
            instances = self.predictor(image)
        instances = instances[instances.scores >= self.score]
        with self.timing("drawing"):
            rgb = convert_image_to_rgb(image, self.predictor.input_format)
            picture = draw(rgb, instances, self.name, self.predictor.keypoints)
        found.add(file_name, instances)
        self.done += 1
        self.detections += len(instances)
        return picture

    def image(self, path: str, file_name: str, target: str, found: CocoFile) -> None:
        """Do one image; a warning names it if it cannot be used."""
        self.bar.update()
        try:
            with self.timing("reading"):
                image = read_image(path, self.predictor.input_format)
        except ImageError as error:
            return self.warn(str(error).removesuffix(f"; {REMEDY}"))
        try:
            picture = self.find(image, file_name, found)
        except ImageError as error:
            return self.warn(f"image '{path}' cannot be used ({error})")
        with self.timing("writing"):
            write_picture(target, picture)

    def video(self, video: VideoFile, path: str, found: CocoFile) -> None:
        """Do all frames of a video; a warning names it if it has none."""
        frames, before = iter(video), self.done
        while True:
            with self.timing("reading"):
                frame = next(frames, None)
            if frame is None:
                break
            image = convert_PIL_to_numpy(Image.fromarray(frame), self.predictor.input_format)
            number = self.done - before
            picture = self.find(image, f"{os.path.basename(path)}#{number}", found)
            with self.timing("writing"):
                video.write(picture)
            self.bar.update()
        video.close()
        if self.done == before:
            self.warn(f"video '{path}' cannot be read, or has no frames")
        elif (done := self.done - before) < 0.95 * video.frames:  # a header may be a bit wrong
            self.warn(
                f"video '{path}' ends after {done} of the {video.frames} frames it should have"
            )

    def summary(self) -> str:
        """Return what was found and the throughput, in three lines."""
        each = {work: 1000 * seconds / self.done for work, seconds in self.seconds.items()}
        times = ", ".join(f"{work} {time:.1f}" for work, time in each.items())
        hint = "" if self.detections else "; a lower --score or SCORE_THRESH_TEST finds more"
        return (
            f"{self.detections} detections with a score of {self.score:g} or more{hint}\n"
            f"{self.done} images, {1000 / sum(each.values()):.1f} a second; of the model alone "
            f"{1000 / each['model']:.1f} a second\nms an image: {times}"
        )


def build_predictor(args):
    """Return the predictor that the command line names.

    Raises:
        InputError: if config or weights cannot be used.
    """
    if args.weights.endswith(".onnx"):
        if args.device not in (None, "cpu"):
            raise InputError(f"--device {args.device}: an .onnx file runs on the CPU")
        if args.config_file or args.opts:
            raise InputError("--config-file and --opts do not change an .onnx file; leave them out")
        return OnnxPredictor(args.weights)
    if not args.config_file:
        raise InputError("--config-file is missing; only an exported .onnx file needs none")
    device = ["MODEL.DEVICE", args.device] if args.device else []
    cfg = build_config(args.config_file, [*args.opts, *device])
    return ConfigPredictor(cfg, args.weights)


def predict(args) -> Run:
    """Do all inputs, and return the finished ``Run``.

    Raises:
        InputError: if the model cannot be used, or if no input matches or can be read.
    """
    files, unmatched = find_inputs(args.inputs)
    if not files:
        below = "; for those in folders of a folder, name 'FOLDER/**/*.jpg'"
        hint = below if any(map(os.path.isdir, unmatched)) else ""
        raise InputError(f"no image or video matches {', '.join(map(repr, unmatched))}{hint}")
    targets, folder = targets_of(files, args.output)
    predictor = build_predictor(args)
    os.makedirs(args.output, exist_ok=True)  # before the first image, if it cannot be made
    videos = {path: VideoFile(path, targets[path]) for path in files if is_video(path)}
    total = len(files) - len(videos) + sum(video.frames for video in videos.values())
    with tqdm(total=total, unit="image") as bar:
        run = Run(predictor, args.score, bar)
        for word in unmatched:
            run.warn(f"no image or video matches '{word}'")

        @contextmanager
        def detections(target):
            """Collect detections, and write them in the end, also of a run that is stopped."""
            found = CocoFile(folder, predictor.classes, run.name)
            try:
                yield found
            finally:
                if args.json and found.content["images"]:
                    found.write(target)

        with detections(os.path.join(args.output, "predictions.json")) as found:
            for path in files:
                if path in videos:
                    with detections(f"{targets[path]}.json") as frames:
                        run.video(videos[path], path, frames)
                else:
                    file_name = os.path.relpath(os.path.abspath(path), folder)
                    run.image(path, file_name, targets[path], found)
    if not run.done:
        raise InputError(f"none of the {len(files)} inputs could be read")
    return run


def main(arguments=None):
    """Run the command line; an expected error ends it with one sentence and the exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="images, videos, folders or patterns")
    add("--config-file", help="the model's config; not for an .onnx file")
    add("--weights", required=True, help="a checkpoint, or an exported .onnx file")
    add("--output", required=True, help="the folder to write to")
    add("--score", type=float, default=0.5, help="the lowest score that is kept (default: 0.5)")
    add("--json", action="store_true", help="write the detections in COCO format, too")
    add("--device", help="cpu, cuda, cuda:1, ... (default: that of the config)")
    options = "KEY VALUE pairs on top of the config file"
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help=options)
    add_code_options(parser)
    args = parser.parse_args(arguments)
    if not 0 <= args.score <= 1:
        parser.error(f"--score {args.score:g} should be from 0 to 1")
    try:
        with in_one_sentence(parser.prog), on_signal(stop):
            run = predict(args)
    except Stopped:
        done = f"; what was done is in '{args.output}'" * os.path.isdir(args.output)
        print(f"{parser.prog}: stopped{done}", file=sys.stderr)
        raise
    print(f"{run.summary()}\nWritten to {args.output}")


if __name__ == "__main__":
    main()
