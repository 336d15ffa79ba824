"""The main job: the starter suite at a small scale, as `make reports` makes it, and as it is committed; what it must
reach"""
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from medclip_nb.evaluators import Result

ROOT = Path(__file__).resolve().parent.parent
RUNS = ("audit", "zero-shot-untrained", "probe-untrained", "retrieval-untrained", "finetune", "zero-shot-trained",
        "probe-trained", "retrieval-trained", "plain-0", "itemized-0", "maps", "studies", "compare")
MORE = ("few-shot", "robustness", "plain-1", "plain-2", "itemized-1", "itemized-2", "studies-maps", "compare")
SUITES = ROOT / "nbs" / "experiments" / "suites"
FILES = {"report.ipynb", "report.html", "metrics.json", "predictions.parquet", "run.json"}


def make_reports(out, target="reports"):
    env = {k: v for k, v in os.environ.items()
           if k not in ("OMP_NUM_THREADS", "MPLBACKEND", "MAKEFLAGS", "MAKELEVEL", "JUPYTER_PATH", "PYTHON_EXEC")}
    return subprocess.run(["make", target, f"OUT={out}"], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A fresh `make reports`, and what goes on from it"
    out = tmp_path_factory.mktemp("reports")
    for target in ("reports", "reports-all"):
        done = make_reports(out, target)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out / "starter"


def call_suite(installed, folder, *options, name="starter"):
    return subprocess.run([installed, "suite", f"{name}.yaml", "--out", "reports", *options], cwd=folder,
                          capture_output=True, text=True)


def small_suite(name):
    "A suite with few studies, one epoch and few resamples"
    suite = yaml.safe_load((SUITES / f"{name}.yaml").read_text(encoding="utf-8"))
    data = {"n_studies": [14, 6, 8], "n_slices": 4, "seed": 6, "workers": 1} # With every finding in each split
    suite["defaults"] |= {"data_options": data, "n_boot": 50}
    for run in suite["runs"]:
        params = run["params"] = dict(run.get("params", {}))
        if "data_options" in params: params["data_options"] = {**data, "view": "studies"}
        if "epochs" in params: params["epochs"] = 1
        if run["template"] == "few_shot": params |= {"shots": [1, 2], "seeds": [0]}
    return suite


@pytest.fixture(scope="module")
def small(installed, tmp_path_factory):
    "Both suites at a small scale; of the second, what has templates of its own"
    folder = tmp_path_factory.mktemp("small")
    for name, options in (("starter", []), ("starter-more", ["--only", "few-shot", "--only", "robustness"])):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(small_suite(name), sort_keys=False), encoding="utf-8")
        done = call_suite(installed, folder, *options, name=name)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "reports" / "starter"


SLOW = pytest.param("made", marks=pytest.mark.slow)


def found(request, which):
    "The folder of the reports that are meant"
    return ROOT / "reports" / "starter" if which == "committed" else request.getfixturevalue(which)


@pytest.fixture(params=[SLOW, "committed"])
def reports(request):
    return found(request, request.param)


def seeds(reports, arm):
    "The runs of one arm; the first seed belongs to the main suite"
    return [reports / f"{arm}-0", *(reports.parent / "starter-more" / f"{arm}-{seed}" for seed in (1, 2))]


def metric(reports, run, name):
    return json.loads((reports / run / "metrics.json").read_text())["metrics"][name]


@pytest.mark.parametrize("which", [SLOW, "small", "committed"])
def test_every_run_is_whole(request, which):
    reports = found(request, which)
    more = MORE if which != "small" else ("few-shot", "robustness")
    for run in (*RUNS, *(f"../starter-more/{run}" for run in more)):
        assert FILES <= {p.name for p in (reports / run).iterdir()}, run
        for file in ("report.ipynb", "report.html", "metrics.json"):
            text = (reports / run / file).read_text()
            assert not re.search(r"(?<![\w.:/])/(home|root|tmp|work|Users|builds)/",
                                 text), f"{run}/{file} names a place on one machine"
    for folder, runs in ((reports, RUNS), (reports.parent / "starter-more", more)):
        index = (folder / "index.html").read_text()
        for run in runs: assert f'href="{run}/report.html"' in index
        assert "<script" not in index and "not for clinical use" in index.lower()


def test_values_lie_in_their_intervals(reports):
    for run in (*RUNS, *(f"../starter-more/{run}" for run in MORE)):
        for name, m in json.loads((reports / run / "metrics.json").read_text())["metrics"].items():
            if m["low"] is not None: assert m["low"] <= m["value"] <= m["high"], (run, name)


def test_untrained_model_is_at_chance(reports):
    for label, chance in (("side", 1 / 2), ("lesion", 1 / 2), ("finding", 1 / 6)):
        found = metric(reports, "zero-shot-untrained", f"{label}/balanced_accuracy")
        assert found["low"] - 1e-5 <= chance <= found["high"] + 1e-5, (label, found) # Files hold six digits


def test_trained_model_reaches_its_goals(reports):
    assert metric(reports, "probe-trained", "side/accuracy")["value"] >= 0.95
    assert metric(reports, "zero-shot-trained", "side/accuracy")["value"] >= 0.95
    assert metric(reports, "probe-trained", "lesion/auroc")["value"] >= 0.90
    assert metric(reports, "retrieval-trained", "image_to_text_R@10")["value"] >= 0.50
    assert metric(reports, "retrieval-trained", "text_to_image_R@10")["value"] >= 0.50


def test_itemized_model_looks_at_what_a_text_names(reports):
    """Each seed near the finding more often than every plain model, and inside it more often than the plain model of
    the same seed, outside the intervals; and far above chance"""
    plain = [metric(reports, run, f"places/{way}_pointing_within")["high"] for run in seeds(reports, "plain")
             for way in ("relevance", "similarity")]
    for run, other in zip(seeds(reports, "itemized"), seeds(reports, "plain")):
        strict = [metric(reports, other, f"places/{way}_pointing")["high"] for way in ("relevance", "similarity")]
        assert metric(reports, run, "places/attention_pointing_within")["low"] > max(plain), run
        assert metric(reports, run, "places/attention_pointing")["low"] > max(strict), run
        assert metric(reports, run, "places/attention_pixel_auroc")["low"] > 0.9, run
        assert metric(reports, run, "items/image_to_text_R@10")["low"] > 0.85, run


def test_pointing_game(reports, request):
    """0.80 within 6 mm over three seeds in the committed reports; what another processor rounds differently may cost a
    little"""
    found = [metric(reports, run, "places/attention_pointing_within")["value"] for run in seeds(reports, "itemized")]
    assert sum(found) / 3 >= (0.80 if request.node.callspec.params["reports"] == "committed" else 0.77), found


def test_model_of_studies_recognises_findings(reports):
    "Every kind of finding is recognised without a classifier, above chance outside its interval"
    for finding in ("white-matter lesion", "ring-enhancing mass", "haemorrhage", "infarct", "enlarged ventricles"):
        assert metric(reports, "studies", f"findings/{finding}/auroc")["low"] > 0.5, finding


def test_model_of_studies_looks_at_what_a_text_names(reports):
    "In three dimensions: far above a point drawn at random, strictly and within the tolerance"
    for run, before in (("studies", "places/"), ("../starter-more/studies-maps", "")):
        found = {name: metric(reports, run, f"{before}attention_{name}")
                 for name in ("pointing", "pointing_within", "mask_share", "near_share", "pixel_auroc")}
        assert found["pointing"]["low"] > 20 * found["mask_share"]["high"], run
        assert found["pointing_within"]["low"] > 20 * found["near_share"]["high"], run
        assert found["pixel_auroc"]["low"] > 0.85, run


@pytest.mark.slow
def test_second_call_has_nothing_to_do(made):
    before = {p: p.stat().st_mtime_ns for p in made.rglob("report.ipynb")}
    done = make_reports(made.parent)
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in made.rglob("report.ipynb")} == before


def test_a_second_call_of_the_small_suite_has_nothing_to_do(installed, small):
    before = {p: p.stat().st_mtime_ns for p in small.rglob("report.ipynb")}
    done = call_suite(installed, small.parent.parent)
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in small.rglob("report.ipynb")} == before


def test_the_small_suite_measures_what_the_whole_one_does(small):
    "Every template, and in each run every metric of the committed reports, with a value in its interval"
    templates = {run["template"] for name in ("starter", "starter-more") for run in small_suite(name)["runs"]}
    assert {json.loads(path.read_text())["template"].removesuffix(".ipynb")
            for path in small.parent.glob("*/*/run.json")} == templates
    for path in small.parent.glob("*/*/metrics.json"):
        metrics, whole = (json.loads((folder / path.relative_to(small.parent)).read_text())["metrics"]
                          for folder in (small.parent, ROOT / "reports"))
        if path.parent.name != "few-shot": assert metrics.keys() == whole.keys(), path.parent.name
        assert metrics.keys() <= whole.keys()
        assert all(m["low"] <= m["high"] for m in metrics.values() if m["low"] is not None), path.parent.name


def test_itemized_template(small):
    for objective, run, maps in (("itemized", "itemized-0", "attention"), ("clip", "plain-0", "relevance")):
        result = Result.load(small / run)
        assert result.details["objective"] == objective
        for name in ("items/image_to_text_R@1", "items/image_to_text_COMPLETE@10", "finding/balanced_accuracy",
                     f"places/{maps}_pointing_within", f"places/{maps}_iou"):
            low, value, high, note = result.metrics.set_index("name").loc[name, ["low", "value", "high", "note"]]
            assert 0 <= low <= value <= high <= 1 or note.startswith("too few groups") and 0 <= value <= 1, name
        assert (small / run / "checkpoint").is_dir()
    assert set(Result.load(small / "itemized-0").predictions["task_label"]) == {"items", "finding", "places"}


def test_maps_of_one_model_against_another(small):
    names = set(Result.load(small / "maps").metrics["name"])
    assert {"attention_pointing", "plain-relevance_pointing", "plain-similarity_pointing"} <= names


def test_studies(small):
    names = set(Result.load(small / "studies").metrics["name"])
    assert {"findings/auroc_macro", "places/attention_pointing_within", "items/image_to_text_R@10"} <= names
