"Folders that are not ours survive every command that writes one, and no file outside the data is opened"
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medclip_nb import core
from medclip_nb.cli.main import app
from medclip_nb.core import MARK, InputError, atomic_folder, folder_mark, replaceable
from medclip_nb.datasets import Manifest, load_manifest, make_starter, write_shards
from medclip_nb.datasets.readers.natural_images import extract_once
from medclip_nb.embeddings import embed
from medclip_nb.evaluators import look_at_row
from medclip_nb.experiments import run
from medclip_nb.experiments.runs import FAILED_FOLDER, RUN_FOLDER, run_folder
from medclip_nb.models import add_lora, load_model, save_adapter, save_checkpoint, save_huggingface
from medclip_nb.trainers import ClassificationHead, save_head

ROOT = Path(__file__).resolve().parent.parent


def tree(root: Path) -> dict[str, object]:
    "Every file below a folder with its content, every link with its target, every empty folder"
    found = {}
    for p in sorted(root.rglob("*")):
        name = p.relative_to(root).as_posix()
        if p.is_symlink(): found[name] = ("link", os.readlink(p))
        else: found[name] = p.read_bytes() if p.is_file() else "folder"
    return found


def call(*words):
    "Exit code and output of the command; a traceback fails the test"
    done = CliRunner().invoke(app, list(map(str, words)))
    if done.exception and not isinstance(done.exception, SystemExit): raise done.exception
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_template):
    "What the commands of these tests read: a checkpoint, a table with pictures, a template"
    root = tmp_path_factory.mktemp("made")
    save_checkpoint(load_model("starter", device="cpu"), root / "model")
    (root / "data").mkdir()
    for i in range(4): Image.fromarray(np.full((8, 8, 3), 60 * i, np.uint8)).save(root / "data" / f"{i}.png")
    rows = "".join(f"{i}.png,picture {i},train\n" for i in range(4))
    (root / "data" / "t.csv").write_text("image,caption,split\n" + rows)
    make_template(root / "stub.ipynb", 'out_dir: str = "."', "print(1)")
    run(root / "stub.ipynb", {}, root / "run", quiet=True)
    return root


def commands(made):
    "Command lines that write a folder, without the folder"
    table = ["--root", made / "data" / "t.csv"]
    return {"export": ["export", made / "model", "--to", "open_clip", "--overwrite", "--out"],
            "shard": ["data", "shard", "csv", *table, "--overwrite", "--out"],
            "run": ["run", made / "stub.ipynb", "--out"]}


def callables(made):
    "Functions that write a folder"
    clip = load_model(str(made / "model"), device="cpu")
    adapted = add_lora(load_model(str(made / "model"), device="cpu"), rank=1, towers=("text",))
    return {"checkpoint": lambda p: save_checkpoint(clip, p, epoch=1),
            "adapter": lambda p: save_adapter(adapted, p),
            "head": lambda p: save_head(ClassificationHead(4, ["a", "b"]), p),
            "unpacked": lambda p: extract_once(p, made / "data" / "t.csv", lambda folder: {}),
            "starter": lambda p: make_starter(p, workers=1, n_studies=(1, 0, 0), n_slices=(1, 1, 1))}


@pytest.fixture
def strangers(tmp_path, monkeypatch):
    "Places that hold what a user may not lose"
    work, home = tmp_path / "work", tmp_path / "home"
    for folder in (work / "photos" / "2019", home, work / "empty"): folder.mkdir(parents=True)
    (work / "photos" / "2019" / "a.jpg").write_bytes(b"one of a kind")
    (work / "photos" / "index.json").write_text('{"shards": [], "samples": 0}')  # An index, but of something else
    (work / "photos" / "run.json").write_text('{"km": 12}')
    (work / "link").symlink_to("photos")
    (work / "empty link").symlink_to("empty")
    (work / "file").write_text("text")
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    return {"files": work / "photos", "link": work / "link", "empty link": work / "empty link", "file": work / "file",
            "here": ".", "above": "..", "home": home, "root": "/"}


@pytest.mark.parametrize("name", ["export", "shard", "run"])
def test_commands_replace_nothing_that_they_did_not_make(made, strangers, tmp_path, name):
    before = tree(tmp_path)
    for place, out in strangers.items():
        code, output = call(*commands(made)[name], out)
        assert code == 2 and output.startswith("error: ") and output.count("\n") == 1, (place, output)
        assert tree(tmp_path) == before, place


@pytest.mark.parametrize("name", ["checkpoint", "adapter", "head", "unpacked", "starter"])
def test_functions_replace_nothing_that_they_did_not_make(made, strangers, tmp_path, name):
    before, write = tree(tmp_path), callables(made)[name]
    for out in strangers.values():
        with pytest.raises(InputError, match="is not replaced|is a file|holds something else"): write(out)
        assert tree(tmp_path) == before


def test_a_whole_file_system_is_not_replaced(made, tmp_path, monkeypatch):
    (disk := tmp_path / "disk").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda p: Path(p) == disk)
    for words in commands(made).values():
        code, output = call(*words, disk)
        assert code == 2 and "is a whole file system, which is not replaced" in output
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("name", ["export", "shard", "run"])
def test_own_folders_are_replaced_unless_they_hold_something_else(made, tmp_path, name):
    words, out = commands(made)[name], tmp_path / "out"
    out.mkdir()  # An empty folder may be filled
    if name == "run": shutil.copytree(made / "run", out, dirs_exist_ok=True)
    else: assert call(*words, out)[0] == 0
    assert call(*words, out)[0] == 0
    if name != "run":
        assert folder_mark(out)["kind"] == {"export": "export", "shard": "shards"}[name]
        code, output = call(*[w for w in words if w != "--overwrite"], out)
        assert code == 2 and "or --overwrite" in output
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("three weeks of reading")
    before = tree(tmp_path)
    code, output = call(*words, out)
    assert code == 2 and "holds notes/mine.txt, which does not belong to it" in output
    assert tree(tmp_path) == before
    for other in {"export", "shard", "run"} - {name}:
        code, output = call(*commands(made)[other], out)
        assert code == 2 and "so it is not replaced" in output and tree(tmp_path) == before


def test_a_card_replaces_no_other_readme(made, tmp_path):
    (mine := tmp_path / "project").mkdir()
    (mine / "README.md").write_text("# My project")
    words = ["export", made / "run", "--to", "card", "--out"]
    assert "is there already" in call(*words, mine)[1]
    code, output = call(*words, mine, "--overwrite")
    assert code == 2 and "is not a model card of this package" in output
    assert (mine / "README.md").read_text() == "# My project"
    for _ in range(2): assert call(*words, tmp_path / "card", "--overwrite")[0] == 0


@pytest.mark.parametrize("text", [
    "# Tools\n\n- medclip_nb\n- other\n", "---\ntags: [other]\n---\n- medclip_nb\n",
    "---\ntags: [\n---\n- medclip_nb\n",
    "# Mine\n---\ntags:\n- medclip_nb\n---\n", "---\nneeds:\n- medclip_nb\n---\n", "---\n- medclip_nb\n---\n"])
def test_a_readme_that_only_mentions_the_package_is_no_card_of_ours(made, tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    code, output = call("export", made / "run", "--to", "card", "--out", tmp_path, "--overwrite")
    assert code == 2 and "is not a model card of this package" in output
    assert (tmp_path / "README.md").read_text() == text


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    "The table, pictures and run of these tests in the current folder, to be lost"
    shutil.copytree(made / "data", tmp_path / "data")
    shutil.copytree(made / "run", tmp_path / "reports" / "run")
    (tmp_path / "reports" / "run" / "metrics.json").write_text(json.dumps(
        {"schema": 1, "task": "x", "metrics": {"a": {"value": 1, "low": None, "high": None, "n": 1}}}))
    for name in ("mask.png", "texts.svg", "old.csv", "old.png", "old-2.png", "attend.png", "pair.csv"):
        (tmp_path / name).write_text("a disk")
    for split in ("train", "test"): shutil.copytree(made / "data", tmp_path / "folders" / split / "a")
    (tmp_path / "folders" / "notes.csv").write_text("perhaps a table of the data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


LOOK = ["attend", "data/0.png", "--texts", "a disk"]
MODEL = "hf-hub:no/where"  # Nothing looks for it before it is loaded
EMBED = ["embed", "csv", "data/t.csv", "--only", "images", "--model"]
TABLE = ["csv", "--root", "data/t.csv"]


@pytest.mark.parametrize("words, file", [
    (LOOK, "attend.png"), ([*LOOK, "--out", "old.png"], "old.png"),
    (["attend", "data/0.png", "data/1.png", "--texts", "a disk", "--out", "old.png"], "old-2.png"),
    (["compare", "reports", "--csv", "old.csv"], "old.csv"),
    (["data", "convert", *TABLE, "--out", "old.csv"], "old.csv"),
    (["data", "split", *TABLE, "--out", "old.csv"], "old.csv"),
    (["data", "validate", *TABLE, "--csv", "old.csv"], "old.csv"), ([*EMBED, MODEL, "--out", "pair.npy"], "pair.csv")])
def test_files_are_replaced_only_where_asked(place, words, file):
    before = tree(place)
    code, output = call(*words, *(["--model", MODEL] if words[0] == "attend" else []))
    assert (code, output) == (2, f"error: {file}: is there already. Give another name, or --overwrite.\n")
    assert tree(place) == before
    if words[0] in ("compare", "data"):
        assert call(*words, "--overwrite")[0] == 0 and tree(place)[file] != before[file]


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("words, file", [
    ([*LOOK, "--out", "data/0.png"], "data/0.png"), ([*LOOK, "--mask", "mask.png", "--out", "mask.png"], "mask.png"),
    ([*LOOK, "--texts-file", "texts.svg", "--out", "texts.svg"], "texts.svg"),
    (["attend", "a=data/0.png", "--texts", "a disk", "--out", "data/0.png"], "data/0.png"),
    (["compare", "reports", "--csv", "reports/run/metrics.json"], "reports/run/metrics.json"),
    (["data", "convert", *TABLE, "--out", "data/t.csv"], "data/t.csv"),
    (["data", "split", *TABLE, "--out", "data/1.png"], "data/1.png"),
    (["data", "validate", *TABLE, "--csv", "data/../data/2.png"], "data/../data/2.png"),
    (["data", "validate", "imagefolder", "--root", "folders", "--csv", "folders/notes.csv"],
     "folders/notes.csv"),
    ([*EMBED, MODEL, "--out", "data/t.npy"], "data/t.csv")])
def test_no_output_replaces_an_input(place, words, file, overwrite):
    before = tree(place)
    code, output = call(*words, *overwrite, *(["--model", MODEL] if words[0] == "attend" else []))
    assert code == 2 and output.startswith(f"error: {file}: is ") and output.count("\n") == 1, output
    assert "Give another name." in output and "--overwrite" not in output
    assert tree(place) == before


def test_figures_and_features_are_replaced_where_asked(made, place):
    assert call(*EMBED, made / "model", "--out", "pair.npy", "--overwrite")[1].endswith("\npair.npy and pair.csv\n")
    code, output = call(*LOOK, "--out", "old.png", "--overwrite", "--model", made / "model")
    assert code == 0, output
    assert Image.open("old.png").format == "PNG" and len((place / "pair.csv").read_text().splitlines()) == 5


def test_a_volume_of_an_unknown_kind_leaves_no_stray_lines(tmp_path, command):
    header = bytearray(352)
    header[:4], header[40:56], header[344:348] = (348).to_bytes(4, "little"), np.array([3] + 3 * [4] + 4 * [1], "<i2"
        ).tobytes(), b"n+1\0"
    header[70:74], header[108:112] = np.array([1537, 16], "<i2").tobytes(), np.array([352], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(header + bytes(128))
    (tmp_path / "t.csv").write_text("image,caption,split\na.nii,a,test\n")
    done = subprocess.run([command, "data", "validate", "csv", "--root", tmp_path / "t.csv", "--images", "decode"],
                          capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 1 and "1537" in output and "attempting fix" not in output


def test_the_folder_of_a_failed_run_is_ours_before_it_is_replaced(made, tmp_path):
    (mine := tmp_path / "run.failed").mkdir()
    (mine / "analysis.xlsx").write_bytes(b"mine")
    with pytest.raises(InputError, match="run.failed: is not a folder of medclip_nb"):
        run(made / "stub.ipynb", {}, tmp_path / "run", quiet=True)
    assert tree(tmp_path) == {"run.failed": "folder", "run.failed/analysis.xlsx": b"mine"}
    (mine / "analysis.xlsx").rename(mine / "report.ipynb")
    (mine / "report.ipynb").write_text('{"cells": [], "nbformat": 4}')  # As earlier versions left it
    run(made / "stub.ipynb", {}, tmp_path / "run", quiet=True)
    assert not mine.exists()


@pytest.mark.parametrize("report", sorted(p.parent.name for p in (ROOT / "reports" / "starter").glob("*/run.json")))
def test_runs_of_earlier_versions_are_replaced(report, tmp_path):
    shutil.copytree(ROOT / "reports" / "starter" / report, tmp_path / report)
    (tmp_path / report / ".ipynb_checkpoints").mkdir()
    (tmp_path / report / ".ipynb_checkpoints" / "report-checkpoint.ipynb").touch()  # It was opened in Jupyter
    assert replaceable(tmp_path / report, RUN_FOLDER) == tmp_path / report
    (tmp_path / report / "figure for the talk.png").touch()
    with pytest.raises(InputError, match="holds figure for the talk.png"): replaceable(tmp_path / report, RUN_FOLDER)


def test_starter_data_of_earlier_versions_are_replaced(tmp_path):
    tiny = dict(workers=1, n_studies=(1, 0, 0), n_slices=(1, 1, 1))
    root = make_starter(tmp_path / "starter", series=True, **tiny)
    for p in root.rglob(MARK): p.unlink()
    make_starter(root, **tiny, seed=1)
    assert folder_mark(root)["kind"] == "starter data" and not (root / "series").exists()
    make_starter(root, series=True, **tiny, seed=2)
    (root / "masks" / "mine.txt").touch()
    with pytest.raises(InputError, match="holds masks/mine.txt"): make_starter(root, **tiny, seed=3)


def killed(code: str, until: Path, pattern: str) -> None:
    "Start Python on some code, and kill it when a path appears"
    process = subprocess.Popen([sys.executable, "-c", code])
    for _ in range(600):
        if list(until.glob(pattern)): break
        assert process.poll() is None, "it ended too early"
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(until.glob(pattern))


def test_a_killed_shard_write_is_cleared_away(made, tmp_path):
    code = ("import time\nfrom medclip_nb.datasets import load_manifest, shards\n"
            "shards._add = lambda *_: time.sleep(60)\n"
            f"shards.write_shards(load_manifest('csv', {str(made / 'data')!r}), {str(tmp_path / 'out')!r})")
    killed(code, tmp_path, ".out.*/*.tar")
    living = tmp_path / f".out.{os.getpid()}-{next(tmp_path.glob('.out.*')).name.split('-')[1]}-00000000"
    for folder in (living, tmp_path / ".out.mine"): folder.mkdir()
    write_shards(load_manifest("csv", made / "data"), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["out", ".out.mine", living.name])


def test_a_run_killed_between_its_two_renames_comes_back(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    before = tree(tmp_path / "run")
    code = ("import os, time\nfrom medclip_nb.experiments import runs\nplain = os.replace\n"
            "def slow(a, b):\n    plain(a, b)\n    time.sleep(60)\n"
            f"with runs.run_folder({str(tmp_path / 'run')!r}): os.replace = slow")
    killed(code, tmp_path, ".partial/.run.*.old")
    assert not (tmp_path / "run").exists()
    with pytest.raises(RuntimeError), run_folder(tmp_path / "other"): raise RuntimeError
    assert tree(tmp_path / "run") == before and not (tmp_path / ".partial").exists()


def test_huggingface_folders_replace_their_like(tmp_path):
    (mine := tmp_path / "mine").mkdir()
    (mine / "model.safetensors").touch()
    with pytest.raises(InputError, match="of the kind 'huggingface'"):
        save_huggingface(load_model("starter", device="cpu"), mine)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"] and FAILED_FOLDER.name == "failed run"


@pytest.fixture
def hostile(tmp_path):
    "A data folder with a link out of it, a pipe, a device and a picture that may be read"
    secret, data = tmp_path / "secret", tmp_path / "data"
    for folder in (secret, data / "scan"): folder.mkdir(parents=True)
    Image.fromarray(np.full((8, 8, 3), 77, np.uint8)).save(secret / "secret.png")
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(data / "a.png")
    (data / "link.png").symlink_to(secret / "secret.png")
    (data / "up").symlink_to(secret)
    (data / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(data / "pipe.png")
    (data / "scan" / "1.dcm").symlink_to(secret / "secret.png")
    return data


FAULTS = {"link.png": "is a link out of", "up/secret.png": "is a link out of", "zero.png": "is a link out of",
          "pipe.png": "is a pipe or a device", "scan": "holds 1.dcm, which is a link out of"}


def table(root, *images, **columns):
    same = {"caption": ["a"] * len(images), "split": ["train"] * len(images)}
    rows = Manifest({"image": list(images), **same, **columns})
    rows.root = str(root)
    return rows


@pytest.mark.parametrize("name", FAULTS)
def test_no_reader_leaves_the_folder_or_waits_at_a_pipe(made, hostile, name):
    clip, rows = load_model("starter", device="cpu"), table(hostile, "a.png", name)
    for read in (rows.paths, lambda: embed(clip, rows), lambda: look_at_row(clip, rows, 1, ["a lesion"])):
        with pytest.raises(InputError, match=FAULTS[name]) as caught: read()
        assert f"data/{name}: " in str(caught.value) and "(row 1)" in str(caught.value)
    masks = table(hostile, "a.png", mask=[name], items=[["a lesion"]])
    with pytest.raises(InputError, match=FAULTS[name]): look_at_row(clip, masks, 0)
    index = write_shards(rows, hostile.parent / "shards", max_bad=0.5)
    assert index["samples"] == 1 and [s["row"] for s in index["skipped"]] == [1]
    assert FAULTS[name] in index["skipped"][0]["message"]
    secret = (hostile.parent / "secret" / "secret.png").read_bytes()
    assert secret not in (hostile.parent / "shards" / "train-000000.tar").read_bytes()


def test_embed_and_shard_end_with_one_line(hostile, command):
    for name, words in FAULTS.items():
        if name == "scan": continue
        (hostile / "t.csv").write_text(f"image,caption,split\n{name},x,train\na.png,y,train\n")
        for verb in (["embed", "csv", "t.csv", "--model", "starter", "--out", "f.npz"],
                     ["data", "shard", "csv", "--root", "t.csv", "--out", "s"]):
            done = subprocess.run([command, *verb], cwd=hostile, capture_output=True, text=True,
                                  timeout=120)
            said = words if verb[0] == "data" else f"row 0: {name}: "
            assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
            assert not (hostile / "f.npz").exists() and not (hostile / "s").exists()


@pytest.mark.parametrize("reader, name", [
    ("csv", "t.csv"), ("json-pairs", "pairs.json"), ("json-pairs", "pairs.jsonl"), ("study-json", "train.json"),
    ("parquet", "t.parquet"), ("webdataset", "train-0.tar")])
def test_a_pipe_is_no_table(tmp_path, command, reader, name):
    os.mkfifo(tmp_path / name)
    done = subprocess.run([command, "data", "info", reader, "--root", "."], cwd=tmp_path, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr, done.stderr


def test_a_mark_says_what_it_marks(tmp_path):
    save_head(ClassificationHead(4, ["a", "b"]), tmp_path / "head")
    assert json.loads((tmp_path / "head" / MARK).read_text()) == {"kind": "head",
                                                                  "files": ["head.json", "head.safetensors"]}


def test_a_folder_that_another_process_replaces_meanwhile_is_looked_at_again(tmp_path, monkeypatch):
    "Two runs that make the same data: the file list of one folder is not held against the files of the next"
    kind = core.FolderKind("pictures")
    for name in ("data", "next"):
        with atomic_folder(tmp_path / name, kind) as folder: (folder / name).touch()
    look, swaps = core._foreign, iter([True])
    def slow(path, kind, own):
        if next(swaps, False):
            os.replace(path, tmp_path / "old")
            os.replace(tmp_path / "next", path)
        yield from look(path, kind, own)
    monkeypatch.setattr(core, "_foreign", slow)
    assert replaceable(tmp_path / "data", kind) == tmp_path / "data"
    (tmp_path / "data" / "mine").touch()
    with pytest.raises(InputError, match="holds mine"): replaceable(tmp_path / "data", kind)
