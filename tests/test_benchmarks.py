"The table of speed: benchmarks in tiny sizes leave their figures, and the table shows them"
import json
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = {
    "retrieval_metrics": ["--n", "700", "--dim", "16", "--rounds", "2"],
    "bootstrap": ["--rows", "200", "--classes", "3", "--resamples", "40", "--loop", "5", "--rounds", "2"],
    "itemized_loss": ["--batch", "4", "--items", "2", "--tokens", "9", "--dim", "16", "--heads", "2", "--rounds", "2"],
    "item_similarity": ["--images", "3", "--texts", "150", "--tokens", "9", "--dim", "16", "--heads", "2",
                        "--rounds", "2"],
    "probe": ["--n", "300", "--dim", "8", "--classes", "3", "--rounds", "2"],
}


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return runpy.run_path(str(FOLDER / "table.py"))


@pytest.mark.parametrize("name", TINY)
def test_figures_are_noted(name, table, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEDCLIP_NB_BENCH", str(tmp_path / "notes"))
    monkeypatch.setattr(sys, "argv", [name, *TINY[name], "--threads", "1"])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    found = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert found and all(one["low"] <= one["ratio"] <= one["high"] and one["rounds"] == 2 for one in found)
    shown = table["as_table"](found, bf16=False)
    assert len(shown) == len(found) and set(shown["path"]) == {one["path"] for one in found}


def test_goals_are_judged(table):
    about = {"path": "a", "rival": "b", "size": "", "seconds": 2.0, "rival_seconds": 5.0, "low": 2.0, "high": 3.0,
             "bound_seconds": 1.0, "memory_mb": [1.0, 4.0]}
    goals = [(2.5, 2.0, ""), (2.5, 3.0, ""), (2.5, 3.0, "bf16"), (2.5, None, "")]
    found = [about | {"ratio": ratio, "goal": goal, "needs": needs} for ratio, goal, needs in goals]
    shown = table["as_table"](found, bf16=False)
    assert list(shown["goal"]) == ["2 reached", "3 missed", "(3, needs bf16)", ""]
    assert list(table["as_table"](found, bf16=True)["goal"])[2] == "3 missed"
    assert shown.loc[0, "ratio"] == "2.50 (2.00 to 3.00)" and shown.loc[0, "bound"] == "50%"
    assert shown.loc[0, "memory (MB)"] == "1 / 4"


def test_some_benchmarks_are_measured_again(table, tmp_path):
    "The figures of the others stay, unless they are of another machine"
    about = {"processor": "a", "cores": 2, "date": "today"}
    earlier = {"machine": about | {"date": "yesterday"}, "results": [{"benchmark": "probe"}, {"benchmark": "loss"}]}
    text = json.dumps(earlier)
    (tmp_path / "r.json").write_text(text)
    assert table["kept"](tmp_path / "r.json", about, {"loss"}) == [{"benchmark": "probe"}]
    assert table["kept"](tmp_path / "r.json", about | {"cores": 4}, {"loss"}) == []
    assert table["kept"](tmp_path / "none.json", about, {"loss"}) == []


def test_the_kept_table(table):
    "It names its machine, and holds every benchmark"
    kept = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    assert kept["machine"]["processor"] and kept["machine"]["packages"]["torch"]
    assert {one["benchmark"] for one in kept["results"]} == set(table["STANDARD"])
    assert len([one for one in kept["results"] if one["goal"]]) >= 11
    assert len(table["as_table"](kept["results"], kept["machine"]["bf16"])) == len(kept["results"])
