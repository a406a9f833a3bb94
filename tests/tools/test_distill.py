"""tools/distill.py: from one config to trained models, a table and a picture."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from helpers import NO_TEST, ROOT, load_tool, run_script, train

from msad_kd.config.build import build_config


@pytest.fixture(scope="module")
def hr_weights(config_files, tmp_path_factory):
    """The checkpoint of a stock model at high resolution that was trained for a few steps."""
    folder = tmp_path_factory.mktemp("hr")
    torch.manual_seed(0)
    train(build_config(str(config_files["hr"]), ["OUTPUT_DIR", str(folder), *NO_TEST]))
    return folder / "model_final.pth"


def test_a_dry_run_writes_configs_that_train_net_runs(config_files, hr_weights, tmp_path, capsys):
    output = tmp_path / "out"
    load_tool("tools.distill").main(
        ["--config-file", str(config_files["hr"]), "--weights", str(hr_weights)]
        + ["--output", str(output), "--dry-run", "SOLVER.MAX_ITER", "2"]
        + ["teacher:SOLVER.MAX_ITER", "3", "student:KD.LOSSES", "[{name: l1, weight: 0.5}]"]
    )
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[-4:]] == ["hr", "teacher", "control", "student"]
    assert "l1 0.5" in said[-1] and sorted(x.name for x in output.iterdir()) == [
        "configs",
        "grid.yaml",
    ]
    steps = {}
    for role in ("teacher", "student", "control"):  # what the files say is enough to train them
        cfg = build_config(str(output / "configs" / f"{role}.yaml"), [])
        steps[role] = train(cfg).iter
        assert (output / role / "seed_1" / "model_final.pth").is_file()
    assert steps == {"teacher": 3, "student": 2, "control": 2}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config-file", "nowhere.yaml"], "'nowhere.yaml' is no file and not in the model zoo"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["judge:SOLVER.MAX_ITER", "3"], "there is no role 'judge'"),
        (["SOLVER.MAX_ITER"], "'SOLVER.MAX_ITER' has no value"),
        (["--scale", "3"], "3"),
        (["DATASETS.TEST", "()"], "DATASETS.TRAIN and DATASETS.TEST"),
        (["student:KD.LOSSES", "[{name: l3, weight: 1.0}]"], "there is no loss 'l3'"),
    ],
)
def test_what_is_wrong_ends_in_one_sentence(config_files, tmp_path, arguments, words):
    given = ["--config-file", str(config_files["hr"]), "--output", str(tmp_path), "--dry-run"]
    with pytest.raises(SystemExit, match="^distill.py: ") as end:
        load_tool("tools.distill").main([*given, *arguments])
    assert words in str(end.value) and "\n" not in str(end.value)


@pytest.mark.long
def test_killed_and_typed_again_it_ends_with_a_table(config_files, hr_weights, tmp_path):
    command = ["tools/distill.py", "--config-file", str(config_files["hr"])]
    command += ["--weights", str(hr_weights), "--output", str(tmp_path / "out")]
    command += ["SOLVER.MAX_ITER", "4"]
    first = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=os.environ)
    checkpoint = tmp_path / "out" / "teacher" / "seed_1" / "model_final.pth"
    for _ in range(3000):
        if checkpoint.exists():
            break
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    made = checkpoint.stat().st_mtime_ns
    done = run_script(*command, cwd=ROOT)
    assert "high resolution" in done.stdout and "against its control" in done.stdout
    assert checkpoint.stat().st_mtime_ns == made  # it went on
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [x["row"] for x in table["models"]] == ["hr", "teacher", "control", "student"]
    grid = yaml.safe_load((tmp_path / "out" / "grid.yaml").read_text())
    assert grid["rows"]["hr"]["checkpoint"] == str(hr_weights)
    for made in ("scenes.png", "ap_cost.png", "data/sizes.png", "export/config.yaml"):
        assert (tmp_path / "out" / made).is_file()
