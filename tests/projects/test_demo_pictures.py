"""The demo's pictures: which scenes, masks that do not mix, labels that do not overlap."""

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pytest
from demo_rows import KEYS, row

from projects.Shapes import pictures


def test_scenes_are_chosen_by_their_number_of_objects():
    counts = [3, 9, 5, 9, 1, 7] + [0] * 44 + [99]
    assert pictures.choose_scenes(counts) == [1, 2, 3, 5]
    assert pictures.choose_scenes([2, 2], scenes=1) == [0]


def test_masks_do_not_cover_what_is_surer():
    masks = np.array([[[1, 1, 0, 0]], [[0, 1, 1, 0]], [[0, 1, 0, 0]]], bool)
    left, labels = pictures._uncovered(masks, [4, 2, 3])
    assert labels == [4, 2]
    assert np.array_equal(left, np.array([[[1, 1, 0, 0]], [[0, 0, 1, 0]]], bool))
    assert pictures._uncovered(np.zeros((0, 1, 4), bool), []) == ([], [])


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_labels_do_not_overlap(tmp_path, monkeypatch, spread):
    figures = []
    monkeypatch.setattr(pictures.plt, "close", figures.append)
    gmacs = [0.42, 0.36, 0.13, 0.48, 0.13, 0.13, 0.13]
    box = [44.5, 45.5, 34.4, 45.7, 33.9, 33.7, 34.1]
    rows = [row(key, spread * b, spread * b, g) for key, b, g in zip(KEYS, box, gmacs)]
    pictures.draw_ap_cost(tmp_path / "ap_cost.png", rows)
    assert cv2.imread(str(tmp_path / "ap_cost.png")) is not None
    renderer = figures[0].canvas.get_renderer()
    for axis in figures[0].axes:
        boxes = [super(type(t), t).get_window_extent(renderer) for t in axis.texts]
        assert len(boxes) == 7
        for index, one in enumerate(boxes):
            assert not any(one.overlaps(other) for other in boxes[index + 1 :])
    monkeypatch.undo()
    plt.close(figures[0])
