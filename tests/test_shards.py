"Shards as they are used: by several processes and workers, interrupted, resumed, over the web, damaged"
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file

from medclip_nb.core import InputError
from medclip_nb.datasets import Manifest, ShardLoader, Shards, load_manifest, write_shards
from medclip_nb.datasets.readers.webdataset import tar_samples
from medclip_nb.images import read_image, read_volume

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
N, BATCH = 61, 4


def row_key(sample):
    "What a test compares: the row, and the picture's own value, so that both belong together"
    return sample["key"], sample["caption"], int(np.asarray(sample["image"])[0, 0, 0])


def make_manifest(root, n=N):
    for i in range(n): Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(root / f"{i}.png")
    (root / "t.csv").write_text("image,caption,split\n" + "".join(f"{i}.png,picture {i},train\n" for i in range(n)))
    return load_manifest("csv", root)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    manifest = make_manifest(root)
    write_shards(manifest, root / "many", per_shard=7)
    write_shards(manifest, root / "few", per_shard=40)
    return root


def loader(source, workers, rank=0, world=1, **options):
    return ShardLoader(Shards(source, row_key, shuffle=9, seed=5, rank=rank, world_size=world), BATCH, workers,
                       collate=list, **options)


EVERY = [(f"{i:08d}", f"picture {i}", i) for i in range(N)]


@pytest.mark.parametrize("layout", ["many", "few"])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_sample_once(folder, layout, world, workers):
    seen = [sum(loader(folder / layout, workers, rank, world), []) for rank in range(world)]
    assert sorted(sum(seen, [])) == EVERY
    assert min(map(len, seen)) > 0


@pytest.mark.parametrize("layout", ["many", "few"])
@pytest.mark.parametrize("workers, rank, world", [(0, 0, 1), (1, 0, 1), (2, 0, 1), (3, 0, 1), (2, 1, 2), (0, 2, 3)])
def test_resumed_anywhere_is_the_rest_of_the_epoch(folder, layout, workers, rank, world):
    whole, batches, states = loader(folder / layout, workers, rank, world), [], []
    for batch in whole:
        batches.append(batch)
        states.append(json.dumps(whole.state_dict()))
    following = list(whole)
    assert (sorted(sum(following, [])) == sorted(sum(batches, [])) if layout == "few"
            and world == 1 else following != batches)
    for n, state in enumerate(states[:: 1 if workers < 2 else 3]):
        n *= 1 if workers < 2 else 3
        resumed = loader(folder / layout, workers, rank, world)
        resumed.load_state_dict(json.loads(state))
        assert list(resumed) == batches[n + 1:]
    assert list(resumed) == following


def test_state_refuses_another_order(folder):
    state = loader(folder / "many", 0).state_dict()
    for other, words in [(loader(folder / "few", 0), "shards was"),
                         (loader(folder / "many", 0, 0, 2), "world_size was 1, now it is 2"),
                         (loader(folder / "many", 2), "workers were 1")]:
        with pytest.raises(InputError, match=words): other.load_state_dict(state)


def test_breaking_off_and_starting_anew(folder):
    "A loop that is left early resumes where it was; set_epoch begins again"
    one = loader(folder / "many", 0)
    whole = list(loader(folder / "many", 0))
    for n, _batch in enumerate(one):
        if n == 3: break
    assert list(one) == whole[4:]
    one.stream.set_epoch(0)
    assert list(one) == whole


TRAIN = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from medclip_nb.core import write_json
from test_shards import loader
one = loader({source!r}, 2)
if Path({state!r}).exists(): one.load_state_dict(json.loads(Path({state!r}).read_text()))
for batch in one:
    with open({log!r}, "a") as f: f.write(json.dumps(batch) + "\\n")
    write_json({state!r}, one.state_dict())
    time.sleep(0.05)
"""


def test_killed_training_goes_on(folder, tmp_path):
    log, state = tmp_path / "log", tmp_path / "state.json"
    code = TRAIN.format(tests=str(Path(__file__).parent), source=str(folder / "many"), state=str(state), log=str(log))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    for _ in range(600):
        if state.exists() and log.read_text().count("\n") >= 5: break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = log.read_text().count("\n")
    used = json.loads(state.read_text())["positions"]
    subprocess.run([sys.executable, "-c", code], check=True)
    lines = [[tuple(s) for s in json.loads(line)] for line in log.read_text().splitlines()]
    # killed between the log and the state: that batch came again
    if sum(used) < sum(len(b) for b in lines[:done]): lines.pop(done - 1)
    assert 5 <= done < len(lines) and lines == list(loader(folder / "many", 2))


def test_spawned_workers(folder):
    assert list(loader(folder / "many", 1, multiprocessing_context="spawn")) == list(loader(folder / "many", 1))


def test_over_the_web(folder):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder / "many")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        pattern = f"http://127.0.0.1:{server.server_port}/train-{{000000..000008}}.tar"
        assert sum(loader(pattern, 2), []) == sum(loader(folder / "many", 2), [])
        (folder / "many" / "cut.tar").write_bytes((folder / "many" / "train-000000.tar").read_bytes()[:7168])
        for name, says in {"cut": "truncated or damaged", "none": "404"}.items():
            with pytest.raises(InputError, match=rf"{name}.tar.*{says}"):
                list(tar_samples(f"http://127.0.0.1:{server.server_port}/{name}.tar"))
    finally:
        server.shutdown()
        server.server_close()
        (folder / "many" / "cut.tar").unlink(missing_ok=True)


WRITE = """
import sys, time
from pathlib import Path
from medclip_nb.datasets import shards
from medclip_nb.datasets import load_manifest
slow = shards._add
def add(*args):
    time.sleep(0.02)
    slow(*args)
shards._add = add
shards.write_shards(load_manifest("csv", sys.argv[1]), sys.argv[2], per_shard=7, overwrite=True)
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("before", [False, True])
def test_writer_that_is_killed_leaves_nothing_half(tmp_path, sign, before):
    manifest, out = make_manifest(tmp_path, 30), tmp_path / "out" / "shards"
    if before: write_shards(manifest, out, per_shard=30)
    files = {p.name: p.read_bytes() for p in out.glob("*")}
    process = subprocess.Popen([sys.executable, "-c", WRITE, str(tmp_path), str(out)], stderr=subprocess.DEVNULL)
    for _ in range(600):
        if list(out.parent.glob(".shards.*/train-000001.tar")): break
        time.sleep(0.02)
    assert process.poll() is None
    process.send_signal(sign)
    process.wait()
    assert {p.name: p.read_bytes() for p in out.glob("*")} == files and out.exists() == before
    if sign == signal.SIGINT:
        assert [p.name for p in out.parent.glob("*")] + [p.name for p in out.parent.glob(".*")] == ["shards"] * before
    index = write_shards(manifest, out, per_shard=7, overwrite=True)
    assert (sorted(s[0] for s in sum(loader(out, 0), [])) == [f"{i:08d}" for i in range(30)]
            and len(index["shards"]) == 5)


def spoil(path, key):
    raw = bytearray(path.read_bytes())
    start = next(files["png"][0] for k, files in tar_samples(path, load=False) if k == key)
    raw[start:start + 8] = b"overhere"
    path.write_bytes(raw)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_named_and_counted(tmp_path, workers):
    write_shards(make_manifest(tmp_path), out := tmp_path / "shards", per_shard=7)
    for name, key in {"train-000001.tar": "00000008", "train-000008.tar": "00000060"}.items(): spoil(out / name, key)
    one = loader(out, workers)
    seen = sum(one, [])
    assert sorted(seen) == [row for row in EVERY if row[2] not in (8, 60)]
    assert sorted(s["row"] for s in one.stream.skipped) == ["train-000001.tar: 00000008", "train-000008.tar: 00000060"]
    list(one)
    assert len(one.stream.skipped) == 2, "a second epoch counts no file twice"
    one.stream.max_bad = 0
    with pytest.raises(InputError, match="bad files among"): list(one)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [300, 5000, 7168, 10000])
def test_truncated_shard_is_named(tmp_path, workers, size):
    write_shards(make_manifest(tmp_path), out := tmp_path / "shards", per_shard=7)
    (shard := out / "train-000002.tar").write_bytes(shard.read_bytes()[:size])
    with pytest.raises(InputError, match="train-000002.tar: truncated or damaged"): list(loader(out, workers))
    with pytest.raises(InputError, match="train-000002.tar: truncated or damaged"): load_manifest("webdataset", out)
    assert not (out / ".images" / "train-000002").exists()


@pytest.mark.parametrize("kind", ["up", "absolute", "symlink", "hardlink", "device"])
def test_hostile_shards_are_refused(tmp_path, kind):
    (out := tmp_path / "shards").mkdir()
    name = {"up": "../../evil.png", "absolute": str(tmp_path / "evil.png")}.get(kind, "a.png")
    info = tarfile.TarInfo(name)
    info.type = {"symlink": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE,
                 "device": tarfile.CHRTYPE}.get(kind, tarfile.REGTYPE)
    info.linkname = "/etc/passwd" if kind.endswith("link") else ""
    with tarfile.open(out / "train-0.tar", "w") as tar: tar.addfile(info)
    with pytest.raises(InputError, match="train-0.tar: refused"): load_manifest("webdataset", out)
    with pytest.raises(InputError, match="train-0.tar: refused"): list(Shards(out))
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["train-0.tar"]


def test_an_index_cannot_point_elsewhere(tmp_path):
    write_shards(make_manifest(tmp_path, 12), out := tmp_path / "shards")
    index = json.loads((out / "index.json").read_text())
    index["shards"][0]["name"] = "../../other.tar"
    (out / "index.json").write_text(json.dumps(index))
    for read in (partial(load_manifest, "webdataset", out), partial(Shards, out)):
        with pytest.raises(InputError, match="index.json: the path leads out of the folder"): read()


def test_shards_that_lost_samples_disagree_with_their_index(tmp_path):
    write_shards(make_manifest(tmp_path, 12), out := tmp_path / "shards", per_shard=6)
    (out / "train-000000.tar").write_bytes(b"\0" * 10240)
    with pytest.raises(InputError, match="train-000000.tar: holds 0 samples, the index says 6"):
        load_manifest("webdataset", out)


def test_scans_decode_as_they_do_on_disk(tmp_path):
    "Series of studies become volumes, DICOM becomes a picture: the same as from the files"
    (tmp_path / "ct.dcm").write_bytes(Path(get_testdata_file("CT_small.dcm")).read_bytes())
    torch.manual_seed(0)
    for name in ("a.pt", "b.pt"): torch.save(torch.rand(3, 8, 8), tmp_path / name)
    studies = Manifest(pd.DataFrame(
        {"series": [{"AX T1": "a.pt", "COR.T2": "b.pt"}], "items": [["x", "y"]], "split": ["train"]}))
    pictures = Manifest(pd.DataFrame({"image": ["ct.dcm"], "caption": ["a chest"], "split": ["train"]}))
    studies.root = pictures.root = str(tmp_path)
    write_shards(studies, tmp_path / "studies")
    write_shards(pictures, tmp_path / "pictures")
    study, = Shards(tmp_path / "studies")
    assert list(study["series"]) == ["AX T1", "COR.T2"] and study["items"] == ["x", "y"]
    for name, path in studies["series"][0].items():
        assert np.array_equal(study["series"][name].array, read_volume(tmp_path / path).array)
    sample, = Shards(tmp_path / "pictures")
    assert sample["image"].tobytes() == read_image(tmp_path / "ct.dcm").tobytes() and sample["caption"] == "a chest"


def extension(raw, extension, volume): return extension


def test_how_files_are_read_comes_along(tmp_path):
    "A window is that of the manifest: for pictures and studies, in a folder, one shard or a pattern; or there is none"
    rng = np.random.default_rng(0)
    for name in ("a.npy", "b.npy", "c.npy"):
        np.save(tmp_path / name, rng.normal(-500, 400, (3, 8, 8)).astype(np.float32))
    read = {"window": "lung", "file_spacing": [3, 1, 1]}
    (tmp_path / "t.csv").write_text("image,split\na.npy,train\nb.npy,train\nc.npy,train\n")
    manifest = load_manifest("csv", tmp_path / "t.csv", read=read)
    write_shards(manifest, out := tmp_path / "shards", per_shard=2)
    wanted = [read_image(path, window="lung").tobytes() for path in manifest.paths()]
    assert wanted != [read_image(path).tobytes() for path in manifest.paths()]
    for source in (out, [out], str(out / "train-{000000..000001}.tar")):
        assert [s["image"].tobytes() for s in Shards(source, shuffle=0)] == wanted
    assert next(iter(Shards(out / "train-000001.tar")))["image"].tobytes() == wanted[2]
    for source in (out, out / "train-000001.tar"): assert load_manifest("webdataset", source).read == read
    again = load_manifest("webdataset", out, read={"window": None})
    assert again.read == read | {"window": None} and next(iter(Shards(out, decode=extension)))["image"] == "npy"

    studies = Manifest(pd.DataFrame({"series": [{"CT": "a.npy"}], "split": ["train"]}))
    studies.root, studies.read = str(tmp_path), read
    write_shards(studies, tmp_path / "studies")
    study, = Shards(tmp_path / "studies")
    assert np.array_equal(study["series"]["CT"].array, read_volume(tmp_path / "a.npy", **read).array)

    index = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "read"}))
    assert [s["image"].tobytes() for s in Shards(out, shuffle=0)] != wanted
    assert load_manifest("webdataset", out).read == {}
    with pytest.raises(InputError, match="in another way than those of"): load_manifest("webdataset", tmp_path)
    (out / "index.json").write_text(json.dumps(index | {"read": {"windw": "lung"}}))
    for take in (Shards, lambda folder: load_manifest("webdataset", folder)):
        with pytest.raises(InputError, match="index.json: read has no option 'windw'. Did you mean 'window'"): take(out)


def test_rows_state_how_their_own_files_are_read(tmp_path):
    "Slope, intercept and spacing of a row hold for what is streamed, as for the manifest"
    values = np.arange(64, dtype=np.int16).reshape(8, 8) * 60
    for name in "ab": np.save(tmp_path / f"{name}.npy", values)
    rows = pd.DataFrame({"image": ["a.npy", "b.npy"], "caption": ["one", "two"], "split": "train", "slope": [1, 2],
                         "intercept": [-1024, 0]})
    rows.to_csv(tmp_path / "t.csv", index=False)
    manifest, out = load_manifest("csv", tmp_path / "t.csv", read={"window": "lung"}), tmp_path / "shards"
    write_shards(manifest, out)
    wanted = [read_image(path, **how).tobytes() for path, how in zip(manifest.paths(), manifest.how())]
    assert len({*wanted, read_image(tmp_path / "a.npy", window="lung").tobytes()}) == 3
    assert [sample["image"].tobytes() for sample in Shards(out, shuffle=0)] == wanted
    again = load_manifest("webdataset", out)
    assert [read_image(path, **how).tobytes() for path, how in zip(again.paths(), again.how())] == wanted
    own = lambda raw, extension, volume: len(raw)
    assert {sample["image"] for sample in Shards(out, decode=own)} == {(tmp_path / "a.npy").stat().st_size}
    volume = {"series": [{"CT": "v.npy"}], "split": "train", "spacing": [[3.0, 1.0, 1.0]], "slope": 2.0,
              "intercept": -5.0}
    np.save(tmp_path / "v.npy", np.arange(4 * 8 * 8, dtype=np.int16).reshape(4, 8, 8))
    studies = Manifest(pd.DataFrame(volume))
    studies.root = str(tmp_path)
    write_shards(studies, tmp_path / "studies")
    found, expected = next(iter(Shards(tmp_path / "studies")))["series"]["CT"], read_volume(
        tmp_path / "v.npy", **studies.how()[0])
    assert np.array_equal(found.array, expected.array) and found.spacing == expected.spacing == (3.0, 1.0, 1.0)
    (tmp_path / "s.csv").write_text("study,CT,items,split,spacing\n1,v.npy,a nodule,train,3 x 1 x 1\n")
    assert load_manifest("study-csv", tmp_path / "s.csv", series=["CT"]).how() == [{"file_spacing": (3.0, 1.0, 1.0)}]


def test_files_of_any_name_come_back(tmp_path):
    "What the writer takes, both readers give back: a DICOM file without an ending, one named by its identifier, a JFIF"
    dicom = Path(get_testdata_file("CT_small.dcm")).read_bytes()
    for name in ("IM0001", "1.2.840.113619.55"): (tmp_path / name).write_bytes(dicom)
    Image.fromarray(np.full((4, 4, 3), 90, np.uint8)).save(tmp_path / "b.jfif", "JPEG")
    (tmp_path / "c.json").write_text("{}")
    names = ["IM0001", "1.2.840.113619.55", "b.jfif", "c.json"]
    manifest = Manifest(pd.DataFrame({"image": names, "caption": [f"of {n}" for n in names], "split": ["train"] * 4}))
    manifest.root = str(tmp_path)
    index = write_shards(manifest, out := tmp_path / "shards", max_bad=0.3)
    assert [s["message"] for s in index["skipped"]] == [f"{tmp_path}/c.json: .json is not an image"]
    wanted = [read_image(tmp_path / n).tobytes() for n in names[:3]]
    assert [s["image"].tobytes() for s in Shards(out, shuffle=0)] == wanted
    again = load_manifest("webdataset", out)
    assert [read_image(p).tobytes() for p in again.paths()] == wanted
    assert again["caption"].tolist() == manifest["caption"].tolist()[:3] and not again.skipped


PAIRS = {"the same key": ["s.png", "s.txt"] * 3, "unsorted": ["a.png", "b.png", "a.txt", "b.txt"],
         "identifiers": ["1.2.840.0.png", "1.2.840.0.txt", "1.2.840.1.png", "1.2.840.1.txt"],
         "some with dots": ["scan_0.png", "scan.1.png", "scan_2.png", "scan.3.png"]}


@pytest.mark.parametrize("kind", PAIRS)
def test_samples_that_share_a_key_are_not_lost(tmp_path, kind):
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name in PAIRS[kind]:
            raw = picture.getvalue() if name.endswith("png") else b"a text"
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    cause = r"several samples have the key|2 images in it: a key ends at the first dot"
    with pytest.raises(InputError, match=cause) as caught: load_manifest("webdataset", tmp_path)
    assert ("a key ends at the first dot" in str(caught.value).lower()) == (kind in ("identifiers", "some with dots"))
    stream = Shards(tmp_path, shuffle=0)
    if kind == "identifiers": assert not list(stream) and "first dot" in stream.skipped[0]["message"]
    else:
        with pytest.raises(InputError, match=cause): list(stream)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["train-0.tar"]
