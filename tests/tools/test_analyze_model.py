"""tools/analysis/analyze_model.py: once as a process of its own, then by its main()."""

import json
import re

import pytest
import torch
from helpers import load_tool, run_script
from torch import nn

from msad_kd import KDTrainer
from msad_kd.evaluation.cost import count_gmacs

tool = load_tool("analyze_model")


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def branches(config_files, tmp_path):
    """branches(role, ARGUMENT, ...): what the tool finds, run in this process."""

    def run(role, *arguments):
        file = tmp_path / "costs.json"
        tool.main(["--config-file", str(config_files[role]), "--json", str(file), *arguments])
        return json.loads(file.read_text())["branches"]

    return run


def test_a_teacher_by_branches(config_files, teacher_weights, config, tmp_path):
    arguments = ["--config-file", config_files["teacher"], "--weights", teacher_weights]
    arguments += ["--test-images", 2, "--json", tmp_path / "costs.json"]
    process = run_script("tools/analysis/analyze_model.py", *arguments)
    result = json.loads((tmp_path / "costs.json").read_text())
    assert list(result["branches"]) == ["hr", "lr", "fused"] and result["images"] == 2
    fused = result["branches"]["fused"]
    assert fused["side"] == "64 + 32"
    model = KDTrainer.build_model(config("teacher"))
    params = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert fused["params_m"]["total"] == pytest.approx(params)
    header, _, *lines = [line for line in process.stdout.splitlines() if line.startswith("|")]
    assert cells(header)[:4] == ["part", "params (M)", "GMACs hr", "activations (M) hr"]
    parts = ["bottom-up", "FPN", "fusion", "RPN", "RoI heads", "rest", "total"]
    assert [cells(line)[0] for line in lines] == parts
    totals = [f"{fused[kind]['total']:.3f}" for kind in ("gmacs", "activations_m")]
    assert cells(lines[-1])[-2:] == totals
    gmacs = {name: branch["gmacs"] for name, branch in result["branches"].items()}
    for part in ("bottom-up", "FPN"):
        high, low, both = (gmacs[branch][part] for branch in ("hr", "lr", "fused"))
        assert 0 < low < high and both == pytest.approx(high + low)
    assert gmacs["hr"]["bottom-up"] == pytest.approx(4 * gmacs["lr"]["bottom-up"])
    assert gmacs["hr"]["fusion"] == gmacs["lr"]["fusion"] == 0 < gmacs["fused"]["fusion"]
    assert "mean over 2" in process.stdout and "fused: 64 + 32 px" in process.stdout


def test_a_stripped_student_costs_what_its_baseline_costs(branches, config, tmp_path, capsys):
    """Neither the teacher nor the losses' parts are needed."""
    weights = tmp_path / "stripped.pth"
    torch.save({"model": KDTrainer.build_model(config("lr")).state_dict()}, weights)
    losses = ["KD.LOSSES", "[{'name': 'mgd', 'weight': 1.0}]", "KD.TEACHER.CONFIG_FILE", "no.yaml"]
    sizes = ["--image-size", "64", "128"]
    costs = [*branches("student", "--weights", str(weights), *sizes, *losses).values()]
    costs += branches("lr", *sizes).values()
    assert costs[0] == costs[1] and costs[0]["side"] == "32" and costs[0]["gmacs"]["RoI heads"] > 0
    out = capsys.readouterr().out
    assert "at 10 detections" in out and "the model: 32 px" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["costs.json", "stripped.pth"]


def test_masks_cost_by_the_number_of_detections(branches):
    costs = [branches("lr", "--detections", count)[""]["gmacs"] for count in ("1", "3", "5")]
    heads = [gmacs["RoI heads"] for gmacs in costs]
    assert heads[2] - heads[1] == pytest.approx(heads[1] - heads[0]) and heads[0] < heads[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weights", "nowhere.pth"], "'nowhere.pth' for the config .* does not exist"),
        (["--test-images", "0"], "--test-images: '0' is no whole number"),
        (["--test-images", "1", "DATASETS.TEST", "()"], "no data set; set DATASETS.TEST"),
    ],
)
def test_mistakes_end_in_one_sentence(config_files, capsys, arguments, words):
    with pytest.raises(SystemExit) as end:
        tool.main(["--config-file", str(config_files["lr"]), *arguments])
    assert re.search(words, f"{end.value} {capsys.readouterr().err}")  # the second: argparse's own


class Toy(nn.Module):
    """A detector of three layers, and a matrix product that belongs to no part."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential()
        self.backbone.bottom_up = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.backbone.lateral = nn.Conv2d(4, 2, 1)
        self.head = nn.Linear(2, 5)

    def forward(self, batch):
        logits = self.head(self.backbone(batch[0]).mean(dim=(2, 3)))
        return logits.T @ logits


def test_cost_by_part_by_hand():
    costs = tool.cost_by_part(Toy(), [torch.zeros(1, 3, 8, side) for side in (8, 16)])
    pixels = (8 * 8 + 8 * 16) / 2
    parts = {
        "gmacs": ([pixels * 3 * 4 * 9, pixels * 4 * 2, 2 * 5, 5 * 5], 1e9),
        "activations_m": ([pixels * 4, pixels * 2, 5, 5 * 5], 1e6),
        "params_m": ([3 * 4 * 9, 4 * 2 + 2, 2 * 5 + 5, 0], 1e6),
    }
    assert costs.keys() == parts.keys()
    for kind, (expected, unit) in parts.items():
        assert list(costs[kind]) == ["bottom-up", "FPN", "dense head", "rest", "total"]
        values = [unit * value for value in costs[kind].values()]
        assert values == pytest.approx([*expected, sum(expected)], abs=1e-3)


def test_parts_of_real_models_add_up(config):
    cfg = config("lr")
    model = KDTrainer.build_model(cfg).eval()
    inputs = next(iter(KDTrainer.build_test_loader(cfg, "tiny_val")))
    costs = tool.cost_by_part(model, inputs)
    assert costs["gmacs"]["total"] == pytest.approx(count_gmacs(model, inputs))
    for by_part in costs.values():
        assert list(by_part) == ["bottom-up", "FPN", "RPN", "RoI heads", "rest", "total"]
        *parts, total = by_part.values()
        assert sum(parts) == pytest.approx(total) and min(parts[:-1]) > 0
        assert by_part["rest"] == pytest.approx(0, abs=1e-9)
