"""A small grid of a study, for the tests of what grids mean."""

import yaml

STUDENT, LR = "configs/Shapes/student_one_size.yaml", "configs/Shapes/lr.yaml"
TEACHER = "configs/Shapes/teacher_one_size.yaml"
CHECKPOINT = "projects/Shapes/checkpoints/teacher_one_size.pth"
# A teacher's checkpoint, a baseline, a student, a student of it, and the student on fresh scenes.
CONTENT = f"""
generator: projects.Shapes.generate
data: {{shapes: {{train: 6, val: 3}}, shapes_fresh: {{train: 6, val: 3, seed: 1}}}}
seeds: [1, 2]
rows:
  teacher: {{title: T, config: {TEACHER}, checkpoint: {CHECKPOINT}}}
  lr: {{title: LR, config: {LR}}}
  student:
    title: S
    config: {STUDENT}
    test_config: {LR}
    options: {{KD.TEACHER.WEIGHTS: "{{teacher}}", SOLVER.MAX_ITER: 4}}
  again: {{title: S2, like: student, options: {{MODEL.WEIGHTS: "{{student}}"}}, seeds: [2, 3]}}
  fresh: {{title: F, checkpoint_of: student, options: {{DATASETS.TEST: [shapes_fresh_val]}}}}
tables: [{{name: t, title: T, rows: [lr, student], control: lr}}]
"""

# Keys of a row that also learns from images without labels
UNLABELED = {
    "DATASETS.COCO_FORMAT": [{"name": "more", "images": "shapes_more/train"}],
    "DATASETS.UNLABELED": ["more"],
    "SOLVER.UNLABELED_PER_BATCH": 4,
    "KD.UNLABELED.PSEUDO_LABELS": True,
}


def content():
    return yaml.safe_load(CONTENT)


def fingerprints(cells):
    return {key: cell.fingerprint for key, cell in cells.items()}
