"The repository itself: what is generated is current, what is declared agrees, notebooks are fit to be read"
import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import repository
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
TEMPLATES = [p for p in NOTEBOOKS if p.parent.name == "experiments" and not p.name[0].isdigit()]
COMMON = {"dataset": "str", "data_root": "str", "model": "str", "checkpoint": "str", "seed": "int", "device": "str",
          "precision": "str",
          "limit": "int", "out_dir": "str"}
named = lambda paths: {"argvalues": paths, "ids": [p.stem for p in paths]}


@pytest.fixture(scope="module")
def settings():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


@pytest.fixture(scope="module")
def lock():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    found = {}
    for r in (Requirement(line) for line in lines if line and not line.lstrip().startswith(("#", "--"))):
        found.setdefault(r.name.lower().replace("_", "-"), []).append(r)
    return found


@pytest.mark.parametrize("check", repository.CHECKS)
def test_generated_files_are_current(check):
    find, remedy = repository.CHECKS[check]
    assert find() == [], remedy


def test_lock_satisfies_settings(settings, lock):
    for r in map(Requirement, (settings["requirements"] + " " + settings["dev_requirements"]).split()):
        pins = lock.get(r.name.lower().replace("_", "-"), [])
        assert pins, f"{r.name} is not in requirements.lock: make lock"
        for pin in pins:
            version, = (s.version for s in pin.specifier if s.operator == "==")
            assert r.specifier.contains(version, prereleases=True), f"{pin} does not satisfy {r}: make lock"


def test_lock_is_exact_and_has_no_places(lock):
    assert all([s.operator for s in r.specifier] == ["=="] and not r.url for pins in lock.values() for r in pins)
    assert str(lock["torch"][0].specifier) == "==2.14.1" and str(lock["torchvision"][0].specifier).startswith("==0.29.")
    assert not re.search(r"/(work|tmp|home|root|opt)/", (ROOT / "requirements.lock").read_text())


def test_environment_agrees(settings):
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda, pip = [d for d in env["dependencies"] if isinstance(d, str)], [d for d in env["dependencies"]
                                                                          if isinstance(d, dict)]
    assert f"python={settings['min_python']}" in conda and env["name"] == settings["lib_name"]
    assert pip == [{"pip": ["-r requirements.lock", "-e ."]}]


def test_exported_code_imports_no_nbdev():
    for path in (ROOT / "medclip_nb").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {a.name for n in nodes if isinstance(n, ast.Import)
                 for a in n.names} | {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
        assert not {n.split(".")[0] for n in names} & {"nbdev", "fastcore", "execnb"}, path.name


@pytest.mark.parametrize("module", ["medclip_nb", "medclip_nb.cli", "medclip_nb.experiments", "medclip_nb.core"])
def test_import_is_light(module):
    heavy = {"torch", "pandas", "open_clip", "matplotlib", "sklearn", "papermill", "nbformat"}
    code = f"import {module}, sys; print(*{heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


@pytest.mark.parametrize("line", [
    "from medclip_nb.evaluators.results import Result",
    "from medclip_nb.metrics import auroc, bootstrap, retrieval_metrics",
    "from medclip_nb.plots import comparison, image_grid, metric_intervals, training_curves, use_style",
    "from medclip_nb.experiments.overview import compare",
    "from medclip_nb.images import read_image, StudyPreprocess, corrupt, ImageDataset",
    "from medclip_nb.datasets import load_manifest",
    "from medclip_nb.losses import clip_loss"])
def test_import_needs_no_model_zoo(line):
    zoo = {"open_clip", "timm", "torchvision", "torchvision.models"}
    code = f"{line}; import sys; print(*{zoo} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize("path", **named(NOTEBOOKS))
def test_notebook_names_no_place(path):
    text = json.dumps([(c["source"],
                        [(o.get("text"), o.get("data", {}).get("text/plain"), o.get("data", {}).get("text/html"))
                         for o in c.get("outputs", [])]) for c in json.loads(path.read_text())["cells"]])
    assert not (found := re.findall(r"(?<![\w.])/(?:work|tmp|home|root|Users)/\S{0,40}", text)), found


@pytest.mark.parametrize("path", **named(TEMPLATES))
def test_template(path):
    from papermill import inspect_notebook

    from medclip_nb.experiments import template_cells, template_parameters
    cells = json.loads(path.read_text())["cells"]
    assert not any(c.get("outputs") or c.get("execution_count") for c in cells), "a template keeps no output"
    assert sum("parameters" in tags for _, _, tags in template_cells(path)) == 1
    found = template_parameters(path)
    needed = {"out_dir": "str"} if path.stem == "compare" else COMMON
    assert {k: found[k].type for k in needed if k in found} == needed
    assert [k for k, p in found.items() if not p.help] == [], "every parameter has a help comment"
    assert set(inspect_notebook(str(path))) == set(found), "papermill sees the same parameters (no = in the help)"
    assert not any("#| export" in source for _, source, _ in template_cells(path))


def test_suites_can_be_run():
    from medclip_nb.experiments import load_suite
    for path in (ROOT / "nbs" / "experiments" / "suites").glob("*.yaml"): assert load_suite(path).runs
