"""The keys this project adds, and what is said of those it does not know."""

import argparse
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from helpers import ROOT

from msad_kd import add_msad_kd_config
from msad_kd.config.build import build_config
from msad_kd.config.imports import VARIABLE, Import, import_module
from msad_kd.config.stages import read_stages
from msad_kd.losses.terms import read_losses
from msad_kd.utils.errors import InputError
from msad_kd.utils.flat_config import flatten_config
from msad_kd.utils.schema import yaml_number

PIPED = {"capture_output": True, "text": True}


def own_keys():
    stock, ours = get_cfg(), get_cfg()
    add_msad_kd_config(ours)
    return sorted(flatten_config(ours).keys() - flatten_config(stock).keys())


def test_every_key_is_read():
    """Look for it as an attribute or a string; files with tables of keys do not count."""
    tables = "defaults.py", "values.py", "changes.py"
    files = [path for path in (ROOT / "msad_kd").rglob("*.py") if path.name not in tables]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    loaded = [x for x in nodes if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Load)]
    read = {node.attr for node in loaded}
    read |= {x.value for x in nodes if isinstance(x, ast.Constant) and isinstance(x.value, str)}
    assert [key for key in own_keys() if key.rsplit(".", 1)[-1] not in read] == []


def test_stock_defaults_are_left_alone():
    stock, ours = get_cfg(), get_cfg()
    add_msad_kd_config(ours)
    stock, ours = flatten_config(stock), flatten_config(ours)
    assert {key: ours[key] for key in stock} == stock


def test_files_and_options_are_merged(config_files):
    losses = "[{'name': 'pkd', 'weight': 2.0, 'levels': ['p2', 'p3']}]"
    options = ["KD.SCALE", "4", "MODEL.FPN.OUT_CHANNELS", 8, "KD.LOSSES", losses]
    cfg = build_config(str(config_files["student"]), options)
    assert (cfg.KD.SCALE, cfg.MODEL.FPN.OUT_CHANNELS) == (4, 8)
    assert cfg.MODEL.META_ARCHITECTURE == "DistilledRCNN"
    assert cfg.KD.LOSSES == [{"name": "pkd", "weight": 2.0, "levels": ["p2", "p3"]}]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["KD.TEACHER.WIEGHTS", "x.pth"], "KD.TEACHER.WIEGHTS; did you mean KD.TEACHER.WEIGHTS"),
        (["SOLVER.MAX_ITERS", "3"], "SOLVER.MAX_ITERS; did you mean SOLVER.MAX_ITER"),
        (["QQQ.XYZZY", "3"], "unknown config key: QQQ.XYZZY$"),
        (["SEED.X", "3"], "unknown config key: SEED.X; did you mean SEED"),
        (["MODEL.DEVICE.cuda", "3"], "unknown config key: MODEL.DEVICE.cuda; .*MODEL.DEVICE"),
        (["MODEL", "3"], "^the config cannot be read: MODEL is a section.*below it$"),
        (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE is 'gpu'; it should be cpu, cuda, or one GPU"),
        (
            ["DATASETS.TEST", "('voc_2007_tset',)"],
            "TEST: 'voc_2007_tset' .* mean voc_2007_test.; --",
        ),
        (["KD.SCALE"], "cannot be read: .*odd length"),
        (["KD.SCALE", "2", "--resume"], "'--resume' is an option: write it before the KEY VALUE"),
        (["MODEL.WEIGHTS=a.pth"], "write KEY VALUE with a space: MODEL.WEIGHTS a.pth$"),
        (["KD.SCALE", "two"], "cannot be read: Type mismatch.*KD.SCALE$"),
        (["KD.SCALE", "3"], "KD.SCALE is 3.*power of two"),
        (["MODEL.BACKBONE.NAME", "build_resnet"], "'build_resnet' .* mean build_resnet_backbone"),
        (["MODEL.FPN.TOP_BLOCK", "conv_p5"], "conv_p5, but .*build_resnet.* does not read it"),
        (["MODEL.META_ARCHITECTURE", "DistiledRCNN"], "'DistiledRCNN' .* mean DistilledRCNN"),
        (["MODEL.ROI_HEADS.NAME", "StandardHeads"], "'StandardHeads' .* mean StandardROIHeads"),
        (["SOLVER.REFERENCE_WORLD_SIZE", 3], "IMS_PER_BATCH is 16, which .* 3 processes"),
    ],
)
def test_options_that_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        build_config("", options)


def test_the_option_import_holds_for_the_processes_that_a_command_starts(tmp_path, monkeypatch):
    (tmp_path / "my_data.py").write_text(
        "from detectron2.data import DatasetCatalog\nDatasetCatalog.register('own', list)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in (VARIABLE, "PYTHONPATH"):
        monkeypatch.setenv(name, "")
    parser = argparse.ArgumentParser()
    parser.add_argument("--import", action=Import)
    assert vars(parser.parse_args(["--import", "my_data"])) == {}
    program = "from msad_kd import build_config; build_config('', ['DATASETS.TEST', ('own',)])"
    command = [sys.executable, "-c", program]
    subprocess.run(command, cwd=ROOT, check=True)  # not where the module is
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, VARIABLE: ""}, **PIPED)
    assert "'own' is not registered; --import names the module" in done.stderr.splitlines()[-1]
    parser.parse_args(["--import", "my_dota"])
    with pytest.raises(InputError, match="no module 'my_dota'"):
        build_config("", [])


def test_a_users_module_is_imported(tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text("import os\n")
    (tmp_path / "my_broken_parts.py").write_text("import no_such_package_of_mine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import_module("my_parts")
    assert "my_parts" in sys.modules
    with pytest.raises(InputError, match="--import: there is no module 'my_partz'"):
        import_module("my_partz")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_of_mine"):
        import_module("my_broken_parts")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("no/such.yaml", "'no/such.yaml' does not exist"),
        ("configs/Shapes", "'configs/Shapes' is a folder"),
        ("lazy.py", r"tools/lazyconfig_tr"),
    ],
)
def test_files_that_are_no_config(file, words):
    with pytest.raises(InputError, match=f"the config file .*{words}"):
        build_config(file, [])


NO_SECTIONS = ("", "# no key\n", "MODEL:\n", "MODEL: 3\n", "- 1\n- 2\n", "a text\n", "1: 2\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("KD:\n  TEECHER:\n    WEIGHTS: x\n", "KD.TEECHER; did you mean KD.TEACHER"),
        ("MODEL:\n  FPNN: 3\n", "MODEL.FPNN; did you mean MODEL.FPN"),
        ("_BASE_: gone.yaml\n", "gone.yaml"),
        *((text, "'.*my.yaml' cannot .*sections with keys below") for text in NO_SECTIONS),
        ("INPUT:\n", "'.*my.yaml' cannot be read: INPUT is a section"),
        ("MODEL:\n\tMASK_ON: true\n", "cannot be read: line 2, column 1: .*; indent by spaces$"),
        ("_BASE_: my.yaml\n", "'.*my.yaml' cannot be read: its _BASE_ leads back"),
        ("KD:\n  LOSSES:\n", "KD.LOSSES: None should be a list of dicts"),
        ("KD:\n  LADDER:\n    STAGES:\n", "KD.LADDER.STAGES: None should be a list of dicts"),
    ],
)
def test_files_that_are_refused(tmp_path, text, words):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        build_config(str(tmp_path / "my.yaml"), [])


def test_detectron2s_own_configs_may_run_code(tmp_path):
    """Its RetinaNets compute their anchors in YAML."""
    zoo = Path(model_zoo.__file__).parent / "configs"
    base = zoo / "COCO-Detection/retinanet_R_50_FPN_3x.yaml"
    (tmp_path / "my.yaml").write_text(f"_BASE_: {base}\n")
    cfg = build_config(str(tmp_path / "my.yaml"), [])
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0] == pytest.approx([32, 32 * 2 ** (1 / 3), 50.7968337])
    (tmp_path / "copy.yaml").write_text((zoo / "Base-RetinaNet.yaml").read_text())
    with pytest.raises(InputError, match="RetinaNets, MODEL.ANCHOR_GENERATOR.SIZES"):
        build_config(str(tmp_path / "copy.yaml"), [])


def test_the_device_is_the_gpu_or_with_one_warning_the_cpu(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert build_config("", []).MODEL.DEVICE == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, warnings in (("cuda", ["No GPU is"]), ("cpu", [])):
        caplog.clear()
        cfg = build_config("", ["MODEL.DEVICE", device, "SOLVER.AMP.ENABLED", True])
        assert cfg.MODEL.DEVICE == "cpu" and not cfg.SOLVER.AMP.ENABLED
        said = [*warnings, "SOLVER.AMP.ENABLED is False"]
        assert len(caplog.messages) == len(said) and all(map(str.startswith, caplog.messages, said))
        caplog.clear()
        build_config("", ["MODEL.DEVICE", "cpu"])
        assert not caplog.messages


def test_devices_that_do_not_fit_the_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    build_config("", ["MODEL.DEVICE", "cuda:1"])
    assert current == [torch.device("cuda:1")]
    with pytest.raises(InputError, match="'cuda:2', but the last GPU here is cuda:1"):
        build_config("", ["MODEL.DEVICE", "cuda:2"])
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    for device, words in (("cuda:1", "each process has a GPU of its own; set"), ("cpu", "hide")):
        with pytest.raises(InputError, match=f"MODEL.DEVICE is .*{words}"):
            build_config("", ["MODEL.DEVICE", device])


REFERENCE = ["SOLVER.REFERENCE_WORLD_SIZE", 8, "SOLVER.IMS_PER_BATCH", 16]


def test_the_world_size_scales_schedule_and_distillation_once(monkeypatch):
    terms = [{"name": "l1", "weight": 0.6, "warmup_iters": 500}, {"name": "mse", "weight": 1}]
    keys = [*REFERENCE, "SOLVER.MAX_ITER", 1000, "KD.LOSSES", terms]
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    cfg = build_config("", keys)
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.REFERENCE_WORLD_SIZE) == (4, 4000, 2)
    assert [entry.get("warmup_iters", 0) for entry in cfg.KD.LOSSES] == [2000, 0]
    again = cfg.clone()  # a run's own config.yaml, used once more
    assert DefaultTrainer.auto_scale_workers(again, 2) is again
    monkeypatch.setattr(comm, "get_world_size", lambda: 8)
    cfg = build_config("", keys)
    assert (cfg.SOLVER.MAX_ITER, cfg.KD.LOSSES[0]["warmup_iters"]) == (1000, 500)


def test_what_an_alias_repeats_is_scaled_once(monkeypatch, tmp_path):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    (tmp_path / "ladder.yaml").write_text(
        "KD:\n"
        "  LOSSES: &kd [{name: l1, weight: 5e-1, warmup_iters: 500}]\n"
        "  LADDER:\n"
        "    STAGES:\n"
        "      - {name: a, config_file: t.yaml, weights: t.pth, losses: *kd, base_lr: 8e-2}\n"
        "      - {name: b, config_file: t.yaml, weights: t.pth, losses: *kd}\n"
    )
    cfg = build_config(str(tmp_path / "ladder.yaml"), REFERENCE)
    stages = read_stages(cfg.KD.LADDER.STAGES)
    for losses in (cfg.KD.LOSSES, stages[0].losses, stages[1].losses):
        # YAML 1.1 has no point in 5e-1 and takes it for a text.
        assert [(term.warmup_iters, term.weight) for term in read_losses(losses)] == [(2000, 0.5)]
    assert stages[0].base_lr == pytest.approx(0.02)


@pytest.mark.parametrize("number", ["1e-3", "-2E5", "3e+2", "1.5e7"])
def test_numbers_that_yaml_reads_as_text(number):
    assert yaml_number(yaml.safe_load(number)) == float(number)
    assert yaml_number("p2") == "p2" and yaml_number(2) == 2 and yaml_number("1e") == "1e"


def test_empty_keys(tmp_path):
    (tmp_path / "my.yaml").write_text("DATASETS:\n  TEST:\nKD:\n  TEACHER:\n    OPTS:\n")
    assert not build_config(str(tmp_path / "my.yaml"), []).DATASETS.TEST
