"""The config keys that this project adds to Detectron2's."""

from detectron2.config import CfgNode as CN

from msad_kd.utils.compat import add_missing_keys


def add_msad_kd_config(cfg: CN) -> None:
    """Add all keys of msad_kd, with their defaults, to a Detectron2 config, in place."""
    add_missing_keys(cfg)

    # Data sets in COCO format to register: a list of {name, json, images}. Relative paths start at
    # the folder that the environment variable DETECTRON2_DATASETS names (./datasets if unset).
    # An entry without json is a folder of images without labels. For keypoints an entry may also
    # have keypoint_names, keypoint_flip_map and skeleton.
    cfg.DATASETS.COCO_FORMAT = []
    # The names of the model's classes, in its order; data sets are mapped to them by name and may
    # have fewer. By default those of the data set in TRAIN that has most and, in an evaluation,
    # those that the checkpoint names.
    cfg.DATASETS.CLASSES = []
    # What happens to an image or annotation that cannot be used, such as a box of NaN: "error"
    # refuses the data set before training starts, "drop" leaves it out with a warning.
    cfg.DATASETS.INVALID_ANNOTATIONS = "error"

    # The data sets whose images a student also learns from without their labels: folders, or files
    # of which only annotations with a "score" are read (those of tools/label_images.py).
    cfg.DATASETS.UNLABELED = []

    # Large-scale jitter, which replaces the resize in training: an image is scaled to fit a square,
    # times a random factor in the range SCALES, and then cropped or padded to it. SIZE is the
    # square's side in pixels of the images that the model trains on; 0 turns it off.
    cfg.INPUT.JITTER = CN()
    cfg.INPUT.JITTER.SIZE = 0
    cfg.INPUT.JITTER.SCALES = [0.1, 2.0]
    # Random colours in training, the same at both resolutions. Each key is a number s from 0 to
    # below 1 (0 turns it off), and draws a factor from [1 - s, 1 + s]. BRIGHTNESS multiplies the
    # pixels by it, CONTRAST their distances from the image's mean, SATURATION those from their own
    # grey.
    cfg.INPUT.COLOR = CN()
    cfg.INPUT.COLOR.BRIGHTNESS = 0.0
    cfg.INPUT.COLOR.CONTRAST = 0.0
    cfg.INPUT.COLOR.SATURATION = 0.0
    # Mixup in training: with probability PROB a sample is lambda x image + (1 - lambda) x another
    # image of DATASETS.TRAIN, with the objects of both; lambda is drawn from Beta(ALPHA, ALPHA).
    # The smaller image is padded with MODEL.PIXEL_MEAN. PROB 0 turns it off.
    cfg.INPUT.MIXUP = CN()
    cfg.INPUT.MIXUP.PROB = 0.0
    cfg.INPUT.MIXUP.ALPHA = 1.5

    # "SGD" or "ADAMW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # The number of images of DATASETS.UNLABELED in a batch, over all processes, which are added to
    # the IMS_PER_BATCH labelled ones.
    cfg.SOLVER.UNLABELED_PER_BATCH = 0
    # How many batches' gradients one optimizer step, which is one iteration, averages. It equals
    # the step of a batch ACCUMULATE times as large; docs/training-script.md has the exceptions.
    cfg.SOLVER.ACCUMULATE = 1

    # What computes COCO's AP: "hotcoco", "detectron2" (its C++ code, in compiled builds),
    # "pycocotools", or "auto", the fastest of these that is installed. All give the same numbers.
    cfg.TEST.COCO_EVALUATOR = "auto"
    # Whether to evaluate Cityscapes by COCO's AP as well: boxes as "bbox", masks as "segm_coco".
    # A model without masks is always evaluated by it.
    cfg.TEST.CITYSCAPES_COCO = False
    # The metric that chooses model_best.pth among the evaluations of EVAL_PERIOD: a name in the
    # log. By default AP of the first data set: segm/AP, else bbox/AP, else keypoints/AP. Of a loss
    # (validation/total_loss, with TEST.LOSS) the least is the best.
    cfg.TEST.BEST_METRIC = ""
    # End the training after so many evaluations without a better one; 0: never.
    cfg.TEST.PATIENCE = 0
    # Whether to compute the detection losses on DATASETS.TEST too, as validation/*.
    cfg.TEST.LOSS = False

    _add_model_keys(cfg)

    # ---- The multi-resolution teacher (MODEL.META_ARCHITECTURE: MultiResolution*) ----
    cfg.MODEL.MULTI_RESOLUTION = CN()
    # The weight of the fused branch in L_T = L_HR + L_LR + FUSED_WEIGHT L_fused.
    cfg.MODEL.MULTI_RESOLUTION.FUSED_WEIGHT = 0.4
    # The fusion has a hidden layer of 2C / REDUCTION units, where C is FPN.OUT_CHANNELS.
    cfg.MODEL.MULTI_RESOLUTION.REDUCTION = 16
    # Whether the fusion leaves padding out when it averages a map; the authors' code does not.
    cfg.MODEL.MULTI_RESOLUTION.MASK_PADDING = True
    # Whether batch normalisation keeps running statistics for each resolution; the authors' code
    # does not. A student starts from the statistics of low resolution.
    cfg.MODEL.MULTI_RESOLUTION.SEPARATE_STATISTICS = False
    # The branch that predicts at test time: "fused", "hr" or "lr".
    cfg.MODEL.MULTI_RESOLUTION.TEST_BRANCH = "fused"

    # ---- Distillation (MODEL.META_ARCHITECTURE: Distilled*) ----
    cfg.KD = CN()
    # k: the side of a high-resolution image over the side of a low-resolution one, a power of two.
    cfg.KD.SCALE = 2
    # The distillation losses (L_KD), a list of dicts:
    #   name: a loss in DISTILL_LOSS_REGISTRY (between feature maps), ROI_LOSS_REGISTRY (between
    #     what the RoI heads of student and teacher predict for the same proposals) or
    #     DENSE_LOSS_REGISTRY (between what dense heads or RPNs predict at every anchor).
    #   weight: its weight in the total loss; feature losses are summed over their levels.
    #   warmup_iters: the iterations over which the weight rises linearly from 0; default 0.
    #   levels: the student's levels to compare; default: all that have a partner in the teacher.
    #   adapter: whether the student's map passes a 1x1 convolution first: true, false or "auto"
    #     (the default), which means where the channels differ.
    #   focus: which cells count more: "none" (default), "boxes" or "scores"; distill/focus.py.
    #   background: with a focus, the weight that is spread over all cells; default 0.5.
    #   proposals: whose regions a loss of RoI heads compares: "student" (default), "teacher" or
    #     "both".
    # Any other field is an argument of the loss. Only losses between maps have levels, adapter and
    # focus.
    cfg.KD.LOSSES = [{"name": "l1", "weight": 0.6, "warmup_iters": 500}]
    # Log every loss without its weight, by level, and its own diagnostics as kd/*, every so many
    # iterations; 0: never. Detectron2 writes its log every 20.
    cfg.KD.DIAGNOSTICS_PERIOD = 20
    # The same for kd/gradient_ratio: the gradient norm of the distillation losses over that of the
    # detection losses, at the bottom-up path's last layer. It costs two more backward passes.
    cfg.KD.GRADIENT_RATIO_PERIOD = 0

    cfg.KD.TEACHER = CN()
    # The teacher's own config, and KEY VALUE pairs on top of it. Relative paths, here and in
    # WEIGHTS, start at the current folder.
    cfg.KD.TEACHER.CONFIG_FILE = ""
    cfg.KD.TEACHER.OPTS = []
    # The teacher's checkpoint. Every key has to fit.
    cfg.KD.TEACHER.WEIGHTS = ""
    # The pyramid to learn from: "fused", "hr" or "lr". A single-resolution teacher has "hr", read
    # from the high-resolution image, and "lr", read from the student's image.
    cfg.KD.TEACHER.BRANCH = "fused"
    # "bf16" or "fp16" computes the teacher's pyramid in 16 bits; "" (default) in fp32, or as
    # SOLVER.AMP says. The losses are computed in fp32. A CPU needs bf16 instructions to gain by it.
    cfg.KD.TEACHER.AMP = ""
    # Whether the student starts from the teacher's weights, and whether from those below the FPN
    # too. If the backbones differ, set the second to False, and MODEL.WEIGHTS.
    cfg.KD.TEACHER.INIT_STUDENT = True
    cfg.KD.TEACHER.INIT_BACKBONE = True
    # Whether to evaluate the teacher on DATASETS.TEST before the first iteration.
    cfg.KD.TEACHER.EVAL_BEFORE_TRAIN = True

    # ---- Images without labels (DATASETS.UNLABELED) ----
    cfg.KD.UNLABELED = CN()
    # The weight of their losses, which are named <loss>_unlabeled. 0: they are loaded, but the
    # student does not see them; weights, batch statistics and random numbers are as without them.
    cfg.KD.UNLABELED.WEIGHT = 1.0
    # Whether the detection losses apply to them as well, with the teacher's detections as boxes,
    # masks and keypoints: those of an image's file, or else those that the teacher finds in the
    # step. False: only the distillation losses do.
    cfg.KD.UNLABELED.PSEUDO_LABELS = False
    # The score from which on a detection is an object, one number for all classes or one for each.
    cfg.KD.UNLABELED.SCORE = [0.5]
    # The score from which on a detection below SCORE is ignored: neither object nor background. The
    # teacher's own SCORE_THRESH_TEST is a lower limit.
    cfg.KD.UNLABELED.IGNORE_SCORE = 0.3

    # ---- A ladder of teachers: train_net.py runs one stage after another ----
    cfg.KD.LADDER = CN()
    # The stages, a list of dicts; the first three fields are required:
    #   name: the stage's name, which its folder has.
    #   config_file, weights, opts: the teacher's config, its checkpoint, and KEY VALUE pairs.
    #   kind: "fused" (default), or "plain" for a single-resolution teacher.
    #   image: which image a plain teacher reads, "hr" (default) or "lr".
    #   losses, iterations, base_lr: KD.LOSSES, SOLVER.MAX_ITER and SOLVER.BASE_LR of the stage;
    #     default: those of this config.
    #   start: the student starts from the "previous" stage's student (default; the first stage from
    #     MODEL.WEIGHTS), from all that fits of the "teacher", from the "teacher_heads" (neck and
    #     heads alone), or from a checkpoint.
    cfg.KD.LADDER.STAGES = []


def _add_model_keys(cfg: CN) -> None:
    # How this project's FPNs (Detectron2's do not read it) make the levels above p5: "maxpool"
    # subsamples p5, as for R-CNN; "conv_p5" (FCOS) and "conv_res5" (RetinaNet) are strided
    # convolutions with FPN.NORM. Without a norm, their scale is far from the other levels'.
    cfg.MODEL.FPN.TOP_BLOCK = "maxpool"

    # ---- A classifier of timm under an FPN (MODEL.BACKBONE.NAME: build_timm_fpn_backbone, and
    # build_aligned_timm_fpn_backbone for a multi-resolution teacher) ----
    # Its feature maps of strides 4 to 32 are FPN.IN_FEATURES [res2, res3, res4, res5].
    # BACKBONE.FREEZE_AT n freezes the layers that lead to strides up to 2^n; 0 freezes none.
    # timm's weights are for RGB; for BGR, the first convolution's are reversed when they are read.
    # PIXEL_MEAN and PIXEL_STD, in the order of INPUT.FORMAT, have to be 255 times those of
    # timm.get_pretrained_cfg(NAME): for most [123.675, 116.28, 103.53], [58.395, 57.12, 57.375].
    cfg.MODEL.TIMM = CN()
    # A classifier's name in timm (timm.list_models()); a tag chooses among its weights:
    # "resnet50.a1_in1k".
    cfg.MODEL.TIMM.NAME = "mobilenetv3_large_100"
    # Arguments of timm.create_model, a list of [name, value]: [[drop_path_rate, 0.2]].
    cfg.MODEL.TIMM.ARGUMENTS = []
    # What its batch normalisation becomes: "BN", "SyncBN" or "FrozenBN".
    cfg.MODEL.TIMM.NORM = "FrozenBN"
    # The weights that training starts from: PRETRAINED takes timm's from its hub, CHECKPOINT takes
    # a file (.pth or .safetensors) of the classifier instead, without its head. Neither is read if
    # MODEL.WEIGHTS is set, as for a teacher and in an evaluation; a resumed run reads them again.
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.MODEL.TIMM.CHECKPOINT = ""

    # ---- FCOS (MODEL.META_ARCHITECTURE: FCOS), which Detectron2 cannot build from a config ----
    # A level of stride s learns boxes whose farthest side is 4 s to 8 s from the location; the
    # finest level learns smaller ones too, the coarsest larger ones.
    cfg.MODEL.FCOS = CN()
    # The number of classes, without background.
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    # The levels that the head reads, from fine to coarse.
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # The number of convolutions in each tower, without the predicting ones, and their norm.
    cfg.MODEL.FCOS.NUM_CONVS = 4
    cfg.MODEL.FCOS.NORM = "GN"
    # The score that all classes start from.
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01
    # A location is positive if it is this near to a box's centre along both axes, in strides.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    # alpha and gamma of the focal loss: the weight of positive locations, and the exponent that
    # makes easy ones count less.
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # The lowest score of a detection, which is sqrt(class score x centerness): 0.2 here is about
    # what 0.05 is in the authors' code, where the threshold acts on the class score alone.
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    # The candidates per level that non-maximum suppression gets, and its IoU threshold.
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6
