"""Features on disk: killed and continued, written by two at once, damaged at random, shared by processes, from the
command line"""
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import forks
import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from typer.testing import CliRunner

from medclip_nb.cli.main import app
from medclip_nb.core import InputError, file_hash
from medclip_nb.datasets import Manifest, load_manifest, row_picture
from medclip_nb.embeddings import FeatureCache, embed, file_hashes, key_numbers, prune, stamp, stores
from medclip_nb.models import load_model, save_checkpoint
from medclip_nb.plots import image_grid

N = 23


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "Pictures, two of them the same, and captions of many lengths, some of them the same"
    root, rng = tmp_path_factory.mktemp("table"), np.random.default_rng(0)
    for i in range(N):
        Image.fromarray(np.random.default_rng(i % (N - 1)).integers(0, 255, (40, 40), np.uint8)).save(root / f"{i}.png")
    captions = [" ".join(["a small lesion"] * rng.integers(1, 9)) + " ." * (i % 5) for i in range(N)]
    pd.DataFrame({"image": [f"{i}.png" for i in range(N)], "caption": captions,
                  "split": ["train", "test", "test"] * 7 + ["test"] * 2}).to_csv(root / "table.csv", index=False)
    return root / "table.csv"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    return save_checkpoint(load_model("starter", device="cpu"), tmp_path_factory.mktemp("weights") / "starter")


@pytest.fixture(scope="module")
def whole(table, weights):
    "The features, without a cache"
    return embed(load_model("starter", weights, "cpu"), load_manifest("csv", table))


def is_whole(found, whole):
    np.testing.assert_allclose(found.images, whole.images, atol=2e-6)
    np.testing.assert_allclose(found.texts, whole.texts, atol=2e-6)


# Slow enough to be killed, one row a batch, each batch saved
SLOW = """
import sys, time, torch
from medclip_nb.datasets import Manifest, load_manifest, row_picture
from medclip_nb.embeddings import embed
from medclip_nb.models import load_model
torch.set_num_threads(1)
clip = load_model("starter", sys.argv[2], "cpu")
encode = clip.encode_images
def slow(batch):
    time.sleep(0.2)
    return encode(batch)
clip.encode_images = slow
embed(clip, load_manifest("csv", sys.argv[1]), sys.argv[3], batch_size=1, save_every=0)
"""


def test_killed_and_continued(table, weights, whole, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SLOW, table, weights, tmp_path], start_new_session=True)
    end = time.monotonic() + 120
    shards = lambda: [p for p in tmp_path.glob("*/*.index.npy") if p.parent.name != "files"]
    while len(shards()) < 3:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = len(shards())
    assert 3 <= kept < N - 1
    found = embed(load_model("starter", weights, "cpu"), load_manifest("csv", table), tmp_path)
    assert found.counts["images"] == {"found": kept + 1, "computed": N - 1 - kept,
                                      "repeated": 0}, "the last picture is the first again"
    is_whole(found, whole)
    assert embed(load_model("starter", weights, "cpu"), load_manifest("csv", table),
                 tmp_path).counts["images"]["found"] == N


def test_what_a_kill_leaves_behind_is_cleaned_up_later(tmp_path):
    "A temporary file, and rows whose index was not written"
    store = FeatureCache(tmp_path / "0123456789abcdef", 4, facts={"kind": "images", "model": "m"})
    store.fill(["a"], lambda positions: np.ones((1, 4), np.float32))
    left = [store.folder / f".{'a' * 16}.npy.12345678.npy", store.folder / f"{'b' * 16}.npy"]
    for path in left: path.write_bytes(b"half")
    np.testing.assert_array_equal(store.fill(["a"], None), np.ones((1, 4)))
    assert len(prune(tmp_path)) == 0, "they may belong to somebody who is still writing"
    for path in left: os.utime(path, (0, 0))
    assert len(prune(tmp_path, dry_run=True)) == 2 and all(p.exists() for p in left)
    assert sorted(prune(tmp_path)["why"]) == ["left by a process that was killed", "rows without an index"]
    assert not any(p.exists() for p in left) and stores(tmp_path)["entries"].tolist() == [1]


def row(key): return np.random.default_rng(int(key)).standard_normal(8).astype(np.float32)


def drawn_keys(seed): return [[str(k) for k in np.random.default_rng([seed, i]).integers(0, 99, 30)] for i in range(8)]


def write_many(seed, folder):
    "Fill overlapping sets of keys, a shard every few rows"
    for keys in drawn_keys(seed):
        store = FeatureCache(folder, save_every=0)
        parts = lambda positions: (positions[i:i + 3] for i in range(0, len(positions), 3))
        found = store.fill(keys,
                           lambda positions: ((part, np.array([row(keys[i]) for i in part]))
                                              for part in parts(positions)))
        np.testing.assert_array_equal(found, [row(k) for k in keys])


def test_two_writers(tmp_path):
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_many, args=(seed, tmp_path)) for seed in range(2)]
    for writer in writers: writer.start()
    for writer in writers: writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    drawn = sorted({key for seed in range(2) for keys in drawn_keys(seed) for key in keys})
    found, there = FeatureCache(tmp_path).read(key_numbers(drawn))
    assert there.all(), "nothing that one of them computed is lost"
    np.testing.assert_array_equal(found, [row(k) for k in drawn])
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.damaged"))


@pytest.mark.parametrize("seed", range(40))
def test_damage_is_never_believed(tmp_path, seed):
    "Any change of any file: the answers stay right, and what was lost is computed once"
    rng, keys = np.random.default_rng(seed), [str(i) for i in range(30)]
    compute = lambda positions: np.array([row(keys[i]) for i in positions])
    for part in (slice(10), slice(20), slice(30)):
        FeatureCache(tmp_path).fill(keys[part], lambda positions: np.array([row(keys[part][i]) for i in positions]))
    paths = sorted(tmp_path.glob("*.npy"))
    path = paths[rng.integers(len(paths))]
    content = bytearray(path.read_bytes())
    kind = rng.integers(5)
    if kind == 0: content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    elif kind == 1: del content[rng.integers(len(content)):]
    elif kind == 2: content += bytes(rng.integers(1, 99))
    elif kind == 3:
        start = rng.integers(len(content))
        content[start:start + 64] = bytes(len(content[start:start + 64]))
    else: content = bytearray(paths[rng.integers(len(paths))].read_bytes())
    same = bytes(content) == path.read_bytes()
    path.write_bytes(content)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = FeatureCache(tmp_path).fill(keys, compute)
    np.testing.assert_array_equal(found, compute(range(30)))
    np.testing.assert_array_equal(FeatureCache(tmp_path).fill(keys, None), found)
    assert all("computed again" in str(w.message) for w in said)
    if kind in (1, 4): assert bool(said) != same, "a file that ends early, or is another, is always noticed"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says what a process has used at most")
def test_reading_needs_the_memory_of_the_answer(tmp_path):
    rows, width = 40_000, 512
    for part in range(5):
        keys = [str(i) for i in range(part * 8000, part * 8000 + 8000)]
        FeatureCache(tmp_path).fill(keys, lambda positions: np.ones((len(positions), width), np.float32))
    code = f"""
import sys
from medclip_nb.embeddings.store import FeatureCache
keys = [str(i) for i in range({rows})]
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
before = peak()
out = FeatureCache(sys.argv[1]).fill(keys, None)
print(peak() - before, out.nbytes / 2**20)
"""
    used, size = map(float,
                     subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True,
                                    check=True).stdout.split())
    assert size < used < size + 3 * 32, f"{used:.0f} MB for an answer of {size:.0f} MB"


@pytest.mark.parametrize("seed", range(3))
def test_hashes_of_files_are_never_stale(tmp_path, seed):
    "Files are rewritten, touched, renamed and swapped; the clock is turned back and forth"
    rng, paths = np.random.default_rng(seed), [tmp_path / f"{i}.png" for i in range(6)]
    for path in paths: path.write_bytes(bytes(rng.integers(0, 2, 8, np.uint8)))
    for _ in range(60):
        a, b = (paths[i] for i in rng.choice(6, 2, replace=False))
        kind = rng.integers(4)
        if kind == 0: a.write_bytes(bytes(rng.integers(0, 2, 8, np.uint8)))
        if kind == 1: a.write_bytes(bytes(rng.integers(0, 2, rng.integers(1, 9), np.uint8)))
        if kind == 2: os.utime(a, ns=(b.stat().st_atime_ns, b.stat().st_mtime_ns))
        if kind == 3:
            a.rename(tmp_path / "held")
            b.rename(a)
            (tmp_path / "held").rename(b)
        assert file_hashes([stamp(p) for p in paths], tmp_path / "hashes") == [file_hash(p) for p in paths]


def run_together(rank, world, folder, table, weights):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world,
                            timeout=timedelta(seconds=60))
    through = {"images": 0, "texts": 0}
    clip, manifest = load_model("starter", weights, "cpu"), load_manifest("csv", table)
    encode = {"images": clip.encode_images, "texts": clip.encode_texts}
    def counting(kind):
        def count(batch, *more):
            through[kind] += len(batch)
            return encode[kind](batch, *more)
        return count
    clip.encode_images, clip.encode_texts = counting("images"), counting("texts")
    def call(cache, rows=manifest):
        before = dict(through)
        found = embed(clip, rows, cache, batch_size=4)
        return found, {k: through[k] - before[k] for k in through}
    found = {"no cache": call(None), "first": call(f"{folder}/cache"), "again": call(f"{folder}/cache"),
             "few": call(None, manifest.iloc[3:4]), "no rows": call(None, manifest.iloc[:0])}
    if rank == 0: embed(clip, manifest.iloc[:9], f"{folder}/own0", together=False)
    found["own disks"] = call(f"{folder}/own{rank}")
    found["own disks again"] = call(f"{folder}/own{rank}", manifest.iloc[::-1])
    def spoiled(batch): raise InputError("this picture is spoiled")
    if rank == 1: clip.encode_images = spoiled
    try: embed(clip, manifest)
    except Exception as error: found["error"] = f"{type(error).__name__}: {error}"
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(table, weights, tmp_path_factory):
    "What each of two processes got, and what passed through its encoders"
    folder = tmp_path_factory.mktemp("together")
    forks.run_together(run_together, 2, folder, table, weights)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", ["no cache", "first", "again", "own disks"])
def test_processes_share_the_work_and_get_the_same_rows(ranks, whole, case):
    (one, done_one), (two, done_two) = (found[case] for found in ranks)
    is_whole(one, whole)
    np.testing.assert_array_equal(one.images, two.images)
    np.testing.assert_array_equal(one.texts, two.texts)
    assert one.counts == two.counts
    for kind in ("images", "texts"):
        assert done_one[kind] + done_two[kind] == one.counts[kind]["computed"]
        assert abs(done_one[kind] - done_two[kind]) <= 1, "each computes its share"
    if case == "again": assert one.counts["images"] == {"found": N, "computed": 0, "repeated": 0}
    if case == "first": assert one.counts["images"] == {"found": 0, "computed": N - 1, "repeated": 1}


def test_processes_with_little_to_do(ranks, whole):
    for found in ranks:
        np.testing.assert_allclose(found["few"][0].images, whole.images[3:4], atol=2e-6)
        assert found["no rows"][0].images.shape == (0, 128)
        np.testing.assert_allclose(found["own disks again"][0].images[::-1], whole.images, atol=2e-6)


def test_a_process_that_fails_stops_the_others(ranks):
    assert ranks[1]["error"] == "InputError: this picture is spoiled"
    assert ranks[0]["error"] == "RuntimeError: Process 1 could not compute its share; its own message says why."


@pytest.mark.parametrize("kind", ["short first", "random"])
def test_texts_by_length_are_the_same_texts(kind):
    clip, rng = load_model("starter", device="cpu"), np.random.default_rng(0)
    texts = [" ".join(["lesion"] * n) for n in (range(1, 90, 2) if kind == "short first" else rng.integers(1, 90, 60))]
    one_by_one = torch.cat([clip.encode_texts([text]) for text in texts])
    torch.testing.assert_close(clip.encode_texts(texts), one_by_one, atol=2e-6, rtol=0)


def command(*words):
    "Exit code and what was printed; a traceback fails the test"
    done = CliRunner().invoke(app, list(map(str, words)))
    if done.exception and not isinstance(done.exception, SystemExit): raise done.exception
    return done.exit_code, done.output


@pytest.mark.parametrize("ending", ["npz", "parquet", "npy"])
def test_embed_writes_rows_in_order(table, weights, whole, tmp_path, ending):
    words = ["embed", "csv", table, "--model", "starter", "--checkpoint", weights, "--device", "cpu", "--split", "test",
             "--limit", "9", "--out", tmp_path / f"f.{ending}"]
    code, said = command(*words, *(["--only", "images"] if ending == "npy" else []))
    assert code == 0, said
    if ending == "npz":
        found = dict(np.load(tmp_path / "f.npz", allow_pickle=False))
        images, texts, rows, names = found["image_features"], found["text_features"], found["row"], found["image"]
    elif ending == "parquet":
        found = pd.read_parquet(tmp_path / "f.parquet")
        images, texts, rows, names = np.stack(found["image_features"]), np.stack(found["text_features"]), found[
            "row"].to_numpy(), found["image"]
    else:
        found = pd.read_csv(tmp_path / "f.csv")
        images, texts, rows, names = np.load(tmp_path / "f.npy"), None, found["row"].to_numpy(), found["image"]
    manifest = load_manifest("csv", table)
    assert len(rows) == 9 and (np.diff(rows) > 0).all() and (manifest["split"].iloc[rows] == "test").all()
    assert list(names) == manifest["image"].iloc[rows].tolist()
    np.testing.assert_allclose(images, whole.images[rows], atol=2e-6)
    if texts is not None: np.testing.assert_allclose(texts, whole.texts[rows], atol=2e-6)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    code, said = command(*words, *(["--only", "images"] if ending == "npy" else []))
    assert (code, {p.name: p.read_bytes() for p in tmp_path.iterdir()}) == (2, before) and "is there already" in said


def test_embed_leaves_bad_rows_out(table, weights, whole, tmp_path):
    rows = pd.read_csv(table)
    for n in range(len(rows)):
        path = table.parent / rows["image"][n]
        (tmp_path / path.name).write_bytes(b"no image" if n == 2 else path.read_bytes())
    rows["image"] = [Path(name).name for name in rows["image"]]
    rows.to_csv(tmp_path / "some.csv", index=False)
    words = ["embed", "csv", tmp_path / "some.csv", "--model", "starter", "--checkpoint", weights, "--device", "cpu",
             "--only", "images", "--out", tmp_path / "f.npz"]
    code, said = command(*words, "--max-bad", "0")
    assert code == 2 and "1 of " in said and "raise --max-bad" in said and not (tmp_path / "f.npz").exists()
    code, said = command(*words, "--max-bad", "0.5")
    assert code == 0 and "left out: 1 row(s), unreadable image; the first is row 2" in said
    found = np.load(tmp_path / "f.npz", allow_pickle=False)
    assert found["row"].tolist() == [n for n in range(len(rows)) if n != 2]
    np.testing.assert_allclose(found["image_features"], whole.images[found["row"]], atol=2e-6)
    code, said = command(*words, "--max-bad", "0.5", "--check", "none", "--overwrite")
    assert code == 2 and "cannot be read as an image" in said


@pytest.mark.parametrize("words, says",
                         [([], "--out FILE, --cache FOLDER"),
                          (["--out", "f.pkl"], "must end in .npz, .parquet or .npy"),
(["--out", "f.npy"], "holds one array, and there are two"),
                          (["--out", "f.npz", "--only", "image"], "Did you mean 'images'"),
(["--out", "f.npz", "--split", "valid"], "has no rows in split 'valid'"),
                          (["--out", "f.npz", "--precision", "fp8"], "Unknown precision"),
(["--out", "f.npz", "--long-text", "cut"], "Unknown long_text")])
def test_embed_says_what_is_wrong(table, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    code, said = command("embed", "csv", table, "--model", "starter", *words)
    assert code == 2 and says in said and not list(tmp_path.iterdir())


def test_embed_and_the_care_of_its_cache(table, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("medclip_nb.embeddings.store.SETTLED", 0.0)
    words = ["embed", "csv", table, "--model", "starter", "--checkpoint", weights, "--cache", tmp_path / "cache"]
    assert command(*words)[0] == 0
    assert command(*words, "--precision", "bf16", "--only", "images")[0] == 0
    code, said = command(*words)
    assert code == 0 and f"images    {N}    128    {N}            0         0" in said, said
    code, said = command("cache", "ls", tmp_path / "cache")
    assert code == 0 and "4 stores" in said and said.count("bf16") == 1 and max(
        map(len, said.splitlines())) <= 100, said
    keep = tmp_path / "cache" / "notes.txt"
    keep.write_text("mine")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "meta.json").write_text("{}")
    (outside / f"{'a' * 16}.npy.damaged").write_text("not ours")
    (tmp_path / "cache" / "link").symlink_to(outside)
    assert command("cache", "gc", tmp_path / "cache", "--older-than",
                   "0.5")[1].endswith("0.0 kB in 0 files were freed\n")
    for store in (tmp_path / "cache").glob("*/meta.json"): os.utime(store, (0, 0))
    code, said = command("cache", "gc", tmp_path / "cache", "--older-than", "30", "--dry-run")
    assert code == 0 and "would be freed" in said and "not used for" in said and len(stores(tmp_path / "cache")) == 4
    assert command("cache", "gc", tmp_path / "cache", "--older-than", "30", "--model", "starter")[0] == 0
    assert stores(tmp_path / "cache")["kind"].tolist() == ["files"]
    assert command("cache", "gc", tmp_path / "cache", "--older-than", "30")[0] == 0
    assert (sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["link", "notes.txt"]
            and len(list(outside.iterdir())) == 2)
    assert command("cache", "gc", tmp_path / "nowhere") == (2,
                                                            f"error: {tmp_path}/nowhere: no such folder. Give the "
                                                            f"folder that features are kept in.\n")


def test_embed_on_several_processes(table, weights, whole, tmp_path):
    words = [forks.forked(), "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
             str(29500 + os.getpid() % 1000), "--no-python", forks.forked("medclip-nb")]
    words += ["embed", "csv", table, "--model", "starter", "--checkpoint", weights, "--device", "cpu", "--out",
              tmp_path / "f.npz"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("computed") == 1, "one of them speaks"
    with np.load(tmp_path / "f.npz", allow_pickle=False) as found:
        np.testing.assert_allclose(found["image_features"], whole.images, atol=2e-6)


def test_hounsfield_units_that_a_table_states_are_those_of_features_and_pictures(weights, tmp_path):
    "The same scans as HU and as HU + 1024: one feature each, but keys of their own, and keys as ever without columns"
    for i in range(3):
        scan = np.random.default_rng(i).integers(-1000, 400, (4, 24, 20)).astype(np.int16)
        np.save(tmp_path / f"hu{i}.npy", scan)
        np.save(tmp_path / f"stored{i}.npy", scan + 1024)
    def table(name, **columns):
        rows = Manifest({"image": [f"{name}{i}.npy" for i in range(3)], "split": "test"} | columns)
        rows.root, rows.dataset, rows.read = str(tmp_path), "scans", {"window": "lung"}
        return rows
    clip, plain = load_model(str(weights), device="cpu"), table("stored")
    stated = table("stored", slope=1, intercept=[-1024.0, -1024.0, None])
    features = lambda rows: embed(clip, rows, tmp_path / "cache", texts=False)
    wanted = features(table("hu")).images
    first, found = features(plain), features(stated)
    assert np.abs(found.images[:2] - wanted[:2]).max() < 1e-5 < np.abs(first.images - wanted).max()
    assert found.counts["images"] == {"found": 1, "computed": 2, "repeated": 0}
    assert np.array_equal(found.images[2], first.images[2])
    other = features(stated.assign(intercept=-1000.0)).counts["images"]
    assert other["computed"] == 3 and features(plain).counts["images"]["found"] == 3
    seen = lambda rows: np.asarray(row_picture(rows, 0)).astype(int)
    assert np.abs(seen(stated) - seen(table("hu"))).max() <= 1 and np.abs(seen(plain) - seen(table("hu"))).mean() > 50
    shown = [image_grid(rows, n=1).axes[0].images[0].get_array().astype(int) for rows in (stated, table("hu"))]
    assert np.abs(shown[0] - shown[1]).max() <= 1
