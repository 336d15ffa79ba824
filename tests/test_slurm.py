"A suite as jobs: the scripts as bash reads them, and as a stand-in for sbatch executes them"
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from medclip_nb.cli import main as cli

PARAMETERS = '''value: float = 1.0
mode: str = ""
before: str = ""
epochs: int = 0
out_dir: str = "out"'''
BODY = '''import json, os, pathlib, time
if mode.startswith("once") and not os.path.exists(mode[5:]):
    state = pathlib.Path(os.environ["MEDCLIP_NB_STATE"], "state.pt")
    if not state.exists():
        state.touch()
        pathlib.Path(mode[5:]).touch()
        time.sleep(60)
if mode == "bug": raise KeyError("a bug")
if before: value += json.loads(pathlib.Path(before, "metrics.json").read_text())["metrics"]["value"]["value"]
text = {"schema": 1, "task": "stub", "metrics": {"value": {"value": value}}, "details": {}}
_ = pathlib.Path(out_dir, "metrics.json").write_text(json.dumps(text))'''
SBATCH = '''#!{python}
"Executes the tasks of a job at once, one after the other, and notes how it was called"
import json, os, re, subprocess, sys
log = os.path.join(os.environ["STAND_IN"], "calls.jsonl")
number = str(100 + (sum(1 for _ in open(log)) if os.path.exists(log) else 0))
with open(log, "a") as f: f.write(json.dumps(sys.argv[1:]) + "\\n")
given = dict(a[2:].split("=", 1) for a in sys.argv[1:-1] if "=" in a)
ranges = [part.split("-") for part in given.get("array", "").split("%")[0].split(",") if part]
script, codes = sys.argv[-1], []
assert subprocess.run(["bash", "-n", script]).returncode == 0
for task in [n for r in ranges for n in range(int(r[0]), int(r[-1]) + 1)] or [None]:
    own = {{"SLURM_JOB_ID": number, "SLURM_ARRAY_JOB_ID": number}}
    if task is not None: own["SLURM_ARRAY_TASK_ID"] = str(task)
    with open(os.path.join(os.environ["STAND_IN"], f"{{number}}_{{task}}.log"), "a") as out:
        codes.append(subprocess.run(["bash", script], env={{**os.environ, **own}}, stdout=out, stderr=out).returncode)
with open(os.path.join(os.environ["STAND_IN"], "codes.jsonl"), "a") as f: f.write(json.dumps([number, codes]) + "\\n")
print(number + ";cluster")
'''


def call(*words, code=0):
    done = CliRunner().invoke(cli.app, ["slurm", *map(str, words)])
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def cluster(make_template, command, tmp_path, monkeypatch):
    "A suite, the stand-in on the path, and python as a fork"
    make_template(tmp_path / "stub.ipynb", PARAMETERS, BODY)
    (tmp_path / "bin").mkdir()
    for name, text in (("sbatch", SBATCH.format(python=sys.executable)),
                       ("scontrol", '#!/bin/sh\necho "$@" >> "$STAND_IN/scontrol"\n')):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "notes").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(tmp_path / "notes"))
    monkeypatch.setattr("sys.executable", os.path.join(os.environ["MEDCLIP_NB_FORKS"], "python"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def noted(folder, name): return [json.loads(line) for line in (folder / "notes" / name).read_text().splitlines()]


SUITE = '''runs:
  - {name: first, template: stub.ipynb, params: {value: 2}}
  - {name: broken, template: stub.ipynb, params: {mode: bug}}
  - {name: second, template: stub.ipynb, params: {before: "{first}"}}
  - {name: orphan, template: stub.ipynb, params: {before: "{broken}"}}
  - {name: all, template: stub.ipynb, params: {mode: "{suite}"}}'''


def test_a_suite_is_submitted(cluster):
    "In levels that wait for each other; a failure takes along what needs it only; the last job brings all together"
    (cluster / "my suite.yaml").write_text("name: mine\n" + SUITE)
    said = call("my suite.yaml", "--out", "the reports", "--submit", "--partition", "gpu", "--time", "1-00:00:00",
                "--memory", "64G", "--at-once", 3, "--sbatch=--constraint=a100")
    assert "5 runs in 3 array(s)" in said and "submitted: 100 101 102 and last 103" in said
    assert noted(cluster, "calls.jsonl") == [
        ["--parsable", "--array=0-1%3", "run.sh"],
        ["--parsable", "--array=2-3%3", "--dependency=afterany:100", "run.sh"],
        ["--parsable", "--array=4%3", "--dependency=afterany:100:101", "run.sh"],
        ["--parsable", "--dependency=afterany:100:101:102", "last.sh"]]
    assert noted(cluster, "codes.jsonl") == [["100", [0, 1]], ["101", [0, 1]], ["102", [0]], ["103", [1]]]
    folder = cluster / "the reports" / "mine"
    found = {r["name"]: (r["status"], r["message"].split("\n")[0]) for r in
             json.loads((folder / "suite.json").read_text())["runs"]}
    assert found == {"first": ("done", ""), "broken": ("failed", "KeyError: 'a bug'"), "second": ("done", ""),
                     "orphan": ("skipped", "it needs broken"), "all": ("done", "")}
    assert json.loads((folder / "second" / "metrics.json").read_text())["metrics"]["value"]["value"] == 3
    assert "KeyError" in (folder / "index.html").read_text()
    assert "second  " in (cluster / "notes" / "103_None.log").read_text()
    script = (cluster / "the reports" / "slurm" / "mine" / "run.sh").read_text()
    for line in ("--partition=gpu", "--time=1-00:00:00", "--mem=64G", "--gpus-per-node=1", "--requeue",
                 "--cpus-per-task=8", "--constraint=a100"): assert f"#SBATCH {line}\n" in script
    assert f'#SBATCH --output="{cluster}/the reports/slurm/mine/logs/%x-%A_%a.log"\n' in script
    assert "OMP_NUM_THREADS=8\n" in script
    assert "3 runs in 3 array(s)" in call("my suite.yaml", "--out", "the reports"), "what is there is not submitted"


def test_a_task_goes_on(cluster):
    "Shortly before its time is over it is queued again, and the same command continues from the state"
    (cluster / "one.yaml").write_text(
        f'runs: [{{name: long, template: stub.ipynb, params: {{mode: "once {cluster}/begun"}}}}]')
    call("one.yaml", "--gpus", 0)
    task = {**os.environ, "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "7"}
    script = ["bash", "reports/slurm/one/run.sh"]
    process = subprocess.Popen(script, env=task, stdout=subprocess.PIPE, start_new_session=True)
    end = time.monotonic() + 60
    while not (cluster / "begun").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    while not (cluster / "notes" / "scontrol").exists() and time.monotonic() < end: time.sleep(0.05)
    assert (cluster / "notes" / "scontrol").read_text() == "requeue 7_0\n"
    assert process.poll() is None, "the task goes on until Slurm ends it"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(1)
    done = subprocess.run(script, env=task, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "long  done" in done.stdout and not list((cluster / "reports" / "one").glob(".partial/*state*"))


def test_gpus_are_for_training(cluster, make_template):
    "One process for each, and one GPU for what trains nothing"
    make_template(cluster / "look.ipynb", 'before: str = ""\nout_dir: str = "out"', "pass")
    (cluster / "two.yaml").write_text('runs: [{name: look, template: look.ipynb}, {name: train, template: stub.ipynb}]')
    call("two.yaml", "--gpus", 4, "--cpus", 32)
    submit, run = ((cluster / "reports" / "slurm" / "two" / name).read_text() for name in ("submit.sh", "run.sh"))
    assert re.findall(r"--array.* run.sh", submit) == ["--array=0 run.sh", "--array=1 --gpus-per-node=1 run.sh"]
    assert "#SBATCH --gpus-per-node=4\n" in run and "OMP_NUM_THREADS=8\n" in run and "--gpus 4 --cpus 32 --run" in run


@pytest.mark.parametrize("words, message", [
    (["--time", "soon"], "--time 'soon': give minutes"), (["--memory", "much"], "--memory 'much'"),
    (["--partition", "a b"], "--partition 'a b' is not a name"), (["--sbatch", "constraint"], "--sbatch 'constraint'"),
    (["--run", "frist"], "Did you mean 'first'"), (["--only", "frist"], "Did you mean 'first'")])
def test_mistakes_end_with_2(cluster, words, message):
    (cluster / "mine.yaml").write_text(SUITE)
    assert message in call("mine.yaml", *words, code=2)
    assert not (cluster / "reports").exists()


def test_nothing_of_others_is_replaced(cluster, monkeypatch):
    (cluster / "mine.yaml").write_text(SUITE)
    (cluster / "reports" / "slurm" / "mine").mkdir(parents=True)
    (cluster / "reports" / "slurm" / "mine" / "run.sh").write_text("#!/bin/bash\nrm -r data\n")
    assert "was not written by this command and is not replaced" in call("mine.yaml", code=2)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert "There is no sbatch here" in call("mine.yaml", "--scripts", "other", "--submit", code=2)
    assert (cluster / "other" / "submit.sh").is_file()


def test_data_on_the_cluster_only(cluster):
    "Data that are not on this machine are a warning, and all is written below the folder that was given"
    (cluster / "far.yaml").write_text("runs: [{name: a, template: zero_shot, params: "
                                      "{dataset: kather, data_root: /no/where, labels: [label]}}]")
    said = call("far.yaml", "--out", "there")
    assert "warning: kather is not here: /no/where" in said and "1 runs in 1 array(s)" in said
    assert (cluster / "there" / "slurm" / "far" / "submit.sh").is_file() and not (cluster / "slurm").exists()
