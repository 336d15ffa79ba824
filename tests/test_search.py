"Searches of a suite: trials never measure the test rows, the best is measured once, and reports count them"
import csv
import json
import shutil
import subprocess
import sys

import nbformat
import pytest
import yaml

from medclip_nb.core import InputError
from medclip_nb.datasets import make_squares
from medclip_nb.experiments import compare, load_suite, plan_suite, run_suite, searched_runs, suite_levels

DEFAULTS = {"dataset": "csv", "model": "starter", "device": "cpu", "n_boot": 20}
WORDS = {"name": "words", "template": "zero_shot", "params": {"labels": ["label"]},
         "search": {"method": "grid", "metric": "balanced_accuracy",
                    "space": {"templates": [["{}"], ["a {} square"]]}}}


def suite_file(folder, runs, **more):
    (path := folder / "tuned.yaml").write_text(yaml.safe_dump({"runs": runs} | more, sort_keys=False))
    return path


def result(folder, *files):
    return [(folder / f).read_bytes() for f in (files or ("metrics.json", "predictions.parquet"))]


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    make_squares(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(command, squares, tmp_path_factory):
    "A training run whose learning rate was searched, an evaluation of it, and a comparison"
    folder = tmp_path_factory.mktemp("tuned")
    search = {"method": "grid", "metric": "image_to_text_mean_rank", "goal": "min", "space": {"lr": ["1e-4", 0.01]}}
    runs = [{"name": "finetune", "template": "finetune", "params": {"epochs": 2, "batch_size": 8}, "search": search},
            {"name": "after", "template": "retrieval", "params": {"checkpoint": "{finetune}/checkpoint"}},
            {"name": "compare", "template": "compare", "params": {"reports_dir": "{suite}"}}]
    path = suite_file(folder, runs, defaults=DEFAULTS | {"data_root": str(squares)})
    done = subprocess.run([command, "suite", path, "--out", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return path, folder / "tuned"


def test_the_best_trial_is_measured_once_on_the_test_rows(tuned, squares):
    _, folder = tuned
    with open(squares / "table.csv", newline="") as f: splits = [row["split"] for row in csv.DictReader(f)]
    read = lambda name: json.loads((folder / name / "metrics.json").read_text())
    trials = [read(f"finetune.trial-{k}") for k in range(2)]
    ranks = [t["metrics"]["image_to_text_mean_rank"]["value"] for t in trials]
    best, found = min(range(2), key=ranks.__getitem__), read("finetune")
    facts = found["details"]["search"]
    assert (facts["tried"], facts["failed"], facts["chosen"]) == (2, 0, f"finetune.trial-{best}")
    assert facts["point"] == {"lr": [1e-4, 0.01][best]}
    assert (facts["value"], facts["highest"]) == (min(ranks), max(ranks))
    params = json.loads((folder / "finetune" / "run.json").read_text())["parameters"]
    assert params["lr"] == [1e-4, 0.01][best] and params["split"] == "test"
    import pandas as pd
    measured = lambda name: {splits[row] for row in pd.read_parquet(folder / name / "predictions.parquet")["row"]}
    assert measured("finetune") == {"test"} == measured("after")
    assert measured("finetune.trial-0") == {"valid"} == measured("finetune.trial-1")
    assert trials[best]["details"]["valid_mrr"] == found["details"]["valid_mrr"], "the same training, done again"
    weights = [next((folder / name / "checkpoint").glob("*.safetensors")).read_bytes()
               for name in ("finetune", f"finetune.trial-{best}")]
    assert weights[0] == weights[1]


def test_reports_say_how_many_were_tried(tuned):
    path, folder = tuned
    report = (folder / "finetune" / "report.html").read_text()
    assert "<strong>2 trials</strong> were measured on" in report and "too good an estimate" in report
    cells = nbformat.read(folder / "finetune" / "report.ipynb", 4).cells
    shown = next(c for c in cells if c.source == "show_search(search)")
    assert any("image/png" in o.get("data", {}) for o in shown.outputs)
    assert "trial" not in (folder / "after" / "report.html").read_text()
    said = (folder / "compare" / "report.html").read_text()
    assert "image_to_text_mean_rank" in said and "lr=" in said
    table = searched_runs(folder)
    assert list(table.index) == ["finetune"] and table.loc["finetune", "tried"] == 2
    assert set(compare(folder)["run"]) == {"finetune", "after"}
    assert "trial" not in (folder / "index.html").read_text()
    assert {r.status for r in plan_suite(path, folder.parent)} == {"kept"}


def test_labels_of_the_test_rows_change_no_trial(squares, tmp_path):
    "Neither the trials nor the choice; only what is measured at the end"
    found = {}
    for name in ("as they are", "exchanged"):
        shutil.copytree(squares, data := tmp_path / name)
        if name == "exchanged":
            with open(data / "table.csv", newline="") as f: rows = list(csv.DictReader(f))
            other = {"dark": "bright", "bright": "dark"}
            rows = [r | {"label": other[r["label"]]} if r["split"] == "test" else r for r in rows]
            with open(data / "table.csv", "w", newline="") as f:
                (out := csv.DictWriter(f, rows[0])).writeheader()
                out.writerows(rows)
        path = suite_file(tmp_path, [WORDS], name=name.replace(" ", "-"), defaults=DEFAULTS | {"data_root": str(data)})
        records = run_suite(path, tmp_path / "out", quiet=True)
        assert [r.status for r in records] == ["done"] * 3, [r.message for r in records]
        found[name] = records[0].path.parent
    first, second = found.values()
    for k in range(2): assert result(first / f"words.trial-{k}") == result(second / f"words.trial-{k}")
    assert result(first, "words.search.json") == result(second, "words.search.json")
    assert result(first / "words", "metrics.json") != result(second / "words", "metrics.json")
    said = (first / "words" / "report.html").read_text()
    assert "The prompts are the best of 2 trials on" in said and "selected no prompt" not in said


def test_what_cannot_be_searched(squares, tmp_path, monkeypatch):
    def fails(message, params=(), **changes):
        entry = WORDS | {"params": WORDS["params"] | dict(params), "search": WORDS["search"] | changes}
        path = suite_file(tmp_path, [entry], defaults=DEFAULTS | {"data_root": str(squares)})
        with pytest.raises(InputError, match=message): load_suite(path)
    fails("run words, search: unknown key 'tries'. Did you mean 'trials'", tries=3)
    fails("trials are measured on 'valid', so it has to be measured on other rows than split=valid", {"split": "valid"})
    fails("trials are measured on 'test', so it has to", split="test")
    fails(r"words.trial-1: zero_shot: Prompt '\{size\} \{\}' has a slot", space={"templates": [["{}"], ["{size} {}"]]})
    fails("words.trial-1: zero_shot: parameter 'n_boot' must be from 0", space={"n_boot": [5, -5]})
    monkeypatch.setitem(sys.modules, "optuna", None)
    fails(r"needs the package of that name: pip install 'medclip_nb\[search\]'", method="optuna", trials=1)


@pytest.mark.parametrize("metric, goal", [("ece", "min"), ("words/mean_rank", "min"), ("balanced_accuracy", "max")])
def test_without_a_goal_the_best_is_what_is_better(squares, tmp_path, metric, goal):
    entry = WORDS | {"search": WORDS["search"] | {"metric": metric}}
    path = suite_file(tmp_path, [entry], defaults=DEFAULTS | {"data_root": str(squares)})
    assert load_suite(path).runs[-1].search.goal == goal


def test_the_best_calibrated_is_the_one_with_the_lowest_error(squares, tmp_path):
    "Also where no goal is given; a metric that is not there costs one trial, and its name is told before another run"
    search = WORDS["search"] | {"metric": "eec"}
    write = lambda **changes: suite_file(
        tmp_path, [WORDS | {"search": search | changes}], defaults=DEFAULTS | {"data_root": str(squares)})
    *trials, last = run_suite(write(), tmp_path, quiet=True)
    assert [t.status for t in trials] == ["done", "skipped"] and last.status == "failed"
    assert trials[1].message == "words.trial-0: no metric 'eec'. Did you mean 'ece'?"
    assert "no metric 'eec'. Did you mean 'ece'? With another metric in the suite, trials stay" in last.message
    with pytest.raises(InputError, match="run words, search: words.trial-0 has no metric 'eec'. Did you mean 'ece'?"):
        plan_suite(write(), tmp_path)
    *trials, last = run_suite(write(metric="ece"), tmp_path, quiet=True)
    assert [t.status for t in trials] == ["kept", "done"] and last.status == "done"
    read = lambda name: json.loads((tmp_path / "tuned" / name / "metrics.json").read_text())
    facts = read("words")["details"]["search"]
    errors = [read(f"words.trial-{k}")["metrics"]["ece"]["value"] for k in range(2)]
    assert errors[0] != errors[1] and facts["value"] == min(errors) and facts["goal"] == "min"
    assert "<em>ece</em> was lowest" in (tmp_path / "tuned" / "words" / "report.html").read_text()


def test_data_without_validation_rows(squares, tmp_path):
    shutil.copytree(squares, data := tmp_path / "data")
    (data / "table.csv").write_text((data / "table.csv").read_text().replace(",valid", ",train"))
    entry = WORDS | {"search": WORDS["search"] | {"space": {"templates": [["{}"]]}}}
    path = suite_file(tmp_path, [entry], defaults=DEFAULTS | {"data_root": str(data)})
    trial, run = run_suite(path, tmp_path, quiet=True)
    assert trial.status == run.status == "failed"
    assert "has no rows in split 'valid'" in trial.message
    assert "None of 1 trials has a value of 'balanced_accuracy'" in run.message
    assert not (tmp_path / "tuned" / "words").exists()


@pytest.fixture(scope="module")
def bowl(tmp_path_factory):
    "A template whose score is highest at x = 0.3 on validation rows; it fails above 0.9"
    folder, v4 = tmp_path_factory.mktemp("bowl"), nbformat.v4
    params = 'x: float = 0.5\nkind: str = "a"\nsplit: str = "test"\nsearch: str = ""\nout_dir: str = "."'
    cells = [v4.new_code_cell(params, metadata={"tags": ["parameters"]}),
             v4.new_code_cell("import json, pathlib\nassert x <= 0.9\n"
                              "score = -abs(x - 0.3) if split == 'valid' else x\n"
                              "found = {'schema': 1, 'task': split, 'metrics': {'score': {'value': score}}}\n"
                              "_ = pathlib.Path(out_dir, 'metrics.json').write_text(json.dumps(found))")]
    nbformat.write(v4.new_notebook(cells=cells), folder / "bowl.ipynb")
    return folder


def bowl_suite(folder, **search):
    search = {"metric": "score", "space": {"x": {"low": 0, "high": 1}, "kind": ["a", "b"]}, "seed": 3} | search
    return suite_file(folder, [{"name": "run", "template": "bowl.ipynb", "search": search}])


def test_random_trials_are_known_beforehand_and_independent(bowl):
    suite = load_suite(bowl_suite(bowl, method="random", trials=4))
    assert [[r.name for r in level] for level in suite_levels(suite.runs)] == [
        [f"run.trial-{k}" for k in range(4)], ["run"]]
    xs = [r.params["x"] for r in suite.runs[:4]]
    assert len(set(xs)) == 4 and all(0 <= x <= 1 and x == float(f"{x:.4g}") for x in xs)


def test_optuna_goes_on_where_it_was_stopped(bowl, tmp_path):
    pytest.importorskip("optuna")
    path = bowl_suite(bowl, method="optuna", trials=4)
    assert len(suite_levels(load_suite(path).runs)) == 5, "each trial waits for those before"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_suite(path, whole, quiet=True)
    run_suite(path, parts, only=["run.trial-1"], quiet=True)
    record = json.loads((whole / "tuned" / "run.search.json").read_text())
    assert ([r.status for r in run_suite(path, parts, quiet=True)[:2]]
            == ["failed" if t["fault"] else "kept" for t in record["trials"][:2]]), "what is there is not done again"
    assert (parts / "tuned" / "run.search.json").read_bytes() == (whole / "tuned" / "run.search.json").read_bytes()
    points = [t["point"] for t in record["trials"]]
    assert len({p["x"] for p in points}) == 4 and {p["kind"] for p in points} <= {"a", "b"}
    values = [t["value"] for t in record["trials"] if t["value"] is not None]
    assert [t["fault"] != "" for t in record["trials"]] == [p["x"] > 0.9 for p in points]
    best = next(t for t in record["trials"] if t["name"] == record["chosen"])
    assert best["value"] == max(values)
    final = json.loads((whole / "tuned" / "run" / "metrics.json").read_text())
    assert final["metrics"]["score"]["value"] == best["point"]["x"] and final["task"] == "test"


def test_a_dry_run_counts_trials(bowl, tmp_path, command):
    path = bowl_suite(bowl, method="random", trials=3)
    done = subprocess.run([command, "suite", path, "--out", tmp_path, "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("run: 3 trials (random over x, kind) on 'valid', 0 of them there; the one whose score is highest is then "
            "measured once.") in done.stdout
    assert [line.split() for line in done.stdout.splitlines()[:4]] == [
        *([f"run.trial-{k}", "to", "run"] for k in range(3)), ["run", "to", "run"]]
    run_suite(path, tmp_path, only=["run.trial-0"], quiet=True)
    done = subprocess.run([command, "suite", path, "--out", tmp_path, "--dry-run"], capture_output=True, text=True)
    assert "1 of them there, the others about" in done.stdout


def test_a_scale_has_its_own_number_of_trials(bowl):
    path = bowl_suite(bowl, method="random", trials=9)
    content = yaml.safe_load(path.read_text()) | {"scales": {"tiny": {"runs": {"run": {"search": {"trials": 2}}}}}}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    assert len(load_suite(path).runs) == 10 and len(load_suite(path, "tiny").runs) == 3
