"""Hostile and broken files, rows that cannot be used, leaks between splits, and an audit that shows all of it and runs
none of it"""
import json
import os
import pickle
import struct
import subprocess
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from PIL import Image

from medclip_nb import datasets
from medclip_nb.core import InputError
from medclip_nb.datasets import (
    Manifest,
    allowed_bad,
    check,
    drop_unusable,
    file_facts,
    inside,
    leak_table,
    load_manifest,
    nearest_hashes,
    probe,
    row_picture,
    row_units,
    safe_members,
    safe_path,
    safe_paths,
    split_counts,
    split_table,
    summarize_issues,
    validate,
)
from medclip_nb.metrics import unit_count


def picture(seed):
    "A smooth random picture, as distinct from others as two photographs"
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6), dtype=np.uint8)).resize(
        (64, 64), Image.Resampling.BICUBIC)


def manifest_of(root, rows):
    made = Manifest(rows)
    made.dataset, made.root = "toy", str(root)
    return made


@pytest.fixture
def data(tmp_path):
    "A hundred good pictures below the folder data, one outside"
    (tmp_path / "data").mkdir()
    for i in range(100): picture(i).save(tmp_path / "data" / f"{i}.png")
    picture(1000).save(tmp_path / "outside.png")
    return tmp_path / "data"


@pytest.fixture
def good(data):
    "A manifest of the hundred, a quarter of them for testing"
    return manifest_of(data,
                       {"image": [f"{i}.png" for i in range(100)], "caption": [f"picture {i}" for i in range(100)],
                        "label": ["ab"[i % 2] for i in range(100)], "group": [f"p{i // 2}" for i in range(100)],
                        "split": ["train"] * 76 + ["test"] * 24})


def bomb(path, width=50_000, height=50_000):
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
                     + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


class Program:
    "Makes a folder when it is unpickled"
    def __init__(self, target): self.target = str(target)
    def __reduce__(self): return os.mkdir, (self.target,)


# -- single files

@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_never_decoded(tmp_path):
    bomb(tmp_path / "bomb.png")
    bomb(tmp_path / "large.png", 10_000, 9_000)
    start = time.perf_counter()
    for name in ("bomb.png", "large.png"):
        found = probe(tmp_path / name, "decode", hashes=True)
        assert found.kind == "huge image" and "pixels" in found.message
    with open(tmp_path / "bomb.npy", "wb") as f:
        np.lib.format.write_array_header_1_0(f, {"descr": "<f8", "fortran_order": False, "shape": (40_000, 1000, 1000)})
    assert probe(tmp_path / "bomb.npy", "decode").kind == "huge image"
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as z: z.write(tmp_path / "bomb.npy", "image.npy")
    assert probe(tmp_path / "bomb.npz", "decode").kind == "huge image"
    assert time.perf_counter() - start < 5
    assert probe(tmp_path / "large.png", max_pixels=10**9).kind == ""


def test_truncation_is_found_by_decoding(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))
    for name in ("a.jpg", "a.png", "a.tif", "a.bmp", "a.webp"):
        noise.save(tmp_path / name)
        assert probe(tmp_path / name, "decode").kind == "", name
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:len(whole) // 2])
        assert probe(tmp_path / name, "decode").kind in ("truncated image", "unreadable image"), name
    for name in ("a.jpg", "a.tif"): assert probe(tmp_path / name, "decode").kind == "truncated image", name
    assert probe(tmp_path / "a.jpg", "header").kind == ""
    whole = Path(pydicom_file("CT_small.dcm")).read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[:-3000])
    assert (probe(tmp_path / "cut.dcm").kind, probe(tmp_path / "cut.dcm", "decode").kind) == ("", "truncated image")


def pydicom_file(name):
    from pydicom.data import get_testdata_file
    return get_testdata_file(name, download=False)


def test_medical_files(tmp_path):
    import nibabel
    found = probe(pydicom_file("CT_small.dcm"), "decode", hashes=True)
    assert ((found.kind, found.format, found.width, found.height, found.frames) == ("", "DICOM", 128, 128, 1)
            and found.perceptual)
    (tmp_path / "ct.png").write_bytes(Path(pydicom_file("CT_small.dcm")).read_bytes())
    assert probe(tmp_path / "ct.png").kind == "wrong suffix"
    assert probe(pydicom_file("rtplan.dcm")).kind == "unreadable image"
    nibabel.save(nibabel.Nifti1Image(np.zeros((7, 5, 3), np.int16), np.eye(4)), tmp_path / "v.nii.gz")
    found = probe(tmp_path / "v.nii.gz", "decode")
    assert (found.kind, found.format, found.width, found.height, found.frames,
            found.mode) == ("", "NIfTI", 7, 5, 3, "int16")
    np.savez(tmp_path / "v.npz", note=np.array("x"), image=np.zeros((3, 5, 7), np.uint8))
    found = probe(tmp_path / "v.npz", "decode")
    assert (found.kind, found.width, found.height, found.frames) == ("", 7, 5, 3)
    torch.save({"t1": torch.zeros(3, 5, 7)}, tmp_path / "v.pt")
    found = probe(tmp_path / "v.pt", "decode")
    assert (found.kind, found.format, found.width, found.height, found.frames) == ("", "PT", 7, 5, 3)


@pytest.mark.parametrize("images", ["header", "decode"])
def test_programs_are_never_run(tmp_path, images):
    marker = tmp_path / "marker"
    pickle.dump(Program(marker), open(tmp_path / "bare.pt", "wb"))
    pickle.dump(Program(marker), open(tmp_path / "picture.png", "wb"))
    torch.save(Program(marker), tmp_path / "program.pt")
    torch.save({"image": torch.zeros(3, 8, 8), "x": Program(marker)}, tmp_path / "mixed.pt")
    torch.save(torch.zeros(3, 8, 8), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    np.save(tmp_path / "objects.npy", np.array([Program(marker)], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", image=np.array([Program(marker)], dtype=object))
    for path in sorted(tmp_path.iterdir()):
        assert probe(path, images, hashes=True).kind == "unsafe pickle", path.name
    assert not marker.exists()
    pickle.load(open(tmp_path / "bare.pt", "rb"))
    assert marker.exists()


def test_formats_that_start_programs_are_not_opened(tmp_path):
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    assert probe(tmp_path / "a.png", "decode").kind == "unreadable image"


def test_devices_and_pipes_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert probe(tmp_path / "pipe.png").kind == "unreadable image"
    assert probe("/dev/zero").kind == "unreadable image"


@pytest.mark.parametrize("name, kind, says", [
    ("A.png", "wrong case", "a.png"), ("SUB/b.png", "wrong case", "sub/b.png"), ("a.png ", "path trap", "a.png"),
    ("sub\\b.png", "path trap", "sub/b.png"),
    ("sub /b.png", "path trap", "sub/b.png"), ("Sub\\B.PNG", "path trap", "sub/b.png"),
    ("c.png", "missing image", "no such file"), ("sub", "a folder", "a folder"),
    ("no/b.png", "missing image", "no such file"),
    ("dead.png", "missing image", "a link to a file that does not exist"),
    ("a.png/b.png", "missing image", "no such file")])
def test_traps_of_case_and_path(tmp_path, name, kind, says):
    (tmp_path / "sub").mkdir()
    for place in ("a.png", "sub/b.png"): picture(0).save(tmp_path / place)
    (tmp_path / "dead.png").symlink_to("nowhere")
    found = probe(tmp_path / name)
    assert (found.kind, says in found.message) == (kind, True), found


def test_odd_names_are_a_warning(tmp_path):
    picture(0).save(tmp_path / "a.png")
    for name in ("back\\slash.png", "blank.png "):
        (tmp_path / "a.png").rename(tmp_path / name).rename(tmp_path / name)
        assert probe(tmp_path / name).kind in ("odd name", "wrong suffix")
        (tmp_path / name).rename(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore")
def test_no_bytes_make_probe_raise(tmp_path):
    "Files that begin like something and go on at random"
    rng, starts = np.random.default_rng(0), [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"PK\x03\x04",
                                             b"\x93NUMPY\x01\0", b"\0" * 128 + b"DICM", b"\x80\x04", b"GIF89a", b"RIFF"]
    for number, start in enumerate(starts * 4):
        for suffix in (".png", ".dcm", ".nii.gz", ".pt", ".npz"):
            path = tmp_path / f"{number}{suffix}"
            path.write_bytes(start + rng.integers(0, 256, 700, dtype=np.uint8).tobytes())
            assert probe(path, "decode", hashes=True).kind, path


# -- paths and archives

def test_safe_paths_agree_with_safe_path():
    odd = ["a.png", "a/b.png", "./a.png", "a//b.png", "a/./b.png", "a/../b.png", "..a.png", "a..png", ".hidden/x.png",
           "a b/c d.png", "ü/ß.png", "a\nb.png", "a/"]
    assert safe_paths("root", odd, "t.csv") == [safe_path("root", p, "") for p in odd]
    for bad in ("..", "../a", "a/../../b", "/a", "\\a", "c:\\a", "C:a", "a\0b", "", "  ", "..\\a", "a/..\\..\\..\\b",
                "file:///etc/passwd", None, 3.5, np.nan):
        with pytest.raises(InputError, match="t.csv, row 3: "): safe_paths("root", ["a.png", bad], "t.csv")
        with pytest.raises(InputError, match="somewhere: "): safe_path("root", bad, "somewhere")


def test_a_million_paths_at_once():
    paths = [f"train/class{i % 9}/image_{i:07d}.png" for i in range(1_000_000)]
    start = time.perf_counter()
    assert safe_paths("root", paths, "t.csv") == paths
    assert time.perf_counter() - start < 5


def test_archives_that_lead_out(tmp_path):
    def tar(name, kind=tarfile.REGTYPE, target=""):
        with tarfile.open(tmp_path / "x.tar", "w") as t:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            t.addfile(info)
        return tmp_path / "x.tar"
    assert safe_members(tar("a/b.png")) == ["a/b.png"]
    for name in ("../b.png", "/tmp/b.png", "a/../../b.png", "..\\b.png", "C:\\b.png"):
        with pytest.raises(InputError, match="x.tar: refused"): safe_members(tar(name))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        with pytest.raises(InputError, match="a link or a device"): safe_members(tar("a", kind, "../b"))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        z.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match="a link or a device"): safe_members(tmp_path / "x.zip")


def test_links_out_of_the_root(good, data, tmp_path):
    (data / "link.png").symlink_to(tmp_path / "outside.png")
    (data / "fine.png").symlink_to(data / "3.png")
    (data / "up").symlink_to(tmp_path)
    assert [inside(data, data / p) for p in ("link.png", "fine.png", "up/outside.png")] == [False, True, False]
    good.loc[[0, 1, 2], "image"] = ["link.png", "fine.png", "up/outside.png"]
    for images in ("none", "header", "decode"):
        found = validate(good, images, duplicates=False)
        assert found[["kind", "row"]].values.tolist() == [["link out of the root", 0], ["link out of the root", 2]]
    (tmp_path / "alias").symlink_to(data)
    good.root = str(tmp_path / "alias")
    assert validate(good, duplicates=False)["row"].tolist() == [0, 2]
    good.loc[[0, 2], "image"] = ["../outside.png", str(tmp_path / "outside.png")]
    assert validate(good, duplicates=False)["kind"].tolist() == ["unsafe path"] * 2


# -- findings

def test_findings_name_file_row_and_remedy(good, data):
    (data / "4.png").write_bytes(b"junk")
    good.loc[7, "image"] = "none.png"
    found = validate(good)
    assert found.columns[:5].tolist() == ["severity", "kind", "row", "message", "remedy"]
    assert found[["severity", "kind", "row"]].values.tolist() == [["error", "missing image", 7],
                                                                  ["error", "unreadable image", 4]]
    assert f"{data}/none.png: no such file" in found.message[0] and "remove the row" in found.remedy[0]
    for kind in ("missing", "unreadable"): assert (summarize_issues(found).kind == f"{kind} image").sum() == 1
    assert datasets.validate is validate and datasets.check is check and datasets.drop_unusable is drop_unusable
    with pytest.raises(InputError,
                       match=r"toy in .*: row 7 \(counted from 0\): .*none.png: no such file \(1 more errors; .*\). "
                             r"Check the path"): check(good)
    with pytest.raises(InputError, match="images='some': use"): validate(good, "some")


def test_good_data_has_no_findings(good):
    for images in ("none", "header", "decode"): assert not len(validate(good, images))


def test_every_series_of_a_study(data):
    torch.save(torch.zeros(4, 8, 8), data / "a.pt")
    np.save(data / "b.npy", np.zeros((3, 8, 8)))
    for folder in ("slices", "pictures"): (data / folder).mkdir()
    for i in range(3):
        picture(i).save(data / "pictures" / f"{i}.png")
        ds = pydicom.dcmread(pydicom_file("CT_small.dcm"))
        ds.ImagePositionPatient = [0, 0, i]
        ds.save_as(data / "slices" / f"{i}.dcm")
    studies = manifest_of(data,
                          {"series": [{"t1": "a.pt", "t2": "b.npy"}, {"t1": "b.pt"}, {"ct": "slices"}, {"x": "1.png"},
                                      {"x": "pictures"}],
                           "items": [["x"], ["y"], [" "], ["z"], ["z"]], "split": ["train"] * 4 + ["test"]})
    for images in ("header", "decode"):
        found = validate(studies, images, duplicates=False)
        assert found[["kind", "row"]].values.tolist() == [["empty items", 2], ["missing image", 1],
                                                          ["unreadable image", 3], ["unreadable image", 4]]
        assert "series 't1'" in found.message[1] and "a picture, and a series is" in found.message[2]
        assert "no DICOM images" in found.message[3]
    kept, _ = drop_unusable(studies, max_bad=0.7)
    assert kept.index.tolist() == [0, 2]
    facts = file_facts(studies)
    assert facts[facts.path == "slices"].frames.tolist() == [3]


def test_options_of_volumes_do_not_spoil_pictures(tmp_path):
    "What a study model needs of volumes in a column image says nothing about the files; a mistake is told at once"
    rng, names = np.random.default_rng(0), [f"{i}.npy" for i in range(4)]
    for name in names: np.save(tmp_path / name, rng.normal(0, 300, (4, 9, 9)).astype(np.float32))
    pd.DataFrame({"image": names, "split": "train"}).to_csv(tmp_path / "t.csv", index=False)
    loaded = lambda **read: load_manifest("csv", tmp_path, read=read)
    for read in ({"file_spacing": [3, 1, 1]}, {"window": "lung", "spacing": [3, 1, 1], "percentiles": None}):
        assert not len(validate(loaded(**read), images="decode"))
        pictures = [row_picture(loaded(**how), 0).tobytes() for how in (read, {"window": read.get("window")})]
        assert pictures[0] == pictures[1]
    for wrong, told in (({"windw": "lung"}, "csv: read has no option 'windw'. Did you mean 'window'"),
                        ({"window": "lungs"}, "csv: read: No window 'lungs'. Known: brain, "),
                        ({"file_spacing": [3, 1]}, "csv: read: file_spacing should be three lengths")):
        with pytest.raises(InputError, match=told): loaded(**wrong)


def test_captions(good):
    good["caption"] = good["caption"].mask(good.index < 10,
                                           "no finding").mask(good.index == 20, " ").mask(good.index == 21, np.nan)
    good.loc[30:33, "caption"] = ["<script>alert(1)</script>", "=cmd|' /C calc'!A0", "a\x07b", "word " * 90]
    from medclip_nb.models import load_model
    clip = load_model("starter", device="cpu", precision="fp32")
    found = validate(good, "none", context=(clip.tokenizer, clip.context_length)).set_index("kind")
    assert found.row["empty caption"].tolist() == [20, 21]
    assert (found["count"]["identical captions"] == 10
            and "the most frequent is that of 10" in found.message["identical captions"])
    assert (found.row["long captions"] == 33
            and ("1 captions (1.0%) are longer than the model's context of 77 tokens; the longest has 92"
                 in found.message["long captions"]))
    assert [found.row[f"{k} in captions"] for k in ("markup", "formula", "control characters")] == [30, 31, 32]
    assert set(found.severity.drop("empty caption")) == {"warning"}


def test_labels(good):
    good.loc[99, "label"] = "c"
    good.loc[:60, "label"] = np.nan
    found = validate(good, "none").set_index("kind")
    assert "61.0% of column 'label' is empty" in found.message["missing labels"]
    assert "'c' does not occur in the training split (1 rows elsewhere)" in found.message["unseen label"]
    assert found.row["single example"] == 99
    with pytest.raises(InputError, match="one class only: \\['a'\\]"): check(good.assign(label="a"), ["label"])


# -- leaks

def test_rows_without_a_group_are_counted_one_by_one():
    "The tables of splits count what splits keep together: a row without a group is one of its image"
    rows = Manifest({"image": [f"{i}.png" for i in range(10)], "group": ["a"] * 4 + [None] * 6, "split": "train"})
    told = split_table(rows).loc["train"]
    assert told.tolist() == [10, 1, 7, 1, 4] and split_counts(rows)["groups"].tolist() == [7]
    assert rows.pipe(row_units)[1].nunique() == unit_count(rows["group"]) == 7
    studies = Manifest({"series": [{"a": "1"}, {"a": "1"}, {"a": "2"}], "split": "test"})
    assert split_table(studies)["groups"].tolist() == [2]


def test_leaks_across_splits(good, data):
    (data / "99.png").write_bytes((data / "0.png").read_bytes())
    (data / "98.png").unlink()
    Image.open(data / "1.png").resize((90, 80)).save(data / "98.png")
    (data / "5.png").write_bytes((data / "6.png").read_bytes())
    good.loc[97, "group"] = "p3"
    leaks = leak_table(good)
    assert leaks[["kind", "row", "other_row"]].values.tolist() == [["same file", 99, 0], ["near duplicate", 98, 1],
                                                                   ["same group", 97, 6]]
    assert leaks.distance[1] <= 4
    found = validate(good, "decode").set_index("kind")
    assert found.severity.to_dict() == {"same file across splits": "error", "group in several splits": "error",
                                        "same file twice": "warning", "near duplicate across splits": "warning"}
    assert "99.png (test) and 0.png of row 0 (train) are the same file" in found.message["same file across splits"]
    assert "near duplicate across splits" not in set(validate(good, "header").kind)
    assert "same file across splits" in set(validate(good, "header").kind)
    assert not len(leak_table(good[good.split == "test"]))


def mixtures(data):
    "A picture with more and more of another mixed in; the first is its own"
    parts = [np.asarray(picture(i), dtype=float) for i in (0, 77)]
    for i, share in enumerate(np.linspace(0, 0.6, 25)):
        Image.fromarray(((1 - share) * parts[0] + share * parts[1]).astype(np.uint8)).save(data / f"{i}.png")
    return manifest_of(data, {"image": [f"{i}.png" for i in range(25)], "split": ["train"] + ["test"] * 24})


@pytest.mark.parametrize("most", [2, 4, 8])
def test_near_within_the_tolerance_only(data, most):
    mixed = mixtures(data)
    facts = file_facts(mixed, "decode", hashes=True)
    apart = [(facts.perceptual[0] ^ p).bit_count() for p in facts.perceptual]
    assert sum(d <= most for d in apart[1:]) and sum(d > most for d in apart)
    found = leak_table(mixed, facts, most, min_similarity=0)
    assert (found.row.tolist() == [i for i in range(1, 25) if apart[i] <= most]
            and found.distance.tolist() == [d for d in apart[1:] if d <= most])
    small = np.array([np.frombuffer(t, np.int8) for t in facts.thumbnail], dtype=float)
    alike = np.corrcoef(small)[0]
    strict = leak_table(mixed, facts, most)
    assert strict.row.tolist() == [i for i in range(1, 25) if apart[i] <= most and alike[i] >= 0.98]
    assert np.allclose(strict.similarity, alike[strict.row], atol=1e-4)


def test_copies_are_told_from_likenesses(data):
    "Among pictures of one pose, which all have nearly the same hash, the copy is found and the others are not"
    pose = np.asarray(picture(0).resize((128, 128)), dtype=float)
    rng = np.random.default_rng(0)
    def patient():
        detail = np.asarray(
            Image.fromarray(rng.normal(0, 1, (12, 12)).astype(np.float32)).resize((128, 128), Image.Resampling.BICUBIC))
        return Image.fromarray((pose + 30 * detail).clip(0, 255).astype(np.uint8))
    for i in range(40): patient().save(data / f"{i}.png")
    Image.open(data / "7.png").resize((100, 90)).point(lambda v: v * 0.8 + 10).save(data / "39.jpg", quality=70)
    table = manifest_of(data,
                        {"image": [*(f"{i}.png" for i in range(39)), "39.jpg"],
                         "split": ["train"] * 20 + ["test"] * 20})
    assert len(leak_table(table, max_distance=12, min_similarity=0)) > 3
    assert leak_table(table, max_distance=12)[["row", "other_row"]].values.tolist() == [[39, 7]]


@pytest.mark.parametrize("most", [0, 1, 4, 7])
def test_banded_search_is_exact(most):
    rng = np.random.default_rng(most)
    gallery = rng.integers(0, 2**63, 500, dtype=np.uint64) & np.uint64(0xFFFF0000FFFFFFFF)
    queries = gallery[rng.integers(0, 500, 400)].copy()
    for i in range(400):
        for bit in rng.choice(64, rng.integers(0, 12), replace=False): queries[i] ^= np.uint64(1) << np.uint64(bit)
    brute = np.array([[(int(q) ^ int(g)).bit_count() for g in gallery] for q in queries])
    place, distance = nearest_hashes(queries, gallery, most)
    near = brute.min(1) <= most
    assert near.any() and not near.all()
    assert ((place == np.where(near, brute.argmin(1), -1)).all()
            and (distance == np.where(near, brute.min(1), most + 1)).all())


# -- decisions

def test_a_few_bad_rows_are_skipped_and_recorded(good, data):
    (data / "4.png").write_bytes((data / "4.png").read_bytes()[:300])
    good.skipped = [{"row": 3, "kind": "excluded", "message": "by the reader"}]
    kept, found = drop_unusable(good)
    assert len(kept) == 99 and 4 not in kept.index and kept.root == good.root
    assert [(s["row"], s["kind"]) for s in kept.skipped] == [(3, "excluded"), (4, "truncated image")]
    assert "4.png" in kept.skipped[1]["message"] and len(found) == 1
    assert [s["row"] for s in kept.part("test").skipped] == [3, 4] and len(good.skipped) == 1


@pytest.mark.parametrize("n, share, most", [(154, 0.01, 3), (154, 0, 0), (40, 0.01, 2), (19, 0.01, 0), (19, 0.3, 5),
                                            (1000, 0.01, 10), (1000, 0.002, 3)])
def test_small_data_may_lack_a_few_rows(n, share, most):
    "Three, but not more than one in twenty, and none where none are tolerated"
    assert allowed_bad(n, share) == most


def test_above_the_share_the_list_is_shown(good, data):
    for i in range(0, 60, 2): (data / f"{i}.png").write_bytes(b"")
    with pytest.raises(InputError) as error: drop_unusable(good)
    said = str(error.value)
    assert "30 of 100 rows cannot be used (30.0%, at most 3 row(s) may be left out)" in said
    assert said.endswith("raise max_bad, as in max_bad=0.3.")
    assert (said.count("0.png: no bytes in it") + said.count("2.png: no bytes in it") >= 6
            and said.count("no bytes in it") == 20 and "and 10 more" in said)
    kept, _ = drop_unusable(good, max_bad=0.3)
    assert len(kept) == 70


def test_what_concerns_all_rows_raises(good):
    with pytest.raises(InputError, match="no column 'captio'. Did you mean 'caption'"):
        drop_unusable(good, ["image", "captio"])
    with pytest.raises(InputError, match="group 'p0' is in train and test"):
        drop_unusable(good.assign(group=["p0"] * 2 + ["p1"] * 97 + ["p0"]), max_bad=1)
    with pytest.raises(InputError, match="one class only"): drop_unusable(good.assign(label="a"), labels=["label"])
    good.loc[5, "caption"] = ""
    assert len(drop_unusable(good)[0]) == 100 and len(drop_unusable(good, ["image", "caption"])[0]) == 99


# -- the audit

@pytest.fixture(scope="module")
def audit(command, tmp_path_factory):
    "The report of a table with a fault of nearly every kind"
    root = tmp_path_factory.mktemp("faulty")
    for i in range(40): picture(i).save(root / f"{i}.png")
    (root / "39.png").write_bytes((root / "0.png").read_bytes())
    (root / "1.png").write_bytes((root / "1.png").read_bytes()[:200])
    bomb(root / "2.png")
    pickle.dump(Program(root / "marker"), open(root / "3.png", "wb"))
    captions = [f"picture {i}" for i in range(40)]
    captions[5:9] = ["<script>alert(1)</script><img src=x onerror=alert(2)>", '=HYPERLINK("http://x.example/","$y$")',
                     "<b>bold</b> $5", "a\u202eb"]
    pd.DataFrame({"image": [*(f"{i}.png" for i in range(40))], "caption": captions, "label": ["<i>a</i>", "b"] * 20,
                  "group": [i // 2 for i in range(40)],
                  "split": ["train"] * 30 + ["test"] * 10}).to_csv(root / "t.csv", index=False)
    done = subprocess.run([command, "run", "data_audit", "-p", "dataset=csv", "-p", f"data_root={root / 't.csv'}",
                           "--out", root / "run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def test_the_audit_survives_bad_files_and_runs_nothing(audit):
    metrics = {k: m["value"] for k, m in json.loads((audit / "run" / "metrics.json").read_text())["metrics"].items()}
    assert (metrics["rows"], metrics["groups"], metrics["leaks_same_file"]) == (40, 20, 1) and metrics["errors"] == 4
    assert not (audit / "marker").exists()


def test_the_audit_escapes_what_it_shows(audit):
    page = (audit / "run" / "report.html").read_text()
    for tag in ("<script>alert", "<img src=x", "<b>bold", "<i>a</i>"): assert tag not in page
    assert "onerror" not in page.replace("&lt;img src=x onerror", "")
    assert "&lt;script&gt;" in page and "HYPERLINK" in page
    for kind in ("truncated image", "huge image", "unsafe pickle", "same file across splits", "markup in captions",
                 "formula in captions"): assert kind in page


def test_words_for_nothing_are_no_captions(tmp_path):
    "Programs write an empty cell as a word, which a model would learn"
    captions = ["NaN", "none", "N/A", " null ", "<NA>", "-", "None seen.", "nan is a bread", "a"]
    rows = pd.DataFrame({"image": [f"{i}.png" for i in range(9)], "caption": captions})
    rows.to_csv(tmp_path / "t.csv", index=False)
    found = validate(datasets.load_manifest("csv", tmp_path / "t.csv", split="all"), "none").set_index("kind")
    assert found.loc["captions of empty cells", "count"] == 6 and found.loc["captions of empty cells", "row"] == 0
    assert "6 captions are 'NaN', 'none'" in found.loc["captions of empty cells", "message"]


def test_images_that_lie_elsewhere(tmp_path):
    "In a folder below, which one option names; or under names with an ending"
    (tmp_path / "scans" / "x").mkdir(parents=True)
    for i in range(4): Image.new("L", (8, 8), 60 * i).save(tmp_path / "scans" / "x" / f"{i}.png")
    table = tmp_path / "t.csv"
    pd.DataFrame({"image": [f"x/{i}.png" for i in range(4)], "label": list("abab")}).to_csv(table, index=False)
    found = validate(datasets.load_manifest("csv", table, split="all"))
    said = found[found["kind"] == "missing image"]["message"]
    option = f"image_root={(tmp_path / 'scans').as_posix()}"
    assert len(said) == 4 and said.str.endswith(f"it lies in scans/x, which the option {option} would say").all()
    right = datasets.load_manifest("csv", table, split="all", image_root=str(tmp_path / "scans"))
    assert "missing image" not in set(validate(right)["kind"])
    pd.DataFrame({"image": list("0123"), "label": list("abab")}).to_csv(table, index=False)
    said = validate(datasets.load_manifest("csv", table, split="all"))["message"]
    assert said.str.endswith("there is scans/x/0.png: write names with their endings").sum() == 4
    pd.DataFrame({"image": ["9.png", *"012"], "label": list("abab")}).to_csv(table, index=False)
    said = validate(datasets.load_manifest("csv", table, split="all"))["message"]
    assert said.str.endswith("no such file").sum() == 4
