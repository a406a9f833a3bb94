"""tools/prediction_files.py: what is drawn and written."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from helpers import load_tool
from PIL import Image

from msad_kd.data.coco_format import load_checked

files = load_tool("prediction_files")


def test_a_class_has_one_colour_and_its_name():
    image = np.full((500, 500, 3), 128, dtype=np.uint8)
    masks = torch.zeros(3, 500, 500, dtype=torch.bool)
    corners = torch.tensor([[50.0, 50, 150, 150], [300, 50, 400, 150], [50, 300, 150, 400]])
    for mask, (x, y, right, bottom) in zip(masks, corners.int().tolist()):
        mask[y:bottom, x:right] = True
    found = Instances((500, 500), pred_boxes=Boxes(corners), pred_masks=masks)
    found.scores, found.pred_classes = torch.ones(3), torch.tensor([1, 1, 2])
    picture = files.draw(image, found, "class {}".format)
    one, same, other = (picture[y, x].tolist() for x, y in ((100, 100), (350, 100), (100, 350)))
    assert one == same != other and picture[450, 450].tolist() == [128] * 3


@pytest.mark.parametrize("corner", [(450, 440, 499, 470), (440, 470, 480, 499)])
def test_no_edge_cuts_a_name(corner):
    image = np.full((500, 500, 3), 128, dtype=np.uint8)

    def background(x, y, right, bottom):  # pixels of the black behind the name
        found = Instances((500, 500), pred_boxes=Boxes([[x, y, right, bottom]]))
        found.scores, found.pred_classes = torch.ones(1), torch.tensor([1])
        return (files.draw(image, found, "class {}".format).max(-1) < 50).sum()

    assert background(*corner) == pytest.approx(background(200, 200, 249, 230), rel=0.1)


def test_keypoints_in_the_json_are_a_data_set(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    found = Instances((40, 40), pred_boxes=Boxes([[2.0, 2, 30, 30]]), scores=torch.ones(1))
    found.pred_classes = torch.zeros(1, dtype=torch.long)
    found.pred_keypoints = torch.tensor([[[4.5, 5.5, 0.3], [20.5, 9.5, 0.01]]])
    file = files.CocoFile(str(tmp_path), ["bird"], lambda _: "bird")
    file.add("a.png", found)
    file.write(str(tmp_path / "found.json"))
    (entry,) = file.content["annotations"]
    assert entry["keypoint_scores"] == pytest.approx([0.3, 0.01])
    (image,) = load_checked(str(tmp_path / "found.json"), str(tmp_path), "found")
    assert image["annotations"][0]["keypoints"] == [4.5, 5.5, 2, 20.5, 9.5, 2]
