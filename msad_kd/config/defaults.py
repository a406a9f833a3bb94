"""The configuration keys this project adds to Detectron2's."""

from __future__ import annotations

from detectron2.config import CfgNode as CN

__all__ = ["add_msad_kd_config"]


def add_msad_kd_config(cfg: CN) -> None:
    """Add every key of msad_kd, with its default, to a Detectron2 config (in place)."""
    # Your own data sets in COCO format: a list of {name, json, images}. A relative path starts at
    # the folder DETECTRON2_DATASETS (./datasets when unset), as with Detectron2's builtin sets.
    cfg.DATASETS.COCO_FORMAT = []

    # Large-scale jitter instead of the resize in training: the side of the square crop, in pixels
    # of what the model trains on (1024 at high resolution and 512 at low), 0 to leave it off.
    cfg.INPUT.JITTER = CN()
    cfg.INPUT.JITTER.SIZE = 0
    # The image is scaled at random to fit into the square times this range, then cropped or padded.
    cfg.INPUT.JITTER.SCALES = [0.1, 2.0]

    # The share of images RandomSubsetTrainingSampler draws; Detectron2 0.6 lacks the key.
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = cfg.DATALOADER.get("RANDOM_SUBSET_RATIO", 1.0)

    # "SGD" (Detectron2's own) or "ADAMW".
    cfg.SOLVER.OPTIMIZER = "SGD"

    # What computes COCO's AP: "auto" (the fastest there is of the following), "faster-coco-eval",
    # "detectron2" (its C++, in compiled builds) or "pycocotools"; all give the same numbers.
    cfg.TEST.COCO_EVALUATOR = "auto"
    # Evaluate Cityscapes by COCO's AP, too: boxes as "bbox", masks as "segm_coco". A model without
    # masks is evaluated so in any case.
    cfg.TEST.CITYSCAPES_COCO = False

    _add_model_keys(cfg)

    # ---- The multi-resolution teacher (MODEL.META_ARCHITECTURE: MultiResolution*) ----
    cfg.MODEL.MULTI_RESOLUTION = CN()
    # Weight of the fused branch's loss next to L_HR + L_LR.
    cfg.MODEL.MULTI_RESOLUTION.FUSED_WEIGHT = 0.4
    # C-FF: its hidden layer has 2C / REDUCTION units, C being FPN.OUT_CHANNELS.
    cfg.MODEL.MULTI_RESOLUTION.REDUCTION = 16
    # C-FF pools a map without its padding; False pools the whole map, as the authors' code does.
    cfg.MODEL.MULTI_RESOLUTION.MASK_PADDING = True
    # Keep batch normalisation's running statistics for each resolution by itself; False shares one
    # set, as the authors' code does. A student gets those of its own resolution.
    cfg.MODEL.MULTI_RESOLUTION.SEPARATE_STATISTICS = False
    # The branch that predicts at test time: "fused", "hr" or "lr".
    cfg.MODEL.MULTI_RESOLUTION.TEST_BRANCH = "fused"

    # ---- Distillation (MODEL.META_ARCHITECTURE: Distilled*) ----
    cfg.KD = CN()
    # k, high-resolution side / low-resolution side: a power of two; m = log2 k is the level shift.
    cfg.KD.SCALE = 2
    # A list of {name, weight, levels, warmup_iters}: the loss's name in DISTILL_LOSS_REGISTRY, its
    # weight in the total loss (summed over levels), the student's levels, and the iterations over
    # which the weight rises from 0. Without `levels`: all that have a partner. `adapter` puts a 1x1
    # convolution on the student's map: true, false or "auto" (the default: where channels differ).
    # A name in ROI_LOSS_REGISTRY compares what the RoI heads of an R-CNN and of its teacher predict
    # for the student's proposals; it has no levels and no adapter. Further entries are arguments
    # of the loss.
    cfg.KD.LOSSES = [{"name": "l1", "weight": 0.6, "warmup_iters": 500}]
    # Every so many iterations each loss is logged level by level, without its weight, as kd/*, and
    # what else the losses tell of themselves; 0: never. Detectron2 writes every 20.
    cfg.KD.DIAGNOSTICS_PERIOD = 20
    # Every so many iterations kd/gradient_ratio is logged: the norm of the distillation losses'
    # gradient over that of the detection losses', at the last layer of the backbone's bottom-up
    # path. It costs two more backward passes; 0: never.
    cfg.KD.GRADIENT_RATIO_PERIOD = 0

    cfg.KD.TEACHER = CN()
    # The config the teacher was trained with, and KEY VALUE pairs on top of it. Like the weights'
    # path below, it starts at the current folder.
    cfg.KD.TEACHER.CONFIG_FILE = ""
    cfg.KD.TEACHER.OPTS = []
    # The teacher's checkpoint; every key has to fit.
    cfg.KD.TEACHER.WEIGHTS = ""
    # The pyramid to learn from: "fused", "hr" or "lr". A single-resolution teacher has "hr", read
    # from the high-resolution image, and "lr", read from the student's own image.
    cfg.KD.TEACHER.BRANCH = "fused"
    # KDTrainer starts the student from the teacher's weights, on a fresh start only.
    cfg.KD.TEACHER.INIT_STUDENT = True
    # Whether that includes the backbone's bottom-up path; False takes neck and heads alone, and
    # leaves the path as MODEL.WEIGHTS has it: for a teacher with another backbone.
    cfg.KD.TEACHER.INIT_BACKBONE = True
    # KDTrainer evaluates the teacher on DATASETS.TEST before the first iteration.
    cfg.KD.TEACHER.EVAL_BEFORE_TRAIN = True

    # ---- A ladder of teachers (train_net.py runs one stage after another) ----
    cfg.KD.LADDER = CN()
    # A list of {name, config_file, weights, opts, kind, image, losses, iterations, base_lr, start}:
    # the teacher's config, weights and options; "fused" or "plain"; the image a plain one reads,
    # "hr" or "lr"; KD.LOSSES, SOLVER.MAX_ITER and SOLVER.BASE_LR of the stage; where the student
    # starts: "previous" (in the first stage: MODEL.WEIGHTS), "teacher", "teacher_heads" or a
    # checkpoint. Name, config_file and weights are needed. Without the others there are no opts, a
    # "fused" teacher or one of the "hr" image, the config's own losses, iterations and base_lr, and
    # the student starts from the "previous" one.
    cfg.KD.LADDER.STAGES = []


def _add_model_keys(cfg: CN) -> None:
    # How this project's FPNs make the levels above p5: "maxpool" (subsampling p5, as Detectron2's
    # R-CNNs do), or strided convolutions "conv_p5" (its FCOS) or "conv_res5" (its RetinaNet), which
    # have FPN.NORM; without one their scale is far from the other levels'. The FPNs that Detectron2
    # itself builds have one way each, and do not read this.
    cfg.MODEL.FPN.TOP_BLOCK = "maxpool"

    # ---- A classifier of timm under an FPN (MODEL.BACKBONE.NAME: build_timm_fpn_backbone, and
    # build_aligned_timm_fpn_backbone for a multi-resolution teacher) ----
    # Its feature maps of strides 4 to 32 are FPN.IN_FEATURES [res2, res3, res4, res5].
    # BACKBONE.FREEZE_AT n freezes the layers that lead to strides up to 2^n; 0 freezes none.
    # timm's weights are for RGB images; with INPUT.FORMAT BGR, the first convolution's are reversed
    # when they are read. PIXEL_MEAN and PIXEL_STD, in the order of INPUT.FORMAT, have to be 255
    # times the mean and std of timm.get_pretrained_cfg(NAME): for most [123.675, 116.28, 103.53]
    # and [58.395, 57.12, 57.375] (RGB).
    cfg.MODEL.TIMM = CN()
    # A classifier's name in timm (timm.list_models()); a tag chooses among its weights:
    # "resnet50.a1_in1k".
    cfg.MODEL.TIMM.NAME = "mobilenetv3_large_100"
    # Arguments of timm.create_model, a list of [name, value]: [[drop_path_rate, 0.2]].
    cfg.MODEL.TIMM.ARGUMENTS = []
    # What its batch normalisation becomes: "BN", "SyncBN" or "FrozenBN".
    cfg.MODEL.TIMM.NORM = "FrozenBN"
    # The weights that training starts from: PRETRAINED takes timm's from its hub, CHECKPOINT takes
    # a file (.pth or .safetensors) of the classifier instead, whose head is left out. Neither is
    # read if MODEL.WEIGHTS is set, as it is for a teacher and in an evaluation. A resumed run reads
    # them again before it loads its checkpoint; set them back to do without.
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.MODEL.TIMM.CHECKPOINT = ""

    # ---- FCOS (MODEL.META_ARCHITECTURE: FCOS), which Detectron2 cannot build from a config ----
    # Its sizes of interest follow the strides: on a level of stride s, boxes whose farthest side is
    # 4 s to 8 s away; on the finest and the coarsest level also smaller and larger ones.
    cfg.MODEL.FCOS = CN()
    # Without the background.
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    # The levels that its head reads, from fine to coarse.
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions in each tower, those that predict aside, and their normalisation.
    cfg.MODEL.FCOS.NUM_CONVS = 4
    cfg.MODEL.FCOS.NORM = "GN"
    # The score all classes start from.
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01
    # A location is positive when it is nearer to a box's centre than this, in strides, along both
    # axes.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    # The weight of positive locations, and the exponent by which easy ones count less.
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # A detection's score is sqrt(class score x centerness), on which this threshold acts: 0.2 is
    # about what 0.05 is where it acts on the class score alone, as in the authors' code.
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    # Candidates kept per level before non-maximum suppression, and the IoU it suppresses at.
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6
