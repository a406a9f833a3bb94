"""The comparison of two detectors: what counts as a difference."""

import numpy as np
import pytest

from msad_kd import InputError
from msad_kd.export.parity import at_three_sizes, compare, differences, table

BOXES = [[0, 0, 10, 10], [20, 0, 30, 10], [0, 20, 10, 30]]
METADATA = {
    "min_size": 40,
    "max_size": 60,
    "resizes": False,
    "score_threshold": 0.05,
    "detections_per_image": 100,
    "format": "onnx",
}


def detections(scores=(0.9, 0.5, 0.5), classes=(1, 2, 2), boxes=BOXES, mask=0.5):
    boxes = np.array(boxes[: len(scores)], np.float32).reshape(-1, 4)
    masks = np.full((len(scores), 28, 28), mask, np.float32)
    return [boxes, np.array(scores, np.float32), np.array(classes[: len(scores)]), masks]


def reordered(order, outputs):
    return [output[list(order)] for output in outputs]


MOVED = [[0, 0, 10, 10], [20, 0, 30.5, 10], [0, 20, 10, 30]]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (detections(), (0, 0, 0)),
        (reordered((0, 2, 1), detections()), (0, 0, 0)),  # equal scores have no order
        (detections(boxes=MOVED), (0.5, 0, 0)),
        (detections((0.9, 0.5, 0.4)), (0, 0.1, 0)),
        (detections(mask=0.75), (0, 0, 0.25)),
        (detections(mask=np.nan), (0, 0, np.inf)),
        (detections((0.9, 0.5)), (0, 0.5 - 0.051, 0)),  # one is missing
        (detections((0.9, 0.5, 0.5), (0, 2, 2)), (0, 0.9 - 0.051, 0)),  # of another class
        (detections(()), (0, 0.9 - 0.051, 0)),
    ],
)
def test_differences(found, expected):
    for pair in ((detections(), found), (found, detections())):
        largest = differences(*pair, 0.05, most=100)
        assert [*largest] == ["boxes", "scores", "masks"]
        assert [*largest.values()] == pytest.approx(expected, abs=1e-6)


def test_what_is_at_the_cut_may_be_in_one_only():
    at_threshold = detections((0.9, 0.5, 0.0502))
    assert max(differences(at_threshold, detections((0.9, 0.5)), 0.05, 100).values()) == 0
    # Of three detections with the same score, two are kept.
    one, other = detections((0.9, 0.5)), reordered((0, 2), detections())
    assert max(differences(one, other, 0.05, 2).values()) == 0
    for most in (100, -1):
        assert differences(one, other, 0.05, most)["boxes"] == 20


def test_a_report():
    images = [np.zeros((80, 100, 3), np.uint8)]

    def shifted(image):
        return detections(boxes=MOVED if image.shape[1] > image.shape[2] else BOXES)

    report = compare(lambda image: detections(), shifted, images, METADATA, runs=1)
    assert [row["size"] for row in report["sizes"]] == [[40, 50], [40, 40], [51, 31]]
    assert [row["boxes"] for row in report["sizes"]] == [0, 0, 0.5]  # the portrait alone
    assert report["largest"] == {"boxes": 0.5, "scores": 0, "masks": 0}
    assert not report["passed"] and report["detections"] == 9
    assert [line.split()[1] for line in table(report).splitlines()[2:]] == ["40", "40", "51"]


@pytest.mark.parametrize("resizes", [False, True])
@pytest.mark.parametrize("shape", [(40, 40, 3), (90, 90, 3), (60, 60, 3), (40, 90, 3)])
def test_the_three_sizes_differ(shape, resizes):
    metadata = {**METADATA, "resizes": resizes}
    shapes = {image.shape for image in at_three_sizes(np.zeros(shape, np.uint8), metadata)}
    assert len(shapes) == 3


def test_nothing_to_compare():
    with pytest.raises(InputError, match="nothing scores above 0.05 .*SCORE_THRESH_TEST 0.001"):
        compare(*2 * [lambda image: detections(())], [np.zeros((9, 9, 3))], METADATA, runs=1)
