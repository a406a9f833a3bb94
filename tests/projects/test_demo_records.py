"""What was recorded beside the checkpoints, and the demo's comparison with it."""

import json

import pytest
from demo_rows import KEYS, ap

from projects.Shapes import plan, records
from projects.Shapes.jobs import DemoError, Screen


def write_records(folder, **results):
    folder.mkdir(exist_ok=True)
    for name, found in results.items():
        (folder / f"{name}.pth").touch()
        (folder / f"{name}.json").write_text(json.dumps({"command": "c", "results": found}))


def test_absent_checkpoint_is_told_with_the_way_out(tmp_path):
    with pytest.raises(DemoError, match=r"hr.pth' does not exist.*make demo-full"):
        records.read(tmp_path)


def test_record_without_all_branches_is_refused(tmp_path):
    write_records(tmp_path, hr={"hr": ap(44, 43)}, teacher_jitter={"hr": ap(1, 1), "lr": ap(1, 1)})
    with pytest.raises(DemoError, match="'.*teacher_jitter.json' lacks the AP"):
        records.read(tmp_path)


def test_record_is_completed_by_what_is_measured(tmp_path):
    write_records(tmp_path, hr={}, teacher_jitter={})
    rows = {key: ap(index, index) for index, key in enumerate(KEYS[:4])}
    records.complete(tmp_path, {"device": "no GPU", "rows": rows})
    found = records.read(tmp_path)
    assert found["hr"]["results"] == {"hr": ap(0, 0)}
    teacher = found["teacher_jitter"]
    assert teacher["results"] == {"hr": ap(1, 1), "lr": ap(2, 2), "fused": ap(3, 3)}
    assert teacher["command"] == "c" and "no GPU" in found["hr"]["machine"]


def test_announcer_tells_each_model_once_and_checks_it(tmp_path, capsys):
    rows = plan.model_rows(tmp_path, tmp_path, [])[:4]
    recorded = {"hr": {"results": {"hr": ap(44, 43)}}}
    recorded[plan.TEACHER] = {"results": {name: ap(45, 44) for name in ("hr", "lr", "fused")}}
    announce = plan.Announcer(tmp_path, rows, Screen(), recorded)
    announce()
    results = {"rows": {"hr": ap(44.1, 43)}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    announce()
    announce()
    assert capsys.readouterr().out.count("stock HR, p2-p6: box AP 44.1") == 1
    results["rows"]["teacher_jitter-lr"] = ap(45, 40)
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(DemoError, match="teacher, LR branch has mask AP 40.0 here"):
        announce()
