"Studies of several series wherever images go: features and their cache, evaluators, templates"
import json
import os
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch

from medclip_nb.core import InputError
from medclip_nb.datasets import Manifest, load_manifest, name_studies, series_paths
from medclip_nb.embeddings import embed
from medclip_nb.evaluators import linear_probe, retrieval, zero_shot, zero_shot_classifier
from medclip_nb.images import StudyPreprocess
from medclip_nb.models import load_model, save_checkpoint, study_model

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
