"Runs and suites as processes: the same bytes, nothing half-written, resumed where they stopped"
import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medclip_nb.core import InputError, file_hash
from medclip_nb.experiments import RunError, compare, plan_suite, run, run_suite
from medclip_nb.experiments.overview import render_reports, write_index

SAVE = '''metrics = {"value": {"value": value, "low": value - 1, "high": value + 1, "n": 7}}
details = {"license": "CC0 <1>", "where": out_dir}
text = json.dumps({"schema": 1, "task": "stub", "metrics": metrics, "details": details})
_ = pathlib.Path(out_dir, "metrics.json").write_text(text)'''
PARAMETERS = '''value: float = 1.0
mode: str = ""  # What goes wrong
data_root: str = ""  # A table
before: str = ""  # Folder of another run
out_dir: str = "out"'''
MODES = '''import json, os, pathlib, time
if mode == "input":
    from medclip_nb.core import InputError
    raise InputError("a.csv, row 3: <b>no image</b>. Remove the row.")
if mode == "bug": raise KeyError("a bug")
if mode == "die": os.kill(os.getpid(), 9)
if mode.startswith("wait"):
    pathlib.Path(mode[5:]).touch()
    time.sleep(60)
if before: value += json.loads(pathlib.Path(before, "metrics.json").read_text())["metrics"]["value"]["value"]'''


@pytest.fixture(scope="module")
def stub(make_template, tmp_path_factory):
    return make_template(tmp_path_factory.mktemp("templates") / "stub.ipynb", PARAMETERS, MODES, SAVE)


def finished(folder):
    return sorted(p.name for p in Path(folder).iterdir() if not p.name.endswith((".yaml", ".marker")))


def test_two_runs_are_the_same_bytes(make_template, tmp_path):
    noisy = '''import json, pathlib, sys, time, warnings
import matplotlib.pyplot as plt, pandas as pd
for i in range(4):
    print("line", i, end=" ", flush=True); time.sleep(0.03)
    print("error", i, file=sys.stderr, flush=True)
warnings.warn("careful")
print(object(), out_dir, pathlib.Path(out_dir).resolve(), pathlib.Path.cwd(), sorted({"b", "a"}), hash("text"))'''
    show = '''plt.plot([1, 3, 2]); plt.title("A figure"); plt.show()
pd.DataFrame({"caption": ["<script>alert(1)</script>"]}).style.highlight_max()'''
    template = make_template(tmp_path / "noisy.ipynb", 'value: float = 1.0\nout_dir: str = "out"', noisy, show, SAVE)
    a, b = tmp_path / "here" / "noisy", tmp_path / "there" / "noisy"
    for out in (a, b): run(template, {"value": "2"}, out, quiet=True)
    for name in ("report.ipynb", "report.html", "metrics.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    text, page = (a / "report.ipynb").read_text(), (a / "report.html").read_text()
    assert str(tmp_path) not in text + page + (a / "metrics.json").read_text() + (a / "run.json").read_text()
    assert '"out_dir": "."' in text and '"value": 2.0' in text and "ipykernel" not in text
    assert "<script" not in page and "&lt;script&gt;" in page and 'alt="Figure 1: ' in page
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    record = json.loads((a / "run.json").read_text())
    assert (record["parameters"] == {"value": 2.0}
            and record["artefacts"].keys() == {"metrics.json", "report.html", "report.ipynb"})
    png = next(o["data"]["image/png"] for c in json.loads(text)["cells"]
               for o in c.get("outputs", []) if "image/png" in o.get("data", {}))
    assert base64.b64decode("".join(png)).startswith(b"\x89PNG")


def test_another_package_in_the_current_folder_is_not_used(installed, make_template, tmp_path):
    (tmp_path / "medclip_nb").mkdir()
    (tmp_path / "medclip_nb" / "__init__.py").write_text("raise RuntimeError('another checkout')")
    where = 'import json, pathlib, medclip_nb; value = float("here" in medclip_nb.__file__)'
    template = make_template(tmp_path / "own.ipynb", 'value: float = 1.0\nout_dir: str = "out"', where, SAVE)
    environment = {name: value for name, value in os.environ.items() if name != "JUPYTER_PATH"} # A kernel of its own
    done = subprocess.run([installed, "run", str(template), "--out", "run"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]["value"]["value"] == 0


def test_failures_leave_the_old_run_whole(stub, tmp_path):
    out = tmp_path / "run"
    run(stub, {"value": 3}, out, quiet=True)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(InputError, match="^a.csv, row 3: <b>no image</b>. Remove the row.$"):
        run(stub, {"mode": "input"}, out, quiet=True)
    assert finished(tmp_path) == ["run"]
    with pytest.raises(RunError,
                       match=r"KeyError: 'a bug'\nin this cell:\n    import json(.|\n)*run.failed/report.ipynb"):
        run(stub, {"mode": "bug"}, out, quiet=True)
    assert "a bug" in (tmp_path / "run.failed" / "report.ipynb").read_text()
    with pytest.raises(RunError, match="ran out of memory"): run(stub, {"mode": "die"}, out, quiet=True)
    with pytest.raises(RunError, match="longer than its limit of 2 s"):
        run(stub, {"mode": f"wait {tmp_path / 'x.marker'}"}, out, quiet=True, timeout=2)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert finished(tmp_path) == ["run", "run.failed"]


def test_what_is_no_run_is_not_replaced(stub, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").touch()
    for out in (tmp_path, tmp_path / "data", tmp_path / "data" / "a.png"):
        with pytest.raises(InputError, match="is not a folder of medclip_nb|is a file"): run(stub, {}, out, quiet=True)
    with pytest.raises(InputError, match="cannot be written"):
        run(stub, {}, tmp_path / "data" / "a.png" / "b", quiet=True)
    assert (tmp_path / "data" / "a.png").exists()


@pytest.mark.parametrize("params, message", [
    ({"valu": 1}, "unknown parameter 'valu'. Did you mean 'value'"),
    ({"value": "high"}, "'value' must be float, not str 'high'"),
    ({"mode": 7}, "'mode' must be str, not int 7. Put it in quotes"), ({"out_dir": "x"}, "--out")])
def test_parameters_are_strict(stub, tmp_path, params, message):
    with pytest.raises(InputError, match=re.escape(message)): run(stub, params, tmp_path / "run")
    assert finished(tmp_path) == []


def start(code, stub, **popen):
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys\nfrom medclip_nb.experiments import run, run_suite\n{code}", str(stub)],
        **popen)


def wait_for(path, process):
    for _ in range(600):
        if path.exists(): return
        assert process.poll() is None, "it ended too early"
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")


def test_kill_leaves_nothing_and_is_swept_up(stub, tmp_path):
    marker = tmp_path / "x.marker"
    process = start(f"run(sys.argv[1], {{'mode': 'wait {marker}'}}, {str(tmp_path / 'run')!r})", stub,
                    stderr=subprocess.DEVNULL)
    wait_for(marker, process)
    process.kill()
    process.wait()
    assert finished(tmp_path) == [".partial"]
    run(stub, {}, tmp_path / "run", quiet=True)
    assert finished(tmp_path) == ["run"]


@pytest.fixture(scope="module")
def study(stub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder / "data.csv").write_text("image,label\n")
    (folder / "study.yaml").write_text(f'''
title: A <study>
description: Some *stubs*.
defaults: {{data_root: "{folder}/data.csv"}}
runs:
  - {{name: late, template: {stub}, params: {{before: "{{early}}"}}}}
  - {{name: early, template: {stub}, params: {{value: 2}}}}
  - {{name: broken, template: {stub}, params: {{mode: input}}}}
  - {{name: orphan, template: {stub}, params: {{before: "{{broken}}/x"}}}}
  - {{name: last, template: {stub}, params: {{mode: "{{suite}}"}}}}
''')
    return folder / "study.yaml"


def status(records): return {r.name: r.status for r in records}


def test_suite_goes_on_after_failures_and_resumes(study, tmp_path):
    first = run_suite(study, tmp_path, quiet=True)
    assert status(first) == {"early": "done", "late": "done", "broken": "failed", "orphan": "skipped", "last": "done"}
    assert [r.name for r in first] == ["early", "late", "broken", "orphan", "last"]
    folder = tmp_path / "study"
    table = compare(tmp_path)
    assert dict(zip(table["run"], table["value"])) == {"study/early": 2, "study/late": 3, "study/last": 1}
    assert '"before": "../early"' in (folder / "late" / "report.ipynb").read_text()
    page = (folder / "index.html").read_text()
    assert "<h1>A &lt;study&gt;</h1>" in page and "<em>stubs</em>" in page and "2.000 (1.000–3.000)" in page
    assert "row 3: &lt;b&gt;no image" in page and "CC0 &lt;1&gt;" in page and "Not for clinical use" in page
    assert "<script" not in page and not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    for link in re.findall(r'href="([^"]+)"', page):
        assert f'id="{link[1:]}"' in page if link.startswith("#") else (folder / link).exists(), link

    plan = {"early": "kept", "late": "kept", "broken": "to run", "orphan": "to run", "last": "to run"}
    assert status(plan_suite(study, tmp_path)) == plan
    again = run_suite(study, tmp_path, quiet=True)
    assert status(again) == {"early": "kept", "late": "kept", "broken": "failed", "orphan": "skipped", "last": "kept"}
    assert (folder / "index.html").read_text() == page

    (folder / "late" / "report.html").unlink()
    assert status(run_suite(study, tmp_path, only=["late"], quiet=True)) == {"early": "kept", "late": "done"}
    assert status(run_suite(study, tmp_path, only=["early"], force=True, quiet=True)) == {"early": "done"}
    assert status(plan_suite(study, tmp_path))["late"] == "kept", "the same products do not make it out of date"
    (study.parent / "data.csv").write_text("image,label\na,b\n")
    assert status(plan_suite(study, tmp_path))["early"] == "to run"


def test_interrupted_suite_goes_on(stub, tmp_path, command):
    marker, file = tmp_path / "x.marker", tmp_path / "two.yaml"
    text = "runs:\n  - {name: one, template: STUB}\n  - {name: two, template: STUB, params: {mode: MODE}}\n".replace(
        "STUB", str(stub))
    file.write_text(text.replace("MODE", f"wait {marker}"))
    process = subprocess.Popen([command, "suite", file, "--out", tmp_path], stderr=subprocess.PIPE, text=True)
    wait_for(marker, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "goes on from here" in error and "Traceback" not in error
    assert finished(tmp_path / "two") == ["one", "suite.json"]
    file.write_text(text.replace("MODE", '""'))
    assert status(run_suite(file, tmp_path, quiet=True)) == {"one": "kept", "two": "done"}


def test_pages_are_drawn_anew_without_executing(stub, tmp_path):
    "From the notebook alone, byte for byte as the run drew them; the record and the stamp still fit"
    run(stub, out_dir=tmp_path / "one", quiet=True)
    before = (tmp_path / "one" / "report.html").read_bytes()
    (tmp_path / "one" / "report.html").write_text("of an older version")
    render_reports(tmp_path)
    assert (tmp_path / "one" / "report.html").read_bytes() == before
    record, stamp = (json.loads((tmp_path / "one" / name).read_text()) for name in ("run.json", ".complete"))
    assert record["artefacts"]["report.html"] == file_hash(tmp_path / "one" / "report.html")
    assert stamp["files"]["run.json"] == (tmp_path / "one" / "run.json").stat().st_size
    assert run(stub, out_dir=tmp_path / "one", quiet=True, force=False).status == "kept"


def test_the_front_page_of_many_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("medclip_nb.experiments.overview._PICTURED", 3)
    metrics = json.dumps({"schema": 1, "task": "stub", "metrics": {"value": {"value": 0.5, "n": 7}}, "details": {}})
    reads = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or real(path))
    for n in range(5):
        (tmp_path/f"run-{n}").mkdir()
        (tmp_path/f"run-{n}"/"metrics.json").write_text(metrics)
        page = write_index(tmp_path).read_text()
        assert page.count('<a href="run-') - page.count('>metrics.json</a>') == n + 1 # A line of the table for each
        assert page.count('class="card"') == min(n + 1, 3)
        assert ("and to the 2 others" in page) == (n == 4)
    assert len(reads) == 1 + 2 + 3 + 4 + 5 # Each once
