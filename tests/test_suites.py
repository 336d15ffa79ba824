"Suites at a scale, and the published numbers that they keep"
import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from medclip_nb.cli.main import app
from medclip_nb.experiments import find_runs, load_suite, plan_suite, read_metrics

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "title": "Tissues",
    "defaults": {"dataset": "kather", "data_root": "data/kather", "model": "ViT-B-32/openai", "n_boot": 1000},
    "published": [{"run": "words", "metric": "f1_weighted", "value": [0.19, 0.31], "source": "a README"},
                  {"run": "words", "metric": "accuracy", "value": 0.5, "source": "a paper"}],
    "runs": [{"name": "words", "template": "zero_shot", "params": {"labels": ["label"]}},
             {"name": "compare", "template": "compare", "params": {"reports_dir": "{suite}"}}],
    "scales": {"tiny": {"miniatures": ["kather"], "defaults": {"model": "starter", "n_boot": 20, "images": "header"}}},
}


def call(*words):
    "Exit code and output of the command; a traceback fails the test"
    done = CliRunner().invoke(app, [str(w) for w in words])
    if done.exception and not isinstance(done.exception, SystemExit): raise done.exception
    return done.exit_code, done.output


def suite_file(folder, **changes):
    (path := folder / "tissues.yaml").write_text(yaml.safe_dump(SMALL | changes))
    return path


@pytest.fixture(scope="module")
def tiny(command, tmp_path_factory):
    "A suite of two runs at scale tiny, and what the command said"
    folder = tmp_path_factory.mktemp("tiny")
    done = subprocess.run([command, "suite", suite_file(folder), "--scale", "tiny", "--out", folder],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "tissues-tiny", done.stdout


def test_a_scale_is_no_result(tiny):
    folder, said = tiny
    assert "scale tiny: this was to try the suite out, and nothing above is a result" in said
    state, page = json.loads((folder / "suite.json").read_text()), (folder / "index.html").read_text()
    assert state["scale"] == "tiny" and state["title"] == "Tissues (scale tiny)"
    assert "Scale tiny, for trying out: nothing here is a result." in page
    notes = read_metrics(folder / "words")["details"]["notes"]
    assert notes == ["A miniature of kather, made up for trying out: nothing measured on it is a result."]
    assert json.loads((folder / "words" / "run.json").read_text())["parameters"]["model"] == "starter"
    assert [p.name for p in find_runs(folder)] == ["words", "compare"], "data are no runs"


def test_published_numbers_stay_apart_at_a_scale(tiny):
    folder, _ = tiny
    page = (folder / "compare" / "report.html").read_text()
    assert "Scale tiny, for trying out: nothing below is a result" in page
    assert "At scale tiny nothing is comparable" in page and "0.19–0.31" in page
    assert ">difference</th>" not in page.split("Published numbers")[1].split("Seeds")[0]
    assert read_metrics(folder / "compare")["details"]["published"] == []
    code, said = call("compare", folder)
    assert code == 0 and "tissues-tiny: tiny is a scale for trying out" in said and "0.19–0.31" not in said


def test_published_numbers_stand_beside_ours(tiny, tmp_path):
    "The state that the full scale writes, over runs that were made already"
    folder, state = tmp_path / "tissues", json.loads((tiny[0] / "suite.json").read_text())
    folder.mkdir()
    (folder / "words").symlink_to(tiny[0] / "words")
    del state["scale"]
    (folder / "suite.json").write_text(json.dumps(state))
    code, said = call("compare", folder, "--csv", tmp_path / "all.csv")
    assert code == 0 and "\npublished\n" in said and "0.19–0.31" in said and "a README" in said
    rows = pd.read_csv(tmp_path / "all.csv").set_index("metric")
    ours = read_metrics(folder / "words")["metrics"]["accuracy"]["value"]
    assert rows.loc["accuracy", "difference"] == pytest.approx(ours - 0.5)
    assert rows["published"].notna().sum() == 2


def test_a_full_comparison_is_told_the_numbers(tmp_path):
    full = {r.name: r.params for r in load_suite(suite_file(tmp_path)).runs}
    assert full["compare"]["published"] == SMALL["published"] and "scale" not in full["compare"]
    assert full["words"]["model"] == "ViT-B-32/openai" and full["words"]["n_boot"] == 1000


@pytest.mark.parametrize(("words", "message"), [
    (("--scale", "tny"), "there is no scale 'tny'. Did you mean 'tiny'?"),
    (("--scale", "tiny", "--only", "wrods"), "no run 'wrods'"),
])
def test_unknown_names(words, message, tmp_path):
    code, said = call("suite", suite_file(tmp_path), "--out", tmp_path, *words)
    assert code == 2 and message in said and not (tmp_path / "tissues-tiny").exists()


@pytest.mark.parametrize(("changes", "message"), [
    ({"published": [{"run": "word", "metric": "a", "value": 1, "source": "b"}]}, "entry 1: there is no run 'word'"),
    ({"published": [{"run": "words", "metric": "a", "value": "97 %", "source": "b"}]}, "must be a number or a range"),
    ({"published": ["97"]}, "entry 1: is no mapping"),
    ({"scales": {"tiny": {"default": {}}}}, "scale tiny: unknown key 'default'. Did you mean 'defaults'?"),
    ({"scales": {"tiny": 3}}, "scale tiny must be a mapping"),
    ({"scales": {"tiny": {"runs": {"words": {"epochs": 1}}}}}, "scale tiny, run words: unknown key 'epochs'"),
])
def test_broken_files(changes, message, tmp_path):
    code, said = call("suite", suite_file(tmp_path, **changes), "--dry-run", "--out", tmp_path)
    assert code == 2 and message in said, said


def test_suites_are_listed():
    code, said = call("suite")
    assert code == 0 and any(line.startswith("starter ") for line in said.splitlines())
    code, said = call("suite", "startr")
    assert code == 2 and "Did you mean 'starter'?" in said and "  ablation " in said


def test_a_scale_makes_no_data_to_be_planned(tmp_path):
    assert [r.status for r in plan_suite(suite_file(tmp_path), tmp_path, scale="tiny")] == ["to run", "to run"]
    assert [p.name for p in tmp_path.iterdir()] == ["tissues.yaml"]
