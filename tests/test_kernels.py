"Kernels that are forked from a server: as fresh ones in all but the time, and gone when their run is"
import json
import os
import signal
import subprocess
import sys
import time

import forks
import pytest

from medclip_nb.experiments import RunError, run, warm_kernels

FACTS = """
import json, os, pathlib, sys
found = {"first": "pandas" in sys.modules, "server": os.getppid(), "pid": os.getpid(), "session": os.getsid(0),
         "threads": os.environ.get("OMP_NUM_THREADS"), "run": os.environ["MEDCLIP_NB_RUN"],
         "left": sys.modules.get("pandas").__dict__.pop("left", None) if "pandas" in sys.modules else None}
import pandas
pandas.left = "by an earlier run"
_ = pathlib.Path(out_dir, "facts.json").write_text(json.dumps(found))
"""


@pytest.fixture
def usual(monkeypatch):
    "The kernel python3 of the environment, not the one of these tests"
    monkeypatch.delenv("JUPYTER_PATH")


@pytest.fixture
def facts(make_template, tmp_path, usual):
    "Execute a template that says where it runs; its facts and its record"
    template = make_template(tmp_path/"facts.ipynb", 'out_dir: str = "out"', FACTS)
    def execute(name):
        path = run(template, {}, tmp_path/name, quiet=True).path
        return json.loads((path/"facts.json").read_text()), json.loads((path/"run.json").read_text())
    return execute


def gone(pid):
    "Whether a process ends within some seconds; one that has only not been asked after is"
    for _ in range(300):
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8") as f: state = f.read().rpartition(")")[2].split()[0]
        except OSError: return True
        if state == "Z": return True
        time.sleep(0.1)
    return False


def test_a_fork_computes_and_draws_what_a_fresh_kernel_does(make_template, tmp_path, usual, monkeypatch):
    template = make_template(tmp_path/"sums.ipynb", 'out_dir: str = "out"', """
import matplotlib.pyplot as plt, numpy as np, pandas as pd, torch""", """
from medclip_nb.core import setup_experiment
setup_experiment(0)
rows = torch.randn(300, 200) @ torch.randn(200, 100)
table = pd.DataFrame({"sum": rows.sum(1).numpy(), "mean": np.random.default_rng(0).normal(size=300)})
plt.plot(table); table.describe()""", """
import json, pathlib, sys
table.to_parquet(f"{out_dir}/predictions.parquet")
about = {"threads": torch.get_num_threads(), "hash": hash("a"), "backend": plt.get_backend(), "path": sys.path,
         "value": float(table["sum"].std()), "words": len(sys.argv), "columns": pd.get_option("display.max_columns")}
_ = pathlib.Path(out_dir, "metrics.json").write_text(json.dumps({"schema": 1, "task": "x", "metrics": {}, **about}))
""")
    one, two = tmp_path/"one"/"run", tmp_path/"two"/"run"
    run(template, {}, one, quiet=True)
    monkeypatch.setenv("MEDCLIP_NB_KERNEL", "fresh")
    run(template, {}, two, quiet=True)
    starts = [json.loads((p/"run.json").read_text())["kernel"] for p in (one, two)]
    assert starts == [{"start": "forked", "why": ""}, {"start": "fresh", "why": "MEDCLIP_NB_KERNEL asks for it"}]
    for name in ("metrics.json", "predictions.parquet", "report.ipynb", "report.html"):
        assert (one/name).read_bytes() == (two/name).read_bytes(), name


def test_a_kernel_ends_without_a_word(make_template, tmp_path, usual, capfd):
    "Though its control thread is about to write out what was printed when the main thread closes the sockets"
    template = make_template(tmp_path/"slow.ipynb", 'out_dir: str = "out"', """
import threading, time
from ipykernel.iostream import IOPubThread
def late(self, pipe=IOPubThread._event_pipe.fget, current=threading.current_thread, wait=time.sleep):
    if current().name == "Control": wait(0.2)
    return pipe(self)
IOPubThread._event_pipe = property(late)""")
    run(template, {}, tmp_path/"run", quiet=True)
    assert "Error" not in capfd.readouterr().err


def test_runs_of_a_block_share_a_server_and_nothing_else(facts):
    with warm_kernels(): (one, about), (two, _) = facts("one"), facts("two")
    assert about["kernel"] == {"start": "forked", "why": ""}
    assert one["server"] == two["server"] and one["pid"] != two["pid"], "the same server, another process"
    assert one["first"] and two["first"], "the library was there before its first import"
    assert one["left"] is two["left"] is None, "what one run leaves, the next does not see"
    assert one["session"] == one["pid"] and [one["run"], two["run"]] == ["one", "two"]
    assert gone(one["server"]), "the server ends with the block"


def test_the_phases_of_a_run_are_its_seconds(facts):
    about = facts("one")[1]
    assert set(about["phases"]) == {"checks", "kernel", "imports", "body", "papermill", "report", "saving"}
    assert sum(about["phases"].values()) == pytest.approx(about["seconds"], abs=0.06), "but for rounding"


def test_the_runner_imports_neither_models_nor_what_nobody_needs():
    code = """
import sys
from medclip_nb.experiments import kernels, runs
runs.check_names("zero_shot", {"dataset": "starter", "model": "starter"})
with kernels.without("rfc3987_syntax"):
    import papermill
print(sorted({"torch", "open_clip", "timm", "transformers", "rfc3987_syntax"} & sys.modules.keys()))"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_a_figure_is_drawn_for_its_report_alone(make_template, tmp_path, usual):
    template = make_template(tmp_path/"figure.ipynb", 'out_dir: str = "out"', """
import matplotlib.pyplot as plt
from medclip_nb import plots
plots.use_style()
draw, drawn = plt.Figure.draw, []
plt.Figure.draw = lambda figure, renderer: (drawn.append(1), draw(figure, renderer))[1]
plt.plot([1, 2]);""", "print(len(drawn))")
    report = json.loads((run(template, {}, tmp_path/"out", quiet=True).path/"report.ipynb").read_text())
    outputs = [output for cell in report["cells"] for output in cell.get("outputs", [])]
    assert [o["output_type"] for o in outputs] == ["display_data", "stream"], "a figure, and how often it was drawn"
    assert "".join(outputs[1]["text"]).strip() == "1", "once, and cut to what is drawn"


def test_another_environment_gets_another_server(facts, monkeypatch):
    with warm_kernels():
        one = facts("one")[0]
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        two = facts("two")[0]
    assert one["server"] != two["server"] and [one["threads"], two["threads"]] == ["1", "2"]


def test_another_kernel_is_started_as_it_says(make_template, tmp_path):
    template = make_template(tmp_path/"stub.ipynb", 'out_dir: str = "out"', "1")
    about = json.loads((run(template, {}, tmp_path/"one", quiet=True).path/"run.json").read_text())
    assert about["kernel"] == {"start": "fresh", "why": "the kernel python3 is not the usual one"}


@pytest.mark.parametrize("end, how", [
    ("os._exit(1)", "ended with 1"), ("os.kill(os.getpid(), 9)", "was killed by signal 9; most likely it ran out of"),
    ("os.kill(os.getppid(), 9)", "was killed by signal 9")])
def test_a_kernel_that_dies_fails_its_run_alone(facts, make_template, tmp_path, end, how):
    dies = make_template(tmp_path/"dies.ipynb", 'out_dir: str = "out"', f"import os, time\n{end}\ntime.sleep(60)")
    with warm_kernels():
        with pytest.raises(RunError, match=f"The kernel {how}"): run(dies, {}, tmp_path/"dead", quiet=True)
        assert facts("next")[1]["kernel"]["start"] == "forked"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_when_the_runner_is_ended(make_template, tmp_path, number):
    sleeps = make_template(tmp_path/"sleeps.ipynb", 'here: str = ""\nout_dir: str = "out"', """
import os, pathlib, time
_ = pathlib.Path(here, "part").write_text(f"{os.getppid()} {os.getpid()}")
os.rename(f"{here}/part", f"{here}/pids")
time.sleep(120)""")
    code = f"from medclip_nb.experiments import run; run({str(sleeps)!r}, {{'here': '.'}}, 'out')"
    environment = {name: value for name, value in os.environ.items() if name != "JUPYTER_PATH"}
    runner = subprocess.Popen([forks.forked(), "-c", code], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    for _ in range(1200):
        if (tmp_path/"pids").is_file() or runner.poll() is not None: break
        time.sleep(0.1)
    server, kernel = map(int, (tmp_path/"pids").read_text().split())
    runner.send_signal(number)
    assert runner.wait(60) != 0
    assert gone(kernel) and gone(server)


def test_a_server_in_its_imports_ends_with_the_process_that_started_it(tmp_path):
    (tmp_path/"torch.py").write_text(
        f"import pathlib, time; pathlib.Path({str(tmp_path/'begun')!r}).touch(); time.sleep(60)"
    )
    code = f"""
import os, sys, time
from medclip_nb.experiments.kernels import KernelServer
path = ":".join([{str(tmp_path)!r}, os.environ["PYTHONPATH"]])
server = KernelServer([sys.executable], os.environ | {{"PYTHONPATH": path}}, tied=True)
server.prepare([["torch"]])
print(server.process.pid, flush=True)
time.sleep(60)"""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                             env=os.environ | {"PYTHONPATH": root})
    pid = int(owner.stdout.readline())
    for _ in range(600):
        if (tmp_path/"begun").exists(): break
        time.sleep(0.1)
    assert (tmp_path/"begun").exists() and os.path.exists(f"/proc/{pid}")
    owner.kill()
    owner.wait()
    began = time.monotonic()
    assert gone(pid) and time.monotonic() - began < 20
