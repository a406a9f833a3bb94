"""Builds the config of a run from a YAML file and command-line options, and checks it."""

import ast
import logging
import re
from itertools import accumulate, chain
from pathlib import Path

import detectron2
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from msad_kd.config.defaults import add_msad_kd_config
from msad_kd.config.imports import import_modules
from msad_kd.config.stages import read_stages
from msad_kd.config.values import check_values
from msad_kd.data.coco_format import register_coco_format
from msad_kd.data.unlabeled import check_unlabeled
from msad_kd.evaluation.coco import choose_implementation
from msad_kd.losses.terms import read_losses
from msad_kd.modeling.pyramid import level_shift
from msad_kd.utils.arguments import check_pairs
from msad_kd.utils.device import find_device
from msad_kd.utils.errors import InputError, nearest
from msad_kd.utils.flat_config import flatten_config
from msad_kd.utils.replaced import replaced
from msad_kd.utils.schema import yaml_number
from msad_kd.utils.unpickle import trusted

# What reading a config raises; the last three if a file has not the form of one.
_UNREADABLE = (KeyError, AssertionError, ValueError, OSError, yaml.YAMLError)
_UNREADABLE += (AttributeError, TypeError, RecursionError)


def merge_config(cfg: CfgNode, config_file: str, opts: list) -> None:
    """Merge a YAML file and KEY VALUE pairs into a config, in place.

    Raises:
        InputError: if the file cannot be read, if a value has the wrong type, or if a key is
            unknown; the message proposes the nearest one.
    """
    check_pairs(opts)
    source = f" in '{config_file}'" if config_file else ""
    if config_file.endswith(".py"):
        raise InputError(
            f"the config file '{config_file}' is a Python config (LazyConfig): train it by "
            "tools/lazyconfig_train_net.py, or write a YAML file"
        )
    if config_file and not PathManager.isfile(config_file):
        folder = PathManager.isdir(config_file)
        words = "is a folder; name a file in it" if folder else "does not exist"
        raise InputError(f"the config file '{config_file}' {words}")
    try:
        if config_file:
            with replaced(cfg, load_yaml_with_base=_Yaml.load_yaml_with_base):
                cfg.merge_from_file(config_file)
        source = ""
        cfg.merge_from_list(_read_lists(cfg, list(opts)))
    except _UNREADABLE as error:
        known = _known_keys(cfg)
        if unknown := re.search(r"Non-existent (?:config )?key: ([\w.]+)", str(error)):
            key = unknown[1]
        else:  # Detectron2 looks for SEED.X in the value of SEED
            of_options = isinstance(error, TypeError) and not source
            key = next((x for x in opts[::2] if of_options and x not in known), None)
        if key is None:
            raise InputError(f"the config{source} cannot be read: {_reason(error)}") from error
        last, last_known = key.rsplit(".", 1)[-1], (name.rsplit(".", 1)[-1] for name in known)
        hint = nearest(key, known) or nearest(last, last_known)
        raise InputError(f"unknown config key{source}: {key}{hint}") from error


class _Yaml(CfgNode):
    """Reads YAML files without running the code that a tag may name.

    What comes with Detectron2 is code already: the anchors of its RetinaNets are an expression.
    """

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict:
        package = Path(detectron2.__file__).parent
        folders = package, package / "model_zoo/configs"  # in a clone, a link to another folder
        file = Path(PathManager.get_local_path(filename)).resolve()
        own = any(file.is_relative_to(folder.resolve()) for folder in folders)
        return super().load_yaml_with_base(filename, allow_unsafe=own or trusted())


def _reason(error: Exception) -> str:
    """Return why a config cannot be read, in the words of the error if they say it."""
    tag = re.search(r"constructor for the tag 'tag:yaml.org,2002:(python/[^']+)'", str(error))
    if tag and isinstance(error, yaml.YAMLError):
        return (
            f"its tag '{tag[1]}' would run code; write the value itself (in Detectron2's "
            "RetinaNets, MODEL.ANCHOR_GENERATOR.SIZES), or add --trust-files if you know its author"
        )
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}"
        problem = error.problem or error.context
        return f"{where}: {problem}{'; indent by spaces' * (repr(chr(9)) in problem)}"
    if isinstance(error, UnicodeDecodeError):
        return "it is no text in UTF-8; is it a checkpoint?"
    if isinstance(error, RecursionError):
        return "its _BASE_ leads back to it, or lists are nested too deeply"
    # Detectron2 would print the whole section.
    if section := re.search(r"CfgNode'> vs\. .* config key: ([\w.]+)$", str(error), re.DOTALL):
        return f"{section[1]} is a section, which needs keys below it"
    if isinstance(error, (AttributeError, TypeError)):
        return (
            "it, or its _BASE_, does not consist of sections with keys below them, as "
            "'MODEL: {MASK_ON: True}' does"
        )
    return str(error)


def _read_lists(cfg: CfgNode, opts: list) -> list:
    """Return KEY VALUE pairs in which lists that are YAML, [{name: l1}], are read.

    Detectron2 reads values as Python alone, [{'name': 'l1'}], and what is not Python as text.
    """
    values = flatten_config(cfg)
    read = list(opts)
    for index, (key, value) in enumerate(zip(opts[::2], opts[1::2])):
        if not isinstance(value, str) or not isinstance(values.get(key), (list, tuple)):
            continue
        try:
            ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            try:
                as_yaml = yaml.safe_load(value)
            except (yaml.YAMLError, RecursionError) as error:
                reason = " ".join(str(error).split())
                raise InputError(f"{key}: {value} is not a list in YAML ({reason})") from error
            if isinstance(as_yaml, list):
                read[2 * index + 1] = as_yaml
    return read


def _known_keys(cfg: CfgNode) -> list[str]:
    """Return every key of a config, sections such as "MODEL.RPN" included."""
    paths = (accumulate(key.split("."), "{}.{}".format) for key in flatten_config(cfg))
    return list(dict.fromkeys(chain(*paths)))


def build_config(config_file: str, opts: list) -> CfgNode:
    """Build and check the config of a run, and register its data sets.

    First it imports the modules of ``--import``, which may register what the config names.
    Without a GPU, MODEL.DEVICE becomes "cpu", with a warning. If the number of processes is not
    SOLVER.REFERENCE_WORLD_SIZE, batch, schedule and warm-up of the distillation are scaled, once.

    Raises:
        InputError: if a file, key or value cannot be used; the message names it.
    """
    import_modules()
    cfg = get_cfg()
    add_msad_kd_config(cfg)
    merge_config(cfg, config_file, opts)
    return check_config(cfg)


def check_config(cfg: CfgNode) -> CfgNode:
    """Check a config that was read, and return that of the run; see ``build_config``.

    The config is changed in place (MODEL.DEVICE, SOLVER.AMP), and its data sets are registered.

    Raises:
        InputError: if a key or value cannot be used; the message names it.
    """
    check_values(cfg)
    level_shift(cfg.KD.SCALE)
    read_losses(cfg.KD.LOSSES)
    read_stages(cfg.KD.LADDER.STAGES)
    choose_implementation(cfg.TEST.COCO_EVALUATOR)
    register_coco_format(cfg)
    check_parts(cfg)
    backbone, top_block = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.TOP_BLOCK
    of_detectron2 = BACKBONE_REGISTRY.get(backbone).__module__.startswith("detectron2.")
    if top_block != "maxpool" and of_detectron2:
        raise InputError(
            f"MODEL.FPN.TOP_BLOCK is {top_block}, but Detectron2's {backbone} does not read it; "
            "set MODEL.BACKBONE.NAME to build_five_level_resnet_fpn_backbone"
        )
    for key in ("TRAIN", "TEST", "UNLABELED"):
        for name in cfg.DATASETS[key] or ():
            _check_name(f"DATASETS.{key}", name, DatasetCatalog)
    check_unlabeled(cfg)
    _choose_device(cfg)
    return scale_to_processes(cfg, comm.get_world_size())


def _choose_device(cfg: CfgNode) -> None:
    """Check MODEL.DEVICE; where there is no GPU, take the CPU, without SOLVER.AMP."""
    cfg.MODEL.DEVICE = find_device(cfg.MODEL.DEVICE)
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        logging.getLogger(__name__).warning("SOLVER.AMP.ENABLED is False: it needs a GPU")
        cfg.SOLVER.AMP.ENABLED = False


def _check_name(key: str, name: str, registry) -> None:
    if name not in registry:
        known = list(registry.list()) if hasattr(registry, "list") else [n for n, _ in registry]
        words = "; --import names the module of yours that registers it"
        raise InputError(f"{key}: '{name}' is not registered{nearest(name, known)}{words}")


def check_parts(cfg: CfgNode) -> None:
    """Check that meta-architecture, backbone and RoI heads of a config are registered.

    Raises:
        InputError: if one is not; the message proposes the nearest name.
    """
    model = cfg.MODEL
    _check_name("MODEL.META_ARCHITECTURE", model.META_ARCHITECTURE, META_ARCH_REGISTRY)
    _check_name("MODEL.BACKBONE.NAME", model.BACKBONE.NAME, BACKBONE_REGISTRY)
    _check_name("MODEL.ROI_HEADS.NAME", model.ROI_HEADS.NAME, ROI_HEADS_REGISTRY)


def scale_to_processes(cfg: CfgNode, processes: int) -> CfgNode:
    """Scale batch, learning rate and schedule to a number of processes, as Detectron2 does.

    Returns:
        A new config; the same one if SOLVER.REFERENCE_WORLD_SIZE is 0 or this number.

    Raises:
        InputError: if the images of a step cannot be divided among REFERENCE_WORLD_SIZE processes.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    for key in ("IMS_PER_BATCH", "UNLABELED_PER_BATCH"):
        if reference and cfg.SOLVER[key] % reference:
            raise InputError(
                f"SOLVER.{key} is {cfg.SOLVER[key]}, which cannot be divided among the {reference} "
                "processes of SOLVER.REFERENCE_WORLD_SIZE; change one, or set it to 0"
            )
    scaled = DefaultTrainer.auto_scale_workers(cfg, processes)
    if scaled is cfg:
        return cfg
    solver = scaled.SOLVER
    logging.getLogger(__name__).warning(
        "Scaled from %d processes to %d: IMS_PER_BATCH %d, BASE_LR %g, MAX_ITER %d",
        *(reference, processes, solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER),
    )
    scaled.defrost()
    solver.UNLABELED_PER_BATCH = cfg.SOLVER.UNLABELED_PER_BATCH // reference * processes
    # Rounding to 0 would be an error in the one, and in the other mean never.
    solver.CHECKPOINT_PERIOD = max(1, solver.CHECKPOINT_PERIOD)
    if cfg.TEST.EVAL_PERIOD:
        scaled.TEST.EVAL_PERIOD = max(1, scaled.TEST.EVAL_PERIOD)

    def rescaled(losses):  # copies: with a YAML alias, several keys hold the same dict
        factor = reference / processes
        return [{**x, "warmup_iters": round(x.get("warmup_iters", 0) * factor)} for x in losses]

    scaled.KD.LOSSES = rescaled(scaled.KD.LOSSES)
    for stage in scaled.KD.LADDER.STAGES:
        if stage.get("losses"):
            stage["losses"] = rescaled(stage["losses"])
        if stage.get("iterations"):
            stage["iterations"] = max(1, round(stage["iterations"] * reference / processes))
        if stage.get("base_lr"):
            stage["base_lr"] = yaml_number(stage["base_lr"]) * processes / reference
    check_values(scaled)
    return scaled
