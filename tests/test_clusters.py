"Suites on a Dask cluster of several processes, and on one that is made of jobs, with a stand-in for Slurm"
import json
import os
import re
import signal
import socketserver
import subprocess
import sys
import threading

import pytest
import yaml
from distributed import Client, LocalCluster
from test_workers import BODY, PARAMETERS, kernels_of, left, states, until
from typer.testing import CliRunner

from medclip_nb.cli import main as cli
from medclip_nb.core import InputError, alive
from medclip_nb.experiments import clusters, run_suite

SBATCH = '''#!/bin/sh
# Starts a job at once, in the background, from a copy: who submits it may remove the script as soon as this ends
cat "$1" >> "$STAND_IN/scripts"
cp "$1" "$STAND_IN/job-$$"
setsid bash "$STAND_IN/job-$$" > "$STAND_IN/log" 2>&1 < /dev/null &
echo "Submitted batch job $!"
echo $! >> "$STAND_IN/jobs"
'''
SCANCEL = '#!/bin/sh\nfor job in "$@"; do kill -9 -- -$job; done\n'


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(n_workers=3, threads_per_worker=1, processes=True, dashboard_address=None) as found:
        with Client(found) as client: yield client


@pytest.fixture
def suite(make_template, tmp_path, monkeypatch):
    "Write a suite of runs of a stub"
    make_template(tmp_path / "stub.ipynb", PARAMETERS, BODY)
    monkeypatch.chdir(tmp_path)
    def write(**runs):
        entries = [{"name": name, "template": "stub.ipynb", "params": params} for name, params in runs.items()]
        (tmp_path / "many.yaml").write_text(yaml.safe_dump({"runs": entries}))
        return tmp_path / "many.yaml"
    return write


def start(command, path, *words):
    words = [command, "suite", path, "--out", "reports", "--executor", "dask", "--threads", "1", *words]
    return subprocess.Popen(words, cwd=path.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process, code=0):
    said, errors = process.communicate(timeout=300)
    assert process.returncode == code, said + errors
    return said, errors


def test_a_killed_worker_of_a_cluster(cluster, suite, command, tmp_path):
    "Its run is repeated on another one, and the reports are those of one machine"
    go, folder = tmp_path / "go", tmp_path / "reports" / "many"
    path = suite(one={"mode": f"hold {tmp_path / 'one'} {go}"}, broken={"mode": "bug"}, two={"value": 3},
                 three={"before": "{two}"}, orphan={"before": "{broken}"}, all={"mode": "x {suite}"})
    process = start(command, path, "--scheduler", cluster.scheduler.address)
    [kernel], before = kernels_of(tmp_path, "one"), cluster.run(os.getpid)
    until(lambda: (folder / "three").exists(), process)
    until(lambda: sum(map(len, cluster.processing().values())) == 1, process)
    busy = next(worker for worker, keys in cluster.processing().items() if keys)
    os.kill(before[busy], signal.SIGKILL)
    until(lambda: not alive(kernel))
    until(lambda: len((tmp_path / "one").read_text().split()) == 2, process)
    go.touch()
    ended(process, code=1)
    assert states(folder) == {"one": "done", "broken": "failed", "two": "done", "three": "done", "orphan": "skipped",
                              "all": "done"}
    run_suite(path, tmp_path / "here", quiet=True)
    for name in ("one", "two", "three", "all"): # The first says that it was held, and is not here
        for file in ("metrics.json", *(("report.ipynb", "report.html") if name != "one" else ())):
            assert (folder / name / file).read_bytes() == (tmp_path / "here" / "many" / name / file).read_bytes()


def test_after_an_interruption_nothing_is_left_on_the_cluster(cluster, suite, command, tmp_path):
    go, folder = tmp_path / "go", tmp_path / "reports" / "many"
    path = suite(**{name: {"mode": f"hold {tmp_path / name} {go}"} for name in ("one", "two")})
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, None)):
        for name in ("one", "two"): (tmp_path / name).unlink(missing_ok=True)
        process = start(command, path, "--scheduler", cluster.scheduler.address)
        kernels = kernels_of(tmp_path, "one", "two")
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        if code: assert process.returncode == code and "goes on from here" in errors and "Traceback" not in errors
        until(lambda: not any(map(alive, kernels)))
    until(lambda: left(folder) == [])
    go.touch()
    ended(start(command, path, "--scheduler", cluster.scheduler.address))
    assert states(folder) == {"one": "done", "two": "done"}


def test_a_worker_that_does_not_see_what_is_needed(cluster, suite, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    path, address = suite(one={"before": f"{tmp_path}/data"}), cluster.scheduler.address
    for name, message in (("glimpse", f"it sees something else at {tmp_path}/data"),
                          ("code_hash", "its medclip_nb has other code")):
        with monkeypatch.context() as changed:
            changed.setattr(clusters, name, lambda *_: "other")
            with clusters.dask_place(address, share=1) as place, pytest.raises(InputError, match=message):
                run_suite(path, tmp_path / "reports", quiet=True, place=place)
    assert "one" not in left(tmp_path / "reports" / "many")


def test_jobs_of_slurm_are_workers(suite, command, tmp_path, monkeypatch):
    "Submitted from a profile, and given back at the end"
    (tmp_path / "bin").mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({
        "type": "slurm", "jobs": 2, "cores": 6, "processes": 2, "memory": "8GB", "queue": "gpu", "account": "lab",
        "walltime": "12:00:00", "job_extra_directives": ["--gres=gpu:1"], "job_script_prologue": ["module load cuda"],
        "scheduler_options": {"host": "127.0.0.1", "dashboard_address": None}}))
    path = suite(one={}, broken={"mode": "bug"}, two={"before": "{one}"})
    monkeypatch.delenv("OMP_NUM_THREADS")
    process = subprocess.Popen([command, "suite", path, "--out", "reports", "--executor", "dask", "--cluster",
                                "small.yaml"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ended(process, code=1)
    assert states(tmp_path / "reports" / "many") == {"one": "done", "broken": "failed", "two": "done"}
    details = json.loads((tmp_path / "reports" / "many" / "two" / "metrics.json").read_text())["details"]
    assert details["threads"] == "3", "six cores for two workers"
    script = (tmp_path / "scripts").read_text()
    for line in ("-p gpu", "-A lab", "-t 12:00:00", "--cpus-per-task=6", "--gres=gpu:1"):
        assert f"#SBATCH {line}\n" in script
    assert "module load cuda\n" in script and f"{sys.executable} -m distributed.cli.dask_worker tcp://127" in script
    jobs = [int(line) for line in (tmp_path / "jobs").read_text().split()]
    assert len(jobs) >= 2
    until(lambda: not any(map(alive, jobs)))


@pytest.mark.parametrize("job, message", [
    ("exit 0", "has ended before a worker of it joined"),
    ("", "The queue did not take a job: .*Invalid account")], ids=["dies", "refused"])
def test_jobs_that_never_become_workers(suite, command, job, message, tmp_path, monkeypatch):
    "They are not waited for"
    (tmp_path / "bin").mkdir()
    sbatch = "echo Submitted batch job 7" if job else "echo 'sbatch: error: Invalid account' >&2; exit 1"
    for name, text in (("sbatch", sbatch), ("scancel", "true"), ("squeue", "true")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({
        "type": "slurm", "jobs": 2, "cores": 1, "memory": "8GB",
        "scheduler_options": {"host": "127.0.0.1", "dashboard_address": None}}))
    path = suite(one={})
    process = subprocess.Popen([command, "suite", path, "--out", "reports", "--executor", "dask", "--cluster",
                                "small.yaml"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _, errors = ended(process, code=2)
    assert re.search(message, errors.replace("\n", " ")) and "Traceback" not in errors, errors


@pytest.mark.parametrize("words, message", [
    ([], "give either --scheduler ADDRESS"),
    (["--cluster", "slurm.yaml"], "slurm.yaml: has no 'cores' of a job"),
    (["--scheduler", "x", "--workers", "2"], "leave out --workers"), (["--cluster", "none.yaml"], "cannot be read")])
def test_mistakes_end_with_2(suite, words, message, tmp_path):
    path = suite(one={})
    (tmp_path / "slurm.yaml").write_text("type: slurm\nmemory: 1GB\n")
    done = CliRunner().invoke(cli.app, ["suite", str(path), "--executor", "dask", *words])
    assert done.exit_code == 2 and message in done.output, done.output


@pytest.fixture(scope="module")
def answering():
    "The address of something that is no scheduler, and that says so at once"
    speak = lambda request, *_: request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with socketserver.TCPServer(("127.0.0.1", 0), speak) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"tcp://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("address, message", [
    ("tcp://127.0.0.1:9", "No Dask scheduler answers at"), ("localhost", "Give one as in tcp://host:8786"),
    ("http://localhost:80", "Give one as in tcp://host:8786"), ("tcp://127.0.0.1:0", "No Dask scheduler answers at")])
def test_where_no_scheduler_answers_one_line_says_so(suite, command, address, message, answering):
    "A client that never connected says no more behind it"
    if address.endswith(":0"): address = answering
    _, errors = ended(start(command, suite(one={}), "--scheduler", address), code=2)
    assert message in errors and len(errors.splitlines()) == 1, errors


def test_without_dask_the_command_to_install_it_is_said(suite, monkeypatch):
    for name in ("distributed", "dask_jobqueue"): monkeypatch.setitem(sys.modules, name, None)
    done = CliRunner().invoke(cli.app, ["suite", str(suite(one={})), "--executor", "dask", "--scheduler", "tcp://x:1"])
    assert done.exit_code == 2 and "pip install 'medclip_nb[dask]'" in done.output
    done = CliRunner().invoke(cli.app, ["suite", str(suite(one={})), "--scheduler", "tcp://x:1"])
    assert done.exit_code == 2 and "are for --executor dask" in done.output
