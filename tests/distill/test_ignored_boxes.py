"""Boxes that the detection losses ignore: labels of the class ``IGNORED``."""

import pytest
import torch
from detectors import DENSE
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from helpers import build_student
from torch.nn import functional as F

from msad_kd.data.unlabeled import IGNORED
from msad_kd.distill.unlabeled import _IgnoringMatcher, ignoring

# They are apart, so each anchor is about one of them at the most.
A, B = [2.0, 2.0, 14.0, 14.0], [26.0, 10.0, 42.0, 30.0]


def truth(classes, size=(32, 48)):
    labels = Instances(size, gt_boxes=Boxes(torch.tensor([A, B])))
    labels.gt_classes = torch.tensor(classes)
    return labels


def test_a_matcher_by_hand():
    #                        both  A     B     B     low: best of A, or of B
    overlaps = torch.tensor([[0.8, 0.7, 0.2, 0.35, 0.0], [0.75, 0.1, 0.9, 0.4, 0.0]])
    matcher = Matcher([0.3, 0.5], [0, -1, 1], allow_low_quality_matches=True)
    _, labels = matcher(overlaps)
    assert labels.tolist() == [1, 1, 1, -1, 0]
    for flags, expected in (([0, 1], [1, 1, -1, -1, 0]), ([1, 0], [-1, -1, 1, -1, 0])):
        mine = _IgnoringMatcher(matcher, [torch.tensor(flags).bool()])
        assert mine(overlaps)[1].tolist() == expected
    # The last anchor is positive only as the best one of B, and nearer to A.
    overlaps = torch.tensor([[0.9, 0.25], [0.1, 0.2]])
    assert matcher(overlaps)[1].tolist() == [1, 1]
    mine = _IgnoringMatcher(matcher, [torch.tensor([False, True])])
    assert mine(overlaps)[1].tolist() == [1, 0]


@pytest.mark.parametrize("detector", DENSE, indirect=True)
def test_ignored_boxes_of_dense_detectors(detector, student_config, batch):
    student = build_student(student_config()).train()
    images = student.preprocess_image(batch(student_config(), "lr", count=1))
    features = student.backbone(images.tensor)
    features = [features[name] for name in student.head_in_features]
    predictions = [[x.detach().requires_grad_() for x in maps] for maps in student.head(features)]
    anchors = student.anchor_generator(features)
    whole, _ = student.label_anchors(anchors, [truth([3, 5])])
    inputs = [{"instances": truth([3, IGNORED])}]
    with ignoring(student, inputs):
        (labels,), _ = student.label_anchors(anchors, [inputs[0]["instances"]])
        with EventStorage():
            args = images, features, predictions, [inputs[0]["instances"]]
            losses = student.forward_training(*args)
    ignored = whole[0] == 5
    assert ignored.sum() > 2 and (whole[0] == 3).sum() > 0
    assert torch.equal(labels, whole[0].masked_fill(ignored, IGNORED))
    sum(losses.values()).backward()
    for maps, width in zip(predictions, (8, 4, 1)):
        grads = student._transpose_dense_predictions([[x.grad for x in maps]], [width])[0]
        grads = torch.cat(grads, dim=1)[0]
        assert grads[ignored].eq(0).all() and grads[labels == 3].ne(0).any()
    logits = torch.cat(student._transpose_dense_predictions([predictions[0]], [8])[0], dim=1)[0]
    target = F.one_hot(labels.clamp(min=0), 9)[:, :-1].float()
    p = logits.sigmoid()
    focal = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    focal = focal * torch.where(target > 0, 0.25 * (1 - p) ** 2, 0.75 * p**2)
    found = losses["loss_fcos_cls" if detector == "fcos" else "loss_cls"]
    torch.testing.assert_close(found, focal[labels >= 0].sum() / student.loss_normalizer)


def test_ignored_boxes_of_the_rpn_and_the_roi_heads(student_config, batch):
    student = build_student(student_config()).train()
    rpn, heads = student.proposal_generator, student.roi_heads
    images = student.preprocess_image(batch(student_config(), "lr", count=1))
    features = student.backbone(images.tensor)
    anchors = rpn.anchor_generator([features[name] for name in rpn.in_features])
    rpn.batch_size_per_image = 10**6  # all anchors are sampled
    (whole,), (boxes,) = rpn.label_and_sample_anchors(anchors, [truth([3, 5])])
    inputs = [{"instances": truth([3, IGNORED])}]
    with ignoring(student, inputs):
        (labels,), _ = rpn.label_and_sample_anchors(anchors, [truth([3, IGNORED])])
    ignored = (whole == 1) & (boxes == torch.tensor(B)).all(dim=1)
    assert ignored.any() and (whole == 1).sum() > ignored.sum()
    assert torch.equal(labels, whole.masked_fill(ignored, IGNORED))
    assert type(rpn.anchor_matcher) is Matcher
    proposals = Instances((32, 48), objectness_logits=torch.zeros(4))
    boxes = [A, B, [26.0, 12.0, 42.0, 30.0], [0, 20.0, 8, 30]]
    proposals.proposal_boxes = Boxes(torch.tensor(boxes))
    with EventStorage():
        (sampled,) = heads.label_and_sample_proposals([proposals], [truth([3, IGNORED])])
        assert set(sampled.gt_classes.tolist()) == {3, 8}  # 8 is the background
        overlaps = pairwise_iou(sampled.proposal_boxes, Boxes(torch.tensor([B])))
        assert len(sampled) == 3 and overlaps.max() < 0.5
        # An image whose proposals are all ignored has no loss.
        (none,) = heads.label_and_sample_proposals([proposals[[1]]], [truth([IGNORED] * 2)])
        assert len(none) == 0 and heads._forward_box(features, [none])["loss_cls"] == 0
