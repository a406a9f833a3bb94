#!/usr/bin/env python
"""Measure what a student's RoI losses see: which regions, and how much both models differ there.

    python tools/analysis/compare_rois.py --config-file configs/Nuclei/student.yaml \
        KD.LOSSES "[{'name': 'roi_class', 'weight': 1.0}, {'name': 'roi_box', 'weight': 1.0}]"

On training batches, at a checkpoint or at the student's start, for each RoI loss of KD.LOSSES:

    norm            gradient norm at the backbone's last layer / the detection losses', mean
    regions         for which both models predict, of an image
    objects         share of the regions that match a ground-truth box, as the student's targets do
    teacher's       share of the regions that the teacher takes for objects
    KL              KL(p_T || p_S) of the classes, mean over those that match (fg), or do not (bg)
    differ          how often the teacher's best class is not the target's, fg and bg
    IoU             of matched regions with their ground-truth box: as proposed, and after the
                    student's and the teacher's box regression for the target's class
"""

from collections import defaultdict

import torch
import torch.nn.functional as F
from arguments import report
from compare_gradients import build_parser, load_student, settings_of, source_of
from detectron2.structures.boxes import Boxes, matched_pairwise_iou, pairwise_iou
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from msad_kd import InputError
from msad_kd.distill.gradient_ratio import gradient_ratio
from msad_kd.modeling.capture import recording

COLUMNS = {
    "norm": "norm",
    "regions": "regions",
    "objects": "objects",
    "teacher": "teacher's objects",
}
COLUMNS |= {"kl_fg": "KL fg", "kl_bg": "KL bg", "differ_fg": "differ fg", "differ_bg": "differ bg"}
COLUMNS |= {"iou_proposed": "IoU", "iou_student": "student's", "iou_teacher": "teacher's"}


def targets_of(heads, boxes, truth):
    """Match the ``Boxes`` of R regions with an image's ground truth, as in training.

    Returns:
        Classes (R,), K for the background, and the boxes (R, 4) of those that are objects.
    """
    gt_boxes = truth.gt_boxes.to(boxes.device)
    rows, labels = heads.proposal_matcher(pairwise_iou(gt_boxes, boxes))
    classes = torch.full_like(rows, heads.num_classes)
    corners = torch.zeros_like(boxes.tensor)
    objects = (labels == 1).nonzero()[:, 0]
    classes[objects] = truth.gt_classes.to(rows.device)[rows[objects]]
    corners[objects] = gt_boxes.tensor[rows[objects]]
    return classes, corners


@torch.no_grad()
def compare(heads, regions, classes, corners, predictions):
    """Return a column's name to its values, one for each region that the column is about.

    ``regions`` (R, 4) are in the student's frame, with targets of ``targets_of``; ``heads`` and
    ``predictions`` are the student's and the teacher's.
    """
    fg = classes < heads[0].num_classes
    s, t = (F.log_softmax(x.classes.float(), dim=1) for x in predictions)
    kl = F.kl_div(s, t, reduction="none", log_target=True).sum(dim=1)
    best = t.argmax(dim=1)
    values = {"objects": fg, "teacher": best < heads[0].num_classes}
    for name, rows in (("fg", fg), ("bg", ~fg)):
        values |= {f"kl_{name}": kl[rows], f"differ_{name}": (best != classes)[rows]}
    boxes = {"proposed": regions[fg]}
    for name, own, x in zip(("student", "teacher"), heads, predictions):
        deltas = x.deltas.float().view(len(fg), -1, 4)[fg]
        deltas = deltas[torch.arange(len(deltas)), classes[fg] * (deltas.shape[1] > 1)]
        boxes[name] = own.box_predictor.box2box_transform.apply_deltas(deltas, regions[fg])
    for name, x in boxes.items():
        values[f"iou_{name}"] = matched_pairwise_iou(Boxes(x), Boxes(corners[fg]))
    return values


def measure(args):
    """Return what is written as JSON; see ``load_student``."""
    model, cfg, batches = load_student(args)
    rois, columns = model.roi_distiller, defaultdict(lambda: defaultdict(list))
    if not rois.terms:
        raise InputError(f"'{args.config_file}' has no roi_ loss in KD.LOSSES")
    heads = rois.models[0], rois.models[1].model.roi_heads
    for batch in batches:
        with EventStorage(), recording(rois) as call:
            losses = model(batch)
        detection = [x for name, x in losses.items() if not name.startswith("loss_kd_")]
        found = rois.predict(*call.inputs[:-1])
        for index, term in enumerate(rois.terms):
            sets, *pair = rois.predicted_for(term, found)
            loss = term.weight * rois.evaluate(term, *pair)
            pairs = [(x, y["instances"]) for seen in sets for x, y in zip(seen.boxes, batch)]
            targets = map(torch.cat, zip(*(targets_of(heads[0], *each) for each in pairs)))
            regions = Boxes.cat([boxes for boxes, _ in pairs]).tensor
            values = compare(heads, regions, *targets, pair)
            values["norm"] = gradient_ratio([loss], detection, model.backbone)[None]
            values["regions"] = torch.tensor([len(regions) / len(batch)])
            for name, x in values.items():
                columns[index][name].append(x.float().cpu())
    rows = []
    for index, term in enumerate(rois.terms):
        means = {name: torch.cat(columns[index][name]) for name in COLUMNS}
        means = {name: x.mean().item() if len(x) else None for name, x in means.items()}
        rows.append({"name": term.name, "proposals": term.proposals, **means})
    return {**settings_of(args, cfg), "rows": rows}


def markdown(result):
    """Return the result of ``measure`` as a table with a note."""
    rows = [
        [x["name"], x["proposals"], *("-" if x[c] is None else f"{x[c]:.3g}" for c in COLUMNS)]
        for x in result["rows"]
    ]
    headings = ["loss", "proposals", *COLUMNS.values()]
    table = tabulate(rows, headings, "pipe", disable_numparse=True)
    return f"{table}\n\nA gradient is at the loss's full weight. {source_of(result)}"


if __name__ == "__main__":
    report(build_parser(__doc__), measure, markdown)
