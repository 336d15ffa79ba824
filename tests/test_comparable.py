"Runs that cannot be compared, tables and figures of those that can, and what they have cost"
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from medclip_nb.cli.main import app
from medclip_nb.evaluators import Result
from medclip_nb.experiments import (
    Table,
    blocks,
    column_names,
    compare,
    comparison_tables,
    differing_columns,
    expense_cells,
    expenses,
    over_runs,
)


def call(*words):
    "Exit code and output of the command; a traceback fails the test"
    done = CliRunner().invoke(app, [str(w) for w in words])
    if done.exception and not isinstance(done.exception, SystemExit): raise done.exception
    return done.exit_code, done.output


DETAILS = {"dataset": "d", "split": ["test"], "manifest": "0123456789abcdef", "classes": ["no", "yes"],
           "positive": "yes", "precision": "fp32", "bootstrap": {"unit": "group", "resamples": 100}}


def write_run(folder, metrics=("auroc",), n=100, skill=0.8, seed=0, record=None, task="zero_shot", **details):
    "A run with predictions"
    rng, truth = np.random.default_rng(seed), np.random.default_rng(9).integers(0, 2, n)
    names = np.array(["no", "yes"])
    told = np.where(rng.random(n) < skill, truth, 1 - truth)
    rows = pd.DataFrame({"row": range(n), "image": [f"{i}.png" for i in range(n)], "group": [f"p{i}" for i in range(n)],
                         "label": names[truth], "predicted": names[told], "correct": truth == told})
    value = float(rows["correct"].mean())
    table = pd.DataFrame([(m, value, value - 0.05, value + 0.05, n) for m in metrics],
                         columns=["name", "value", "low", "high", "n"])
    folder.mkdir(parents=True)
    Result(task, table, rows, DETAILS | details).save(folder)
    params = {"dataset": (DETAILS | details)["dataset"], "model": "m"}
    about = {"template": f"{task}.ipynb", "seconds": 10.0, "parameters": params}
    (folder / "run.json").write_text(json.dumps(about | (record or {})))


THRESHOLDS = {"multilabel": True, "thresholds": {"rule": "youden", "chosen_on": "valid"}}
RETRIEVAL = {"classes": None, "captions": 100, "ties": "mean"}


@pytest.mark.parametrize(("change", "metric", "columns"), [
    ({"split": ["valid"]}, "auroc", None),
    ({"manifest": "fedcba9876543210"}, "auroc", None),  # Another view, other labels, or rows that were skipped
    ({"dataset": "e"}, "auroc", None),
    ({"manifest": None}, "auroc", None),  # Rows that are not on record are no known rows
    ({"positive": "no"}, "auroc", {"auroc (positive yes)", "auroc (positive no)"}),
    ({"positive": "no"}, "lesion/auroc", None),
    ({"classes": ["no", "yes", "perhaps"]}, "balanced_accuracy",
     {"balanced_accuracy (classes no / yes)", "balanced_accuracy (classes no / perhaps / yes)"}),
    (THRESHOLDS, "accuracy", {"accuracy", "accuracy (labels several per row; threshold youden, chosen on valid)"}),
    ({"n": 90}, "accuracy", {"accuracy (n 100)", "accuracy (n 90)"}),
])
def test_what_differs_shares_no_column(change, metric, columns, tmp_path):
    if metric.startswith("lesion"):  # The same, for one of several label columns
        labels = lambda positive: {"labels": {"lesion": {"classes": ["no", "yes"], "positive": positive}}}
        one, other, columns = labels("yes"), labels("no"), {f"{metric} (positive yes)", f"{metric} (positive no)"}
    else: one, other = {}, change
    write_run(tmp_path / "one", [metric], **one)
    write_run(tmp_path / "other", [metric], **other)
    found = [part.assign(column=column_names(part)) for _, part in blocks(compare(tmp_path))]
    if columns is None: assert [list(part["run"]) for part in found] == [["one"], ["other"]]
    else: assert len(found) == 1 and set(found[0]["column"]) == columns


@pytest.mark.parametrize(("name", "one", "other", "said"), [
    ("f1_macro", THRESHOLDS, THRESHOLDS | {"thresholds": {"rule": "youden", "chosen_on": "test"}}, "chosen on test"),
    ("f1_macro", {"threshold": 0.5}, {"threshold": 0.3}, "threshold 0.5"),
    ("image_to_text_R@10", RETRIEVAL, RETRIEVAL | {"captions": 80}, "captions 80"),
    ("text_to_image_R@10", RETRIEVAL, RETRIEVAL | {"ties": "worst"}, "ties worst"),
])
def test_a_definition_is_named_by_what_differs(name, one, other, said, tmp_path):
    write_run(tmp_path / "one", [name], **one)
    write_run(tmp_path / "other", [name], **other)
    (_, part), = blocks(compare(tmp_path))
    columns = list(column_names(part))
    assert len(set(columns)) == 2 and any(said in c for c in columns), columns


def test_what_makes_no_other_metric_stays_in_one_column(tmp_path):
    write_run(tmp_path / "one", ["accuracy"], prompts={"yes": ["a"]})
    write_run(tmp_path / "two", ["accuracy"], prompts={"yes": ["b"]}, positive="no", precision="bf16",
              measured_where_fitted=True)
    (_, part), = blocks(compare(tmp_path))
    assert set(column_names(part)) == {"accuracy"}, "accuracy knows no positive class"
    assert differing_columns(part) == ["prompts", "stated"] and "bf16; measured where fitted" in set(part["stated"])


def test_seeds_on_other_rows_have_no_mean(tmp_path):
    for seed in range(3): write_run(tmp_path / f"a-{seed}", ["accuracy"], manifest=f"{seed // 2}" * 16)
    found = over_runs(compare(tmp_path), {"a": ["a-0", "a-1", "a-2"]})
    assert dict(zip(found["metric"], found["n"])) == {"accuracy (rows 00000000)": 2, "accuracy (rows 11111111)": 1}


def test_bold_is_what_a_test_tells_apart(tmp_path):
    for name, skill, seed in (("good", 0.97, 1), ("fair", 0.7, 2), ("alike", 0.7, 3)):
        write_run(tmp_path / name, ["accuracy"], skill=skill, seed=seed)
    load = lambda run: Result.load(tmp_path / run)
    table = compare(tmp_path)
    (block,) = comparison_tables(table, load, n_boot=2000).values()
    assert block.best == {("good", "accuracy")} and "**" in block.table.markdown()
    (block,) = comparison_tables(table[table["run"] != "good"], load, n_boot=2000).values()
    assert not block.best and "none is bold" in block.note and "**" not in block.table.markdown()
    (block,) = comparison_tables(table.assign(metric="mcc"), load, n_boot=200).values()
    assert not block.best, "a metric without a paired test has no best"
    shifted = Result.load(tmp_path / "fair")
    shifted.predictions["image"] = "other/" + shifted.predictions["image"]
    (block,) = comparison_tables(table, lambda run: shifted if run == "fair" else load(run), n_boot=200).values()
    assert not block.best, "runs on other rows are in no pair"


def test_the_command_keeps_apart_and_saves(tmp_path):
    runs, names = tmp_path / "runs", ["50%_a & b", "b|c", "elsewhere"]
    for name, skill in zip(names, (0.97, 0.6, 0.6)):
        write_run(runs / name, ["balanced_accuracy"], skill=skill, manifest=("1" if name != "elsewhere" else "2") * 16)
    (runs / "b|c" / "history.jsonl").write_text('{"epoch": 1, "train_loss": 2.0}\n{"epoch": 2, "train_loss": 1.0}\n')
    code, said = call("compare", runs, "--tables", "latex", "--tables", "markdown", "--tables", "csv", "--figures",
                      "svg,pdf")
    assert code == 0 and said.count("zero_shot · d · test · rows") == 2
    assert {p.name for p in (runs / "figures").iterdir()} == {f"{n}.{f}" for n in ("metrics-1", "curves-1")
                                                             for f in ("svg", "pdf")}
    latex = (runs / "tables" / "metrics-1.tex").read_text()
    assert r"50\%\_a \& b & \textbf{" in latex and r"b$|$c" in latex and latex.count(r"\\") == 3
    for rule in ("toprule", "midrule", "bottomrule"): assert latex.count(f"\\{rule}") == 1
    assert r"| b\|c | 0." in (runs / "tables" / "metrics-1.md").read_text()
    data = pd.read_csv(runs / "tables" / "metrics-1.csv")
    assert data["told_apart"].tolist() == [True, False] and data["value"].between(0, 1).all()
    svg = (runs / "figures" / "metrics-1.svg").read_text()
    assert re.search(r">balanced accuracy</text>", svg), "text stays text"
    written = {path: path.read_bytes() for path in (runs / "figures").iterdir()}
    for given in (["svg", "pdf"], ["svg", "--figures", "pdf"]):
        shutil.rmtree(runs / "figures")
        assert call("compare", runs, "--figures", *given)[0] == 0
        assert {path: path.read_bytes() for path in (runs / "figures").iterdir()} == written
    code, said = call("compare", runs, "--figures", "svg")
    assert code == 2 and "is there already" in said
    assert call("compare", runs, "--figures", "svg", "--overwrite")[0] == 0


@pytest.mark.parametrize(("words", "message"), [
    (["--figures", "svgg"], "no format 'svgg'. Did you mean 'svg'?"),
    (["--figures", "pdf,svgg"], "no format 'svgg'. Did you mean 'svg'?"),
    (["--tables", "latx"], "no format 'latx'. Did you mean 'latex'?"),
    (["--tables", "csv", "--metric", "mcc"], "No run has the metric mcc"),
    (["--tables", "csv", "--out", "runs/one"], "is the folder of a run"),
])
def test_a_mistake_writes_nothing(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "one", ["balanced_accuracy"])
    before = sorted(p for p in tmp_path.rglob("*"))
    code, said = call("compare", "runs", *words)
    assert code == 2 and message in said
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_a_name_is_no_markup():
    table = Table(pd.DataFrame({"run": ["<b>x</b>", "=1+1"], "a|b": ["*", None]}), bold={(0, "a|b")})
    assert "<b>x" not in table._repr_html_() and "<strong>*</strong>" in table._repr_html_()
    assert table.csv().splitlines()[2].startswith("'=1+1") and r"**\***" in table.markdown()


def test_costs_count_parents_once_and_no_cached_throughput(tmp_path):
    write_run(tmp_path / "train", record={"seconds": 100, "costs": {"images_trained": 640, "seconds_trained": 10.0}})
    for name, costs in (("fresh", {"images_encoded": 50, "seconds_encoded": 2.0, "images_cached": 0}),
                        ("again", {"images_cached": 50, "memory": 2_000_000_000})):
        write_run(tmp_path / name, record={"costs": costs, "builds_on": {"train": "1"}})
    found = expenses(tmp_path).set_index("run")
    assert found["seconds_in_all"].to_dict() == {"train": 100, "fresh": 110, "again": 110}
    cells = expense_cells(expenses(tmp_path)).set_index("run")
    assert cells["encoded (images/s)"].to_dict() == {"train": "–", "fresh": "25", "again": "cached"}
    assert cells.loc["train", "trained (images/s)"] == "64" and cells.loc["again", "memory (GB)"] == "2.00"
    assert cells.loc["train", "with what it builds on"] == "–"
