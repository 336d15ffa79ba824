"The embedded dataset: left is left, equal recipes give equal bytes, masks, texts and labels agree"
import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from PIL import Image

from medclip_nb.core import InputError, file_hash
from medclip_nb.datasets import (
    NORMAL_ITEM,
    PIXELS,
    VENTRICLES,
    PhantomConfig,
    PhantomStudy,
    View,
    gray_image,
    label_volume,
    load_manifest,
    make_starter,
    masks,
    slice_points,
    volume_affine,
)
from medclip_nb.datasets.phantom import FINDING_KINDS

SMALL = dict(n_studies=(5, 1, 1), seed=3)
TINY = dict(n_studies=(2, 0, 0), n_slices=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_starter(tmp_path_factory.mktemp("data")/"starter", workers=1, **SMALL)


@pytest.fixture(scope="module")
def slices(root):
    return load_manifest("starter", root, **SMALL)


@pytest.fixture(scope="module")
def studies(root):
    return load_manifest("starter", root, view="studies", workers=1, **SMALL)


def fingerprints(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def pixels(root: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(root/name))


def test_left_is_left_in_the_volumes(root, studies):
    checked = 0
    for _, row in studies.iterrows():
        image = nib.load(root/row["mask"])
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        labels = np.asarray(image.dataobj)
        for k, finding in enumerate(row["findings"], 1):
            centre = apply_affine(image.affine, np.argwhere(labels == k)).mean(0)
            if finding["kind"] == VENTRICLES:
                assert finding["side"] is None and abs(centre[0]) < 10
                continue
            assert finding["side"] == ("left" if centre[0] < 0 else "right")
            assert f"in the {finding['side']} {finding['lobe']} lobe" in row["items"][k - 1]
            checked += 1
    assert checked >= 5


def test_left_is_displayed_on_the_right(root, slices):
    sided = slices[slices["side"].notna()]
    assert len(sided) > 10 and set(sided["plane"]) == {"axial", "coronal"}
    for _, row in sided.iterrows():
        mask = pixels(root, row["mask"])
        focal = [k for k, item in enumerate(row["items"], 1) if "ventricles" not in item]
        columns = np.nonzero(np.isin(mask, focal))[1]
        assert row["side"] == ("left" if columns.mean() > (PIXELS - 1)/2 else "right"), row["image"]
        assert all(row["side"] in row["items"][k - 1] for k in focal)


def test_display_agrees_with_the_affine(root, studies):
    "A finding in the volume, by its affine, and the same finding in a plane are at the same place"
    row = next(r for _, r in studies.iterrows() if r["findings"] and r["findings"][0]["side"])
    study = PhantomStudy(PhantomConfig(**SMALL), int(row["group"].split("-")[1]))
    image = nib.load(root/row["mask"])
    world = apply_affine(image.affine, np.argwhere(np.asarray(image.dataobj) == 1))
    position = np.unique(world[:, 2])[len(np.unique(world[:, 2]))//2]
    points = slice_points("axial", position)
    seen = points[:, masks(View(study, points))[0][0]]
    assert np.abs(seen.mean(1) - world[world[:, 2] == position].mean(0)).max() < 1.5


def test_sagittal_slices_name_no_side(slices):
    sagittal = slices[slices["plane"] == "sagittal"]
    assert len(sagittal) and sagittal["side"].isna().all()
    texts = " ".join([*sagittal["caption"], *(t for items in sagittal["items"] for t in items)])
    assert not re.search(r"\b(left|right)\b", texts)


def test_splits_never_share_a_study(slices, studies):
    assert (slices.groupby("group")["split"].nunique() == 1).all()
    assert slices["split"].value_counts().to_dict() == {"train": 40, "valid": 4, "test": 4}
    assert dict(zip(studies["group"], studies["split"])) == slices.groupby("group")["split"].first().to_dict()


def test_default_size():
    recipe, counts = PhantomConfig(), Counter()
    for split, slices in zip(recipe.splits, recipe.slices, strict=True): counts[split] += slices
    assert counts == {"train": 2400, "valid": 400, "test": 560}
    assert PhantomConfig(n_studies=(1, 2, 1), n_slices=3).slices == [3, 3, 3, 3]


@pytest.mark.parametrize("view", ["slices", "studies"])
def test_every_class_has_enough_patients(view):
    "20 in the test split and 15 in the validation split, of every class that metrics of the starter suite have"
    rows = load_manifest("starter", Path(__file__).resolve().parent.parent/"data"/"starter", view=view)
    columns = ["finding", "lesion", "side"] if view == "slices" else rows.labels[1:]
    for column in columns:
        patients = rows.dropna(subset=column).groupby(["split", column])["group"].nunique().unstack("split")
        assert len(patients) == (6 if column == "finding" else 2), column
        for split, least in {"train": 40, "valid": 15, "test": 20}.items():
            assert patients[split].min() >= least, patients
    if view == "studies":
        assert (rows["finding"] == "normal").groupby(rows["split"]).sum().min() >= 15
        assert (rows["finding"] == VENTRICLES).groupby(rows["split"]).sum().min() >= 5
    else:
        alone = rows[(rows["finding"] == VENTRICLES) & (rows["lesion"] == "absent")]
        assert alone.groupby("split")["group"].nunique().min() >= 10


@pytest.mark.parametrize("seed", [1, 2])
def test_kinds_are_spread_evenly_with_any_seed(seed):
    recipe = PhantomConfig(seed=seed)
    for first, studies, least in ((300, 100, 14), (400, 140, 20)):
        kinds = [set(PhantomStudy(recipe, i).kinds) for i in range(first, first + studies)]
        counts = Counter(kind for found in kinds for kind in found or {"normal"})
        assert len(counts) == 6 and min(counts.values()) >= least, counts


def test_equal_recipes_give_equal_bytes(tmp_path):
    small = dict(n_studies=(1, 1, 1), series=True)
    one, two, other = (fingerprints(make_starter(tmp_path/name, workers=workers, **small, seed=seed))
                       for name, workers, seed in (("one", 1, 0), ("two", 2, 0), ("other", 1, 1)))
    assert one == two and len(one) > 3*12
    images = [name for name in one if name.endswith(".png") and name.startswith("slices/")]
    assert images and all(one[name] != other[name] for name in images)


def test_reused_until_the_recipe_changes(tmp_path):
    root = make_starter(tmp_path/"starter", workers=1, n_studies=(1, 0, 0))
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    make_starter(root, workers=1, n_studies=(1, 0, 0))
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    make_starter(root, workers=1, n_studies=(1, 0, 0), n_slices=4)
    assert len(list((root/"slices").iterdir())) == 4
    assert json.loads((root/"recipe.json").read_text())["recipe"]["n_slices"] == 4
    assert [p.name for p in tmp_path.iterdir()] == ["starter"]


UNLOCKED = "import fcntl\ndef refused(*_): raise OSError('no locks available')\nfcntl.flock = refused\n"


def in_processes(*scripts: str) -> list[str]:
    "Run scripts at the same time; what they wrote to stderr"
    imports = ("import sys, time\nfrom pathlib import Path\nfrom medclip_nb.datasets import starter\n"
               f"def make(root, **how): starter.make_starter(root, workers=1, **{TINY!r}, **how)\n"
               "def until(path):\n    while not list(path.parent.glob(path.name)): time.sleep(.01)\n")
    running = [subprocess.Popen([sys.executable, "-c", imports + script], stderr=subprocess.PIPE, text=True)
               for script in scripts]
    try: return [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running: process.kill()


@pytest.mark.parametrize("locks, builds", [("", 1), (UNLOCKED, 2)], ids=["locks", "no locks"])
def test_two_processes_make_it_together(tmp_path, locks, builds):
    "One makes it and the other waits; without locks both make it, and the first to finish wins"
    root, go, count = tmp_path/"starter", tmp_path/"go", tmp_path/"count"
    script = locks + (
        "plain = starter._make_slices\ndef counted(*args):\n"
        f"    with open({str(count)!r}, 'a') as file: file.write('x')\n"
        "    time.sleep(.5)\n    plain(*args)\n"
        "starter._make_slices = counted\n"
        f"Path({str(tmp_path)!r}, '%d.ready').touch()\nuntil(Path({str(go)!r}))\nmake({str(root)!r}, series=True)")
    start = f"for n in range(2): until(Path({str(tmp_path)!r}, f'{{n}}.ready'))\nPath({str(go)!r}).touch()"
    assert in_processes(script % 0, script % 1, start) == ["", "", ""]
    assert len(count.read_text()) == builds
    assert fingerprints(root) == fingerprints(make_starter(tmp_path/"alone", workers=1, series=True, **TINY))
    assert not list(tmp_path.glob(".*"))


def test_a_process_that_finishes_late_uses_what_it_finds(tmp_path):
    "The late one finishes its slices while the other writes volumes into the folder that both want to make"
    root, late = str(tmp_path/"starter"), str(tmp_path/"late")
    slices = UNLOCKED + f"plain = starter.write_study\ndef slow(*args):\n    until(Path({root!r}, '.series.*'))\n"
    slices += "    return plain(*args)\n"
    slices += f"starter.write_study = slow\nmake({root!r})\nPath({late!r}).touch()"
    series = UNLOCKED + f"until(Path({str(tmp_path)!r}, '.starter.*'))\nplain = starter.write_series\n"
    series += f"def slow(*args):\n    until(Path({late!r}))\n    plain(*args)\n"
    series += f"starter.write_series = slow\nmake({root!r}, series=True)"
    assert in_processes(slices, series) == ["", ""]
    assert fingerprints(Path(root)) == fingerprints(make_starter(tmp_path/"alone", workers=1, series=True, **TINY))
    assert not list(tmp_path.glob(".*")) and [p.name for p in Path(root).glob(".*")] == [".medclip_nb.json"]


def test_another_recipe_in_the_same_folder_is_an_error(tmp_path, monkeypatch):
    root = tmp_path/"starter"
    def unlocked(*_): raise OSError("no locks available")
    def write_series(*_):
        monkeypatch.undo()
        make_starter(root, workers=1, **TINY, seed=1)
    monkeypatch.setattr("fcntl.flock", unlocked)
    monkeypatch.setattr("medclip_nb.datasets.starter.write_series", write_series)
    with pytest.raises(InputError, match="another process replaced it"):
        make_starter(root, workers=1, series=True, **TINY)
    assert json.loads((root/"recipe.json").read_text())["recipe"]["seed"] == 1
    assert not (root/"series").exists() and not list(tmp_path.glob(".*"))


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("medclip_nb.datasets.starter.write_study", lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): make_starter(tmp_path/"starter", workers=1, n_studies=(1, 0, 0))
    assert list(tmp_path.iterdir()) == []


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path/"mine.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else"): load_manifest("starter", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(InputError, match="slices"): load_manifest("starter", tmp_path/"new", view="slides")
    with pytest.raises(InputError): load_manifest("starter", tmp_path/"new", n_patients=3)


def test_slice_and_volume_masks_agree():
    recipe, affine, compared = PhantomConfig(seed=1), volume_affine(), 0
    for study in (PhantomStudy(recipe, i) for i in range(8)):
        if not study.kinds: continue
        labels, _ = label_volume(study)
        for k, kind in enumerate(study.kinds):
            voxels = np.argwhere(labels == k + 1)
            for plane, axis in (("axial", 2), ("coronal", 1), ("sagittal", 0)):
                level = np.bincount(voxels[:, axis]).argmax()
                area = masks(View(study, slice_points(plane, affine[axis, 3] + 2*level)))[0][k].sum()
                assert np.isclose(4*(voxels[:, axis] == level).sum(), area, rtol=.2, atol=16), (study.name, kind, plane)
                compared += 1
    assert compared > 12


def test_findings_have_their_size():
    for study in (PhantomStudy(PhantomConfig(seed=2), i) for i in range(10)):
        labels, _ = label_volume(study)
        for k, finding in enumerate(study.findings, 1):
            diameter = 2*((labels == k).sum()*8*3/(4*np.pi))**(1/3)
            assert .45 < diameter/finding.size_mm < 1.35, (study.name, finding.kind)
            low, high = FINDING_KINDS[finding.kind].size_mm
            assert low <= finding.size_mm <= high


def test_items_captions_and_labels_match_the_mask(root, slices):
    limit = PhantomConfig().visible_mm2
    for _, row in slices.iterrows():
        image = pixels(root, row["image"])
        assert image.shape == (PIXELS, PIXELS) and image.dtype == np.uint8 and image.max() > 100
        if not row["mask"]:
            assert row["items"] == [NORMAL_ITEM] and row["finding"] == "normal" and row["lesion"] == "absent"
            continue
        values, areas = np.unique(pixels(root, row["mask"]), return_counts=True)
        assert values.tolist() == [0, *range(1, len(row["items"]) + 1)]
        assert (areas[1:] >= limit*.8).all()
        assert row["finding"].split()[-1] in row["items"][0]
        assert (row["lesion"] == "present") == any("lobe" in item for item in row["items"])
        if row["lesion"] == "present": assert row["lobe"] in row["caption"]
    assert all(level in caption for level, caption in zip(slices["level"], slices["caption"]))
    words = slices["caption"].str.split().str.len()
    assert words.between(8, 55).all() and words.median() >= 12


def test_columns(root, slices, studies):
    assert set(slices) == {"image", "mask", "caption", "items", "sequence", "plane", "level", "finding", "lesion",
                           "side", "lobe", "size_mm", "position_mm", "group", "split"}
    assert slices["size_mm"].dtype == slices["position_mm"].dtype == float
    assert set(slices["lesion"]) <= {"present", "absent"} and set(slices["side"].dropna()) <= {"left", "right"}
    assert set(slices["finding"]) <= {"normal", *FINDING_KINDS, VENTRICLES}
    assert slices["items"].map(type).eq(list).all() and all(path.is_file() for path in slices.paths())
    assert slices.loc[slices["lesion"] == "absent", ["side", "lobe", "size_mm"]].isna().to_numpy().all()
    kinds = [*FINDING_KINDS, VENTRICLES]
    assert set(studies) == {"series", "mask", "items", "findings", "caption", "group", "split", "finding", *kinds}
    assert studies.labels == ["finding", *kinds]
    for _, row in studies.iterrows():
        findings = row["findings"]
        assert {kind for kind in kinds if row[kind] == "present"} == {found["kind"] for found in findings}
        largest = max(findings, key=lambda found: found["size_mm"] or 0, default={"kind": "normal"})
        assert row["finding"] == largest["kind"]
    for series in studies["series"]:
        assert set(series) == {"T1", "T2", "FLAIR"}
        volumes = [nib.load(root/path) for path in series.values()]
        assert {v.shape for v in volumes} == {(80, 96, 40)}
        assert all(np.array_equal(v.affine, volume_affine() @ np.diag([1, 1, 2, 1])) for v in volumes)
        assert all(v.get_data_dtype() == np.uint8 for v in volumes)


def test_no_two_healthy_brains_are_alike():
    healthy = [s for s in (PhantomStudy(PhantomConfig(), i) for i in range(20)) if not s.kinds]
    assert len(healthy) >= 3
    images = [gray_image(View(s, slice_points("axial", 20)), "T1", s.rng(5)).astype(int) for s in healthy[:3]]
    for n, a in enumerate(images):
        for b in images[:n]: assert np.abs(a - b)[(a > 0) & (b > 0)].mean() > 8


def test_contrasts_differ_as_in_life():
    "Relative to the other side, a haemorrhage is bright on T1 and dark on T2, an infarct dark on T1 and bright on T2"
    found = set()
    for study in (PhantomStudy(PhantomConfig(), i) for i in range(30)):
        for k, finding in enumerate(study.findings):
            if finding.kind not in ("haemorrhage", "infarct") or len(study.kinds) > 1: continue
            view = View(study, slice_points("axial", finding.center[2]))
            inside = masks(view)[0][k].reshape(PIXELS, PIXELS)
            for sequence, brighter in (("T1", finding.kind == "haemorrhage"), ("T2", finding.kind == "infarct")):
                image = gray_image(view, sequence, study.rng(5)).reshape(PIXELS, PIXELS).astype(float)
                mirrored = image[:, ::-1]
                other_side = mirrored[inside & (mirrored > 0)]
                assert (np.median(image[inside]) > np.median(other_side)) == brighter, (study.name, sequence)
            found.add(finding.kind)
    assert found == {"haemorrhage", "infarct"}


def test_nifti_files_carry_no_time(root):
    with gzip.open(next((root/"masks").iterdir())) as f:
        f.read(1)
        assert f.mtime == 0
