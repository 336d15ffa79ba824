"""What goes on for long stays level: memory, open files, sockets and processes, over a suite of many runs and over a
training of many steps; `make test-slow` takes a thousand runs and ten thousand steps"""
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import forks
import numpy as np
import pandas as pd
import pytest
import yaml
from kills import LASTS, living
from PIL import Image
from test_training import tiny

GROWS = 8.0  # MB that a process may grow by: what it notes of each run or epoch
FEW = 8  # Open files that come and go within a run
BODY = """import json, pathlib
text = {"schema": 1, "task": "stub", "metrics": {"value": {"value": value}}, "details": {}}
_ = pathlib.Path(out_dir, "metrics.json").write_text(json.dumps(text))"""
TRAINING = """import sys
from medclip_nb.core import seed_everything
from medclip_nb.datasets import load_manifest
from medclip_nb.models import load_model
from medclip_nb.trainers import train
seed_everything(0)
rows, clip = load_manifest("csv", "table.csv"), load_model("model", device="cpu")
train(clip, rows.part("train"), rows.part("valid"), "out", max_steps=int(sys.argv[1]), batch_size=8)"""


@dataclass
class Sample:
    "One process at one moment"
    memory: float  # MB in use
    files: int  # Open, sockets among them
    sockets: int

    def __str__(self): return f"{self.memory:.1f} MB, {self.files} files, {self.sockets} sockets"


def look(process: int) -> Sample | None:
    "A sample of a process; None where it ends, or has just closed a file"
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        open_files = [os.readlink(file) for file in Path(f"/proc/{process}/fd").iterdir()]
    except OSError: return None
    if not open_files: return None
    sockets = sum(file.startswith("socket:") for file in open_files)
    return Sample(pages * resource.getpagesize() / 1e6, len(open_files), sockets)


def level(samples: list[Sample]) -> Sample:
    "What is kept while runs come and go: the median of the memory, the least number of files"
    memory, files, sockets = zip(*map(astuple, samples))
    return Sample(statistics.median(memory), min(files), min(sockets))


def stays_level(words: list, folder: Path, warm: Callable[[], bool], **environment: str | None) -> None:
    """Execute a command in a folder; from the moment when it is warm, every process that works there until the end is
    to stay as it is"""
    found, numbers, begun = {}, [], time.monotonic()
    own = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(words, cwd=folder, env=own, stdout=log, stderr=log)
        while process.poll() is None:
            time.sleep(0.2)
            if not found and not warm(): continue
            numbers.append(len(there := living(folder)))
            for one in there:
                if sample := look(one): found.setdefault(one, []).append(sample)
    assert process.returncode == 0, (folder / "log").read_text()[-3000:]
    print(f"\n{time.monotonic() - begun:.0f} s, at most {max(numbers)} processes at once")
    part = len(numbers) // 5
    kept = {one: samples for one, samples in found.items() if len(samples) > 0.9 * len(numbers)}
    assert kept and part
    for one, samples in kept.items():
        first, half, last = (level(samples[at:][:part]) for at in (0, len(samples) // 2, -part))
        print(f"process {one}: {first}; halfway {half}; at the end {last}")
        assert last.memory - first.memory < GROWS
        assert last.files - first.files < FEW and last.sockets - first.sockets < FEW
    assert min(numbers[-part:]) <= min(numbers[:part]), "processes are left behind"
    end = time.monotonic() + LASTS
    while (left := living(folder)) and time.monotonic() < end: time.sleep(0.1)
    assert left == []


@pytest.fixture(scope="module", autouse=True)
def offered(command):
    "Forks are offered from elsewhere than the folder that is watched"
    subprocess.run([command, "--version"], check=True, capture_output=True)


@pytest.mark.parametrize("runs", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_runs(command, make_template, tmp_path, runs):
    "In the process of the suite, and in the one that forks its kernels; nor do temporary files stay"
    make_template(tmp_path / "stub.ipynb", 'value: int = 1\nout_dir: str = "out"', BODY)
    entry = {"name": "run", "template": "stub.ipynb", "matrix": {"value": list(range(runs))}}
    (tmp_path / "many.yaml").write_text(yaml.safe_dump({"runs": [entry]}))
    (tmp_path / "temporary").mkdir()
    warm = lambda: (tmp_path / "out" / "many" / f"run-{runs // 8}").exists()
    stays_level([command, "suite", "many.yaml", "--out", "out"], tmp_path, warm, JUPYTER_PATH=None,
                TMPDIR=str(tmp_path / "temporary"))
    assert len(list((tmp_path / "out" / "many").glob("run-*/report.html"))) == runs
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("steps", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_steps(tmp_path, steps):
    "With a validation, a stored state and a line of history for every twenty steps"
    rng, rows = np.random.default_rng(0), []
    for i in range(20):
        Image.fromarray(rng.integers(0, 255, (32, 32), np.uint8)).save(tmp_path / f"{i}.png")
        rows += [(f"{i}.png", f"Picture {i}, seen {n} times.", "train" if i < 16 else "valid") for n in range(10)]
    pd.DataFrame(rows, columns=["image", "caption", "split"]).to_csv(tmp_path / "table.csv", index=False)
    (tmp_path / "model").mkdir()
    tiny(tmp_path / "model")
    history = tmp_path / "out" / "history.jsonl"
    warm = lambda: history.exists() and len(history.read_text().splitlines()) > steps // 20 // 8
    stays_level([forks.forked(), "-c", TRAINING, str(steps)], tmp_path, warm)
    assert pd.read_json(history, lines=True)["step"].iloc[-1] == steps
