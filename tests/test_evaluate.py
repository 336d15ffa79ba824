"The template `evaluate`: public test sets as downloaded, checkpoints as published, through the command"
import json
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch
from test_protocols import captions, cq500, ct_rate, jpeg, pub_brain, rad_chest, rsna
from test_volumes import small

from medclip_nb.core import InputError
from medclip_nb.datasets import load_manifest
from medclip_nb.evaluators import PROTOCOLS, Result, evaluate_protocol
from medclip_nb.experiments import check_parameters
from medclip_nb.models import PUBLISHED, load_model

TENSORS = {"percentiles": None, "divide": 255.0, "size": [12, 32, 32]}
CHEST = {"window": [-400, 1500], "spacing": [3, 1, 1], "antialias": False, "size": [12, 32, 32]}


def command_line(command, *args, code=0):
    done = subprocess.run([command, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


# Checkpoints as their authors' training scripts write them, of small models with random weights

def flat(folder, context):
    "FLAIR or ItemizedCLIP of pictures, made small"
    model = {"embed_dim": 32, "init_logit_bias": -10.0, "pooling_cfg": {"heads": 2},
             "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
             "text_cfg": {"context_length": context, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))


def theirs(name):
    "The name of a tensor in a published file"
    return {"visual.proj": "image_post.proj", "text_projection": "text_post.proj"}.get(name, name)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "A published model by name, made small: its folder and a checkpoint"
    made = {}

    def make(name):
        if name in made: return made[name]
        folder = tmp_path_factory.mktemp(name) / "model"
        if "volume_cfg" in PUBLISHED[name]["model_cfg"]["vision_cfg"]:
            config = json.loads((small(name, folder) / "open_clip_config.json").read_text())
            config["preprocess_cfg"] = {"study": CHEST if "single" in str(config) else TENSORS}
            (folder / "open_clip_config.json").write_text(json.dumps(config))
            rename = lambda n: n.replace("visual_proj.", "visual_attn.")
        else:
            flat(folder, PUBLISHED[name]["model_cfg"]["text_cfg"]["context_length"])
            rename = theirs
        torch.manual_seed(len(name))
        state = {rename(n): t for n, t in load_model(str(folder), device="cpu").model.state_dict().items()}
        whole = {"epoch": 3, "name": "run", "state_dict": {f"module.{n}": t for n, t in state.items()},
                 "optimizer": {"lr": np.float64(0.1)}}
        torch.save(state if name == "flair" else whole, folder / "epoch_3.pt")
        made[name] = folder, folder / "epoch_3.pt"
        return made[name]
    return make


# Test sets as they are downloaded

def unit_brain(root):
    "Tensors from 0 to 1, as HLIP's scripts convert Pub-Brain-5"
    pub_brain(root)
    for path in root.rglob("*.pt"): torch.save(torch.load(path) / 255.0, path)


def valid_only(root):
    "CT-RATE without its training part"
    ct_rate(root, 8)
    (root / "dataset/multi_abnormality_labels/train_predicted_labels.csv").unlink()


def rsicd(root):
    "The test table, without items"
    rng = np.random.default_rng(4)
    cells = [{"filename": f"rsicd_images/{i:05d}.jpg", "captions": str([f"scene {i}"] * 5),
              "image": str({"bytes": jpeg(rng), "path": None})} for i in range(8)]
    pd.DataFrame(cells).to_csv(root / "test.csv", index=False)
    (root / "large_label.json").write_text(json.dumps([0, 3, 3, 29, 12, 20, 7, 8]))


SETS = {
    "pub-brain-5": ("pub-brain-5", unit_brain, "itemizedclip-mri", {}, "test"),
    "pub-brain-5-gt-hlip": ("pub-brain-5", unit_brain, "hlip-multiscan-h3-token1176", {"gt": True}, "test"),
    "rsna": ("rsna-ich", rsna, "itemizedclip-head-ct", {}, "test"),
    "cq500": ("cq500", cq500, "itemizedclip-head-ct", {}, "test"),
    "ct-rate": ("ct-rate", valid_only, "itemizedclip-ct-rate", {}, "valid"),
    "rad-chestct-hlip": ("rad-chestct", rad_chest, "hlip-singlescan-h2-token2744", {}, "test"),
    "coco": ("coco-captions", lambda root: captions(root, "coco"), "flair", {"rows": "images"}, "test"),
    "flickr": ("flickr30k", lambda root: captions(root, "flickr"), "itemizedclip-cc0.3m", {"rows": "images"}, "test"),
    "rsicd-30": ("rsicd", rsicd, "itemizedclip-rsicd", {}, "test"),
}  # Protocol -> data set, how it is made, published model, options that are needed, split


def test_every_test_set_and_every_layout_is_there():
    assert {p.dataset for p in PROTOCOLS.values()} - {"any with items"} == {s[0] for s in SETS.values()}
    assert {"flair", "itemizedclip-rsicd", "itemizedclip-mri", "itemizedclip-ct-rate"} <= {s[2] for s in SETS.values()}


@pytest.mark.parametrize("name", SETS)
def test_a_public_test_set_and_a_published_checkpoint(command, published, tmp_path, name):
    dataset, make, model, options, split = SETS[name]
    (root := tmp_path / "data").mkdir()
    make(root)
    folder, checkpoint = published(model)
    given = ["-p", "data_options={gt: true}"] if "gt" in options else []
    command_line(command, "run", "evaluate", "-p", f"dataset={dataset}", "-p", f"data_root={root}", *given,
                 "-p", f"model={folder}", "-p", f"checkpoint={checkpoint}", "-p", "device=cpu", "-p", "n_boot=20",
                 "--out", tmp_path / "run")
    found, clip = Result.load(tmp_path / "run"), load_model(str(folder), checkpoint, "cpu")
    rows = load_manifest(dataset, root, **options)
    valid = rows.part("valid") if PROTOCOLS[name].thresholds and split != "valid" else None
    expected = evaluate_protocol(name, clip, rows.part(split), valid=valid, batch_size=2, n_boot=20)
    pd.testing.assert_frame_equal(found.metrics.set_index("name")[["value", "low", "high"]].sort_index(),
                                  expected.metrics.set_index("name")[["value", "low", "high"]].sort_index(),
                                  atol=1e-5, check_dtype=False)
    assert found.details["evaluated"] == [name] and found.details["weights"] == clip.weights_hash()
    assert found.details.get("files_read_by") == ("mri-unit" if "brain" in name else None)
    report = (tmp_path / "run" / "report.html").read_text()
    assert "departures from the published script" in report
    tuned = {m for m in found.metrics["name"] if "balanced_accuracy_macro" in m}
    if name == "ct-rate": assert tuned == {f"balanced_accuracy_macro_{end}" for end in ("test_tuned", "as_published")}
    if name == "rad-chestct-hlip": assert "Thresholds were chosen on 14 rows of split <em>valid</em>" in report


def test_what_does_not_fit_is_one_line_that_names_what_does(command, published, tmp_path):
    captions(tmp_path, "coco")
    folder, _ = published("flair")
    about = ["-p", "dataset=coco-captions", "-p", f"data_root={tmp_path}", "-p", f"model={folder}"]
    for given, message in (
        (["-p", "protocols=[cocos]"], "protocol 'cocos'. Did you mean 'coco'? For coco-captions there are: coco, item"),
        (["-p", "protocols=[rsna]"], "belongs to the data set 'rsna-ich'. For coco-captions there are: coco, item-"),
    ):
        said = command_line(command, "run", "evaluate", *about, *given, "--out", tmp_path / "run", code=2)
        assert message in said and not (tmp_path / "run").exists()


def test_parameters_that_have_no_effect_or_flatter_are_refused():
    for given, message in (({"top_k": 5}, "'top_k' has no effect here: it needs mode=top-k"),
                           ({"split": "valid", "valid_split": "valid"}, "on this split thresholds are chosen")):
        with pytest.raises(InputError, match=message): check_parameters("evaluate", given)
    assert check_parameters("evaluate", {"split": "valid", "mode": "top-k", "top_k": 5})
