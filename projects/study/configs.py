"""The configs of a study's rows, and what of them changes what is trained or measured."""

import pickle
from functools import lru_cache
from pathlib import Path

from detectron2.config import get_cfg

from msad_kd.checkpoint.files import hash_file
from msad_kd.config.build import check_config, merge_config
from msad_kd.config.defaults import add_msad_kd_config
from msad_kd.modeling.classes import frame_of
from msad_kd.utils.flat_config import flatten_config

# Config keys that change no weight of the trained model.
LOGGING = {"OUTPUT_DIR", "KD.DIAGNOSTICS_PERIOD", "KD.GRADIENT_RATIO_PERIOD"}
LOGGING |= {"SOLVER.CHECKPOINT_PERIOD"}
# Keys of a teacher's config that its student's training reads, beside those of the model.
TEACHER_KEYS = {"KD.SCALE", "INPUT.FORMAT", "TEST.DETECTIONS_PER_IMAGE"}


def build(config, options):
    """Return the checked config of a file, with KEY VALUE pairs on top."""
    cfg = pickle.loads(_read(config))
    # On the CPU, so that a cell means the same on every machine.
    merge_config(cfg, "", [*map(str, options), "MODEL.DEVICE", "cpu"])
    amp, cfg.SOLVER.AMP.ENABLED = cfg.SOLVER.AMP.ENABLED, False  # which would be turned off
    cfg = check_config(cfg)
    cfg.SOLVER.AMP.ENABLED = amp
    return cfg


@lru_cache
def _read(config):
    """Return a file's config, read once for all rows; pickled, as clone() copies more slowly."""
    cfg = get_cfg()
    add_msad_kd_config(cfg)
    merge_config(cfg, config, [])
    return pickle.dumps(cfg)


def is_of_training(key):
    """Return whether a key is about training alone, and changes no measurement of a model."""
    about = ("KD.", "SOLVER.", "INPUT.MIN_SIZE_TRAIN", "DATASETS.UNLABELED")
    return key.startswith(about) or key == "MODEL.WEIGHTS"


def defaults():
    """Return the config that no file has changed."""
    return pickle.loads(_read(""))


def forget_files():
    """Forget the files that were read: they may have changed."""
    _read.cache_clear()


def _changed_keys(cfg):
    """Return KEY to value of all that a config changes of the defaults, without `LOGGING`.

    Defaults are left out, so that a key which a later version adds changes no fingerprint.
    """
    default = flatten_config(defaults())
    return {
        k: v for k, v in flatten_config(cfg).items() if k not in LOGGING and v != default.get(k)
    }


def measured_meaning(cfg):
    """Return what of a config changes a measurement."""
    scale = {"KD.SCALE"} if frame_of(cfg) == "hr" else set()
    changed = _changed_keys(cfg).items()
    return {"test": {k: v for k, v in changed if k in scale or not is_of_training(k)}}


def training_meaning(cfg):
    """Return what of a config, its files and its teachers' configs changes a training."""
    stages = cfg.KD.LADDER.STAGES
    teachers = [stage["weights"] for stage in stages] or [cfg.KD.TEACHER.WEIGHTS]
    files = [cfg.MODEL.WEIGHTS, *teachers, *(s["start"] for s in stages if "start" in s)]
    files = [hash_file(x) if Path(x).is_file() else None for x in files]
    meaning = {"train": _changed_keys(cfg), "files": files}
    return meaning | ({"teachers": configs} if (configs := _teacher_configs(cfg)) else {})


def _teacher_configs(cfg):
    """Return the changed keys that a student's training reads of the config of each teacher."""
    named = [(stage["config_file"], stage.get("opts")) for stage in cfg.KD.LADDER.STAGES]
    named = named or [(cfg.KD.TEACHER.CONFIG_FILE, cfg.KD.TEACHER.OPTS)]
    configs = []
    for file, options in named:
        if Path(file).is_file():  # else the training says what is wrong
            teacher = pickle.loads(_read(file))
            merge_config(teacher, "", list(map(str, options or ())))
            changed = _changed_keys(teacher).items()
            configs.append({k: v for k, v in changed if k in TEACHER_KEYS or _of_model(k)})
    return configs


def _of_model(key):
    return key.startswith("MODEL.") and key not in ("MODEL.WEIGHTS", "MODEL.DEVICE")
