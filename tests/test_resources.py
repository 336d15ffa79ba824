"What a machine refuses, signals, and two processes at the same place: a right result or one line, and nothing half"
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medclip_nb.core import (
    FolderKind,
    InputError,
    alive,
    atomic_folder,
    atomic_path,
    clear_leftovers,
    machine,
    temporary_folder,
)

PARAMETERS = 'mode: str = ""\nout_dir: str = "out"'
BODY = """import json, os, pathlib, time
if mode == "loud":
    for i in range(30): print(f"{i:02d}" * 500_000)
if mode == "exit": os._exit(3)
if mode == "home": print(len(os.environ.get("HOME", "")))
if mode.startswith("wait "):
    pathlib.Path(mode[5:]).write_text(str(os.getpid()))
    time.sleep(100)
text = {"schema": 1, "task": "stub", "metrics": {"value": {"value": 1.0}}, "details": {}}
_ = pathlib.Path(out_dir, "metrics.json").write_text(json.dumps(text))"""


@pytest.fixture(scope="module")
def stub(make_template, tmp_path_factory):
    return make_template(tmp_path_factory.mktemp("stub") / "stub.ipynb", PARAMETERS, BODY)


def call(command, *words, code=0, environment=None, **options):
    "The standard output and error of a command"
    done = subprocess.run([command, *map(str, words)], capture_output=True, text=True, timeout=300,
                          env=environment or os.environ, **options)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout, done.stderr


def left(folder): return sorted(p.name for p in folder.iterdir())


def limited(kind, value):
    "Set a limit in a process that is about to start; a file that grows too large is an error, not a signal"
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(kind, (value, value))
    return limit


def test_a_full_disk_is_one_line_and_leaves_nothing_half(installed, tmp_path):
    "`data make` writes files of more than one kilobyte; the installed command, since limits are those of a process"
    _, errors = call(installed, "data", "make", "medpix", "--out", tmp_path / "made", code=2,
                     preexec_fn=limited(resource.RLIMIT_FSIZE, 1024))
    assert len(errors.strip().splitlines()) == 1 and "cannot be written (File too large)" in errors
    assert left(tmp_path) == []


def until_it_waits(words, kernel):
    "The process of a command, once the kernel has written its number, and when to give up"
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not kernel.exists() or not kernel.read_text():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    return process, end


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["SIGTERM", "SIGHUP"])
def test_signals_end_a_run_as_an_interruption_does(command, stub, tmp_path, number, code):
    words = [command, "run", stub, "-p", f"mode=wait {tmp_path / 'kernel'}", "--out", tmp_path / "runs" / "run"]
    process, end = until_it_waits(words, tmp_path / "kernel")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "interrupted" in errors and "Traceback" not in errors
    assert left(tmp_path / "runs") == [], "nothing is left even before the next run"
    while alive(kernel := int((tmp_path / "kernel").read_text())): assert time.monotonic() < end, kernel


def test_a_suite_ends_where_its_end_goes_wrong(command, stub, tmp_path):
    "The folder is gone when the interrupted run is saved; the next run does not start"
    runs = [{"name": name, "template": str(stub), "params": {"mode": f"wait {tmp_path / name}"}} for name in "ab"]
    (tmp_path / "s.yaml").write_text(json.dumps({"name": "s", "runs": runs}))
    process, end = until_it_waits([command, "suite", tmp_path / "s.yaml", "--out", tmp_path / "out"], tmp_path / "a")
    shutil.rmtree(tmp_path / "out")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "interrupted" in errors and "Traceback" not in errors
    assert not (tmp_path / "b").exists()
    while alive(kernel := int((tmp_path / "a").read_text())): assert time.monotonic() < end, kernel


def test_a_home_that_is_none(command, stub, tmp_path):
    "A file in the place of the home: neither Jupyter nor the report needs it, and no file of a connection is left"
    (tmp_path / "home").write_text("a file")
    (tmp_path / "temporary").mkdir()
    own = {**os.environ, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary")}
    call(command, "run", stub, "--out", tmp_path / "odd ' \" name\n\u00fc" / ("long" * 40), environment=own)
    assert [name for name in left(tmp_path / "temporary") if "medclip" in name] == []
    del own["HOME"]
    call(command, "run", stub, "-p", "mode=home", "--out", tmp_path / "run", environment=own)


def test_a_file_in_the_place_of_a_folder(command, stub, tmp_path):
    (tmp_path / "file").write_text("mine")
    for words in (["run", stub, "--out", tmp_path / "file" / "run"], ["data", "make", "medpix", "--out",
                                                                   tmp_path / "file" / "made"]):
        _, errors = call(command, *words, code=2)
        assert errors.startswith("error: ") and len(errors.strip().splitlines()) == 1 and str(tmp_path) in errors
    assert (tmp_path / "file").read_text() == "mine" and left(tmp_path) == ["file"]


def test_half_files_of_killed_processes_go(tmp_path):
    "Those of this machine's dead processes, wherever a file is written; never those of others"
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = {kind: f".a.csv.{pid}-{where}-00000000.csv" for kind, pid, where in (
        ("dead", dead.pid, machine()), ("living", os.getpid(), machine()), ("elsewhere", dead.pid, "ffffff"))}
    for name in [*names.values(), ".a.csv.mine.csv"]: (tmp_path / name).write_text("ha")
    with atomic_path(tmp_path / "b.csv") as path:
        assert re.fullmatch(rf"\.b\.csv\.{os.getpid()}-{machine()}-[0-9a-f]{{8}}\.csv", path.name)
        path.write_text("whole")
    assert left(tmp_path) == sorted([names["living"], names["elsewhere"], ".a.csv.mine.csv", "b.csv"])


@pytest.mark.parametrize("name", ["x" * 251 + ".csv", "\u00fc" * 125 + ".csv", "a." + "y" * 200, "a b'\"\n.csv"])
def test_names_with_no_room_for_more(tmp_path, name):
    with atomic_path(tmp_path / name) as path: path.write_text("whole")
    assert left(tmp_path) == [name] and (tmp_path / name).read_text() == "whole"


def test_half_a_file_does_not_make_a_folder_somebody_elses(tmp_path):
    with atomic_folder(tmp_path / "a", FolderKind("notes")) as new: (new / "x").write_text("1")
    (tmp_path / "a" / f".report.html.1-{machine()}-00000000.html").write_text("ha")
    with atomic_folder(tmp_path / "a", FolderKind("notes")) as new: (new / "x").write_text("2")
    assert (tmp_path / "a" / "x").read_text() == "2" and left(tmp_path / "a") == [".medclip_nb.json", "x"]


KILLED = """import os, signal, sys
from medclip_nb.core import temporary_folder
with temporary_folder() as folder:
    (folder / "x").write_text("1")
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)"""


def test_temporary_folders_of_killed_processes_go(tmp_path, monkeypatch):
    own = {**os.environ, "TMPDIR": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", KILLED], env=own, capture_output=True, text=True).stdout
    assert Path(said.strip()).is_dir() and Path(said.strip()).stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with temporary_folder() as folder: assert left(tmp_path) == [folder.name]
    clear_leftovers(tmp_path)
    assert left(tmp_path) == []


AGAIN = """import sys
from medclip_nb.core import FolderKind, atomic_folder
for i in range(100):
    with atomic_folder(sys.argv[1], FolderKind("notes")) as new:
        for name in ("one", "two"): (new / name).write_text(sys.argv[2])"""


def test_two_processes_write_the_same_folder(tmp_path):
    "Both succeed each time, and what is there is whole and of one of them"
    writers = [subprocess.Popen([sys.executable, "-c", AGAIN, tmp_path / "a", who], stderr=subprocess.PIPE, text=True)
               for who in "xy"]
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors
    assert left(tmp_path) == ["a"] and left(tmp_path / "a") == [".medclip_nb.json", "one", "two"]
    assert (tmp_path / "a" / "one").read_text() == (tmp_path / "a" / "two").read_text()


def test_what_is_put_into_a_folder_while_it_is_written_anew_stays(tmp_path):
    with atomic_folder(tmp_path / "a", FolderKind("notes")) as new: (new / "one").touch()
    with pytest.raises(InputError, match="holds mine, which does not belong"):
        with atomic_folder(tmp_path / "a", FolderKind("notes")) as new:
            (new / "two").touch()
            (tmp_path / "a" / "mine").touch()
    assert left(tmp_path) == ["a"] and left(tmp_path / "a") == [".medclip_nb.json", "mine", "one"]


def test_two_runs_into_one_folder(command, stub, tmp_path):
    words = [command, "run", stub, "--out", tmp_path / "run"]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0 and "Traceback" not in errors, errors
    assert left(tmp_path) == ["run"] and (tmp_path / "run" / ".complete").is_file()


def picture(path): Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64)).save(path)


def test_few_open_files(installed, stub, tmp_path):
    "A run says so before it begins, and does with a hundred and twenty-eight"
    words, files = ["run", stub, "--out", tmp_path / "run"], resource.RLIMIT_NOFILE
    _, errors = call(installed, *words, code=2, preexec_fn=limited(files, 64))
    assert "may have 64 files open here" in errors and left(tmp_path) == []
    call(installed, *words, preexec_fn=limited(files, 128))
    assert (tmp_path / "run" / "report.html").exists()


def test_what_a_cell_prints_is_kept_within_limits(command, stub, tmp_path):
    call(command, "run", stub, "-p", "mode=loud", "--out", tmp_path / "run")
    for name in ("report.ipynb", "report.html"):
        text = (tmp_path / "run" / name).read_text()
        assert len(text) < 300_000 and "0000" in text and "2929" in text
        assert "29,800,030 characters are left out here" in text


def test_a_kernel_that_ends_itself(command, stub, tmp_path):
    "It has not run out of memory"
    _, errors = call(command, "run", stub, "-p", "mode=exit", "--out", tmp_path / "run", code=1)
    assert "The kernel ended with 3." in errors and "memory" not in errors


def test_random_weights_are_the_same_at_each_call(command, tmp_path):
    "So that the cache serves, and a note says that they are random"
    picture(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("image,caption\n" + "".join(f"a.png,a spot {i}\n" for i in range(9)))
    words = ["embed", "csv", tmp_path / "a.csv", "--model", "starter", "--cache", tmp_path / "cache", "--only", "texts"]
    found = [call(command, *words) for _ in range(2)]
    assert [re.search(r"texts +9 +128 +(\d+) +(\d+)", out).groups() for out, _ in found] == [("0", "9"), ("9", "0")]
    assert all("has random weights here" in errors for _, errors in found)


def test_other_languages_and_clocks(command, tmp_path):
    "A plain locale, and files from the future"
    words = ["embed", "csv", tmp_path / "a.csv", "--model", "starter", "--cache", tmp_path / "größe",
             "--only", "texts"]
    picture(tmp_path / "Füße.png")
    text = "image,caption\nFüße.png,ein großer Herd\nFüße.png,小さな病変\n"
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    for name in ("a.csv", "Füße.png"): os.utime(tmp_path / name, (2 ** 31 - 10, 2 ** 31 - 10))
    plain = {**os.environ, "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0"}
    out, _ = call(command, *words, environment=plain)
    assert re.search(r"texts +2 +128 +0 +2", out)
    out, _ = call(command, *words, environment=plain)
    assert re.search(r"texts +2 +128 +2 +0", out)


IN_A_DISK = """options=$1; folder=$2; shift 2
mount -t tmpfs -o "${options%,ro}" tmpfs "$folder" || exit 99
case $options in *,ro) mount -o remount,ro "$folder";; esac
"$@"; code=$?
find "$folder" -type f
exit $code"""
ALONE = ["unshare", "--mount", "--map-root-user"]


@pytest.fixture
def disk(tmp_path):
    "Words that begin a command with a small disk in the place of a folder; what it leaves there is printed at its end"
    (folder := tmp_path / "disk").mkdir()
    def words(options): return ["sh", "-c", IN_A_DISK, "sh", options, folder]
    if subprocess.run([*ALONE, *words("size=64k"), "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    return lambda options: ("unshare", [*ALONE[1:], *words(options)], folder)


@pytest.fixture
def rows(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("image,caption\n" + "".join(f"a.png,a spot {i}\n" for i in range(9)))
    return tmp_path / "a.csv"


@pytest.mark.parametrize("options, why", [("size=256k", "No space left on device"), ("size=8m,ro", "Read-only file")])
def test_a_disk_that_takes_nothing(installed, disk, options, why):
    "Data: one line, and nothing half; the disk is larger than the first files of these data"
    first, words, folder = disk(options)
    out, errors = call(first, *words, installed, "data", "make", "medpix", "--out", folder / "made", code=2)
    assert len(errors.strip().splitlines()) == 1 and why in errors and out == ""


@pytest.mark.parametrize("options, why", [
    ("size=8k", "No space left on device|the disk took a part of them"), ("size=8m,ro", "Read-only file system"),
])
def test_a_cache_that_takes_nothing(installed, disk, rows, options, why):
    "The features are computed, and a note says that they are not kept"
    first, words, folder = disk(options)
    embed = ["embed", "csv", rows, "--model", "starter", "--cache", folder / "cache", "--only", "texts"]
    out, errors = call(first, *words, installed, *embed)
    assert re.search(r"texts +9 +128 +0 +9", out)
    assert re.search(rf"^note: .*9 rows could not be kept \(({why})", errors, re.MULTILINE), errors


@pytest.mark.parametrize("options, code, why", [
    ("size=8m,ro", 2, "cannot be written: Read-only file system"),
    ("size=12k", 1, r"No space left on device.*\. Make room on that disk"),
])
def test_a_run_on_a_disk_that_takes_nothing(installed, stub, disk, options, code, why):
    first, words, folder = disk(options)
    out, errors = call(first, *words, installed, "run", stub, "--out", folder / "run", code=code)
    assert re.search(why, errors) and "/run/" not in out, out + errors


def test_a_home_that_takes_nothing(installed, stub, disk, tmp_path):
    first, words, folder = disk("size=8m,ro")
    own = {**os.environ, "HOME": str(folder)}
    call(first, *words, installed, "run", stub, "--out", tmp_path / "run", environment=own)
    assert (tmp_path / "run" / "report.html").exists()


def test_a_model_by_name_without_a_network(installed, rows, tmp_path):
    "A word about the network, not a wait for it"
    if subprocess.run(["unshare", "--net", "--map-root-user", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody leave its network")
    embed = ["embed", "csv", rows, "--model", "hf-hub:nobody/nothing", "--cache", tmp_path / "cache"]
    _, errors = call("unshare", "--net", "--map-root-user", installed, *embed, code=2)
    assert "the hub cannot be reached" in errors and len(errors.strip().splitlines()) == 1


def test_nobody_reads_the_output(installed):
    "A closed output, and a reader that leaves after a line"
    done = subprocess.run(["sh", "-c", '"$0" data list >&-', installed], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    done = subprocess.run(["bash", "-c", '"$0" data list | head -1; echo "${PIPESTATUS[0]}"', installed],
                          capture_output=True, text=True)
    assert done.stdout.splitlines()[0].startswith("name ") and "Traceback" not in done.stderr, done.stderr
