"Studies of several series wherever images go: features and their cache, evaluators, templates"
import json
import os
import shutil
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from medclip_nb.cli.ask import encode_files
from medclip_nb.cli.attend import named_series
from medclip_nb.cli.main import app
from medclip_nb.core import InputError
from medclip_nb.datasets import Manifest, drop_unusable, load_manifest, name_studies, series_paths
from medclip_nb.datasets.tables import read_table
from medclip_nb.embeddings import embed, encoded_images, open_rows
from medclip_nb.evaluators import linear_probe, look_at_row, retrieval, zero_shot, zero_shot_classifier
from medclip_nb.images import StudyPreprocess, load_volume, read_volume, study_preprocess, value_scale
from medclip_nb.models import load_model, save_checkpoint, study_model
from medclip_nb.trainers import Pairs

FEW = {"n_studies": [8, 4, 5], "n_slices": 1, "workers": 1}
TOWER = dict(width=32, depth=2, heads=2, patch_size=(8, 16, 16), grid=(2, 3, 3), levels=("scan", "study"), max_scans=8,
             series_names=True)
WORDS = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)


@pytest.fixture(scope="module")
def reader():
    torch.manual_seed(0)
    return study_model(TOWER, WORDS, dim=32, preprocess=StudyPreprocess(grid=(16, 48, 48)), device="cpu")


@pytest.fixture(scope="module")
def folder(reader, tmp_path_factory):
    return save_checkpoint(reader, tmp_path_factory.mktemp("model") / "reader")


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    return load_manifest("starter", tmp_path_factory.mktemp("data") / "starter", view="studies", **FEW)


@pytest.fixture
def tensors(tmp_path):
    "Nine studies of one to four series of noise, as arrays"
    rng, rows = np.random.default_rng(0), []
    for n in range(9):
        names = rng.permutation(["T1", "T2", "FLAIR", "DWI"])[:rng.integers(1, 5)]
        rows.append({"series": {str(name): f"{n}_{name}.npy" for name in names}, "caption": f"study {n}",
                     "split": "test"})
        for path in rows[-1]["series"].values():
            np.save(tmp_path / path, rng.integers(0, 255, (12, 40, 44), dtype=np.uint8))
    manifest = Manifest(rows)
    manifest.root, manifest.dataset = str(tmp_path), "noise"
    return manifest


@pytest.mark.parametrize("seed", range(6))
def test_features_do_not_depend_on_the_batch(reader, tensors, seed):
    alone = torch.cat([reader.encode_images([study]) for study in series_paths(tensors)]).numpy()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(tensors))
    found = embed(reader, tensors.iloc[order], batch_size=16 * int(rng.integers(1, 10)), texts=False).images
    np.testing.assert_allclose(found, alone[order], atol=1e-5)


def test_the_cache_knows_studies_by_content(reader, tensors, tmp_path):
    cache, kept = tmp_path / "cache", lambda found: found.counts["images"]
    first = embed(reader, tensors, cache, texts=False)
    assert kept(first) == {"found": 0, "computed": 9, "repeated": 0}
    moved = tensors.copy()
    moved["series"] = [{name: f"elsewhere/{path}" for name, path in series.items()} for series in tensors["series"]]
    shutil.copytree(tmp_path, tmp_path / "elsewhere", ignore=lambda *_: ["cache", "elsewhere"])
    again = embed(reader, moved.iloc[::-1], cache, texts=False)
    assert kept(again) == {"found": 9, "computed": 0, "repeated": 0}
    np.testing.assert_array_equal(again.images[::-1], first.images)
    row = next(n for n, series in enumerate(tensors["series"]) if len(series) > 1)
    for change in (lambda series: series[:-1], lambda series: series[::-1],
                   lambda series: [(f"{name}+C", path) for name, path in series]):
        other = tensors.copy()
        other["series"] = [dict(change([*series.items()])) if n == row else series
                           for n, series in enumerate(tensors["series"])]
        assert kept(embed(reader, other, cache, texts=False)) == {"found": 8, "computed": 1, "repeated": 0}
    path = tmp_path / next(iter(tensors["series"].iloc[4].values()))
    np.save(path, np.load(path)[::-1])
    assert kept(embed(reader, tensors, cache, texts=False))["computed"] == 1
    tensors.read = {"rescale": (2, 0)}
    assert kept(embed(reader, tensors, cache, texts=False))["computed"] == 9


def test_a_file_that_changes_under_way_is_noticed(reader, tensors, tmp_path, monkeypatch):
    path, read = tmp_path / list(tensors["series"].iloc[3].values())[-1], StudyPreprocess.__call__
    def meddling(self, series, **options):
        if path in series.values(): np.save(path, np.zeros((12, 40, 44), np.uint8))
        return read(self, series, **options)
    monkeypatch.setattr(StudyPreprocess, "__call__", meddling)
    assert embed(reader, tensors.iloc[:3], tmp_path / "cache", texts=False).counts["images"]["computed"] == 3
    with pytest.raises(InputError, match=f"{path.name}: was changed while features were computed"):
        embed(reader, tensors, tmp_path / "cache", texts=False)


def test_evaluators_take_studies(reader, studies):
    named = name_studies(studies)
    train, test = named.part("train"), named.part("test")
    paths = [next(iter(series.values())) for series in test["series"]]
    probe = linear_probe(reader, train, test, "infarct", Cs=[1.0], n_boot=20)
    assert probe.predictions["image"].tolist() == paths
    asked = zero_shot(reader, test, "infarct", ["absent", "present"], ["{} infarct"], n_boot=20)
    cosines = reader.encode_images(series_paths(test)) @ zero_shot_classifier(
        reader, ["absent", "present"], ["{} infarct"]).T
    assert asked.predictions["predicted"].tolist() == np.array(["absent", "present"])[cosines.argmax(1)].tolist()
    found = retrieval(reader, test, n_boot=20)
    assert (found.details["images"], found.details["captions"]) == (5, test["caption"].nunique())


def test_models_of_images_and_of_studies_are_not_confused(reader, studies, tmp_path):
    for rows in (studies, name_studies(studies)):
        with pytest.raises(InputError, match="encodes images, and starter has studies .*Take a study model"):
            embed(load_model("starter", device="cpu"), rows)
    slices = load_manifest("starter", studies.root, **FEW)
    with pytest.raises(InputError, match="encodes studies, and starter has images .*Take a model of images"):
        zero_shot(reader, slices.part("test"), "lesion")


@pytest.mark.parametrize("template, extra, metric", [
    ("zero_shot", {"labels": ["infarct", "haemorrhage", "white-matter lesion", "ring-enhancing mass",
                              "enlarged ventricles"],
      "multilabel": True, "negatives": ["no {}.", "without {}."]},
     "auroc_macro"),
    ("linear_probe", {"labels": ["infarct"], "Cs": [1.0]}, "balanced_accuracy"),
    ("retrieval", {}, "image_to_text_R@5")])
def test_templates_run_on_studies(command, folder, studies, tmp_path, template, extra, metric):
    params = {"dataset": "starter", "data_root": studies.root, "data_options": {"view": "studies", **FEW},
              "model": folder, "device": "cpu",
              "limit": 5, "n_boot": 20, "cache": tmp_path / "cache", **extra}
    given = [f"{name}={json.dumps(value) if isinstance(value, (dict, list, bool)) else value}"
             for name, value in params.items()]
    done = subprocess.run([command, "run", template, *(x for one in given for x in ("-p", one)), "--out",
                           tmp_path / "run"], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert np.isfinite(found["metrics"][metric]["value"])
    predictions = pd.read_parquet(tmp_path / "run" / "predictions.parquet")
    assert len(predictions) == 5 and predictions["image"].str.endswith("_FLAIR.nii.gz").all()
    assert "5 studies" in (tmp_path / "run" / "report.html").read_text()


def test_the_command_writes_features_of_studies(command, reader, folder, studies, tmp_path):
    options = [x for name, value in {"view": "studies", **FEW}.items()
               for x in ("--option", f"{name}={json.dumps(value) if isinstance(value, list) else value}")]
    done = subprocess.run([command, "embed", "starter", studies.root, "--model", folder, "--device", "cpu", "--split",
                           "test", *options, "--out", tmp_path / "found.npz"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = studies.part("test")
    with np.load(tmp_path / "found.npz", allow_pickle=False) as data:
        np.testing.assert_allclose(data["image_features"], reader.encode_images(series_paths(rows)).numpy(), atol=1e-5)
        assert data["image"].tolist() == name_studies(rows)["image"].tolist()
    done = subprocess.run([command, "embed", "starter", studies.root, "--model", "starter", *options, "--out",
                           tmp_path / "other.npz"], capture_output=True, text=True)
    assert done.returncode == 2 and "Take a study model" in done.stderr and not (tmp_path / "other.npz").exists()


NOISE = np.random.default_rng(0).random((12, 40, 44)).astype(np.float32)


def heads():
    "A model that was trained on tensors from 0 to 255"
    torch.manual_seed(0)
    steps = StudyPreprocess(percentiles=None, divide=255, size=(16, 48, 48))
    return study_model(TOWER, WORDS, dim=32, preprocess=steps, device="cpu")


def rows_of(folder, *arrays, **read):
    "A study with one series for each array"
    for i, array in enumerate(arrays): torch.save(torch.as_tensor(array), folder / f"{i}.pt")
    rows = Manifest({"series": [{"T1": f"{i}.pt"} for i in range(len(arrays))], "split": "test"})
    rows = rows.assign(caption=[f"study {i}" for i in range(len(arrays))])
    rows.root, rows.dataset, rows.read = str(folder), "noise", read
    return rows


@pytest.mark.parametrize(("values", "scale"), [
    (NOISE, "unit"), (NOISE * 1.004 - 0.003, "unit"), (NOISE * 255, "bytes"), (NOISE * 259 - 3, "bytes"),
    (NOISE * 5 - 1.5, "other"), (NOISE * 3, "other"), (NOISE * 2000 - 1000, "other"), (NOISE * 1000, "other"),
    (NOISE * 0, ""), (NOISE * 0 + 0.4, ""), (NOISE > 0.5, ""), (np.round(NOISE * 3), "bytes"),
    ((NOISE * 255).astype(np.uint8), "bytes"),
])
def test_the_scale_of_values(values, scale):
    assert value_scale(values) == scale


def test_training_features_and_scores_read_tensors_alike(tmp_path):
    "From 0 to 1 or from 0 to 255: the same picture, wherever rows are opened, and a word where steps were changed"
    (tmp_path / "unit").mkdir()
    bytes_, unit, clip = rows_of(tmp_path, NOISE * 255), rows_of(tmp_path / "unit", NOISE * 1.002), heads()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known = open_rows(clip, bytes_)[0].volumes
    with pytest.warns(UserWarning, match="noise: tensors from 0 to 1, read by the steps mri-unit"):
        trained = Pairs(clip, unit)[0][0].volumes
    seen = open_rows(clip, unit)[0].volumes
    assert torch.equal(seen, trained) and seen.std() > 0.5 and known.std() > 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error") # Told already
        found = next(iter(encoded_images(clip, unit, tokens=False)))[1]
    assert np.allclose(torch.nn.functional.normalize(found).numpy(), embed(clip, unit).images, atol=1e-5)


def test_attend_reads_tensors_as_an_evaluation_does(tmp_path):
    "From 0 to 1, by a model of tensors from 0 to 255: the similarity and the place that a report would show"
    model, unit = save_checkpoint(heads(), tmp_path / "model"), rows_of(tmp_path, NOISE * 1.002)
    asked = ["attend", f"T1={tmp_path / '0.pt'}", "--texts", "a lesion", "--model", model, "--method", "similarity",
             "--out", tmp_path / "seen.png", "--device", "cpu", "--json"]
    done = CliRunner().invoke(app, [*map(str, asked)])
    assert done.exit_code == 0, done.output
    answer, = json.loads(done.stdout)["images"]
    known = look_at_row(load_model(str(model), device="cpu"), unit, 0, ["a lesion"], "similarity")[0]
    assert answer["similarity"] == pytest.approx(known.similarity, abs=1e-6)
    assert answer["peak"][1:] == [int(i) for i in np.unravel_index(known.map.argmax(), known.map.shape)[1:]]


@pytest.mark.parametrize(("last", "said"), [
    (NOISE, r"8.pt: values from \S+ to 1, read by steps for values from 0 to 255. If all .*rescale: \[255, 0\]"),
    (NOISE * 5 - 1.5, r"8.pt: values from -1.5 to 3.5, .*percentiles: \[0.5, 99.5\]"),
])
def test_a_later_file_on_another_scale_stops(tmp_path, last, said):
    "Beyond the files that decide, in training, features and scores"
    rows, clip = rows_of(tmp_path, *[NOISE * 255] * 8, last), heads()
    for read in (lambda: embed(clip, rows), lambda: list(encoded_images(clip, rows)), lambda: Pairs(clip, rows)[8]):
        with pytest.raises(InputError, match=said): read()
    unit = rows_of(tmp_path, *[NOISE] * 8, NOISE * 255)
    with pytest.warns(UserWarning, match="mri-unit"), pytest.raises(InputError, match="8.pt: .* 0 to 1.*0.0039216"):
        embed(clip, unit)
    with pytest.raises(InputError, match="one scale"): embed(clip, rows_of(tmp_path, NOISE, NOISE * 255))


def test_the_remedies_for_other_scales_work(tmp_path):
    "Each as the message writes it; nothing is divided twice"
    clip = heads()
    plain = open_rows(clip, rows_of(tmp_path, NOISE * 255))[0].volumes
    again = open_rows(clip, rows_of(tmp_path, NOISE, rescale=[255, 0]))[0].volumes
    assert torch.allclose(again, plain, atol=1e-5)
    scores = open_rows(clip, rows_of(tmp_path, NOISE * 5 - 1.5, percentiles=[0.5, 99.5]))[0].volumes
    inside = scores[..., 2:14, 4:44, 2:46]
    assert inside.min() == pytest.approx(-0.449 / 0.226, abs=1e-4)
    assert inside.max() == pytest.approx(0.551 / 0.226, abs=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_no_numbers(tmp_path, value):
    "A tensor is refused and is a bad row; in a scan they are where nothing was measured"
    import nibabel as nib
    (broken := NOISE * 255)[3, 5, 7] = value
    rows = rows_of(tmp_path, broken, NOISE * 255, NOISE * 255)
    said = r"0.pt: 1 of 21,120 voxels are not finite \(NaN or infinite\).*remove its row"
    for read in (lambda: embed(heads(), rows), lambda: open_rows(heads(), rows)[0]):
        with pytest.raises(InputError, match=said): read()
    kept, _ = drop_unusable(rows, ["image"], "decode", 0.5)
    assert len(kept) == 2 and kept.skipped[0]["kind"] == "unreadable image"
    np.save(tmp_path / "0.npy", broken)
    with pytest.raises(InputError, match="0.npy: 1 of 21,120 voxels"): read_volume(tmp_path / "0.npy")
    nib.save(nib.Nifti1Image(broken, np.eye(4)), tmp_path / "scan.nii.gz")
    with pytest.warns(UserWarning, match="scan.nii.gz: 1 voxels are not finite"):
        scan = read_volume(tmp_path / "scan.nii.gz", percentiles=None, orientation=None).array
    assert np.isfinite(scan).all() and scan[3, 5, 7] == scan.min()


def test_channels_of_a_tensor(tmp_path):
    "One channel, first or last, is a plain volume; several are turned together"
    torch.save(torch.as_tensor(NOISE), tmp_path / "plain.pt")
    torch.save(torch.as_tensor(NOISE)[None], tmp_path / "first.pt")
    torch.save(torch.as_tensor(NOISE)[..., None], tmp_path / "last.pt")
    torch.save(torch.stack([torch.as_tensor(NOISE), torch.as_tensor(NOISE) * 2]), tmp_path / "two.pt")
    steps = study_preprocess("mri-files")
    read = lambda name: steps({"T1": tmp_path / name}, file_spacing=(3, 1, 1)).volumes
    assert torch.equal(read("first.pt"), read("plain.pt")) and torch.equal(read("last.pt"), read("plain.pt"))
    how = {"file_spacing": (1, 1, 3), "orientation": "IPR", "thick_first": True, "percentiles": None}
    one, two = read_volume(tmp_path / "plain.pt", **how), read_volume(tmp_path / "two.pt", **how)
    assert one.array.shape == (44, 12, 40) and np.array_equal(two.array[0], one.array)
    assert np.allclose(two.array[1], one.array * 2) and np.allclose(two.affine, one.affine)


def test_a_file_of_several_volumes_says_which_is_read(tmp_path):
    import nibabel as nib
    nib.save(nib.Nifti1Image(np.stack([NOISE, NOISE + 1, NOISE + 2], 3), np.eye(4)), tmp_path / "4d.nii.gz")
    with pytest.warns(UserWarning, match=r"4d.nii.gz: volume 0 of 3; another is read with .*read: {frame: 1}"):
        study_preprocess("mri-files")({"s": tmp_path / "4d.nii.gz"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.allclose(load_volume(tmp_path / "4d.nii.gz", frame=1).array, NOISE + 1, atol=1e-6)


def test_a_model_that_measures_in_mm_asks_whether_it_is_meant_for_tensors_without_spacing(reader, tensors):
    chest = replace(reader, preprocess=study_preprocess("chest-ct", size=(16, 48, 48)))
    with pytest.raises(InputError, match=r"3 x 1 x 1 mm and shows Hounsfield units .* so it is one of CT.*do not"):
        embed(chest, tensors)
    told = tensors.copy()
    told.read = {"file_spacing": (3, 1, 1)}
    assert np.isfinite(embed(chest, told, texts=False).images).all()


def test_commands_for_images_say_what_takes_studies(reader, tmp_path):
    for name in ("AX_T2", "AX_DWI"): (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="reads studies of one or more series.*medclip-nb attend"):
        encode_files(reader, [tmp_path])
    with pytest.raises(InputError, match="Give the folder of one series. It holds the folders AX_DWI, AX_T2: is it a"):
        load_volume(tmp_path)


def test_a_series_in_the_published_layout_has_the_name_of_its_folder(tmp_path):
    for name in ("AX_T2", "AX_DWI"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "img.npy", np.zeros((2, 2, 2)))
    files = [tmp_path / name / "img.npy" for name in ("AX_T2", "AX_DWI")]
    assert named_series(files) == dict(zip(("AX_T2", "AX_DWI"), files))
    assert list(named_series([Path(f"T1={files[0]}")])) == ["T1"]


def test_a_root_one_folder_off_is_told_where_the_table_is(tmp_path):
    (tmp_path / "data" / "study").mkdir(parents=True)
    (tmp_path / "data" / "table.csv").write_text("a,b\n1,2\n")
    for root in (tmp_path, tmp_path / "data" / "study"):
        with pytest.raises(InputError, match=f"no such file. It is in {tmp_path / 'data'}: is that the folder of the"):
            read_table(root / "table.csv")
    with pytest.raises(InputError, match="no such file.$"): read_table(tmp_path / "other.csv")


def test_padding_has_the_value_that_is_asked_for(tmp_path):
    "Air around a CT in Hounsfield units, whichever step pads; divided as the values are; 0 where nothing is said"
    file = tmp_path / "ct.npy"
    np.save(file, np.full((4, 6, 5), 40, np.float32))
    for steps in ({"size": (6, 8, 8)}, {"square": True, "size": (6, 8, 8)}):
        for divide in (1.0, 500.0):
            ct = StudyPreprocess(percentiles=None, divide=divide, **steps)
            found = ct.volume(file, fill=-1000).array
            assert np.allclose(found[1:5, 1:7, 1:6], 40 / divide) and np.isclose(found, 40 / divide).sum() == 120
            assert np.allclose(found[0], -1000 / divide) and np.allclose(found[..., -1], -1000 / divide)
    assert StudyPreprocess(percentiles=None, size=(6, 8, 8)).volume(file).array.min() == 0
    by_option = StudyPreprocess(percentiles=None, divide=500).volume(file, size=(6, 6, 5), fill=-1000)
    assert by_option.array.min() == -2
