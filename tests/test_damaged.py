"""A corpus of damaged files through the command: no hang, no traceback, nothing bad used silently, and what the check
calls usable is used"""
import json
import re
import subprocess

import damaged
import forks
import numpy as np
import pandas as pd
import pytest

SEED = 0
LONGEST = 240 # Seconds for a command; each takes a tenth of it


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "data"
    folder.mkdir()
    return folder, damaged.pictures(folder, SEED)


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies") / "data"
    folder.mkdir()
    return folder, damaged.studies(folder, SEED)


def write_table(folder, found, column):
    "Every file a row, in two classes"
    labels = ["ab"[n % 2] for n in range(len(found))]
    table = pd.DataFrame({column: [one.path for one in found], "label": labels, "split": "test"})
    table.to_csv(folder / "table.csv", index=False)
    return folder / "table.csv"


def ended(command, *words, within=LONGEST):
    "The exit code and all that was said, without a traceback"
    done = subprocess.run([command, *map(str, words)], capture_output=True, text=True, errors="replace",
                          stdin=subprocess.DEVNULL, timeout=within)
    said = done.stdout + done.stderr
    assert "Traceback" not in said and "Error:" not in re.sub(r"\(\w*Error: .*", "", done.stderr), said
    return done.returncode, said


def refusals(command, dataset, table, out, *options):
    "Row -> what `data validate` says against it"
    words = ["data", "validate", dataset, "--root", table, "--images", "decode", "--csv", out, *options]
    code, said = ended(command, *words)
    findings = pd.read_csv(out)
    errors = findings[findings["severity"] == "error"]
    assert code == 1 and f"{len(errors)} errors" in said
    return dict(zip(errors["row"].astype(int), errors["message"]))


def check_refusals(refused, found):
    "Each damaged file is named with a reason; no healthy one is"
    silent = [one for n, one in enumerate(found) if one.fate == damaged.LOST and n not in refused]
    wronged = [(one, refused[n]) for n, one in enumerate(found) if one.fate == damaged.FINE and n in refused]
    unnamed = [said for n, said in refused.items() if not re.search(rf"{re.escape(found[n].path)}\S*: .", said)]
    assert not silent and not wronged and not unnamed
    assert all("\n" not in said for said in refused.values())


def check_embedded(said, out, found, refused):
    "All other files have features, and the rows without are counted by kind"
    with np.load(out, allow_pickle=False) as features:
        assert features["row"].tolist() == [n for n in range(len(found)) if n not in refused]
        assert np.isfinite(features["image_features"]).all()
    assert sum(map(int, re.findall(r"left out: (\d+) row", said))) == len(refused)


def check_run(folder, found, refused, name):
    "All other files have predictions, and the report lists the rows without"
    predictions = pd.read_parquet(folder / "predictions.parquet")
    used = [one for n, one in enumerate(found) if n not in refused]
    assert predictions["image"].tolist() == [name(one) for one in used]
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "Traceback" not in report and "Left out, because they cannot be used" in report
    assert not json.loads((folder / "run.json").read_text()).get("error")


def test_pictures(command, pictures, tmp_path):
    folder, found = pictures
    table = write_table(folder, found, "image")
    refused = refusals(command, "csv", table, tmp_path / "findings.csv")
    check_refusals(refused, found)
    words = ["embed", "csv", table, "--model", "starter", "--device", "cpu", "--only", "images", "--max-bad", "1"]
    code, said = ended(command, *words, "--out", tmp_path / "f.npz")
    assert code == 0, said
    check_embedded(said, tmp_path / "f.npz", found, refused)
    assert re.search(r"holes\.nii: \d+ voxels are not finite", said), "a warning is not lost among threads"
    given = ["dataset=csv", f"data_root={table}", "max_bad=1", "n_boot=10", "sensitivity=false", "valid_split="]
    code, said = ended(command, "run", "zero_shot", *(x for one in given for x in ("-p", one)), "--out",
                       tmp_path / "run")
    assert code == 0, said
    check_run(tmp_path / "run", found, refused, lambda one: one.path)


def test_studies(command, studies, tmp_path):
    folder, found = studies
    table = write_table(folder, found, "scan")
    refused = refusals(command, "study-csv", table, tmp_path / "findings.csv", "-o", "series=scan")
    check_refusals(refused, found)
    words = ["embed", "study-csv", table, "-o", "series=scan", "--model", "starter-studies", "--device", "cpu"]
    code, said = ended(command, *words, "--max-bad", "1", "--out", tmp_path / "f.npz")
    assert code == 0, said
    check_embedded(said, tmp_path / "f.npz", found, refused)
    assert re.search(r"series: 1 gaps: about 1 slices are missing", said), "a warning is not lost among threads"
    given = ["dataset=study-csv", f"data_root={table}", "data_options={series: [scan]}", "model=starter-studies",
             "device=cpu", "max_bad=1", "n_boot=10", "sensitivity=false", "valid_split="]
    code, said = ended(command, "run", "zero_shot", *(x for one in given for x in ("-p", one)), "--out",
                       tmp_path / "run")
    assert code == 0, said
    check_run(tmp_path / "run", found, refused, lambda one: one.path)


def test_nothing_but_damage(command, pictures, tmp_path):
    "Where no row is left there is no result, whatever share may be bad"
    folder, found = pictures
    lost = [one for one in found if one.fate == damaged.LOST][:30]
    table = write_table(folder, lost, "image")
    words = ["embed", "csv", table, "--model", "starter", "--device", "cpu", "--only", "images", "--max-bad", "1"]
    code, said = ended(command, *words, "--out", tmp_path / "f.npz")
    assert code == 2 and "30 of 30 rows cannot be used (no row is left)" in said and lost[0].path in said
    assert not (tmp_path / "f.npz").exists()


EACH = """
import json, sys
from typer.testing import CliRunner
from medclip_nb.cli import main as cli

folder, listed, out = sys.argv[1:]
said = []
for path, dataset in json.load(open(listed)):
    done = CliRunner().invoke(cli.app, ["data", "validate", dataset, "--root", f"{folder}/{path}"])
    odd = "" if done.exception is None or isinstance(done.exception, SystemExit) else repr(done.exception)
    said.append([done.exit_code, odd, done.output])
json.dump(said, open(out, "w"))
"""


def test_tables(command, tmp_path):
    "A table is read whole or refused in one line that names it; all of them in one process"
    (folder := tmp_path / "data").mkdir()
    found = damaged.tables(folder, damaged.whole_pictures()["color.png"], SEED)
    (tmp_path / "tables.json").write_text(json.dumps([[one.path, one.dataset] for one in found]))
    code, said = ended(forks.forked(), "-c", EACH, folder, tmp_path / "tables.json", tmp_path / "said.json")
    assert code == 0, said
    for one, (code, odd, output) in zip(found, json.loads((tmp_path / "said.json").read_text())):
        assert not odd and code in (0, 1, 2), (one, odd, output)
        if code == 2:
            assert output.startswith("error: ") and len(output.splitlines()) == 1, (one, output)
            assert str(folder / one.path) in output, (one, output)
        assert (code == 2) if one.fate == damaged.LOST else one.fate == damaged.OPEN or code == 0, (one, output)
    for name in ("t.csv", "t.json", "t.jsonl", "t.parquet", "t.tar"): # Other commands read them in the same way
        one = next(one for one in found if one.path.endswith(f"/{name}") and one.fate == damaged.LOST)
        words = ["embed", one.dataset, folder / one.path, "--model", "starter", "--out", tmp_path / "f.npz"]
        code, said = ended(command, *words)
        assert code == 2 and str(folder / one.path) in said and len(said.splitlines()) == 1, (one, said)
        given = [f"dataset={one.dataset}", f"data_root={folder / one.path}"]
        code, said = ended(command, "run", "zero_shot", *(x for each in given for x in ("-p", each)), "--out",
                           tmp_path / "run")
        last = said.splitlines()[-1]
        assert code in (1, 2) and last.startswith("error: ") and str(folder / one.path) in last, (one, said)
    assert not (tmp_path / "run").exists() and not (tmp_path / "f.npz").exists()
