"medclip-nb data: every verb end to end, every error one message and exit code 2, nothing half-written"
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from medclip_nb.cli.main import app
from medclip_nb.datasets import MINIATURES, load_manifest, make_miniature, validate
from medclip_nb.datasets.registry import READERS, register

N = 24


def data(*words):
    "Exit code and what was printed; a traceback fails the test"
    done = CliRunner().invoke(app, ["data", *map(str, words)])
    if done.exception and not isinstance(done.exception, SystemExit): raise done.exception
    if words[0] == "list" or words[0] in ("info", "validate") and "--root" in words and done.exit_code < 2:
        assert max(map(len, done.output.splitlines())) <= 100, "tables fit 100 columns"
    return done.exit_code, done.output


def png(i):
    "A picture like no other"
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)).save(held := io.BytesIO(), "PNG")
    return held.getvalue()


def make_csv(root):
    for i in range(N): (root / f"{i}.png").write_bytes(png(i))
    rows = [{"image": f"{i}.png", "caption": f"scan {i}", "label": "ab"[i % 2], "group": f"p{i // 2}"}
            for i in range(N)]
    pd.DataFrame(rows).to_csv(root / "t.csv", index=False)
    return ["csv", "--root", root / "t.csv"]


def make_pairs(root):
    for split in ("train", "val"):
        (root / split / "imgs").mkdir(parents=True)
        for i in range(N): (root / split / "imgs" / f"{i}.png").write_bytes(png(i + 100 * (split == "val")))
        (root / split / "img_text_pair.json").write_text(
            json.dumps([{"img": f"{i}.png", "caption": f"{split} {i}"} for i in range(N)]))
    return ["json-pairs", "--root", root]


def make_studies(root):
    for split, n in {"train": 4, "valid": 2}.items():
        for i in range(n):
            for series in ("AX_T1", "COR T2"):
                (folder := root / split / f"{split}{i}" / series).mkdir(parents=True)
                torch.save(torch.rand(2, 4, 4), folder / "img.pt")
        (root / f"{split}.json").write_text(
            json.dumps({f"{split}{i}": {"series": {"AX_T1": {}, "COR T2": {}}, "report": [f"finding {i}", "no mass"]}
                        for i in range(n)}))
    return ["study-json", "--root", root]


def make_parquet(root):
    pd.DataFrame({"image": [png(i) for i in range(N)], "text": [f"scan {i}" for i in range(N)],
                  "label": list("ab") * (N // 2)}).to_parquet(root / "train-00000-of-00001.parquet")
    return ["parquet", "--root", root]


def make_huggingface(root):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict({"image": [{"bytes": png(i), "path": None} for i in range(N)],
                                "label": [i % 2 for i in range(N)]}, features).save_to_disk(root / "hf")
    return ["huggingface", "--root", root / "hf"]


MAKERS = [make_csv, make_pairs, make_studies, make_parquet, make_huggingface]
files = lambda root: {p.relative_to(root).as_posix()
                      for p in root.rglob("*") if p.is_file() and ".images" not in p.parts}


@pytest.mark.parametrize("make", MAKERS)
def test_every_format_through_every_verb(tmp_path, make):
    (root := tmp_path / "data").mkdir()
    words = make(root)
    name, place = words[0], words[2]
    original = load_manifest(name, place)
    code, output = data("info", *words)
    assert code == 0 and f"{name}: {len(original)} rows" in output and all(c in output for c in original.columns)
    assert data("validate", *words)[0] == 0
    assert data("shard", *words, "--out", tmp_path / "shards", "--per-shard", 10)[0] == 0
    back = load_manifest("webdataset", tmp_path / "shards").sort_values("key", ignore_index=True)
    kept = [c for c in original if c not in ("image", "series")]
    assert back[kept].to_json() == original[kept].to_json()
    if "image" in original: assert [p.read_bytes() for p in back.paths()] == [p.read_bytes() for p in original.paths()]
    else:
        read = lambda m: [{k: Path(m.root, v).read_bytes() for k, v in s.items()} for s in m["series"]]
        assert read(back) == read(original)
    out = tmp_path / "all.parquet"
    assert data("convert", *words, "--out", out)[0] == 0
    again = load_manifest("parquet", out)
    assert again[kept].to_json() == original[kept].to_json()
    column = "image" if "image" in original else "series"
    first = lambda m: m[column][0] if column == "image" else m[column][0]["COR T2"]
    assert Path(again.root, first(again)).samefile(Path(original.root, first(original)))


def test_list_and_card():
    code, output = data("list")
    assert (code == 0
            and all(name in output for name in ("json-pairs", "study-json", "parquet", "huggingface", "webdataset")))
    for name in ("json-pairs", "study-json", "parquet", "huggingface", "webdataset"):
        code, output = data("info", name)
        assert code == 0 and "### Layout" in output and f"`{name}`" in output


def test_splits_are_reproducible_and_used(tmp_path):
    words = make_csv(tmp_path)
    for out, seed in (("a.csv", 1), ("b.csv", 1), ("c.csv", 2)):
        assert data("split", *words, "--out", tmp_path / out, "--seed", seed, "--fractions",
                    "train=0.5,test=0.5")[0] == 0
    a, b, c = ((tmp_path / f"{x}.csv").read_text() for x in "abc")
    assert a == b != c
    manifest = load_manifest("csv", tmp_path / "t.csv", splits=tmp_path / "a.csv")
    assert (manifest.split.value_counts().to_dict() == {"train": 12, "test": 12}
            and (manifest.groupby("group").split.nunique() == 1).all())
    assert "12" in data("info", *words, "--splits", tmp_path / "a.csv")[1]


def test_validate_tells_scripts(tmp_path):
    words = make_csv(tmp_path)
    assert data("validate", *words, "--images", "decode")[0] == 0
    (tmp_path / "3.png").write_bytes(png(3)[:50])
    (tmp_path / "5.png").unlink()
    command = [sys.executable, "-c", "from medclip_nb.cli.main import app; app()", "data", "validate", *map(str, words),
               "--images", "decode", "--csv", str(tmp_path / "f.csv")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and f"{N} rows: 2 errors" in done.stdout
    assert sorted(pd.read_csv(tmp_path / "f.csv").query("severity == 'error'").row) == [3, 5]


def test_validate_says_how_a_table_was_read_and_which_labels_look_alike(tmp_path):
    for i in range(6): (tmp_path / f"{i}.png").write_bytes(png(i))
    names = ["benign", "benign ", "Benign", "01", "1.0", "malignant"]
    (tmp_path / "t.csv").write_text("Image;label\n" + "".join(f"{i}.png;{n}\n" for i, n in enumerate(names)))
    code, said = data("validate", "csv", "--root", tmp_path / "t.csv", "--csv", tmp_path / "f.csv")
    assert code == 0 and "read: t.csv: cells are separated by semicolons" in said
    assert "column 'Image' is taken as 'image'" in said
    (tmp_path / "t.txt").write_text("image\tcaption\n" + "".join(f"{i}.png\tone, two\n" for i in range(6)))
    for tab in (r"sep=\t", "sep=tab", "sep=\t"):
        assert data("validate", "csv", "--root", tmp_path / "t.txt", "-o", tab)[0] == 0, "a tab as a shell hands it on"
    found = pd.read_csv(tmp_path / "f.csv").set_index("kind")["message"]["labels alike"]
    assert all(f"{name!r} (1 rows)" in found for name in names[:5]) and "malignant" not in found


def test_hostile_text_does_not_reach_the_terminal(tmp_path):
    words = make_csv(tmp_path)
    table = pd.read_csv(tmp_path / "t.csv").assign(caption="\x1b[2J\x1b]0;owned\x07 a\x9b scan")
    table.to_csv(tmp_path / "t.csv", index=False)
    for verb in ("info", "validate"):
        output = data(verb, *words)[1]
        assert not [c for c in output if not c.isprintable() and c != "\n"]


ERRORS = {
    "unknown dataset": (["validate", "cvs", "--root", "."], "Unknown dataset 'cvs'. Did you mean 'csv'"),
    "unknown card": (["info", "cvs"], "No card for dataset 'cvs'"),
    "no folder": (["validate", "json-pairs", "--root", "nowhere"], "nowhere: no such file or folder"),
    "unknown option": (["info", "csv", "--root", "t.csv", "-o", "seq=;"], "has no option 'seq'. Did you mean 'sep'"),
    "option of reading": (["info", "csv", "--root", "t.csv", "-o", "window=lung"],
                          """How files are read is the option read: {"window": "lung"}"""),
    "no value": (["info", "csv", "--root", "t.csv", "-o", "sep"], "-o 'sep' is not name=value"),
    "wrong images": (["validate", "csv", "--root", "t.csv", "--images", "all"], "images='all'"),
    "wrong check": (["shard", "csv", "--root", "t.csv", "--out", "new", "--check", "all"], "check='all'"),
    "wrong type": (["convert", "csv", "--root", "t.csv", "--out", "new.xlsx"], "must end in .csv, .parquet or .jsonl"),
    "file is there": (["convert", "csv", "--root", "t.csv", "--out", "t.csv"], "t.csv: is an input of this command"),
    "folder is there": (["shard", "csv", "--root", "t.csv", "--out", "."], "is or holds the current folder"),
    "not shards": (["shard", "csv", "--root", "t.csv", "--out", ".", "--overwrite"], "is or holds the current folder"),
    "out of the folder": (["convert", "csv", "--root", "t.csv", "--out", "sub/new.csv"], "does not lie below"),
    "wrong shares": (["split", "csv", "--root", "t.csv", "--out", "new.csv", "--fractions", "train=0.8"],
                     "add up to 1"),
    "no such column": (["split", "csv", "--root", "t.csv", "--out", "new.csv", "--stratify", "lable"],
                       "has no column 'lable'. Did you mean 'label'"),
    "no splits file": (["info", "csv", "--root", "t.csv", "--splits", "none.csv"], "none.csv"),
    "not writable": (["convert", "csv", "--root", "t.csv", "--out", "t.csv/new.csv", "--relative-to", "."],
                     "cannot be written"),
}


@pytest.mark.parametrize("words, says", ERRORS.values(), ids=ERRORS.keys())
def test_errors(tmp_path, monkeypatch, words, says):
    make_csv(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    code, output = data(*words)
    assert code == 2 and output.startswith("error: ") and output.count("error: ") == 1 and says in output, output
    assert files(tmp_path) == before and not (tmp_path / "sub").exists()


@pytest.mark.parametrize("out", ["new.csv", "new.parquet", "new.jsonl", "splits.csv", "shards"])
@pytest.mark.parametrize("before", [False, True])
def test_a_full_disk_leaves_nothing_half(tmp_path, monkeypatch, out, before):
    words = make_csv(tmp_path)
    verb = {"splits.csv": "split", "shards": "shard"}.get(out, "convert")
    command = [verb, *words, "--out", tmp_path / out, "--overwrite"]
    if before: assert data(*command)[0] == 0
    held = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    for where in ("pandas.DataFrame.to_csv", "pandas.DataFrame.to_parquet", "pathlib.Path.write_text",
                  "medclip_nb.datasets.shards._add"): monkeypatch.setattr(where, full)
    code, output = data(*command)
    assert code == 2 and "cannot be written (No space left on device)" in output
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == held
    assert not list(tmp_path.glob(".*new*")) + list(tmp_path.glob(".*splits*")) + list(tmp_path.glob(".*shards*"))


def test_tables_elsewhere(tmp_path):
    (root := tmp_path / "data").mkdir()
    words = make_csv(root)
    (tmp_path / "tables").mkdir()
    assert data("convert", *words, "--out", tmp_path / "tables" / "all.csv", "--relative-to", root)[0] == 0
    back = load_manifest("csv", tmp_path / "tables" / "all.csv", image_root=str(root))
    assert back.paths()[3].read_bytes() == png(3)
    assert data("convert", *words, "--out", tmp_path / "all.jsonl")[0] == 0
    assert json.loads((tmp_path / "all.jsonl").read_text().splitlines()[3])["image"] == "data/3.png"


def test_a_table_says_how_it_is_read_again(tmp_path, monkeypatch):
    "What a table cannot hold is printed as options of a run, and these give the same manifest"
    monkeypatch.setattr("medclip_nb.datasets.registry.READERS", dict(READERS))
    @register("windowed")
    def read_windowed(root: Path) -> pd.DataFrame:
        table = pd.DataFrame({"image": ["0.png", "1.png"], "mass": ["present", "absent"], "split": "train"})
        table.attrs = {"labels": ["mass"], "read": {"window": (40, 80)}}
        return table
    for name in ("0.png", "1.png"): (tmp_path / name).write_bytes(png(3))
    (tmp_path / "tables").mkdir()
    words = ["convert", "windowed", "--root", tmp_path, "--out"]
    code, output = data(*words, tmp_path / "all.csv")
    said = {"labels": ["mass"], "read": {"window": [40, 80]}}
    assert code == 0 and output.splitlines()[1:] == [f"to read it alike: -p data_options='{json.dumps(said)}'"]
    again = load_manifest("csv", tmp_path / "all.csv", **said)
    assert (again.labels, again.read) == (["mass"], {"window": [40, 80]})
    output = data(*words, tmp_path / "tables" / "all.csv", "--relative-to", tmp_path)[1]
    assert json.loads(output.splitlines()[1].split("'")[1])["image_root"] == str(tmp_path)
    assert data(*words, tmp_path / "all.parquet")[1].splitlines()[1:] == [
        """to read it alike: -p data_options='{"read": {"window": [40, 80]}}'""",
        "only a .csv can be read with its labels: mass"]
    assert len(data("convert", "csv", "--root", tmp_path / "all.csv", "--out", tmp_path / "b.csv")[1].splitlines()) == 1


def test_help_is_light():
    code = ("import medclip_nb.cli.data, sys; "
            "print(*{'torch', 'pandas', 'numpy', 'pyarrow', 'webdataset', 'datasets', 'PIL'} & set(sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
    assert all(verb in data("--help")[1] for verb in ("list", "info", "validate", "split", "shard", "convert"))


def test_a_miniature_is_made_and_read(tmp_path):
    out = tmp_path / "kather"
    code, said = data("make", "kather", "--out", out)
    assert code == 0 and f"data root: {out}" in said and f"zero_shot -p dataset=kather -p data_root={out}" in said
    code, said = data("info", "kather", "--root", out)
    assert code == 0 and "81 rows" in said and "nothing measured on it is a result" in said
    code, said = data("make")
    assert code == 0 and all(name in said for name in ("cytopath", "rocov2", "cc03m-itemized"))


def test_a_miniature_replaces_nothing_else(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for words, message in ((("kather", "--out", tmp_path / "mine"), "so it is not replaced"),
                           (("kather",), "--out data/kather-miniature"),
                           (("kater", "--out", tmp_path / "new"), "Did you mean 'kather'?")):
        code, said = data("make", *words)
        assert code == 2 and message in said
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "notes.txt"]


def test_a_file_that_bears_the_name_of_a_recipe_is_no_fault(tmp_path):
    words = make_csv(tmp_path)
    (tmp_path / "recipe.json").write_text("{not JSON")
    assert data("info", *words)[0] == 0


@pytest.mark.parametrize("name", [*MINIATURES, "mri-study"])
def test_every_miniature_is_read_without_a_finding(name, tmp_path):
    root = make_miniature(name, tmp_path / "made")
    manifest = load_manifest(name, root)
    assert not manifest.skipped and manifest.notes[0].startswith(f"A miniature of {name}")
    findings = validate(manifest, images="none")
    assert not (findings["severity"] == "error").any(), findings["message"].tolist()[:2]
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert make_miniature(name, tmp_path / "made") == root
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
