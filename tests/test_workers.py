"Suites side by side: order, failures, interruption at any point, and the same bytes as one after the other"
import json
import os
import re
import signal
import subprocess
import time
from concurrent.futures import Future

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from medclip_nb.core import alive
from medclip_nb.experiments import Board, Here, Line, SuiteRun, environment, run_suite, work_off

PARAMETERS = '''value: float = 1.0
mode: str = ""
before: str = ""
out_dir: str = "out"'''
BODY = '''import json, os, pathlib, time
kind, *files = (mode or "plain").split()
if kind == "bug": raise KeyError("a bug")
if kind == "meet": # Its own file, and that of the run that it needs at its side
    pathlib.Path(files[0]).touch()
    while not os.path.exists(files[1]): time.sleep(0.05)
if kind == "hold" and not os.path.exists(files[1]): # Waits for the second file
    print("holding on")
    with open(files[0], "a") as f: print(os.getpid(), file=f)
    while not os.path.exists(files[1]): time.sleep(0.05)
if before: value += json.loads(pathlib.Path(before, "metrics.json").read_text())["metrics"]["value"]["value"]
threads = os.environ.get("OMP_NUM_THREADS", "")
text = {"schema": 1, "task": "stub", "metrics": {"value": {"value": value}}, "details": {"threads": threads}}
_ = pathlib.Path(out_dir, "metrics.json").write_text(json.dumps(text))'''


@pytest.fixture
def suite(make_template, tmp_path):
    "Write a suite of runs of a stub"
    make_template(tmp_path / "stub.ipynb", PARAMETERS, BODY)
    def write(**runs):
        entries = [{"name": name, "template": "stub.ipynb", "params": params} for name, params in runs.items()]
        (tmp_path / "many.yaml").write_text(yaml.safe_dump({"runs": entries}))
        return tmp_path / "many.yaml"
    return write


def start(command, path, *words):
    return subprocess.Popen([command, "suite", path, "--out", path.parent / "reports", "--workers", "2", *words],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process, code=0):
    "What a command said"
    said, errors = process.communicate(timeout=300)
    assert process.returncode == code, said + errors
    return said, errors


def until(there, process=None):
    "Wait for something"
    for _ in range(4000):
        if found := there(): return found
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("it did not come")


def kernels_of(folder, *runs):
    "The processes in which runs are held"
    return [int(until(lambda: (folder / name).exists() and (folder / name).read_text().split())[-1]) for name in runs]


def states(folder):
    return {r["name"]: r["status"] for r in json.loads((folder / "suite.json").read_text())["runs"]}


def left(folder): return sorted(p.name for p in folder.iterdir() if p.name != ".logs")


def worker_of(folder, run):
    "The process that executes a run, by the name of the folder that it writes"
    found = [re.fullmatch(rf"\.{run}\.(\d+)-.*", p.name) for p in (folder / ".partial").glob(".*")]
    return next((int(m[1]) for m in found if m), None)


def test_runs_go_side_by_side_and_failures_stop_what_needs_them_only(suite, command, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    path = suite(one={"mode": f"meet {a} {b}"}, broken={"mode": "bug"}, orphan={"before": "{broken}"},
                 two={"mode": f"meet {b} {a}"}, three={"before": "{two}"}, all={"mode": "x {suite}"})
    said, errors = ended(start(command, path, "--threads", "3"), code=1)
    folder = tmp_path / "reports" / "many"
    assert states(folder) == {"one": "done", "broken": "failed", "orphan": "skipped", "two": "done", "three": "done",
                              "all": "done"}
    assert [line.split()[0] for line in said.splitlines()[:6]] == list(states(folder)), "in the order of the suite"
    lines = errors.splitlines()
    assert {"one: begun", "orphan: skipped: it needs broken"} < set(lines)
    assert any(re.fullmatch(r"broken: failed after \d+ s: KeyError: 'a bug'", line) for line in lines)
    at = [next(n for n, line in enumerate(lines) if line.startswith(words))
          for words in ("two: done", "three: begun", "three: done", "all: begun")]
    assert at == sorted(at), "what waits for another begins after it"
    found = json.loads((folder / "three" / "metrics.json").read_text())
    assert found["metrics"]["value"]["value"] == 2 and found["details"]["threads"] == "3"
    assert "three: cell 2/4" in (folder / ".logs" / "three.log").read_text()
    assert "KeyError" in (folder / "index.html").read_text()
    said, errors = ended(start(command, path, "--threads", "3"), code=1)
    assert "one: begun" not in errors and "broken: begun" in errors, "what is there is not executed again"


def test_kill_of_the_command_leaves_no_process_and_it_goes_on(suite, command, tmp_path):
    go, folder = tmp_path / "go", tmp_path / "reports" / "many"
    holds = {name: {"mode": f"hold {tmp_path / name} {go}"} for name in ("one", "two")}
    path = suite(first={}, **holds, last={"before": "{one}"})
    process = start(command, path)
    kernels = kernels_of(tmp_path, *holds)
    workers = [worker_of(folder, name) for name in holds]
    assert all(map(alive, kernels + workers)) and "holding on" in (folder / ".logs" / "one.log").read_text()
    process.kill()
    process.communicate()
    until(lambda: not any(map(alive, kernels + workers)))
    assert states(folder)["first"] == "done" and left(folder) == [".partial", "first", "suite.json"]
    go.touch()
    said, errors = ended(start(command, path))
    assert states(folder) == dict.fromkeys(("first", "one", "two", "last"), "done") and "first: begun" not in errors
    assert left(folder) == ["first", "index.html", "last", "one", "suite.json", "two"]


def test_interruption_ends_everything_and_it_goes_on(suite, command, tmp_path):
    go, folder = tmp_path / "go", tmp_path / "reports" / "many"
    path = suite(**{name: {"mode": f"hold {tmp_path / name} {go}"} for name in ("one", "two")}, three={})
    process = start(command, path)
    kernels = kernels_of(tmp_path, "one", "two")
    process.send_signal(signal.SIGINT)
    _, errors = ended(process, code=130)
    assert "goes on from here" in errors and "Traceback" not in errors
    until(lambda: not any(map(alive, kernels)))
    assert left(folder) == [], "no half of a run"
    go.touch()
    ended(start(command, path))
    assert set(states(folder).values()) == {"done"}


def test_a_killed_worker_is_replaced_and_its_run_repeated_once(suite, command, tmp_path):
    go, never, folder = tmp_path / "go", tmp_path / "never", tmp_path / "reports" / "many"
    path = suite(one={"mode": f"hold {tmp_path / 'one'} {go}"}, two={"mode": f"hold {tmp_path / 'two'} {never}"},
                 three={}, four={"before": "{two}"})
    process = start(command, path)
    for name, times in (("one", 1), ("two", 1), ("two", 2)):
        until(lambda: (tmp_path / name).exists() and len((tmp_path / name).read_text().split()) == times, process)
        if name == "one": go.touch()
        os.kill(until(lambda: worker_of(folder, name), process), signal.SIGKILL)
    said, errors = ended(process, code=1)
    assert states(folder) == {"one": "done", "two": "failed", "three": "done", "four": "skipped"}
    assert "two: failed: Died: The process of the run was killed by signal 9." in errors
    never.touch()
    ended(start(command, path))
    assert set(states(folder).values()) == {"done"}


def test_the_same_bytes_side_by_side(command, tmp_path):
    "Data of 36 pictures: training, what builds on it, and what does not, with one thread each"
    rng, rows = np.random.default_rng(0), []
    for i in range(36):
        Image.fromarray(rng.integers(0, 255, (32, 32), np.uint8)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": f"Picture {i % 9}.", "split": ["train", "valid", "test"][i % 3]})
    pd.DataFrame(rows).to_csv(tmp_path / "table.csv", index=False)
    defaults = {"dataset": "csv", "data_root": str(tmp_path / "table.csv"), "device": "cpu", "n_boot": 20,
                "model": "starter"}
    runs = [{"name": "train", "template": "finetune", "params": {"epochs": 1, "batch_size": 6}},
            {"name": "floor", "template": "retrieval"},
            {"name": "trained", "template": "retrieval", "params": {"checkpoint": "{train}/checkpoint"}},
            {"name": "compare", "template": "compare", "params": {"reports_dir": "{suite}"}}]
    (path := tmp_path / "real.yaml").write_text(yaml.safe_dump({"defaults": defaults, "runs": runs}))
    for out, words in (("serial", []), ("parallel", ["--workers", "2"])):
        done = subprocess.run([command, "suite", path, "--out", tmp_path / out, "--threads", "1", *words],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    files = [p.relative_to(tmp_path / "serial") for p in (tmp_path / "serial").rglob("*") if p.is_file()]
    assert len(files) > 20
    for file in files:
        if file.name in ("run.json", ".complete"): continue # Times
        if file.parent.match("compare*") and file.stem == "report" or file.stem == "costs": continue # Times of all runs
        assert (tmp_path / "serial" / file).read_bytes() == (tmp_path / "parallel" / file).read_bytes(), file


@pytest.mark.parametrize("words, message", [
    (["--workers", "0"], "number of workers is from 1 to 1024, not 0"), (["--threads", "-1"], "number of threads"),
    (["--workers", "2", "--processes", "2"], "give one of them")])
def test_mistakes_end_with_2(suite, command, words, message):
    done = subprocess.run([command, "suite", suite(one={}), *words], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


def test_the_scheduler_takes_runs_that_are_decided_later():
    "A run that the result of another calls for, as in a search; and one that raises"
    line, over, board = Line([SuiteRun("a", "x")]), [], Board(dict.fromkeys("abc", "x"), {}.get, "/none", quiet=True)
    for run, answer in work_off(line, lambda run: Here().submit(int, run.template), Here(), board):
        over.append((run.name, type(answer.exception()).__name__ if isinstance(answer, Future) else ""))
        if run.name == "a": line.add([SuiteRun("b", "1", needs={"a"}), SuiteRun("c", "2", needs={"b"})])
    assert over == [("a", "ValueError"), ("b", "NoneType"), ("c", "NoneType")]


def test_an_unforeseen_error_ends_one_run_only(suite, tmp_path, monkeypatch):
    from medclip_nb.experiments import suites
    path, whole = suite(one={}, two={}), suites.run
    def run(template, params, path, **options):
        if path.name == "one": raise OSError("No space left on device")
        return whole(template, params, path, **options)
    monkeypatch.setattr(suites, "run", run)
    with environment({"OMP_NUM_THREADS": "1"}): found = run_suite(path, tmp_path / "reports", quiet=True)
    assert [(r.status, r.message) for r in found] == [("failed", "OSError: No space left on device"), ("done", "")]


def test_planning_looks_once_at_what_runs_share(tmp_path, monkeypatch):
    "Sixty runs on the same table: its content is identified once, and whether names exist is asked once"
    from medclip_nb.experiments import plan_suite, suites
    (tmp_path / "table.csv").write_text("image,caption,split\na.png,A.,test\n")
    runs = [{"name": "r", "template": "retrieval", "matrix": {"seed": list(range(60))}}]
    defaults = {"dataset": "csv", "data_root": str(tmp_path / "table.csv"), "model": "ViT-B-32"}
    (tmp_path / "many.yaml").write_text(yaml.safe_dump({"defaults": defaults, "runs": runs}))
    asked = []
    def counted(name, whole): return lambda *args: (asked.append(name), whole(*args))[1]
    for name in ("data_identity", "check_names"):
        monkeypatch.setattr(suites, name, counted(name, getattr(suites, name)))
    assert len(plan_suite(tmp_path / "many.yaml", tmp_path)) == 60
    assert sorted(asked) == ["check_names", "data_identity"]
