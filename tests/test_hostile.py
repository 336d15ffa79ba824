"Input that is hostile or slips of the hand: one line that says what to mend, exit code 2, in seconds"
import gzip
import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from medclip_nb.cli import main as cli
from medclip_nb.core import InputError
from medclip_nb.datasets import tables
from medclip_nb.datasets.readers import radiology
from medclip_nb.datasets.registry import read_card
from medclip_nb.evaluators.prompts import read_pack
from medclip_nb.experiments import runs
from medclip_nb.experiments.overview import write_index
from medclip_nb.experiments.parameters import read_parameters
from medclip_nb.experiments.suites import load_suite, run_suite

BOMB = "\n".join(["a: &a [x, x, x, x, x, x, x, x, x]",
                  *(f"{k}: &{k} [{', '.join([f'*{b}'] * 9)}]" for b, k in zip("abcdefgh", "bcdefghi"))])
NESTED = "[" * 5000 + "]" * 5000


@pytest.fixture(scope="module")
def stub(make_template, tmp_path_factory):
    parameters = ("n: int = 5\nlr: float = 1e-4\nlimit: int = 0\nname: str = 'a'\nitems: list[str] = []\n"
                  "out_dir: str = 'o'")
    return str(make_template(tmp_path_factory.mktemp("templates") / "stub.ipynb", parameters, "pass"))


def refused(*args):
    "What the command says on its way out with 2"
    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert result.exit_code == 2 and "Traceback" not in result.output, (result.output, result.exception)
    lines = [line for line in result.output.splitlines() if line.strip() and not line.startswith(("Usage", "Try"))]
    assert len(result.output) < 1000, "a message is short"
    return "\n".join(lines)


@pytest.mark.parametrize("text, says", [
    (BOMB, "aliases stand for more than"), (f"a: {NESTED}", "nested deeper than 100 levels"),
    ("x" * 2**21, "1,048,576 are the most"), ("a: &a [*a]", "what it is in"), ("a: 1\na: 2", "'a' stands twice")])
def test_yaml_is_limited_wherever_it_is_read(stub, tmp_path, text, says):
    (path := tmp_path / "mine.yaml").write_text(text)
    for read in (read_parameters, load_suite, read_pack, read_card):
        with pytest.raises(InputError, match=f"mine.yaml: .*{says}"): read(path)
    assert says in refused("suite", path, "--dry-run")
    assert says in refused("run", stub, "-f", path)
    assert says in refused("run", stub, "-p", f"items={text}")


@pytest.mark.parametrize("pair, says", [
    ("limit=-3", "'limit' must be from 0 to 1000000000, not -3"), ("limit=" + "9" * 5000, "'limit' must be int"),
    ("lr=nan", "'lr' must be float"), ("lr=-1", "'lr' must be 0 or more"), ("lr=1e999", "'lr' must be float"),
    ("name=\udcff", "UTF-8"), ("name=a\0b", "zero byte"), ("name=" + "x" * 200_000, "200,000 characters"),
    ("items=[\udcff]", "special characters are not allowed"), ("n=" + "1" * 30, "'n' must be int")])
def test_parameters(stub, tmp_path, pair, says):
    assert says in refused("run", stub, "-p", pair, "--out", tmp_path / "run")


@pytest.mark.parametrize("limit", ["nan", "-5", "0", "inf"])
def test_timeouts(stub, tmp_path, limit):
    (path := tmp_path / "s.yaml").write_text(f"runs: [{{name: a, template: {stub}}}]")
    assert "timeout" in refused("run", stub, "--timeout", limit, "--out", tmp_path / "run")
    assert "timeout" in refused("suite", path, "--timeout", limit, "--out", tmp_path)
    assert "timeout" in refused("suite", path, "--timeout", limit, "--out", tmp_path, "--dry-run")
    with pytest.raises(InputError, match="timeout"): run_suite(path, tmp_path, timeout=float(limit))


@pytest.mark.parametrize("args, says", [
    (["data", "split", "csv", "--out", "s.csv", "--seed", "-1"], "--seed"),
    (["data", "shard", "csv", "--out", "s", "--seed", "-1"], "--seed"),
    (["data", "shard", "csv", "--out", "s", "--max-mb", "nan"], "--max-mb"),
    (["data", "shard", "csv", "--out", "s", "--max-mb", "-1"], "--max-mb"),
    (["data", "shard", "csv", "--out", "s", "--max-bad", "nan"], "--max-bad"),
    (["data", "shard", "csv", "--out", "s", "--per-shard", "0"], "--per-shard"),
    (["data", "split", "csv", "--out", "s.csv", "--fractions", "train=nan,test=1"], "--fractions"),
    (["data", "info", "csv", "-o", "columns=" + NESTED.replace("[", '{"a":').replace("]", "}")], "columns"),
    (["data", "info", "starter", "-o", "n_studies=abc"], "n_studies"),
    (["data", "info", "starter", "-o", "n_studies=[1, 2]"], "n_studies"),
    (["data", "info", "starter", "-o", "seed=-1"], "seed"),
    (["data", "info", "starter", "-o", "workers=0"], "workers"),
    (["data", "info", "starter", "-o", "lesion_share=nan"], "lesion_share")])
def test_options_of_data(tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("image,label\na.png,x\n")
    root = tmp_path / "new" if "starter" in args else tmp_path
    assert says in refused(*args, "--root", root)
    assert not [p.name for p in tmp_path.iterdir() if p.name != "t.csv"]


@pytest.mark.parametrize("args, says", [
    (["embed", "csv", ".", "--model", "starter", "--out", "f.npz", "--limit", "-3"], "--limit"),
    (["embed", "csv", ".", "--model", "starter", "--out", "f.npz", "--batch-size", "0"], "--batch-size"),
    (["embed", "csv", ".", "--model", "starter", "--out", "f.npz", "--workers", "99999"], "--workers"),
    (["embed", "csv", ".", "--model", "starter", "--out", "f.npz", "--device", "cpu:7"], "'cpu:7'"),
    (["cache", "gc", ".", "--older-than", "nan"], "--older-than"),
    (["rank", "a.png", "--texts", "x", "--top", "-1"], "--top")])
def test_options_of_models(tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("image,label\na.png,x\n")
    assert says in refused(*args)


def test_names_are_looked_up_before_a_kernel_starts(tmp_path):
    out = ["--out", tmp_path / "run"]
    assert "Did you mean 'starter'" in refused("run", "zero_shot", "-p", "dataset=startr", *out)
    assert "Did you mean 'starter'" in refused("run", "zero_shot", "-p", "model=startr", *out)
    assert "no such file or folder" in refused("run", "zero_shot", "-p", "checkpoint=" + "x" * 5000, *out)
    (path := tmp_path / "s.yaml").write_text("runs: [{name: a, template: zero_shot, params: {checkpoint: no.pt}}]")
    assert "a: checkpoint='no.pt'" in refused("suite", path, "--dry-run", "--out", tmp_path)


def test_foreign_metrics(tmp_path):
    (tmp_path / "run").mkdir()
    metric = {"value": 1, "low": None, "high": None, "n": "<script>"}
    foreign = [json.dumps({"schema": 1, "task": "x", "metrics": m}) for m in ({"a": metric}, [1], {"a": 1})]
    for content in (NESTED, "[]", "{", '{"schema": 1}', *foreign):
        (tmp_path / "run" / "metrics.json").write_text(content)
        assert "metrics.json" in refused("compare", tmp_path)
        with pytest.raises(InputError, match="metrics.json"): write_index(tmp_path)


def test_formulas_are_marked_and_metrics_sort_as_numbers(tmp_path):
    (run := tmp_path / "=HYPERLINK(1)").mkdir()
    metric = {"value": -1, "low": None, "high": None, "n": 1}
    (run / "metrics.json").write_text(
        json.dumps({"schema": 1, "task": "@x", "metrics": {"a@16": metric, "a@2": metric}}))
    result = CliRunner().invoke(cli.app, ["compare", str(tmp_path), "--csv", str(tmp_path / "t.csv")])
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "t.csv", dtype=str)[["run", "task", "metric", "value", "n"]]
    assert table.values.tolist() == [["'=HYPERLINK(1)", "'@x", m, "-1", "1"] for m in ("a@2", "a@16")]


def test_a_packed_table_is_unpacked_within_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_UNPACKED_LEAST", 2**20)
    (path := tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"image\n" + b"0" * 2**24))
    with pytest.raises(InputError, match="t.csv.gz: unpacks to more than"): tables.read_table(path)
    path.write_bytes(gzip.compress(b"image\n" + b"a.png\n" * 1000))
    assert len(tables.read_table(path)) == 1000


def test_threads_identify_what_trains_and_order_identifies_nothing(make_template, tmp_path, monkeypatch):
    trains = make_template(tmp_path / "t.ipynb", "epochs: int = 1\nn: int = 0\nout_dir: str = 'o'")
    measures = make_template(tmp_path / "m.ipynb", "n: int = 0\nout_dir: str = 'o'")
    found = {}
    for n in ("1", "2"):
        monkeypatch.setenv("OMP_NUM_THREADS", n)
        found[n] = [runs.run_key(t, {}, {}) for t in (trains, measures)] + [runs.asked_for(trains, {}, {})]
    assert found["1"][0] != found["2"][0] and found["1"][1] == found["2"][1]
    name = "the number of threads"
    assert found["1"][2].items() ^ found["2"][2].items() == {(name, "1"), (name, "2")}
    assert runs.run_key(trains, {"n": 1, "epochs": 2}, {}) == runs.run_key(trains, {"epochs": 2, "n": 1}, {})


@pytest.mark.parametrize("encoding", ["nothing-known", "utf-7", "utf-16"])
def test_encodings_of_xml(tmp_path, encoding):
    (path := tmp_path / "1.xml").write_text(f'<?xml version="1.0" encoding="{encoding}"?><a/>')
    with pytest.raises(InputError, match="1.xml"): radiology._openi_report(path)
