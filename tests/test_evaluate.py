"The template `evaluate`: public test sets as downloaded, checkpoints as published, through the command"
import json
import subprocess
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from medclip_nb.core import InputError
from medclip_nb.datasets import (
    load_manifest,
    make_cq500,
    make_ct_rate,
    make_miniature,
    make_pub_brain,
    make_rad_chestct,
    make_rsna,
)
from medclip_nb.evaluators import PROTOCOLS, Result, evaluate_protocol
from medclip_nb.experiments import check_parameters, compare
from medclip_nb.models import StudyModel, load_model, save_checkpoint

FEW = ["-p", "device=cpu", "-p", "n_boot=20"]


def command_line(command, *args, code=0):
    done = subprocess.run([command, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


# Checkpoints as their authors' training scripts write them, of small models with random weights

def theirs(name, flat):
    "The name of a tensor in a published file"
    if flat: return {"visual.proj": "image_post.proj", "text_projection": "text_post.proj"}.get(name, name)
    return name.replace("visual_proj.", "visual_attn.")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A file as published, for the stand-in of a published model"
    made = {}

    def make(name):
        if name in made: return made[name]
        torch.manual_seed(len(name))
        clip = load_model(name, device="cpu")
        state = {theirs(n, "volume_cfg" not in clip.config["model_cfg"]["vision_cfg"]): t
                 for n, t in clip.model.state_dict().items()}
        assert {"flair-tiny": "text_post.proj", "itemizedclip-mri-tiny": "visual_attn.ln_q.weight"}.get(
            name, "logit_scale") in state
        trained = {"epoch": 3, "name": "run", "state_dict": {f"module.{n}": t for n, t in state.items()},
                   "optimizer": {"lr": np.float64(0.1)}}
        made[name] = tmp_path_factory.mktemp(name) / "epoch_3.pt"
        torch.save(state if name == "flair-tiny" else trained, made[name])
        return made[name]
    return make


# Test sets as they are downloaded: no training part, no items, unless a protocol needs them

def without(root, *names):
    for name in names: (root / name).unlink()


def flickr_test_only(root):
    listed = json.loads((root / "dataset_flickr30k.json").read_text())
    listed["images"] = [image for image in listed["images"] if image["split"] == "test"]
    (root / "dataset_flickr30k.json").write_text(json.dumps(listed))


def ct_rate_valid_only(root):
    without(root, *(f"dataset/{name}" for name in ("radiology_text_reports/train_reports.csv",
                                                   "radiology_text_reports/validation_reports.csv",
                                                   "multi_abnormality_labels/train_predicted_labels.csv",
                                                   "metadata/train_metadata.csv")))


SMALL = (6, 20, 20)
MAKE = {"pub-brain-5": partial(make_pub_brain, size=SMALL, studies=3),
        "pub-brain-5-gt-hlip": partial(make_pub_brain, size=SMALL, studies=4),
        "rsna": partial(make_rsna, size=SMALL, studies=(6, 4, 6)),
        "cq500": partial(make_cq500, size=SMALL, studies=12, form="dicom"),
        "ct-rate": partial(make_ct_rate, size=SMALL, patients=(1, 12)),
        "rad-chestct-hlip": partial(make_rad_chestct, size=(20, 40, 40), volumes=(1, 8, 12))}
TRIM = {"ct-rate": ct_rate_valid_only, "flickr": flickr_test_only,
        "coco": lambda root: without(root, "annotations/captions_train2017.json"),
        "rsicd-30": lambda root: without(root, "train.csv", "valid.csv", "trainv1.json", "testv1.json")}
# Protocol -> data set, stand-in for a published model, split that is measured, steps that the files need
CASES = {
    "pub-brain-5": ("pub-brain-5", "itemizedclip-mri-tiny", "test", "mri-unit"),
    "pub-brain-5-gt-hlip": ("pub-brain-5", "hlip-multiscan-h3-token1176-tiny", "test", "mri-unit"),
    "rsna": ("rsna-ich", "itemizedclip-head-ct-tiny", "all", None),
    "cq500": ("cq500", "itemizedclip-head-ct-tiny", "test", "head-ct"),
    "ct-rate": ("ct-rate", "itemizedclip-ct-rate-tiny", "valid", None),
    "rad-chestct-hlip": ("rad-chestct", "hlip-singlescan-h2-token2744-tiny", "test", None),
    "coco": ("coco-captions", "flair-tiny", "valid", None),
    "flickr": ("flickr30k", "itemizedclip-cc0.3m-tiny", "test", None),
    "rsicd-30": ("rsicd", "itemizedclip-rsicd-tiny", "test", None),
}


def test_every_published_test_set_is_among_the_cases():
    assert {p.dataset for p in PROTOCOLS.values()} - {"any with items"} == {case[0] for case in CASES.values()}


@pytest.fixture(scope="module")
def runs(command, checkpoint, tmp_path_factory):
    "Two suites at a time with a run for each case; the folder that holds the data and the runs"
    folder, listed = tmp_path_factory.mktemp("evaluate"), []
    for name, (dataset, model, *_) in CASES.items():
        root = MAKE.get(name, partial(make_miniature, dataset))(folder / name)
        TRIM.get(name, lambda root: None)(root)
        gt = {"data_options": {"gt": True}} if "gt" in name else {}
        about = {"dataset": dataset, "data_root": str(root), "model": model, "checkpoint": str(checkpoint(model))}
        listed.append({"name": name, "template": "evaluate", "params": about | gt})
    started = []
    for half in (listed[::2], listed[1::2]):
        suite = {"name": half[0]["name"], "defaults": {"device": "cpu", "n_boot": 20}, "runs": half}
        (path := folder / f"{half[0]['name']}.yaml").write_text(yaml.safe_dump(suite))
        words = [command, "suite", str(path), "--out", str(folder / "runs")]
        started.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for one in started: assert (said := one.communicate()[0]) and one.returncode == 0, said
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_public_test_set_and_a_published_checkpoint(runs, checkpoint, name):
    dataset, model, split, steps = CASES[name]
    run = next((runs / "runs").glob(f"*/{name}"))
    found, clip = Result.load(run), load_model(model, checkpoint(model), "cpu")
    every = load_manifest(dataset, runs / name, **PROTOCOLS[name].options)
    rows = every.part(split)
    valid = every.part("valid") if name == "rad-chestct-hlip" else None
    expected = evaluate_protocol(name, clip, rows, valid=valid, n_boot=20,
                                 batch_size=2 if isinstance(clip, StudyModel) else 32)
    numbers = lambda result: result.metrics.set_index("name")[["value", "low", "high", "n"]].sort_index()
    pd.testing.assert_frame_equal(numbers(found), numbers(expected), atol=1e-5, rtol=1e-5, check_dtype=False)
    assert found.details["evaluated"] == [name] and found.details["weights"] == clip.weights_hash()
    assert found.details.get("files_read_by") == steps and found.details["split"] == sorted(set(rows["split"]))
    told = compare(run)
    assert set(told["dataset"]) == {dataset} and set(told["model"]) == {model}
    report = (run / "report.html").read_text()
    assert "departures from the published script" in report and "Research only" in report
    tuned = {m for m in found.metrics["name"] if "balanced_accuracy_macro" in m}
    if name == "ct-rate":
        assert tuned == {f"balanced_accuracy_macro_{end}" for end in ("test_tuned", "as_published")}
        assert "No rows were left to choose a threshold on" in report
    if name == "rad-chestct-hlip": assert "Thresholds were chosen on 8 rows of split <em>valid</em>" in report


def test_a_plain_model_two_protocols_and_a_cache(command, tmp_path):
    root, model = make_miniature("rsicd", tmp_path / "data"), save_checkpoint(load_model("starter"), tmp_path / "model")
    command_line(command, "run", "evaluate", "-p", "dataset=rsicd", "-p", f"data_root={root}", "-p", f"model={model}",
                 "-p", "protocols=[rsicd-30, item-retrieval]", "-p", f"cache={tmp_path / 'cache'}", *FEW,
                 "--out", tmp_path / "run")
    found, rows = Result.load(tmp_path / "run"), load_manifest("rsicd", root).part("test")
    report = (tmp_path / "run" / "report.html").read_text()
    for name, metric in (("rsicd-30", "mean_rank"), ("item-retrieval", "image_to_text_mean_rank")):
        expected = evaluate_protocol(name, load_model(str(model), device="cpu"), rows, "global", n_boot=0)
        assert found.value(f"{name}/{metric}") == pytest.approx(expected.value(metric), rel=1e-5) # Six digits are kept
        assert f"<strong>{name}</strong> was published in the mode <em>text-conditioned</em>" in report
    assert sorted(found.details["protocols"]) == ["item-retrieval", "rsicd-30"]
    assert len([p for p in tmp_path.glob("cache/*") if p.name != "files"]) == 1, "both read the images from one store"


def test_a_name_that_does_not_fit_is_one_line_that_names_those_that_do(command, tmp_path):
    root = make_miniature("coco-captions", tmp_path / "data")
    said = command_line(command, "run", "evaluate", "-p", "dataset=coco-captions", "-p", f"data_root={root}",
                        "-p", "model=flair-tiny", "-p", "protocols=[cocos]", "--out", tmp_path / "run", code=2)
    assert "Unknown protocol 'cocos'. Did you mean 'coco'? For coco-captions there are: coco, item-retrieval" in said
    assert not (tmp_path / "run").exists()


def test_parameters_that_have_no_effect_or_flatter_are_refused():
    for given, message in (({"top_k": 5}, "'top_k' has no effect here: it needs mode=top-k"),
                           ({"split": "valid", "valid_split": "valid"}, "on this split thresholds are chosen")):
        with pytest.raises(InputError, match=message): check_parameters("evaluate", given)
    assert check_parameters("evaluate", {"split": "valid", "mode": "top-k", "top_k": 5})
