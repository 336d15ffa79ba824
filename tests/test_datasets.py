"Datasets: hostile tables, faults of files, saved splits, cards that hold together, a package that carries them"
import importlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from medclip_nb.cli.main import app
from medclip_nb.core import InputError
from medclip_nb.datasets import (
    CARD_EXTRAS,
    CARD_KEYS,
    NORMAL_TEXTS,
    READERS,
    Manifest,
    card,
    card_folder,
    card_markdown,
    card_names,
    join_equal,
    leaks,
    list_datasets,
    load_manifest,
    load_splits,
    make_splits,
    normal_flags,
    read_table,
    register,
    save_splits,
    split_hash,
    validate,
    with_validation,
    write_shards,
)
from medclip_nb.datasets import registry as datasets
from medclip_nb.datasets.readers.basic import read_csv
from medclip_nb.experiments import check_parameters
from medclip_nb.images import PICTURES, read_image

ROOT = Path(__file__).resolve().parent.parent
CARDS = sorted((ROOT / "data" / "cards").glob("*.yaml"))


@pytest.fixture
def folder(tmp_path):
    "Twelve readable images below the folder data, one outside"
    (tmp_path / "data").mkdir()
    for i in range(12): Image.new("L", (8, 8), 20 * i).save(tmp_path / "data" / f"{i}.png")
    Image.new("L", (8, 8)).save(tmp_path / "outside.png")
    return tmp_path / "data"


def python(code, cwd=None, **env):
    "What a new process prints"
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=os.environ | env, capture_output=True, text=True,
                          check=True).stdout


def csv(folder, rows, **options):
    "A manifest of a table with these rows, which has good ones as well"
    good = [{"image": f"{i}.png", "caption": f"image {i}", "label": "ab"[i % 2]} for i in range(12)]
    pd.DataFrame([*good, *rows]).to_csv(folder / "t.csv", index=False)
    return load_manifest("csv", folder / "t.csv", **options)


@pytest.mark.parametrize("path, says", [
    ("../outside.png", "leads out of the folder"), ("a/../../outside.png", "leads out of the folder"),
    ("/etc/passwd", "absolute"),
    ("https://example.org/x.png", "web address"), (" ", "empty"),
    ("..\\outside.png", "leads out")])
def test_paths_that_leave_the_folder(folder, path, says):
    with pytest.raises(InputError, match=f"t.csv, row 14: .*{says}.*image_root"): csv(folder, [{"image": path}])


def test_paths_of_windows(tmp_path):
    "No option reads them, so none is named"
    (tmp_path / "t.csv").write_text("image,label\n0.png,a\nC:\\Users\\me\\1.png,b\n")
    for options in ({}, {"image_root": "C:\\Users\\me"}):
        with pytest.raises(InputError, match=r"row 3: a path of Windows \(C:\\Users\\me\\1.png\). Write") as found:
            load_manifest("csv", tmp_path / "t.csv", **options)
        assert "image_root" not in str(found.value)


def test_absolute_paths(folder, tmp_path):
    assert csv(folder, [{"image": str(folder / "3.png")}]).image.tolist()[-1] == "3.png"
    table = tmp_path / "t.csv"
    pd.DataFrame({"image": [str(folder / f"{i}.png") for i in range(4)] + [str(tmp_path / "outside.png")]}).to_csv(
        table, index=False)
    assert load_manifest("csv", table).image.tolist()[3:] == ["data/3.png", "outside.png"]
    everywhere = load_manifest("csv", table, image_root="/")
    assert [p.is_file() for p in everywhere.paths()] == [True] * 5
    with pytest.raises(InputError, match="row 2: .*absolute"):
        load_manifest("csv", table, image_root=str(folder / "deeper"))
    (tmp_path / "alias").symlink_to(folder)
    assert load_manifest("csv", table, image_root=str(tmp_path / "alias" / ".."), split_seed=1).image[0] == "data/0.png"


def test_links_out_of_the_folder(folder, tmp_path):
    for label in "ab": (folder / label).mkdir()
    for i in range(12): shutil.move(folder / f"{i}.png", folder / "ab"[i % 2])
    (folder / "a" / "secret.png").symlink_to(tmp_path / "outside.png")
    (folder / "a" / "inside.png").symlink_to(folder / "b" / "1.png")
    (folder / "b" / "loop").symlink_to(folder)
    manifest = load_manifest("imagefolder", folder)
    assert len(manifest) == 13 and "a/inside.png" in set(manifest.image)
    assert {s["row"]: s["kind"]
            for s in manifest.part("train").skipped} == {"a/secret.png": "link out of the folder",
                                                         "b/loop": "link to a folder"}
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a").symlink_to(folder / "a")
    with pytest.raises(InputError, match="1 link.s. are not followed; give the folder that they lead to"):
        load_manifest("imagefolder", tmp_path / "linked")


def test_texts_stay_texts(folder):
    texts = ['=HYPERLINK("http://x","y")', "=1+1", "@SUM(A1)", "-2+3", "<script>alert(1)</script>", "a\nb", 'say "ah"',
             "None", "NA", "nan", "null", "1e5", "007", "\ttab "]
    manifest = csv(folder, [{"image": f"{i % 12}.png", "caption": t} for i, t in enumerate(texts)])
    assert manifest.caption.tolist()[12:] == texts


def test_huge_cells_and_long_tables(tmp_path):
    text = "word " * 1_000_000
    pd.DataFrame({"image": [f"{i}.png" for i in range(4)], "caption": [text, "b", text, "d"]}).to_csv(
        tmp_path / "t.csv", index=False)
    manifest = load_manifest("csv", tmp_path)
    assert manifest.caption[2] == text and manifest.caption[3] == "d"
    deep = "[" * 100_000
    (tmp_path / "t.csv").write_text(f'image,items\na.png,"{deep}"\nb.png,"[\"\"x\"\", {deep}"\n')
    with pytest.raises(InputError, match="t.csv, row 3: the items are not a list"): load_manifest("csv", tmp_path)


@pytest.mark.parametrize("cell, items", [
    ("['No effusion', 'Clear lungs']", ["No effusion", "Clear lungs"]), ("['Mass | left']", ["Mass | left"]),
    (""" [ "the lung's apex", 'clear'] """, ["the lung's apex", "clear"]), ("['a'\n 'b']", ["a", "b"]),
    ('["Mass | left", null, ""]', ["Mass | left"]), ("[]", []), ("[ ]", []),
    ("[L] effusion | clear", ["[L] effusion", "clear"]), ("[ ] mass | [x] node", ["[ ] mass", "[x] node"]),
    ("[redacted]", ["[redacted]"]), ("one 'cyst' | ['two']", ["one 'cyst'", "['two']"]),
])
def test_lists_in_cells(tmp_path, cell, items):
    table = pd.DataFrame({"image": ["0.png", "1.png"], "items": ["first", cell]})
    table.to_csv(tmp_path / "t.csv", index=False)
    assert load_manifest("csv", tmp_path)["items"].tolist() == [["first"], items]
    for name in table["image"]: (tmp_path / name).touch()
    table.rename(columns={"image": "scan"}).to_csv(tmp_path / "t.csv", index=False)
    assert load_manifest("study-csv", tmp_path, series=["scan"])["items"].tolist() == [["first"], items]


@pytest.mark.parametrize("cell", ["['a', 'b", "['a', 1]", "['a', nan]", '["a", "b', "[np.str_('a')]", "['a' ... 'z']"])
def test_broken_lists_in_cells(tmp_path, cell):
    pd.DataFrame({"image": ["0.png", "1.png"], "items": ["first", cell]}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(InputError) as caught: load_manifest("csv", tmp_path)
    told = f"t.csv, row 3: the items are not a list of texts ({cell!r}). Write [\"one\", \"another\"], or one | another"
    assert told in str(caught.value)


@pytest.mark.parametrize("content, says", [
    ("image,caption\na.png,caf\xe9\n".encode("latin-1"), "line 2 holds the byte 0xe9, which is not UTF-8"),
    ("image,caption\na.png,b\n".encode("utf-16")[:-1], "it is not utf-16"), (b"", "No columns"),
    (b"image,caption\n", "no rows found"),
    (b"image,caption\na.png,x\nb.png,y,z\n", "Expected 2 fields in line 3, saw 3"),
    (b"image,caption\na.png,x,y\nb.png,y,z\n", "line 2: more cells"),
    (b'image,caption\na.png,"x\nb.png,y\n', "opened in line 2 is never closed"),
    (b"scan;caption\na.png;x\n", "no column 'image'. It has 'scan', 'caption'; map one with the option columns="),
    (b"image,caption,dose\na.png,x,0,5\n", "put cells that hold ',' in quotes"),
    (b"\x89PNG\r\n\x1a\n\0\0", "line 1 holds the byte 0x89"),
    (b"image,caption\n,x\n", "row 2: the image path is empty")])
def test_faulty_tables(tmp_path, content, says):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match="t.csv|no rows") as error: load_manifest("csv", tmp_path / "t.csv")
    assert says in str(error.value)


def test_tables_as_people_write_them(tmp_path):
    for name, sep, text in (("a.csv", ";", "\ufeffimage;label\r\n1.png;x\r\n\r\n2.png;y\r\n"),
                            ("a.tsv", None, "image\tlabel\n1.png\tx\n2.png\ty")):
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        assert read_table(tmp_path / name, sep).values.tolist() == [["1.png", "x"], ["2.png", "y"]]
    with pytest.raises(InputError, match="several tables .a.csv, a.tsv.; name one with 'table', or each with"):
        load_manifest("csv", tmp_path)
    with pytest.raises(InputError, match="separator is one character"): read_table(tmp_path / "a.csv", sep=", ")
    (tmp_path / "p.csv").write_text("made by hand\n\nid,n\n1,2\n")
    assert read_table(tmp_path / "p.csv", skip=2, dtype=int).n.tolist() == [2]


@pytest.mark.parametrize("name, content, notes", [
    ("t.csv", b"image,label\na.png,x\n", []),
    ("t.csv", b"image;label\na.png;x\n", ["separated by semicolons"]),
    ("t.csv", b"filepath\ttitle\tlabel\na.png\tA, b.\tx\n", ["separated by tabs", "'filepath' is taken as 'image'",
                                                              "'title' is taken as 'caption'"]),
    ("t.tsv", b"image,label\na.png,x\n", ["separated by commas"]),
    ("t.csv", b"sep=;\r\nimage;label\r\na.png;x\r\n", ["first line names the separator ';'"]),
    ("t.csv", b"\xef\xbb\xbfImage; LABEL ;dose\na.png;x;0,5\n", ["semicolons", "'Image' is", "' LABEL ' is taken as"]),
    ("t.csv", "image\tlabel\na.png\tx\n".encode("utf-16"), ["the file is UTF-16", "separated by tabs"]),
    ("t.csv", b"'image','label'\n'a.png','x'\n", ["single quotes"]),
    ("t.csv", b'"image";"label"\n"a.png";"x"\n', ["semicolons"]),
    ("t.csv", b"image|label\na.png|x\n", ["vertical bars"])])
def test_tables_of_other_programs_are_read_and_said_so(tmp_path, name, content, notes):
    (tmp_path / name).write_bytes(content)
    manifest = read_csv(tmp_path / name)
    assert (manifest["image"].tolist(), manifest["label"].tolist()) == (["a.png"], ["x"])
    assert len(manifest.attrs["notes"]) == len(notes)
    assert all(note in said for note, said in zip(notes, manifest.attrs["notes"]))


def test_encodings_are_named_and_notes_stay(tmp_path):
    for i in range(4): (tmp_path / f"{i}.png").touch()
    rows = "".join(f"{i}.png;caf\xe9\n" for i in range(4))
    (tmp_path / "t.csv").write_bytes(("Image;label\n" + rows).encode("cp1252"))
    with pytest.raises(InputError, match="or name its encoding, such as encoding='cp1252'"):
        load_manifest("csv", tmp_path / "t.csv")
    manifest = load_manifest("csv", tmp_path / "t.csv", encoding="cp1252")
    assert set(manifest["label"]) == {"caf\xe9"} and len(manifest.part("train").notes) == 2
    chosen = load_manifest("csv", tmp_path / "t.csv", encoding="cp1252", labels=["label"], columns={"image": "Image"})
    assert len(chosen.notes) == 1


def test_long_tables_are_read_as_they_stand(tmp_path):
    n = 150_000
    half = lambda a, b: [a] * (n // 2) + [b] * (n // 2)
    table = pd.DataFrame({"image": [f"{i}.png" for i in range(n)], "code": half("007", "x"), "late": half("", "x"),
                          "early": half("x", ""),
                          "mixed": half("True", "1.50"), "number": half("1e5", "-0"),
                          "big": half("123456789012345678901234567890", "1"),
                          "none": half("", ""), "flag": half("True", "false")})
    table.to_csv(tmp_path / "t.csv", index=False)
    found = read_table(tmp_path / "t.csv", columns=["none"])
    assert found.fillna("").equals(table) and found.dtypes.astype(str).eq(found.dtypes.astype(str).iloc[0]).all()
    assert found.isna().sum().to_dict() == dict.fromkeys(table, 0) | {"late": n // 2, "early": n // 2, "none": n}
    with open(tmp_path / "t.csv", "a") as file: file.write("a,b,c,d,e,f,g,h,i,j\n")
    with pytest.raises(InputError, match=f"Expected 9 fields in line {n + 2}, saw 10"): read_table(tmp_path / "t.csv")
    (tmp_path / "u.csv").write_text("a,b\n" + "1,2,3\n" * 300_000)
    with pytest.raises(InputError, match="line 2: more cells"): read_table(tmp_path / "u.csv")
    (tmp_path / "v.csv").write_bytes(b"a,b\n" + b"1,2\n" * 300_000 + b"1,\xff\n")
    with pytest.raises(InputError, match="line 300002 holds the byte 0xff"): read_table(tmp_path / "v.csv")


def test_skipped_and_labels_survive(tmp_path):
    @register("two labels")
    def reader(root):
        table = pd.DataFrame(
            {"image": [f"{i}.png" for i in range(60)], "x": ["present", "absent", None] * 20, "y": ["absent"] * 60})
        table.attrs = {"labels": ["x", "y"], "root": tmp_path / "elsewhere",
                       "skipped": [{"row": 7, "kind": "no image", "message": "row 7: lists no image"}]}
        return table
    try: manifest = load_manifest("two labels", tmp_path)
    finally: del READERS["two labels"]
    assert manifest.split_source == "made by image, stratified by x, y, seed 0"
    parts = [manifest, manifest.part("train"), manifest.limited(3), with_validation(manifest), manifest.copy(),
             manifest.sort_values("x"),
             manifest.reset_index(drop=True), pickle.loads(pickle.dumps(manifest)), manifest.assign(z=1)]
    for part in parts:
        assert (part.labels, len(part.skipped), part.root,
                part.dataset) == (["x", "y"], 1, str(tmp_path / "elsewhere"), "two labels")
    assert manifest[["image", "y"]].labels == ["y"] and manifest.attrs == {}
    assert (Manifest({"image": ["a"]}).labels, Manifest({"label": ["a"]}).labels,
            Manifest({"a": [1]}).skipped) == ([], ["label"], [])


def test_fingerprint_does_not_depend_on_the_process(tmp_path):
    code = """from medclip_nb.datasets import Manifest
print(Manifest({"a": ["x", None, "y"], "b": [1, 2, 3], "c": [.5, float("nan"), 1], "d": [["p"], {"q": [1]}, None],
                "e": [True, False, True]}).fingerprint())"""
    found = {python(code, PYTHONHASHSEED=seed) for seed in "123"}
    assert found == {"f01faf6218ed75f7\n"}


def table_of_groups(n=4000, groups=900, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.choice(["a", "b", "c"], groups, p=[.7, .2, .1])
    group = rng.integers(0, groups, n)
    return pd.DataFrame(
        {"image": [f"{i}.png" for i in range(n)], "group": [f"p{g}" for g in group], "label": label[group]})


@pytest.mark.parametrize("groups", [900, 20_000])
def test_splits_hold_shares_and_do_not_depend_on_order(groups):
    table = table_of_groups(50_000, groups)
    split = make_splits(table, "label")
    assert split.groupby(table["group"]).nunique().max() == 1
    share = pd.crosstab(table["label"], split, normalize="index")[["train", "test", "valid"]]
    assert (share - [.7, .15, .15]).abs().to_numpy().max() < 0.015
    shuffled = table.sample(frac=1, random_state=1)
    assert make_splits(shuffled, "label").sort_index().equals(split)
    assert not make_splits(table, "label", seed=1).equals(split)


def test_splits_of_labels_that_are_all_different():
    table = pd.DataFrame({"image": [f"{i}.png" for i in range(300)], "label": [str(i) for i in range(300)]})
    assert make_splits(table, "label").value_counts().to_dict() == {"train": 210, "test": 45, "valid": 45}


@pytest.mark.parametrize("n", range(3, 9))
def test_splits_of_a_few_groups(n):
    table = pd.DataFrame(
        {"group": [i % n for i in range(2 * n + 1)], "label": ["ab"[i % n % 2] for i in range(2 * n + 1)]})
    for seed in range(5):
        for stratify in (None, "label", ["label", "group"]):
            split = make_splits(table, stratify, seed=seed)
            assert set(split) == {"train", "valid", "test"} and split.groupby(table["group"]).nunique().max() == 1


def test_shares_of_splits_are_shares():
    "Percentages, and shares that add up to more or less than 1, are refused; a split may be left empty"
    table = pd.DataFrame({"image": [f"{i}.png" for i in range(100)]})
    for wrong in ({"train": 80, "test": 20}, {"train": .8, "test": .8}, {"train": .4, "test": .4},
                  {"train": 1.5, "test": -.5}, {"train": float("nan"), "test": .5}):
        with pytest.raises(InputError, match="that add up to 1, such as train=0.8 and test=0.2, not 80 and 20"):
            make_splits(table, fractions=wrong)
    for right in ({"train": .7, "test": .2, "valid": .1}, dict.fromkeys("abc", 1 / 3), {"train": 1, "test": 0}):
        counts = make_splits(table, fractions=right).value_counts()
        assert all(abs(counts.get(split, 0) - 100 * share) < 1 for split, share in right.items())
    manifest = Manifest(table.assign(split="train"))
    for wrong in (15, 1, 0, -.1, float("nan")):
        with pytest.raises(InputError, match="below 1, such as 0.15, not 15"): with_validation(manifest, wrong)
    assert (with_validation(manifest, .15)["split"] == "valid").sum() == 15
    with pytest.raises(InputError, match="'valid_fraction' must be above 0 and below 1, not 15"):
        check_parameters("itemized", {"valid_fraction": 15}, complete=False)


@pytest.mark.parametrize("text", [f"{text}{end}" for text in NORMAL_TEXTS for end in ("", ".")])
def test_readers_agree_on_normal_reports(tmp_path, text):
    "Whatever `says_normal` takes for a normal report is one in the column normal, by the rule of each reader"
    said = {"one": [text.capitalize()], "two": [text, "sinusitis"], "three": ["sinusitis", text]}
    studies = {name: {"series": {"T1": {}}, "report": items} for name, items in said.items()}
    (tmp_path / "train.json").write_text(json.dumps(studies))
    for reader in ("mri-study", "headct-study"):
        rows = load_manifest(reader, tmp_path)
        assert rows["normal"].tolist() == ["present", "present", "absent"], reader
        assert normal_flags(rows.drop(columns="normal"), "first").tolist() == [True, True, False]
    (tables := tmp_path / "dataset" / "radiology_text_reports").mkdir(parents=True)
    names = [f"train_{n}_a_1.nii.gz" for n in (1, 2, 3)]
    columns = "VolumeName,ClinicalInformation_EN,Technique_EN,Findings_EN,Impressions_EN"
    (tables / "train_reports.csv").write_text("\n".join([columns, *(f"{name},x,x,x,x" for name in names)]))
    scans = {f"train_{n}_a": {"recons": [], "report": items} for n, items in enumerate(said.values(), 1)}
    (tmp_path / "items.json").write_text(json.dumps(scans))
    rows = load_manifest("ct-rate", tmp_path, items_json=str(tmp_path / "items.json"))
    assert rows["normal"].tolist() == ["present", "absent", "absent"]
    assert normal_flags(rows.drop(columns="normal"), "only").tolist() == [True, False, False]


def test_splits_on_file(tmp_path):
    manifest = Manifest(table_of_groups())
    manifest.dataset = "toy"
    manifest["split"] = make_splits(manifest, "label")
    path = tmp_path / "new" / "splits.csv"
    assert save_splits(manifest,
                       path) == split_hash(manifest.sample(frac=1, random_state=0)) == split_hash(
                           manifest[["group", "split"]])
    assert re.match(r"# splits of toy by group: \d+ test, \d+ train, \d+ valid; hash [0-9a-f]{16}\ngroup,split\n",
                    path.read_text())
    before = path.read_bytes()
    save_splits(manifest.sample(frac=1, random_state=0), path)
    assert path.read_bytes() == before
    assert load_splits(manifest.drop(columns="split"), path)["split"].equals(manifest["split"])
    for change, says in ((lambda s: s.replace("p1,", "q1,"), "was changed"),
                         (lambda s: s.split("\n", 1)[1].replace("p1,", "q1,"), "'p1'"),
                         (lambda s: s + "p1,test\n", "was changed"),
                         (lambda s: s.split("\n", 1)[1] + "p1,test\n", "group 'p1' occurs twice"),
                         (lambda s: "group,split\np1,\n", "row 2: an empty cell"),
                         (lambda s: "group,fold\np1,1\n", "no column 'split'"),
                         (lambda s: "patient,split\np1,test\n", "splits by 'patient', a column which toy lacks")):
        path.write_text(change(before.decode()))
        with pytest.raises(InputError, match="splits.csv.*" + re.escape(says)): load_splits(manifest, path)
    with pytest.raises(InputError, match="no such file of splits"): load_splits(manifest, tmp_path / "none.csv")


def test_odd_names_of_groups_in_splits(tmp_path):
    groups = ["a,b", 'say "x"', "new\nline", "# hash", " space ", "é", "007", "NA", None, None]
    manifest = Manifest({"image": [f"{i}.png" for i in range(10)], "group": groups})
    manifest["split"] = make_splits(manifest)
    save_splits(manifest, tmp_path / "s.csv")
    assert load_splits(manifest.assign(split="train"),
                       tmp_path / "s.csv")["split"].tolist() == manifest["split"].tolist()


def test_a_folder_of_classes_holds_what_can_be_read(tmp_path):
    "Every picture that `read_image` opens is a row, in each place that looks for images; other files are counted"
    pixels = np.random.default_rng(0).integers(0, 255, (9, 9, 3), np.uint8)
    (tmp_path / "a").mkdir()
    for suffix, kind in PICTURES.items(): Image.fromarray(pixels).save(tmp_path / "a" / f"{suffix[1:]}{suffix}", kind)
    for name in ("x.svg", "y.svg", "IM0001", "t.npy", "notes.txt", "Thumbs.db", ".DS_Store"):
        (tmp_path / "a" / name).touch()
    rows = load_manifest("imagefolder", tmp_path)
    assert {Path(name).suffix for name in rows["image"]} == set(PICTURES)
    assert all(read_image(path).mode == "RGB" for path in rows.paths())
    assert not len(validate(rows, labels=(), duplicates=False))
    assert Counter(s["kind"] for s in rows.skipped) == {".svg file": 2, "file without a suffix": 1, ".npy file": 1}
    assert write_shards(rows, tmp_path / "shards")["samples"] == len(PICTURES)
    assert len(load_manifest("webdataset", tmp_path / "shards")) == len(PICTURES)


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_card_is_whole_and_its_reader_is_there(path):
    found = card(path.stem)
    keys = set(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert keys - set(CARD_EXTRAS) == set(CARD_KEYS) and found["name"] == path.stem
    assert not re.search(r"TODO|</?(a|b|br|div|i|img|p|script|span|table|td)\b", str(found)), "plain text"
    module = importlib.import_module(found["module"])
    assert path.stem in READERS and READERS[path.stem][0].__module__ == module.__name__
    text = card_markdown(path.stem)
    words = lambda s: " ".join(s.replace("\\|", "|").split())
    assert all(words(found[k])[:40] in words(text) for k in ("title", "license", "get", "citation", "description"))


def test_every_reader_has_a_card():
    for path in (ROOT / "medclip_nb").rglob("*.py"):
        if re.search(r"^@?register\(", path.read_text(encoding="utf-8"), re.M):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    ours = {n for n, (reader, _) in READERS.items() if reader.__module__.startswith("medclip_nb.")}
    assert ours == set(card_names()) == {p.stem for p in CARDS}


def test_listing_imports_no_reader():
    code = """import sys
before = set(sys.modules)
from medclip_nb.datasets import list_datasets, card
names = list_datasets().name.tolist()
heavy = {"torch", "pyarrow.dataset", "pydicom", "nibabel", "webdataset", "datasets", "PIL",
         "medclip_nb.datasets.starter"}
print(len(names) >= 3 and "starter" in names, sorted(heavy & set(sys.modules)))"""
    assert python(code) == "True []\n"
    assert list_datasets().columns.tolist() == ["name", "title", "modality", "tasks", "license", "source",
                                                "description", "reader"]


def test_cards_travel_with_the_package(tmp_path):
    for name in ("setup.py", "settings.ini", "pyproject.toml"): shutil.copy(ROOT / name, tmp_path)
    for name in ("medclip_nb", "nbs/experiments", "data/cards", "data/prompts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-lib", tmp_path / "installed"], cwd=tmp_path,
                   check=True, capture_output=True)
    code = """from importlib import resources
from medclip_nb.datasets import card, card_folder, card_names
print(*sorted(p.name for p in resources.files("medclip_nb.cards").iterdir() if p.name.endswith(".yaml")), sep=",")
print(card_folder(), card("starter")["modality"], len(card_names()))"""
    listed, used = python(code, cwd="/", PYTHONPATH=str(tmp_path / "installed")).splitlines()
    assert (listed.split(",") == [p.name for p in CARDS]
            and used == f"{tmp_path}/installed/medclip_nb/cards MRI {len(CARDS)}")


def test_broken_card(tmp_path, monkeypatch):
    shutil.copytree(card_folder(), tmp_path / "cards")
    monkeypatch.setattr(datasets, "card_folder", lambda: tmp_path / "cards")
    text = (tmp_path / "cards" / "csv.yaml").read_text()
    for change, says in (("module: medclip_nb.nowhere", "lost.yaml: there is no module 'medclip_nb.nowhere'"),
                         ("module: medclip_nb.core", "lost.yaml: module 'medclip_nb.core' registers no reader 'lost'")):
        (tmp_path / "cards" / "lost.yaml").write_text(
            text.replace("name: csv", "name: lost").replace("module: medclip_nb.datasets.readers.basic", change))
        with pytest.raises(InputError, match=says): load_manifest("lost", tmp_path)
    (tmp_path / "cards" / "lost.yaml").write_text(text.replace("name: csv", "name: lost") + "classes: {label: [a]}\n")
    with pytest.raises(InputError, match="a list of two texts or more for 'label'"): list_datasets()
    (tmp_path / "cards" / "lost.yaml").write_text("!!python/object/apply:os.system ['touch evil']")
    with pytest.raises(InputError, match="lost.yaml: not YAML"): list_datasets()
    with pytest.raises(InputError, match="Unknown dataset 'lots'. Did you mean 'lost'"): load_manifest("lots", tmp_path)
    for name in ("../csv", "csv.yaml", "", "/etc/passwd"):
        with pytest.raises(InputError, match="No card for"): card(name)


def _looks(monkeypatch, root):
    "How often each file below a folder is looked at, and how many bytes of it are read, as a splitting counts them"
    looked, read = Counter(), Counter()
    def counted(function):
        def call(path, *args, **more):
            if str(path).startswith(f"{root}/p"): looked[str(path)] += 1
            return function(path, *args, **more)
        return call
    class Counted:
        def __init__(self, path, mode): self.path, self.file = str(path), open(path, mode)
        def __enter__(self): return self
        def __exit__(self, *error): self.file.close()
        def __getattr__(self, name): return getattr(self.file, name)
        def read(self, n=-1):
            read[self.path] += len(found := self.file.read(n))
            return found
    for name in ("stat", "lstat"): monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(leaks, "open", Counted, raising=False)
    return looked, read


def test_a_hundred_thousand_rows_are_looked_at_once(tmp_path, monkeypatch):
    n = 100_000
    pd.DataFrame({"image": [f"p{i // 2}/{i}.png" for i in range(n)], "caption": [f"text {i}" for i in range(n)],
                  "label": ["a", "b"] * (n // 2),
                  "group": [f"p{i // 2}" for i in range(n)]}).to_csv(tmp_path / "t.csv", index=False)
    looked, read = _looks(monkeypatch, tmp_path)
    manifest = load_manifest("csv", tmp_path)
    manifest.fingerprint(), split_hash(manifest)
    assert len(looked) == n and max(looked.values()) == 1 and not read
    assert manifest.groupby("group")["split"].nunique().max() == 1


def test_large_files_of_one_size_are_not_read_for_a_split(tmp_path, monkeypatch):
    "Scans of the same size differ in the middle; a file of several rows is looked at once"
    size = 2**20
    for i in range(12): (tmp_path / f"p{i}.pt").write_bytes(np.random.default_rng(i).bytes(size))
    (tmp_path / "p12.pt").write_bytes((tmp_path / "p3.pt").read_bytes())
    files = [f"p{i % 13}.pt" for i in range(39)]
    pd.DataFrame({"image": files, "caption": "text"}).to_csv(tmp_path / "t.csv", index=False)
    rows = load_manifest("csv", tmp_path, split_by=None, split="all")
    looked, read = _looks(monkeypatch, tmp_path)
    joined = join_equal(rows, rows["image"])
    assert set(joined[rows["image"].isin(["p3.pt", "p12.pt"])]) == {"p12.pt"} and joined.nunique() == 12
    assert max(n for path, n in read.items() if Path(path).name not in ("p3.pt", "p12.pt")) < size / 100
    assert len(looked) == 13


def _write(kind, folder, rows):
    "Rows, each with an image, as a data set of one kind"
    rows = [{"image": f"{i}.png", "caption": f"scan {i}"} | row for i, row in enumerate(rows)]
    if kind == "json-pairs":
        (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return folder / "t.jsonl"
    if kind == "parquet":
        pd.DataFrame(rows).to_parquet(folder / "t.parquet")
        return folder / "t.parquet"
    if kind == "huggingface":
        pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(folder / "hf")
        return folder / "hf"
    with tarfile.open(folder / "t.tar", "w") as tar:
        for i, row in enumerate(rows):
            for end, held in (("json", json.dumps(row).encode()), ("png", (folder / f"{i}.png").read_bytes())):
                (member := tarfile.TarInfo(f"{i}.{end}")).size = len(held)
                tar.addfile(member, io.BytesIO(held))
    return folder / "t.tar"


@pytest.mark.parametrize("kind", ["json-pairs", "parquet", "huggingface", "webdataset"])
def test_cells_of_another_kind_are_one_line(folder, kind):
    for column, cell in {"group": {"id": 1}, "split": 1, "label": {"a": 1}}.items():
        root = _write(kind, folder, [{column: cell}] * 6)
        says = rf"{kind}: row 0 .*column '{column}' holds {type(cell).__name__} .*\(6 such rows\)\. Write "
        with pytest.raises(InputError, match=says): load_manifest(kind, root)
    root = _write(kind, folder, [{"group": i // 2, "label": ["a", "b"]} for i in range(8)])
    assert load_manifest(kind, root)["group"].tolist() == list("00112233")
    assert list(load_manifest(kind, root)["label"][0]) == ["a", "b"]
    root = _write(kind, folder, [{"caption": {"a": 1}}] * 6)
    says = "no rows found" if kind == "json-pairs" else "column 'caption' holds dict"
    with pytest.raises(InputError, match=says): load_manifest(kind, root)


def test_cells_of_another_kind_through_the_command(folder):
    root = _write("webdataset", folder, [{"group": {"id": 1}}] * 6)
    done = CliRunner().invoke(app, ["data", "validate", "webdataset", "--root", str(root)])
    assert done.exit_code == 2 and "column 'group' holds dict" in done.output and "Traceback" not in done.output
    root = _write("webdataset", folder, [{"label": ["a", "b"]}] * 6)
    done = CliRunner().invoke(app, ["data", "validate", "webdataset", "--root", str(root)])
    assert done.exit_code == 1 and "lists of labels" in done.output


def test_validate_names_a_label_once_and_cuts_no_remedy(folder):
    said = CliRunner().invoke(app, ["data", "validate", "csv", "--root", str(csv(folder, [
        {"image": "0.png", "label": "b "}]).root)]).output
    assert "labels alike" in said and "single example" not in said and "\u2026" not in said
    assert "otherwise ignore this." in " ".join(said.split())


def test_made_splits_keep_equal_files_together_and_a_column_of_patients_is_pointed_out(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12): Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / f"{i}.png")
    for i in (3, 7, 11): (tmp_path / f"{i}.png").write_bytes((tmp_path / "0.png").read_bytes())
    lines = [f"{i}.png,text {i},p{i // 2}" for i in range(12)]
    (tmp_path / "own.csv").write_text("\n".join(["image,caption,patient", *lines]))
    rows = load_manifest("csv", tmp_path / "own.csv")
    assert rows["split"][[0, 3, 7, 11]].nunique() == 1 and rows["split"].nunique() == 3
    assert rows.split_source == "made by image, 4 rows with equal files kept together, seed 0"
    assert "column 'patient' (6 values in 12 rows) is not taken as group" in rows.notes[-1]
    own = load_manifest("csv", tmp_path / "own.csv", columns={"group": "patient"})
    assert not any("patient" in note for note in own.notes)
    assert own["split"][[0, 1, 2, 3, 6, 7, 10, 11]].nunique() == 1
