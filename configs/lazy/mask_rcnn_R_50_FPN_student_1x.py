"""The student of configs/COCO/mask_rcnn_R_50_FPN_student_1x.yaml as a LazyConfig.

    python tools/lazyconfig_train_net.py --config-file configs/lazy/mask_rcnn_R_50_FPN_student_1x.py

train_net.py trains its teacher, whose config is YAML.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from msad_kd import DistilledRCNN, TwoResolutionMapper, build_config
from msad_kd.distill import FeatureDistiller, TeacherSpec
from msad_kd.evaluation.coco import AnyCOCOEvaluator

_zoo = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
dataloader, lr_multiplier, optimizer = _zoo.dataloader, _zoo.lr_multiplier, _zoo.optimizer
model, train = _zoo.model, _zoo.train

train.init_checkpoint = ""  # it starts from the teacher
train.output_dir = "output/coco/lazy_mask_rcnn_R_50_FPN_student_1x"

# Images and anchors have half the usual size, and the mapper adds the image of twice the size.
dataloader.train.mapper.update(_target_=TwoResolutionMapper, frame="lr", scale=2)
dataloader.train.mapper.augmentations[0].update(
    short_edge_length=(320, 336, 352, 368, 384, 400), max_size=667
)
dataloader.test.mapper.augmentations[0].update(short_edge_length=400, max_size=667)
dataloader.evaluator._target_ = AnyCOCOEvaluator
model.proposal_generator.anchor_generator.sizes = [[16], [32], [64], [128], [256]]

model.update(
    _target_=DistilledRCNN,
    distiller=L(FeatureDistiller)(
        terms=[dict(name="l1", weight=0.6, warmup_iters=500)],  # as in KD.LOSSES
        # Strides in pixels of the high-resolution image.
        student={f"p{i}": ShapeSpec(channels=256, stride=2 * 2**i) for i in range(2, 7)},
    ),
)
teacher = L(TeacherSpec)(
    config_file="configs/COCO/mask_rcnn_R_50_FPN_teacher_1x.yaml",
    branch="fused",
    cfg=L(build_config)(
        config_file="${..config_file}",
        opts=[
            "MODEL.WEIGHTS",
            "output/coco/mask_rcnn_R_50_FPN_teacher_1x/model_final.pth",
            "MODEL.DEVICE",
            "${train.device}",
            "SOLVER.REFERENCE_WORLD_SIZE",
            0,
        ],
    ),
)
