"""Every kind of image that people have: its pixels at both resolutions, or one sentence."""

import logging
import os
import re
import signal
import struct
import zlib

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetMapper, detection_utils
from PIL import Image
from PIL.Image import fromarray

from msad_kd.data import images
from msad_kd.data.images import read_image
from msad_kd.data.mapper import CheckedDatasetMapper, TwoResolutionMapper
from msad_kd.utils.errors import InputError

SIZE = HEIGHT, WIDTH = 64, 96
# The left half of every picture is dark, the right half light.
DARK, LIGHT = 40, 200
GREY = np.where(np.arange(WIDTH) < WIDTH // 2, DARK, LIGHT) * np.ones((HEIGHT, 1), int)
GREY = GREY.astype(np.uint8)
DEEP = GREY.astype(np.uint16) * 256 + 99
COLOUR = fromarray(np.stack([GREY, GREY, GREY], axis=2))


def rotated():
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by 90 degrees: what is on the left belongs to the top
    return exif.tobytes()


def saved(image, **options):
    return lambda path: image.save(path, **options)


def with_alpha(mode):
    image = COLOUR.convert(mode)
    image.putalpha(0)
    return saved(image)


def big_endian(path):
    Image.frombytes("I;16B", (WIDTH, HEIGHT), DEEP.astype(">u2").tobytes()).save(path)


def frames(first, *others):
    return saved(first, save_all=True, append_images=others)


def opencv(array):
    return lambda path: cv2.imwrite(str(path), array)


BLACK = Image.new("RGB", (WIDTH, HEIGHT))
RATIONAL = fromarray(GREY / np.float32(255))
# Kind, file's suffix: how it is written; the values of the dark and of the light half.
GOOD = {
    "8-bit grey.png": (saved(fromarray(GREY)), (DARK, LIGHT)),
    "RGB.png": (saved(COLOUR), (DARK, LIGHT)),
    "RGB.webp": (saved(COLOUR, lossless=True), (DARK, LIGHT)),
    "RGB.bmp": (saved(COLOUR), (DARK, LIGHT)),
    "RGBA, all transparent.png": (with_alpha("RGBA"), (DARK, LIGHT)),
    "LA, all transparent.png": (with_alpha("LA"), (DARK, LIGHT)),
    "palette.png": (saved(COLOUR.convert("P", palette=Image.ADAPTIVE)), (DARK, LIGHT)),
    "palette, a transparent colour.png": (
        saved(COLOUR.convert("P", palette=Image.ADAPTIVE), transparency=0),
        (DARK, LIGHT),
    ),
    "1-bit.png": (saved(fromarray(GREY > 99)), (0, 255)),
    "CMYK.tiff": (saved(COLOUR.convert("CMYK")), (DARK, LIGHT)),
    "JPEG.jpg": (saved(COLOUR, quality=100), (DARK, LIGHT)),
    "CMYK.jpg": (saved(COLOUR.convert("CMYK"), quality=100), (DARK, LIGHT)),
    "progressive.jpg": (saved(COLOUR, progressive=True, quality=100), (DARK, LIGHT)),
    "EXIF.jpg": (saved(COLOUR, exif=rotated(), quality=100), (DARK, LIGHT)),
    "EXIF.tiff": (saved(COLOUR, exif=rotated()), (DARK, LIGHT)),
    "EXIF.png": (saved(COLOUR, exif=rotated()), (DARK, LIGHT)),
    "16-bit, EXIF.png": (saved(fromarray(DEEP), exif=rotated()), (DARK, LIGHT)),
    "16-bit.png": (saved(fromarray(DEEP)), (DARK, LIGHT)),
    "16-bit.tiff": (saved(fromarray(DEEP)), (DARK, LIGHT)),
    "16-bit, big-endian.tiff": (big_endian, (DARK, LIGHT)),
    "16-bit.pgm": (saved(fromarray(DEEP)), (DARK, LIGHT)),
    "16-bit, its whole range.png": (saved(fromarray((GREY > 99) * np.uint16(65535))), (0, 255)),
    "12 of 16 bits.png": (saved(fromarray(DEEP // 16)), (DARK // 16, LIGHT // 16)),
    "16-bit RGB.png": (opencv(np.stack([DEEP] * 3, axis=2)), (DARK, LIGHT)),
    "16-bit RGB.tiff": (opencv(np.stack([DEEP] * 3, axis=2)), (DARK, LIGHT)),
    "animated.gif": (frames(COLOUR, BLACK), (DARK, LIGHT)),
    "several pages.tiff": (frames(COLOUR, BLACK), (DARK, LIGHT)),
}


def truncated(path):
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bomb(path):
    """Write a small PNG file that says to hold 20,000 x 20,000 pixels."""
    COLOUR.save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 20_000, 20_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def wrong_checksum(path):
    COLOUR.save(path)
    content = bytearray(path.read_bytes())
    content[29] ^= 0xFF
    path.write_bytes(content)


def thin(width, height):
    return saved(Image.new("RGB", (width, height)))


BAD = {
    "float.tiff": (saved(RATIONAL), "pixels that are floating-point numbers.* 8 or 16 bits"),
    "32-bit.tiff": (saved(fromarray(DEEP.astype(np.int32))), "whole numbers of 32 bits.* 8 or 16"),
    "truncated.jpg": (truncated, r"cannot be read \(image file is truncated"),
    "truncated.png": (truncated, r"cannot be read \(image file is truncated"),
    "truncated.tiff": (truncated, "cannot be read"),
    "wrong checksum.png": (wrong_checksum, "cannot be read"),
    "empty.png": (lambda path: path.write_bytes(b""), r"cannot be read \(it is no image\)"),
    "text.png": (lambda path: path.write_text("<html>"), r"cannot be read \(it is no image\)"),
    "gone.png": (lambda path: None, r"cannot be read \(it does not exist\)"),
    "folder.png": (lambda path: path.mkdir(), "is not a regular file"),
    "pipe.png": (os.mkfifo, "is not a regular file"),
    "bomb.png": (bomb, "400000000 pixels.* exceeds limit"),
    "wide.png": (thin(4000, 3), "4000 x 3 px would become .* x 0 px by the sizes of INPUT"),
    "wider.png": (thin(20_000, 10), "20000 x 10 px would become .* x 0 px"),
    "high.png": (thin(3, 4000), "3 x 4000 px would become 0 x .* px"),
    "another size.png": (thin(50, 50), "has 50 x 50 px, but its entry says"),
}
ENTRIES = {"wide.png": (3, 4000), "wider.png": (10, 20_000), "high.png": (4000, 3)}


def entry_of(kind, path, turned=False):
    height, width = ENTRIES.get(kind, SIZE[::-1] if turned else SIZE)
    return {"file_name": str(path), "height": height, "width": width, "annotations": []}


@pytest.fixture
def mappers(config):
    """Those of a student and of a plain detector, in training, and the latter's in evaluation."""
    cfg = config("lr", "INPUT.RANDOM_FLIP", "none")
    student = TwoResolutionMapper(cfg, True, frame="lr")
    return [student, CheckedDatasetMapper(cfg, True), CheckedDatasetMapper(cfg, False)]


@pytest.fixture(autouse=True)
def time_limit(mappers):
    """A read that blocks fails after 20 s."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("a read blocks"))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", GOOD)
def test_the_pixels_of_what_can_be_read(kind, mappers, tmp_path):
    write, (dark, light) = GOOD[kind]
    path = tmp_path / f"image{os.path.splitext(kind)[1]}"
    write(path)
    turned = "EXIF" in kind
    found = [mapper(entry_of(kind, path, turned)) for mapper in mappers]
    for image in (found[0]["image_hr"], *(sample["image"] for sample in found)):
        along = image[:, :, image.shape[2] // 2] if turned else image[:, image.shape[1] // 2]
        for part, value in ((along[:, :4], dark), (along[:, -4:], light)):
            assert (part.int() - value).abs().max() <= (2 if path.suffix == ".jpg" else 0)
    if kind == "EXIF.tiff":  # Detectron2 turns it twice
        return
    if not Image.open(path).mode.startswith("I"):
        for format in ("BGR", "RGB", "L", "YUV-BT.601"):
            expected = detection_utils.read_image(str(path), format)
            assert np.array_equal(read_image(str(path), format), expected)


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_used_is_named_or_skipped_in_training(
    kind, mappers, config, tmp_path, caplog
):
    write, words = BAD[kind]
    paths = [tmp_path / f"{number}_{kind}" for number in (1, 2)]
    for path in paths:
        write(path)
    dropping = config("lr", "DATASETS.INVALID_ANNOTATIONS", "drop")
    # No evaluation leaves out an image.
    for mapper in (*mappers, CheckedDatasetMapper(dropping, False)):
        with pytest.raises(InputError, match=words) as error:
            mapper(entry_of(kind, paths[0]))
        assert type(error.value) is InputError  # known by its name in a worker's traceback
        assert str(error.value).startswith(f"image '{paths[0]}' ") and "\n" not in str(error.value)
    for mapper in (
        TwoResolutionMapper(dropping, True, frame="lr"),
        CheckedDatasetMapper(dropping, True),
    ):
        caplog.clear()
        assert [mapper(entry_of(kind, path)) for path in (*paths, *paths)] == [None] * 4
        messages = [r.message for r in caplog.records if r.name == "msad_kd.data.mapper"]
        assert len(messages) == 2 and "Skipped (2 in this process): image " in messages[1]
        assert re.search(words, messages[0])


def test_the_scaling_of_16_bits_is_said_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(images, "_logged", bytearray(1))
    for name in ("a.png", "b.png"):
        fromarray(DEEP).save(tmp_path / name)
        read_image(str(tmp_path / name), "RGB")
    (record,) = caplog.records
    assert "a.png' has 16 bits a pixel" in record.message and record.levelno == logging.WARNING


def test_labels_of_16_bits_keep_their_values(mappers, tmp_path):
    COLOUR.save(tmp_path / "image.png")
    fromarray((GREY > 99) * np.uint16(7)).save(tmp_path / "labels.png")
    labels = {"sem_seg_file_name": str(tmp_path / "labels.png")}
    found = mappers[0]({**entry_of("", tmp_path / "image.png"), **labels})
    assert found["sem_seg"].unique().tolist() == [0, 7]


def test_outside_of_a_call_detectron2_reads_as_before(mappers, tmp_path):
    stock = detection_utils.read_image
    COLOUR.save(tmp_path / "image.png")
    for mapper in mappers:
        mapper(entry_of("", tmp_path / "image.png"))
        assert isinstance(mapper, DatasetMapper) and detection_utils.read_image is stock
