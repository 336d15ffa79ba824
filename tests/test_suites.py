"Suites at a scale, and the published numbers that they keep"
import json
import os
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from medclip_nb.cli.main import app
from medclip_nb.evaluators import find_protocol, measured_split
from medclip_nb.experiments import find_runs, load_suite, plan_suite, published_table, read_metrics, suite_works

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


def test_the_report_shows_published_numbers_beside_ours(tiny, command, tmp_path):
    (folder := tmp_path / "runs").mkdir()
    (folder / "words").symlink_to(tiny[0] / "words")
    later = {"run": "later", "metric": "accuracy", "value": 0.9, "source": "a <b>book</b>", "note": "another split"}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"published": [*SMALL["published"], later],
                                                     "reports_dir": str(folder)}))
    words = [command, "run", "compare", "-f", tmp_path / "p.yaml", "--out", tmp_path / "out"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "report.html").read_text().split("Published numbers</h2>")[1].split("Seeds</h2>")[0]
    assert "a README" in page and "0.19–0.31" in page and ">difference</th>" in page and "<b>book" not in page
    told = {(e["run"], e["metric"]): e for e in read_metrics(tmp_path / "out")["details"]["published"]}
    ours = read_metrics(tiny[0] / "words")["metrics"]["accuracy"]["value"]
    assert told["words", "accuracy"]["difference"] == pytest.approx(ours - 0.5, abs=1e-5)
    assert told["later", "accuracy"]["ours"] is None


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
    ({"runs": [SMALL["runs"][0] | {"search": ["lr"]}]}, "search is a mapping, as in {method: grid, metric: accuracy,"),
    ({"runs": [*SMALL["runs"], {"name": "train", "template": "finetune", "params": {"texts": "captions"}}]},
     "texts='captions'. Did you mean 'caption'?"),
    ({"runs": [*SMALL["runs"], {"name": "maps", "template": "attention_maps", "params": {"methods": ["atention"]}}]},
     "methods='atention'. Did you mean 'attention'?"),
    ({"scales": {"tiny": {"runs": {"words": {"epochs": 1}}}}}, "scale tiny, run words: unknown key 'epochs'"),
])
def test_broken_files(changes, message, tmp_path):
    code, said = call("suite", suite_file(tmp_path, **changes), "--dry-run", "--out", tmp_path)
    assert code == 2 and message in said, said


def test_suites_are_listed():
    code, said = call("suite")
    assert code == 0 and any(line.startswith("starter ") for line in said.splitlines())
    code, said = call("suite", "startr")
    assert code == 2 and "Did you mean 'starter'" in said and "  ablation " in said


def test_a_scale_makes_no_data_to_be_planned(tmp_path):
    assert [r.status for r in plan_suite(suite_file(tmp_path), tmp_path, scale="tiny")] == ["to run", "to run"]
    assert [p.name for p in tmp_path.iterdir()] == ["tissues.yaml"]


def test_a_dry_run_says_what_the_full_size_takes(tmp_path):
    runs = [*SMALL["runs"][:1], {"name": "train", "template": "finetune", "params": {
        "mode": "full", "epochs": 5, "batch_size": 64, "label": "", "model": "starter"}},
        {"name": "after", "template": "zero_shot", "params": {"labels": ["label"], "model": "{train}/checkpoint"}}]
    rows = {"kather": {"train": 1000, "valid": 100, "test": 200}}
    path = suite_file(tmp_path, runs=runs, rows=rows, published=[], defaults=SMALL["defaults"] | {"model": "starter"})
    code, said = call("suite", path, "--dry-run", "--out", tmp_path)
    lines = {line.split()[0]: line for line in reversed(said.splitlines()) if line} # The first of each
    assert "5,000 trained, 900 encoded" in lines["train"] and "PFLOP; about" in lines["train"]
    assert "200 encoded" in lines["words"] and "200 encoded" in lines["after"] and lines["together"]
    assert code == 0 and said.index("together") < said.index("train ", said.index("together"))
    assert "not here: data/kather; how to get it: medclip-nb data info kather" in said.splitlines()[-2]
    assert f"medclip-nb suite {path} --scale tiny" in said.splitlines()[-1]
    code, said = call("suite", suite_file(tmp_path, rows={"kater": {}}), "--dry-run", "--out", tmp_path)
    assert code == 2 and "rows: no run reads 'kater'. Did you mean 'kather'?" in said
    code, said = call("suite", suite_file(tmp_path, rows={"kather": {"train": "many"}}), "--dry-run", "--out", tmp_path)
    assert code == 2 and "'kather' needs a number for each split" in said


@pytest.mark.parametrize("name", [
    "ipclip", "cytopath", "rocov2", "medpix", "itemized-mri", "itemized-headct", "itemized-ctrate", "itemized-rsicd",
    "itemized-cc03m"])
def test_the_suites_of_papers_are_as_published(name):
    suite = load_suite(name)
    works = suite_works(name)
    assert suite.rows and set(works) == {r.name for r in suite.runs if r.template != "compare"}
    assert suite.runs[-1].template == "compare" and all(e["source"] for e in suite.published)
    assert not [r.name for r in suite.runs if "tiny" in str(r.params.get("model"))], "stand-ins are for the scale"
    small = {r.name for r in load_suite(name, "tiny").runs}
    assert small <= {r.name for r in suite.runs} and {e["run"] for e in suite.published} <= small


# Suite -> the rows that its numbers were published for, where no protocol says it: Kather's second archive; val
PUBLISHED_SPLITS = {"ipclip": "test", "cytopath": "valid"}


@pytest.mark.parametrize("name", [
    "ipclip", "cytopath", "rocov2", "medpix", "itemized-mri", "itemized-headct", "itemized-ctrate", "itemized-rsicd",
    "itemized-cc03m"])
def test_published_numbers_stand_beside_the_same_rows(name):
    suite = load_suite(name)
    runs = {r.name: r for r in suite.runs}
    for entry in suite.published:
        params = runs[entry["run"]].params
        found = [find_protocol(p) for p in params.get("protocols", [])]
        parts = pd.DataFrame({"split": list(suite.rows[params["dataset"]])})
        measured = params.get("split") or (measured_split(parts, found) if found else "test")
        if measured == "test": measured = params.get("data_options", {}).get("test_split", "test")
        wanted = {p.published_split or p.split for p in found} or {PUBLISHED_SPLITS[name]}
        assert wanted == {measured}, (name, entry["run"])
    works = suite_works(name)
    for run in works:
        params, rows = runs[run].params, suite.rows
        size = rows.get(run) or rows[params["dataset"]]
        measured = size.get(params.get("split") or "test", sum(size.values()))
        if runs[run].template == "evaluate": assert works[run].encoded == measured, run


def test_the_published_slip_is_compared_with_ours():
    "A published mean over first scans, or over every occurrence of a caption, is not the corrected number"
    metrics = {e["run"]: e["metric"] for n in ("itemized-headct", "itemized-cc03m") for e in load_suite(n).published}
    assert metrics == {"rsna": "auroc_macro_as_published", "flickr": "text_to_image_R@1_as_published"}
    ours = pd.DataFrame([("a", "m", 0.5, 0.4, 0.6), ("a", "m_as_published", 0.7, 0.6, 0.8), ("b", "m", 0.3, 0.2, 0.4)],
                        columns=["run", "metric", "value", "low", "high"])
    entry = {"metric": "m_as_published", "value": 0.6, "source": "a paper"}
    assert published_table(ours, [entry | {"run": run} for run in "abc"])["ours"].tolist()[:2] == [0.7, 0.3]


def test_published_settings():
    "What the five sources say, see their logs, scripts and configurations"
    ipclip = {r.name: r.params for r in load_suite("ipclip").runs}
    assert (ipclip["probe-clip"]["method"], ipclip["probe-clip"]["alpha"]) == ("sgd", 0.001)
    head = ipclip["head-clip"]
    assert [head[k] for k in ("epochs", "batch_size", "lr", "weight_decay", "warmup")] == [5, 8, 5e-5, 0.2, 0]
    cytopath = {r.name: r.params for r in load_suite("cytopath").runs}
    lora = cytopath["lora-processed"]
    assert [lora[k] for k in ("rank", "alpha", "lora_targets", "lr", "max_steps")] == [
        8, 1.0, ["q", "k", "v"], 2e-3, 10000]
    full = cytopath["full-raw"]
    assert [full[k] for k in ("lr", "schedule", "warmup", "max_steps", "betas", "eps")] == [
        1e-5, "constant", 100, 5000, [0.9, 0.999], 1e-8]
    weights = [r.params["image_weight"] for r in load_suite("medpix").runs if r.name.startswith("weighted")]
    assert weights == [0, 0.25, 0.5, 0.75, 1]
    mri = {r.name: r.params for r in load_suite("itemized-mri").runs}["train"]
    assert [mri[k] for k in ("epochs", "batch_size", "lr", "warmup", "betas")] == [24, 256, 1.75e-4, 2000, [0.9, 0.98]]


PARTS = { # Of the three longest, whose runs resemble each other, unless MEDCLIP_NB_WHOLE is set
    "ipclip": ["head-clip", "probe-clip", "zero-shot-ip-clip", "retrieval-ip-clip"],
    "cytopath": ["hits-lora-raw"],
    "medpix": ["zero-shot-vit-b-32", "weighted-1.0"],
}
WHOLE = ["rocov2", "itemized-mri", "itemized-headct", "itemized-ctrate", "itemized-rsicd", "itemized-cc03m"]


@pytest.mark.parametrize("name", [*PARTS, *WHOLE])
def test_a_suite_runs_at_scale_tiny(name, command, tmp_path):
    "Its runs end with the metrics for which there are published numbers, and the last is the comparison"
    only = [] if os.environ.get("MEDCLIP_NB_WHOLE") else PARTS.get(name, [])
    words = [command, "suite", name, "--scale", "tiny", "--out", tmp_path]
    done = subprocess.run([*words, *(w for run in only for w in ("--only", run))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    folder, small = tmp_path / f"{name}-tiny", [r.name for r in load_suite(name, "tiny").runs]
    made = [p.name for p in find_runs(folder)]
    assert set(only) <= set(made) and (only or made == small), "every run has its metrics"
    if not only: assert "nothing below is a result" in (folder / "compare" / "report.html").read_text()
    for e in load_suite(name).published:
        if e["run"] not in made: continue
        known = {e["metric"], e["metric"].removesuffix("_as_published")} # The second where the data have no slip
        assert known & read_metrics(folder / e["run"])["metrics"].keys(), f"{e['run']} does not report {e['metric']}"
    for run in set(made) - {"compare"}:
        assert any("miniature" in note for note in read_metrics(folder / run)["details"]["notes"]), run
