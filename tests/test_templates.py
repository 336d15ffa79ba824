"The experiment templates, on a user's own CSV and on bad input, through the installed command"
import json
import os
import re
import subprocess

import numpy as np
import pandas as pd
import papermill
import pytest
from PIL import Image

from medclip_nb.experiments import compare, run, template_folder, template_parameters, templates

FINETUNE = ["-p", "epochs=2", "-p", "batch_size=16", "-p", "lr=1e-3"]
ASKED = ["-p", "data_options={split_by: group}"] # Splits of a table without them, where nothing is fitted


def command_line(command, *args, code=0):
    done = subprocess.run([command, *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "Sixteen patients with four pictures each: bright or dark squares, on the left or on the right; no split"
    folder, rng, rows = tmp_path_factory.mktemp("own data"), np.random.default_rng(0), []
    (folder / "images").mkdir()
    for i in range(64):
        bright, right = i // 4 % 2, i % 2
        pixels = rng.normal(80, 5, (64, 72))
        pixels[20:44, 36 * right + 6:36 * right + 30] += [-60, 120][bright]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"images/{i:03d}.png")
        rows.append({"image": f"images/{i:03d}.png", "label": ["dark", "bright"][bright], "group": f"patient {i // 4}",
                     "caption": f"A {['dark', 'bright'][bright]} square <b>{i}</b> on the {['left', 'right'][right]}, "
                                f"$5 & more"})
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    return folder / "table.csv"


def test_bad_rows_are_left_out_and_counted(command, table, tmp_path):
    rows = pd.read_csv(table)
    rows.loc[3, "image"] = "nowhere.png"
    rows.to_csv(root := table.with_name("one bad row.csv"), index=False, sep=";")
    command_line(command, "run", "linear_probe", "-p", "dataset=csv", "-p", f"data_root={root}", "-p", "device=cpu",
                 "--out", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())["skipped"]
    assert record["rows"] == 1 and record["kinds"] == {"missing image": 1} and record["list"][0]["row"] == 3
    report = (tmp_path / "run" / "report.html").read_text()
    assert "nowhere.png" in report and "cells are separated by semicolons, as the header shows" in report
    rows.loc[:4, "image"] = "nowhere.png"
    rows.to_csv(root, index=False, sep=";")
    probe = ("run", "linear_probe", root, "-p", "dataset=csv", "-p", "n_boot=0", "--out", tmp_path / "strict")
    said = command_line(command, *probe, code=2)
    assert "5 of 64 rows cannot be used (7.8%, at most 3 row(s) may be left out)" in said
    command_line(command, *probe, "-p", re.search(r"raise max_bad, as in (max_bad=\S+)\.\n", said)[1])


def test_a_head_takes_the_label_of_the_data(command, table, tmp_path):
    command_line(command, "run", "finetune", table, "-p", "dataset=csv", "-p", "mode=head", "-p", "n_boot=20",
                 "-p", "device=cpu", "--out", tmp_path / "head")
    assert "Balanced accuracy on 'label'" in (tmp_path / "head" / "report.ipynb").read_text()


@pytest.mark.parametrize("template, metric, extra", [
    ("linear_probe", "accuracy", []),
    ("zero_shot", "balanced_accuracy", ["-p", "classes=[dark, bright]", "-p", "limit=5", *ASKED]),
    ("retrieval", "image_to_text_R@1", ASKED),
    ("finetune", "text_to_image_R@10", FINETUNE),
    ("data_audit", "rows", [])])
def test_own_csv_without_code(command, table, tmp_path, template, metric, extra):
    command_line(command, "run", template, "-p", "dataset=csv", "-p", f"data_root={table}", "-p", "device=cpu", *extra,
                 "--out", tmp_path / "run")
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert np.isfinite(found["metrics"][metric]["value"])
    assert "made by group" in found["details"]["split_source"]
    assert {"report.ipynb", "report.html", "predictions.parquet",
            "run.json"} <= {p.name for p in (tmp_path / "run").iterdir()}
    assert "<b>" not in (tmp_path / "run" / "report.html").read_text().replace("<b></b>", "")
    if template == "zero_shot":
        assert found["details"]["classes"] == ["dark", "bright"] and found["details"]["drawn_from"]["test"] > 5
        report = (tmp_path / "run" / "report.html").read_text()
        assert "2 classes, from the parameter classes" in report and "Limited run" in report
    if template == "linear_probe": assert found["metrics"]["accuracy"]["value"] > 0.9
    if template == "finetune": assert (tmp_path / "run" / "checkpoint" / "open_clip_model.safetensors").is_file()


FEW = {"limit": 60, "n_boot": 20}
FEWER = {"few_shot": {"shots": [1], "seeds": [0], "methods": ["knn"]}, "finetune": {"epochs": 1, "limit": 16},
         "itemized": {"epochs": 1, "limit": 16}, "attention_maps": {"limit": 4}, "compare": {"n_boot": 50},
         "robustness": {"corruptions": ["noise"], "levels": [1]}, "zero_shot": {"sensitivity": False}}


@pytest.mark.parametrize("template", templates())
def test_template_as_it_is(template, tmp_path, monkeypatch):
    "Plain papermill in the folder of the template, where JupyterLab executes it too, leaves the record that a run does"
    few = {k: v for k, v in {**FEW, **FEWER.get(template, {})}.items() if k in template_parameters(template)}
    path = template_folder()/f"{template}.ipynb"
    monkeypatch.delenv("MEDCLIP_NB_BATCH") # As outside the runner, where relative paths start at the repository
    papermill.execute_notebook(path, tmp_path/"done.ipynb", {**few, "out_dir": str(tmp_path/"plain")}, cwd=path.parent,
                               kernel_name="python3", progress_bar=False)
    record = json.loads((tmp_path/"plain"/"run.json").read_text())
    wanted = {n: p.default for n, p in template_parameters(template).items()} | few
    assert record["parameters"] == {n: v for n, v in wanted.items() if n != "out_dir"}
    assert record["template"] == path.name and "metrics.json" in record["artefacts"]
    if template == "compare": return
    told = compare(tmp_path/"plain")
    assert set(told["dataset"]) == {"starter"} and set(told["model"]) == {"starter"}
    if template != "linear_probe": return
    run(path, few, tmp_path/"ours", quiet=True)
    ours = json.loads((tmp_path/"ours"/"run.json").read_text())
    assert ours.keys() - record.keys() == {"kernel", "phases"} and not record.keys() - ours.keys()
    assert set(ours["artefacts"]) - set(record["artefacts"]) == {"report.ipynb",
                                                                                                "report.html"}
    own = {"artefacts", "seconds", "started", "costs", "kernel", "phases"}
    assert {k: v for k, v in ours.items() if k not in own} == {k: v for k, v in record.items() if k not in own}
    assert ours["artefacts"]["metrics.json"] == record["artefacts"]["metrics.json"]


def test_two_runs_are_the_same_bytes(command, table, tmp_path):
    for name in "ab":
        command_line(command, "run", "finetune", "-p", "dataset=csv", "-p", f"data_root={table}", "-p", "device=cpu",
                     *FINETUNE, "--out", tmp_path / name)
    for name in ("report.ipynb", "metrics.json", "predictions.parquet", "history.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("fault, template, message", [
    ("no label column", "linear_probe", "no column 'label'"),
    ("grades", "linear_probe", "few different values: 'grade'"),
    ("missing image", "zero_shot", "no such file"),
    ("unreadable image", "linear_probe", "not an image that can be read"),
    ("empty caption", "retrieval", "the caption is empty"),
    ("one class", "linear_probe", "one class only"),
    ("unknown model", "zero_shot", "Did you mean 'ViT-B-32'"),
    ("unknown parameter", "zero_shot", "Did you mean"),
    ("no split", "zero_shot", "Give split=all to measure on all rows, or make splits by group"),
    ("no split", "retrieval", "-p 'data_options={split_by: group}'"),
    ("no table", "zero_shot", "no such file or folder")])
def test_bad_input_is_one_message(command, table, tmp_path, fault, template, message):
    asked = template in ("zero_shot", "retrieval") and fault != "no split"
    rows, extra, root = pd.read_csv(table), ASKED if asked else [], table.with_name(f"{fault}.csv")
    if fault == "no label column": rows = rows.drop(columns="label")
    if fault == "grades": rows = rows.rename(columns={"label": "grade"})
    if fault == "missing image": rows.loc[::3, "image"] = "nowhere.png"
    if fault == "unreadable image":
        (table.parent / "junk.png").write_bytes(b"junk")
        rows.loc[::3, "image"] = "junk.png"
    if fault == "empty caption": rows.loc[::3, "caption"] = "  "
    if fault == "one class": rows["label"] = "same"
    if fault == "unknown model": extra = [*ASKED, "-p", "model=ViT-B32"]
    if fault == "unknown parameter": extra = [*ASKED, "-p", "templats=x"]
    rows.to_csv(root, index=False)
    if fault == "no table": root = tmp_path / "nothing.csv"
    said = command_line(command, "run", template, "-p", "dataset=csv", "-p", f"data_root={root}", *extra, "--out",
                        tmp_path / "out", code=2)
    assert message in said
    assert not (tmp_path / "out").exists()
