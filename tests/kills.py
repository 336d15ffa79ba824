"""Kill commands at random moments, call them again, and compare with what nobody disturbed:
`python tests/kills.py [--moments 50] [--seed 0] [--what embed,finetune] [--installed]`

Each moment starts a command in an empty folder, ends it with SIGKILL (the process alone, or all of its group), and
looks at what is left: every result is absent or whole, and no process lives on. Then the same command runs to its end.
Of a suite on a Dask cluster, a worker is killed as well: the command then has to come to its end without help.
Its results, and the names of all files, hidden and temporary ones included, are those of an undisturbed run, and what
was whole before is not computed again. One line tells of each kill, a table of all; the status is 1 after any fault.
"""
import argparse
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import forks
import numpy as np

TRAINING = ("dataset=json-pairs", "device=cpu", "epochs=2", "batch_size=8", "lr=1e-3", "n_boot=20", "save_every=1")
# They tell times, or machines
IGNORED = re.compile(r"run\.json|\.complete|suite\.json|index\.html|costs\..*|.*\.log")
LASTS = 10.0  # Seconds that processes have to follow the one that was killed
WAITS = 70.0  # The same for the processes of a Dask worker, which wait a minute for another run


def finetune(mode: str) -> Callable[[Path, Path], list]:
    "The words of a training run"
    def words(made: Path, out: Path) -> list:
        given = (*TRAINING, f"data_root={made/'rows.json'}", f"model={made/'model'}", f"mode={mode}", "label=place",
                 *(["backbone=trained"] if mode == "head" else []))
        return ["run", "finetune", *(w for p in given for w in ("-p", p)), "--out", out/"run"]
    return words


def itemized(made: Path, out: Path) -> list:
    given = (*TRAINING, f"data_root={made/'rows.json'}", f"model={made/'model'}")
    return ["run", "itemized", *(w for p in given for w in ("-p", p)), "--out", out/"run", "--append", out/"runs.csv"]


def embed(made: Path, out: Path) -> list:
    return ["embed", "json-pairs", made/"rows.json", "--model", made/"model", "--batch-size", 4, "--cache", out/"cache",
            "--out", out/"features.npz", "--overwrite"]


def suite(made: Path, out: Path) -> list:
    return ["suite", made/"two.yaml", "--out", out/"reports", "--workers", 2]


@cache
def cluster() -> Any:
    "A client of a Dask cluster of two processes, which are started again where they are killed"
    from distributed import Client, LocalCluster
    return Client(LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None))


def busy_worker() -> int:
    "The process of a worker, one that executes a run where there is one"
    numbers = cluster().run(os.getpid)
    busy = [worker for worker, runs in cluster().processing().items() if runs and worker in numbers]
    return numbers[(busy or [*numbers])[0]]


def on_dask(made: Path, out: Path) -> list:
    return ["suite", made/"two.yaml", "--out", out/"reports", "--threads", 1, "--executor", "dask",
            "--scheduler", cluster().scheduler.address]


COMMANDS: dict[str, Callable[[Path, Path], list]] = {
    "make": lambda made, out: ["data", "make", "cytopath", "--out", out/"cytopath"],
    "starter": lambda made, out: ["data", "validate", "starter", "--root", out/"starter", "-o", "n_studies=[2, 1, 1]"],
    "shard": lambda made, out: ["data", "shard", "json-pairs", "--root", made/"rows.json", "--out", out/"shards",
                                "--per-shard", 8, "--overwrite"],
    "embed": embed,
    "full": finetune("full"),
    "lora": finetune("lora"),
    "head": finetune("head"),
    "itemized": itemized,
    "suite": suite,
    "dask": on_dask,
    "compare": lambda made, out: ["compare", made/"reports", "--csv", out/"table.csv", "--tables", "csv", "--tables",
                                  "latex", "--figures", "svg", "--out", out/"page", "--overwrite"],
    "report": lambda made, out: ["run", "compare", made/"reports", "--out", out/"run"],
    "export": lambda made, out: ["export", made/"model", "--to", "huggingface", "--out", out/"exported", "--overwrite"],
}  # Command -> its words, for the folder of what it reads and that of what it writes


def make(folder: Path) -> Path:
    "Pictures with captions and items, a model, and a suite of two trainings and what compares them"
    import yaml
    from PIL import Image
    from test_training import tiny
    rng, rows = np.random.default_rng(0), []
    (folder/"model").mkdir(parents=True)
    for i in range(32):
        Image.fromarray(rng.integers(0, 255, (32, 32), np.uint8)).save(folder/f"{i}.png")
        items = [f"Finding {i % 4}.", f"Place {i % 3}."][:1 + i % 2]
        rows.append({"image": f"{i}.png", "caption": " ".join([*items, f"Case {i}."]), "items": items, "group": f"g{i}",
                     "place": "ab"[i // 4 % 2], "split": ["train", "train", "valid", "test"][i % 4]})
    (folder/"rows.json").write_text(json.dumps(rows))
    tiny(folder/"model")
    defaults = {"dataset": "json-pairs", "data_root": str(folder/"rows.json"), "model": str(folder/"model"),
                "device": "cpu", "n_boot": 20}
    train = {"epochs": 2, "batch_size": 8, "lr": 1e-3, "save_every": 1}
    runs = [{"name": "one", "template": "finetune", "params": train},
            {"name": "two", "template": "finetune", "params": {**train, "seed": 1}},
            {"name": "shown", "template": "retrieval", "params": {"checkpoint": "{one}/checkpoint"}},
            {"name": "beside", "template": "compare", "params": {"reports_dir": "{suite}"}}]
    (folder/"two.yaml").write_text(yaml.safe_dump({"defaults": defaults, "runs": runs}))
    time.sleep(2.1) # Only the hashes of files that are older than this are kept
    return folder


def files(folder: Path) -> dict[str, bytes]:
    "All files below a folder by their names"
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try: found[path.relative_to(folder).as_posix()] = path.read_bytes()
        except FileNotFoundError: continue
    return found


def hidden(name: str) -> bool:
    "Whether a file is temporary, or in a folder that is"
    return any(part.startswith(".") for part in Path(name).parts)


def named(found: dict[str, bytes]) -> set[str]:
    "The names of files, without hashes, which differ where rows came into a cache in other portions"
    kept = (name for name in found if not name.startswith(("home/", "temporary/tmp")))
    return {re.sub(r"\b[0-9a-f]{16}\b", "HASH", name) for name in kept}


def results(found: dict[str, bytes]) -> dict[str, bytes]:
    "What must be the same: everything but what tells times, and how rows lie in a cache"
    chosen = {k: v for k, v in found.items() if k.startswith("out/") and not k.startswith("out/cache/")}
    chosen = {k: v for k, v in chosen.items() if not hidden(k) and not IGNORED.fullmatch(Path(k).name)}
    chosen = {k: v for k, v in chosen.items() if not k.startswith("out/reports/two/beside/report.")} # Tells times
    if table := chosen.get("out/runs.csv"): # Tells when each run was finished, and in which folder
        chosen["out/runs.csv"] = re.sub(rb"(?m)^\d{4}-[^,]+,[^,]+", b"", table)
    return chosen


def unit(name: str) -> str:
    "What a file is written together with: the folder of a run, of data, of shards; else itself"
    parts = Path(name).parts # out, then the folder; out, reports, two, then the run
    depth = 4 if parts[1] == "reports" else len(parts) if parts[1] == "page" else 2
    return "/".join(parts[:depth])


def units(found: dict[str, bytes]) -> dict[str, dict[str, bytes]]:
    "Files by what they are written together with"
    groups: dict[str, dict[str, bytes]] = {}
    for name, content in found.items(): groups.setdefault(unit(name), {})[name] = content
    return groups


def living(folder: Path) -> list[int]:
    "Processes that work in a folder"
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid(): continue
        try:
            there = os.readlink(entry/"cwd")
            state = (entry/"stat").read_text().rpartition(")")[2].split()[0]
        except OSError: continue
        if there == str(folder) and state != "Z": found.append(int(entry.name))
    return found


@dataclass
class Trial:
    "A folder in which a command is called"
    what: str  # Name of the command
    program: str  # Path of `medclip-nb`
    made: Path  # What it reads
    folder: Path  # Its own
    said: str = ""  # What the last call printed
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("out", "temporary", "home"): (self.folder/name).mkdir(parents=True)

    def start(self, *more: str) -> subprocess.Popen:
        own = {"TMPDIR": self.folder/"temporary", "HOME": self.folder/"home", "OMP_NUM_THREADS": "1",
               "JUPYTER_RUNTIME_DIR": self.folder/"temporary", "MEDCLIP_NB_BATCH": "1"}
        words = COMMANDS[self.what](self.made, self.folder/"out")
        self.log = open(self.folder.with_suffix(".log"), "w+b")
        return subprocess.Popen([self.program, *map(str, words), *more], cwd=self.folder, stdin=subprocess.DEVNULL,
                                stdout=self.log, stderr=self.log, start_new_session=True,
                                env={**os.environ, **{k: str(v) for k, v in own.items()}})

    def finish(self, process: subprocess.Popen) -> None:
        "Wait for the end of a call that nobody disturbs"
        code = process.wait(600)
        self.log.seek(0)
        self.said = self.log.read().decode(errors="replace")
        if code: self.faults.append(f"the command ended with {code}: {self.said[-300:]}")

    def changes(self) -> int:
        "A number that differs when anything was written"
        found = []
        for where, _, names in os.walk(self.folder/"out"):
            for name in names:
                try: found.append((name, os.stat(os.path.join(where, name)).st_size))
                except OSError: continue
        return hash(tuple(found))

    def kill(self, process: subprocess.Popen, after: float, changes: int, victim: str) -> bool:
        "Kill the process, its group or a worker after some seconds or changes; whether the command still ran"
        end, seen, last = time.monotonic() + after, 0, self.changes()
        while time.monotonic() < end and process.poll() is None:
            if (now := self.changes()) != last: seen, last = seen + 1, now
            if changes and seen >= changes: break
            time.sleep(0.002)
        ran = process.poll() is None
        if ran and victim == "worker": os.kill(busy_worker(), signal.SIGKILL)
        elif ran: (os.killpg if victim == "group" else os.kill)(process.pid, signal.SIGKILL)
        if victim == "worker": self.finish(process)
        else: process.wait()
        return ran

    def alone(self) -> None:
        "Nothing that the killed process has started lives on"
        end = time.monotonic() + (WAITS if self.what == "dask" else LASTS)
        while (left := living(self.folder)) and time.monotonic() < end: time.sleep(0.05)
        for number in left:
            words = Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ")[:80].decode(errors="replace")
            self.faults.append(f"process {number} lives on: {words}")
            os.kill(number, signal.SIGKILL)


def whole_units(trial: Trial, expected: dict[str, bytes], before: dict[str, bytes]) -> set[str]:
    "The results that are whole; a fault for each that is half"
    found, wanted = units(results(before)), units(expected)
    for name, parts in found.items():
        if parts == wanted.get(name) or name == "out/runs.csv" and parts[name] == b"": continue
        other = [k for k in wanted.get(name, {}).keys() | parts.keys() if wanted.get(name, {}).get(k) != parts.get(k)]
        trial.faults.append(f"half of {name} was left: {sorted(other)[:3]}")
    return {name for name, parts in found.items() if parts == wanted.get(name)}


def rows_kept(before: dict[str, bytes]) -> int:
    "Rows of images and texts in the whole shards of a cache"
    kinds = {name.split("/")[2]: json.loads(raw)["kind"] for name, raw in before.items()
             if re.fullmatch(r"out/cache/[^/]+/meta\.json", name)}
    shards = {name: raw for name, raw in before.items()
              if re.fullmatch(r"out/cache/[^/]+/[0-9a-f]{16}\.index\.npy", name)}
    return sum(len(np.load(io.BytesIO(raw))) for name, raw in shards.items() if kinds[name.split("/")[2]] != "files")


def check_kept(trial: Trial, whole: set[str], before: dict[str, bytes]) -> None:
    "What was whole is not computed again"
    if trial.what in ("suite", "dask"):
        again = [name for name in whole if f"{Path(name).name}: begun" in trial.said]
        if again: trial.faults.append(f"executed again: {again}")
    if trial.what == "embed":
        rows = re.findall(r"(?m)^(?:images|texts) +\d+ +\d+ +(\d+)", trial.said)
        if sum(map(int, rows)) != rows_kept(before): trial.faults.append(f"{rows_kept(before)} rows kept, {rows} found")


def compare(trial: Trial, expected: dict[str, bytes], names: set[str]) -> None:
    "The results are those of an undisturbed run, and nothing else is there"
    after = files(trial.folder)
    found = results(after)
    other = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if other: trial.faults.append(f"differs from an undisturbed run: {', '.join(other[:4])}")
    folders = [p.relative_to(trial.folder).as_posix() for p in (trial.folder/"out").rglob(".*") if p.is_dir()]
    more = sorted(named(after) - names) + [name for name in folders if not name.endswith("/.logs")]
    if more: trial.faults.append(f"left behind: {', '.join(more[:4])}")


@dataclass
class Reference:
    "What an undisturbed run gives"
    expected: dict[str, bytes]
    names: set[str]
    seconds: float
    changes: int


def undisturbed(what: str, program: str, made: Path, folder: Path) -> Reference:
    trial, begun, changes = Trial(what, program, made, folder), time.monotonic(), 0
    process, last = trial.start(), trial.changes()
    while process.poll() is None:
        if (now := trial.changes()) != last: changes, last = changes + 1, now
        time.sleep(0.002)
    seconds = time.monotonic() - begun
    trial.finish(process)
    if trial.faults: raise SystemExit(f"{what}: {trial.faults[0]}")
    found = files(folder)
    shutil.rmtree(folder)
    return Reference(results(found), named(found), seconds, changes)


def once(
    what: str, program: str, made: Path, folder: Path, reference: Reference, rng: random.Random
) -> tuple[str, list[str]]:
    "Kill a command at one moment; the moment, and what was wrong"
    victim = rng.choice(["group", "process", *["worker"] * 2 * (what == "dask")])
    trial = Trial(what, program, made, folder)
    changes = rng.randint(1, reference.changes) if rng.random() < 0.7 and reference.changes else 0
    after = reference.seconds * (3 if changes else rng.uniform(0.2, 1.0))
    begun = time.monotonic()
    ran = trial.kill(trial.start(), after, changes, victim)
    moment = f"{time.monotonic() - begun:5.2f} s, " + (f"change {changes}" if changes else "by the clock")
    moment += f", {victim}" + ("" if ran else ", already over")
    if what != "dask": trial.alone() # The second call goes on with the processes of the workers
    before = files(folder)
    whole = whole_units(trial, reference.expected, before)
    more = ["--resume"] if "run" == COMMANDS[what](made, folder)[0] and rng.random() < 0.5 else []
    trial.finish(trial.start(*more))
    trial.alone()
    if ran: check_kept(trial, whole, before)
    compare(trial, reference.expected, reference.names)
    if not trial.faults: shutil.rmtree(folder)
    return moment + f", {len(whole)} whole" + ", resumed" * bool(more), trial.faults


def campaign(moments: int, seed: int, what: list[str], program: str, folder: Path) -> Iterator[tuple[str, str, list]]:
    "Kills one after the other: command, moment, faults"
    made, rng, references = make(folder/"made"), random.Random(seed), {}
    if {"compare", "report"} & {*what}:
        trial = Trial("suite", program, made, folder/"suite")
        trial.finish(trial.start())
        shutil.move(folder/"suite"/"out"/"reports", made/"reports")
    for n in range(moments):
        name = what[n % len(what)]
        if name not in references: references[name] = undisturbed(name, program, made, folder/f"{name}-whole")
        yield name, *once(name, program, made, folder/f"{name}-{n}", references[name], rng)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--what", default=",".join(COMMANDS))
    parser.add_argument("--installed", action="store_true", help="the installed command, not forks that start at once")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-")).resolve()
    os.environ["MEDCLIP_NB_FORKS"] = str(folder/"forks")
    os.environ["MPLBACKEND"] = "Agg"
    forks.offer(str(folder/"forks"))
    program = str(Path(sys.executable).with_name("medclip-nb"))
    if not options.installed:
        program = forks.forked("medclip-nb")
        os.environ |= {"PYTHON_EXEC": forks.forked(), "JUPYTER_PATH": str(folder/"forks")}
        subprocess.run([program, "--version"], check=True, capture_output=True) # Starts the server here, not in a trial
    counts: dict[str, list[int]] = {}
    for name, moment, faults in campaign(options.moments, options.seed, options.what.split(","), program, folder):
        kills = counts.setdefault(name, [0, 0])
        kills[0], kills[1] = kills[0] + 1, kills[1] + bool(faults)
        print(f"{name:<9} {moment}: {'; '.join(faults) or 'right'}", flush=True)
    print(f"\n{'command':<9}  kills  faults")
    for name, (kills, wrong) in counts.items(): print(f"{name:<9}  {kills:>5}  {wrong:>6}")
    faults = sum(wrong for _, wrong in counts.values())
    print(f"what was wrong lies in {folder}" if faults else "no fault")
    if not faults: shutil.rmtree(folder, ignore_errors=True)
    return int(faults > 0)


if __name__ == "__main__": sys.exit(main())
