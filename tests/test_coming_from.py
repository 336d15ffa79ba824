"The pages `Coming from ...`: each of our commands as it stands there, on made-up data in the layout of that system"
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as sk
import torch
import yaml

from medclip_nb.core import InputError
from medclip_nb.datasets import load_manifest, make_miniature
from medclip_nb.experiments import (
    append_run,
    check_names,
    check_parameters,
    read_foreign,
    read_parameters,
    with_defaults,
)
from medclip_nb.metrics import classification_metrics

ROOT = Path(__file__).resolve().parent.parent
PAGES = {p.stem[3:]: p for p in sorted((ROOT / "nbs" / "coming_from").glob("*.ipynb"))}
INSTEAD = {"ViT-B-32/openai": "starter", "ViT-B-16/openai": "starter", "timm:resnet50": "timm:test_resnet",
           "embed_dim=512": "embed_dim=32", **{f"itemizedclip-{m} ": f"itemizedclip-{m}-tiny "
                                               for m in ("mri", "head-ct", "ct-rate", "rsicd", "cc0.3m")}}
QUICK = {"finetune": ["-p", "max_steps=2", "-p", "limit=24"], "zero_shot": ["-p", "sensitivity=false"]}


def texts(page):
    cells = json.loads(PAGES[page].read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]


def commands(page):
    "Our commands of a page, one a line"
    blocks = [b for text in texts(page) for b in re.findall(r"```sh\n(.*?)```", text, re.S)]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def words_of(line, folder):
    "The words of a command, with models that need no download and the folders of this test"
    for ours, small in INSTEAD.items(): line = line.replace(ours, small)
    words = shlex.split(re.sub(r"(?<![\w.])/data/", f"{folder}/data/", line))
    if words[1] != "run": return words
    words += ["-p", "device=cpu", "-p", "n_boot=20"]
    if "solver=adamw" not in words: words += QUICK.get(words[2], [])
    if "mode=lora" in words or "--from" in words: words += ["-p", "towers=[text]"]  # Of the starter, only texts
    small = ["model=starter", "precision=fp32", "num_workers=0", "batch_size=8"] if "--from" in words else []
    words += [word for one in small for word in ("-p", one)]
    return words


def run(command, folder, line):
    words = words_of(line, folder)
    done = subprocess.run([command, *words[1:]], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    for name in re.findall(r"--out (\S+)", line):
        assert (folder / name).exists() and not list((folder / name).glob("*.failed")), name
    return done


def result(folder, name):
    "Metrics and predictions of a run"
    return (json.loads((folder / "reports" / name / "metrics.json").read_text()),
            pd.read_parquet(folder / "reports" / name / "predictions.parquet"))


CONFIG = """
exp_name: clip_ft_lora_all
data_root: ./dataset
pretrained_clip_path: ../huggingface_models/openai--clip-vit-base-patch16
use_lora: True
pretrained_lora_path: null
lora_config: {r: 8, lora_alpha: 1, lora_dropout: 0, target_modules: [q_proj, k_proj, v_proj]}
seed: 0
train_split: train_all
learning_rate: 2.0e-03
train_batch_size: 128
val_batch_size: 500
num_workers: 16
max_train_steps: 10000
adam_beta1: 0.9
adam_beta2: 0.999
adam_weight_decay: 1.0e-03
adam_epsilon: 1.0e-08
scheduler_type: cosine
num_warmup_steps: 100
max_grad_norm: 1.0
mixed_precision: fp16
gradient_accumulation_steps: 1
checkpointing_step_interv: 1000
validation_step_interv: 1000
resume_from_checkpoint: latest
output_dir: ./output
"""


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_two_columns_and_commands(page):
    assert len(commands(page)) >= 3 and all(line.startswith("medclip-nb ") for line in commands(page))
    tables = [t for t in texts(page) if re.search(r"^\| .* \| .* \|$", t, re.M)]
    assert len(tables) >= 3 and "## What differs, and why" in "".join(texts(page))


def test_ipclip(command, tmp_path):
    make_miniature("ipath", tmp_path / "data" / "ipath")
    (tmp_path / "data" / "ipath" / "probe").rename(kather := tmp_path / "data" / "kather")
    for part in ("train", "test"):
        table = pd.read_csv(kather / f"Kather_{part}.csv")
        table.assign(image=f"{kather}/" + table["image"]).to_csv(kather / f"Kather_{part}.csv", index=False)
    lines = commands("ipclip")
    for line in lines: run(command, tmp_path, line)
    assert [shlex.split(line)[1:3] for line in lines] == [
        ["run", "zero_shot"], ["classify", "/data/kather/patches/test_000.png"], ["run", "linear_probe"],
        ["run", "finetune"], ["run", "finetune"]]
    zero, said = result(tmp_path, "zero_shot_kather")
    assert len(said) == len(pd.read_csv(kather / "Kather_test.csv")) and zero["details"]["split"] == ["all"]
    assert zero["details"]["classes"][:2] == ["adipose tissue", "background"]
    assert set(zero["details"]["headline"]) == {"balanced_accuracy", "f1_weighted", "mcc", "auroc_macro"}
    probe, predicted = result(tmp_path, "probe_kather")
    for found, rows in ((zero, said), (probe, predicted)):
        wanted = {"f1_weighted": sk.f1_score(rows["label"], rows["predicted"], average="weighted"),
                  "f1_macro": sk.f1_score(rows["label"], rows["predicted"], average="macro"),
                  "mcc": sk.matthews_corrcoef(rows["label"], rows["predicted"])}
        for name, value in wanted.items(): assert found["metrics"][name]["value"] == pytest.approx(value, abs=1e-5)
    assert probe["details"]["settings"]["alpha"] == 0.001 and probe["details"]["split_source"] == "given with the data"
    line = pd.read_csv(tmp_path / "results_zero_shot_kather.csv")
    assert line.loc[0, "f1_weighted"] == pytest.approx(zero["metrics"]["f1_weighted"]["value"]) and len(line) == 1
    history = pd.read_csv(tmp_path / "reports" / "head_kather" / "history.csv")
    assert list(history) == ["epoch", "val_loss", "f1_weighted", "f1_macro"] and len(history) == 5
    inputs = json.loads((tmp_path / "reports" / "probe_kather" / "run.json").read_text())["inputs"]
    assert {"data_options.train", "data_options.test"} <= set(inputs)


def test_clip_finetune(command, tmp_path):
    make_miniature("cytopath", tmp_path / "dataset")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "clip_ft_lora_all.yaml").write_text(CONFIG)
    said = [run(command, tmp_path, line) for line in commands("clip_finetune")]
    given = json.loads((tmp_path / "output" / "clip_ft_lora_all" / "run.json").read_text())["parameters"]
    named = json.loads((tmp_path / "reports" / "clip_ft_lora_all" / "run.json").read_text())["parameters"]
    differ = {k for k in named if named[k] != given[k]}
    assert differ <= {"data_root", "batch_size", "save_every", "precision", "num_workers"}, differ
    assert "note: validation_step_interv: validation follows every epoch" in said[0].stderr
    assert yaml.safe_load(said[1].stdout)["lora_targets"] == ["q", "k", "v"]
    metrics = result(tmp_path, "hits")[0]["metrics"]
    assert {f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 10, 50)} <= set(metrics)
    (tmp_path / "configs" / "wrong.yaml").write_text(CONFIG + "learning_rat: 1\n")
    line = "medclip-nb run finetune --from clip-finetune=configs/wrong.yaml"
    done = subprocess.run([command, *shlex.split(line)[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown key 'learning_rat'. Did you mean 'learning_rate'" in done.stderr


@pytest.mark.parametrize(("line", "wanted"), [
    ("mixed_precision: no", {"precision": "fp32"}),  # YAML: false
    ("mixed_precision: 'no'", {"precision": "fp32"}), ("mixed_precision:", {"precision": "fp16"}),
    ("scheduler_type:", {"schedule": "constant"}), ("scheduler_type: None", {"schedule": "constant"}),
    ("adam_beta1: null", {"betas": [0.9, 0.999]}), ("pretrained_lora_path: None", {"checkpoint": None}),
    ("use_lora: 'False'", {"mode": "full", "rank": None}), ("use_lora: no", {"mode": "full"}),
    ("use_lora: 'yes'", {"mode": "lora"}), ("use_lora:", {"mode": "full"}),
    ("lora_config: {r: 4, bias: none, task_type: null, target_modules: q_proj}", {"lora_targets": ["q"], "rank": 4}),
    ("lora_config: {r: null, target_modules: null}", {"rank": None, "lora_targets": None}),
    ("gradient_accumulation_steps:", {"batch_size": 128}), ("train_batch_size:", {"batch_size": 1}),
])
def test_settings_as_people_write_them(tmp_path, line, wanted):
    "A later line goes before an earlier one of the same key; the parameters are those that a run accepts"
    key = line.partition(":")[0]
    lines = [one for one in CONFIG.splitlines() if not one.startswith(f"{key}:")]
    (tmp_path / "a.yaml").write_text("\n".join([*lines, line]))
    found = read_foreign(f"clip-finetune={tmp_path / 'a.yaml'}").params
    assert {name: found.get(name) for name in wanted} == wanted


@pytest.mark.parametrize(("line", "said"), [
    ("train_batch_size: 0", "train_batch_size: expected a whole number above 0, not 0"),
    ("gradient_accumulation_steps: 0.5", "gradient_accumulation_steps: expected a whole number above 0"),
    ("use_lora: perhaps", "use_lora: expected true or false, not 'perhaps'"),
    ("lora_config: {bias: all}", "lora_config, bias: 'all' has no counterpart"),
    ("lora_config: {target_module: [q_proj]}", "Did you mean 'target_modules'"),
    ("mixed_precision: yes", "mixed_precision: True has no counterpart"),
])
def test_settings_without_a_counterpart(tmp_path, line, said):
    key = line.partition(":")[0]
    lines = [one for one in CONFIG.splitlines() if not one.startswith(f"{key}:")]
    (tmp_path / "a.yaml").write_text("\n".join([*lines, line]))
    with pytest.raises(InputError, match=re.escape(said)): read_foreign(f"clip-finetune={tmp_path / 'a.yaml'}")


def write_run(folder, task="zero_shot", details=None, **params):
    "The two files of a run that a line of a table is made of"
    folder.mkdir()
    metrics = {"balanced_accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}}
    found = {"schema": 1, "task": task, "metrics": metrics, "details": {"headline": ["balanced_accuracy"], **details}}
    (folder / "metrics.json").write_text(json.dumps(found))
    (folder / "run.json").write_text(json.dumps({"parameters": params}))
    return folder


def test_lines_say_what_was_measured(tmp_path):
    "Metrics of one name are of different labels, protocols, modes and splits"
    table, test = tmp_path / "all.csv", {"split": ["test"]}
    runs = [
        write_run(tmp_path / "tone", details=test | {"label": "tone"}, labels=["tone"], split="test"),
        write_run(tmp_path / "own", details=test | {"label": "finding"}, labels=[], split="test"),
        write_run(tmp_path / "both", details=test | {"labels": {"a": {}, "b": {}}}, labels=[], split="test"),
        write_run(tmp_path / "all", details={"split": ["test", "a"], "label": "tone"}, labels=["tone"], split="all"),
        write_run(tmp_path / "gt", details={"split": ["valid"], "labels": {"disease": {}}, "mode": "global",
                  "protocol": {}, "evaluated": ["pub-brain-5-gt"]}, protocols=[], mode="", split=""),
        write_run(tmp_path / "head", "head", test | {"label": "label"}, label="label", mode="head", split="test"),
    ]
    for one in runs: append_run(one, table)
    found = pd.read_csv(table, keep_default_na=False).set_index("run")
    found.index = [Path(run).name for run in found.index]
    assert list(found["labels"]) == ["tone", "finding", "a, b", "tone", "", "label"]
    assert list(found["split"]) == ["test", "test", "test", "all", "valid", "test"]
    assert found.loc["gt", ["protocols", "mode"]].tolist() == ["pub-brain-5-gt", "global"]
    assert found.loc["head", "mode"] == "head" and found.loc["tone", ["protocols", "mode"]].tolist() == ["", ""]
    lines = table.read_text().splitlines()
    old = [line.replace("labels,protocols,mode,", "").replace(",tone,,,", ",") for line in lines]
    (tmp_path / "old.csv").write_text("\n".join(old[:2]) + "\n")
    append_run(runs[4], tmp_path / "old.csv")
    assert pd.read_csv(tmp_path / "old.csv", keep_default_na=False)["protocols"].tolist() == ["", "pub-brain-5-gt"]


def test_clip_for_medical_caption(command, tmp_path):
    make_miniature("rocov2", tmp_path / "rocov2")
    (tmp_path / "sample.jpg").write_bytes(next((tmp_path / "rocov2" / "test_images" / "test").glob("*")).read_bytes())
    said = [run(command, tmp_path, line).stdout for line in commands("clip_for_medical_caption")]
    assert [row.split()[1] for row in said[1].splitlines() if row.startswith("sample.jpg")] == ["1", "2", "3"]
    metrics = result(tmp_path, "rocov2_valid")[0]["metrics"]
    assert {"image_to_text_R@5", "text_to_image_MRR", "image_to_text_median_rank"} <= set(metrics)
    assert list((tmp_path / "reports" / "rocov2").rglob("events.out*")), "the log of TensorBoard"


def test_medpix(command, tmp_path):
    make_miniature("medpix", tmp_path)
    said = [run(command, tmp_path, line).stdout for line in commands("medpix")]
    assert len([row for row in said[1].splitlines() if row.startswith("MedCLIP")]) == 5
    every, left = (result(tmp_path, name)[1] for name in ("medpix", "medpix_tuned_zero_shot"))
    tuned = result(tmp_path, "medpix_tuned")[1]
    assert len(left) < len(every) and set(left["group"]) >= set(tuned["group"])


def test_itemizedclip(command, tmp_path, monkeypatch):
    "Pictures through the commands; of volumes, parameters and names: test_evaluate and test_item_training run those"
    from PIL import Image

    from medclip_nb.models import load_model
    make_miniature("rsicd", tmp_path / "rsicd")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "scene.jpg")
    lines = commands("itemizedclip")
    for line in lines:
        for place in re.findall(r"data_root=(\S+)", line): (tmp_path / place).mkdir(exist_ok=True)
        for place in re.findall(r"checkpoint[= ](\S+)", line): (tmp_path / place).parent.mkdir(exist_ok=True)
        for place in re.findall(r"checkpoint[= ](\S+)", line): (tmp_path / place).touch()
    state = load_model("itemizedclip-rsicd-tiny", device="cpu").model.state_dict()
    torch.save({"epoch": 60, "name": "rsicd", "state_dict": {f"module.{k}": v for k, v in state.items()}},
               tmp_path / "rsicd-model" / "epoch_60.pt")
    for line in (line for line in lines if "rsicd-model" in line): run(command, tmp_path, line)
    assert (tmp_path / "scene_maps.png").stat().st_size
    monkeypatch.chdir(tmp_path)
    checked = []
    for line in (line for line in lines if " run " in line):
        words = words_of(line, tmp_path)
        own = dict(w.split("=", 1) for at, w in zip(words, words[1:]) if at == "-p")
        preset = read_parameters(words[words.index("-f") + 1]) if "-f" in words else {}
        check_names(words[2], values := check_parameters(words[2], with_defaults(words[2], own, preset)))
        checked.append((words[2], values.get("protocols", [])))
    assert [t for t, _ in checked].count("itemized") == 5
    assert {p for t, names in checked if t == "evaluate" for p in names} == {
        "pub-brain-5", "pub-brain-5-gt", "rsna", "cq500", "ct-rate", "rad-chestct", "rsicd-30", "coco", "flickr"}


def test_absolute_paths_need_one_word_and_links_stay_inside(tmp_path):
    (images := tmp_path / "images").mkdir()
    for place in (images / "a.png", tmp_path / "secret.png"): place.touch()
    (images / "b.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "tables").mkdir()
    (table := tmp_path / "tables" / "t.csv").write_text(f"image,label\n{images}/a.png,x\n{images}/b.png,y\n")
    hint = re.escape(f"data_options={{image_root: {images}}}")
    with pytest.raises(InputError, match=hint): load_manifest("csv", table)
    inside = load_manifest("csv", table, image_root=str(images), split="all")
    assert inside["image"].tolist() == ["a.png", "b.png"]
    with pytest.raises(InputError, match="b.png: is a link out of .*images, to .*secret.png .row 1."): inside.paths()
    everywhere = load_manifest("csv", table, image_root="/", split="all")
    assert len(everywhere.paths()) == 2  # The link stays in the first folder of its path
    (images / "b.png").unlink()
    (images / "b.png").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="is a link out of /"): everywhere.paths()


def test_two_processes_add_to_one_table(tmp_path):
    code = ("import json, sys\nfrom pathlib import Path\nfrom medclip_nb.experiments import append_run\n"
            "for i in range(12):\n    (run := Path(sys.argv[1], f'{sys.argv[2]}-{i}')).mkdir()\n"
            "    (run / 'metrics.json').write_text(json.dumps({'schema': 1, 'task': 't', 'details': {}, "
            "'metrics': {f'{sys.argv[2]}{i // 4}': {'value': i, 'low': None, 'high': None, 'n': 3}}}))\n"
            "    append_run(run, sys.argv[3])\n")
    table = tmp_path / "results.csv"
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name, str(table)]) for name in "ab"]
    assert [one.wait(timeout=120) for one in both] == [0, 0]
    found = pd.read_csv(table)
    assert len(found) == 24 and found["run"].nunique() == 24
    for name in "ab":
        for i in range(12): assert found.loc[found["run"].str.endswith(f"/{name}-{i}"), f"{name}{i // 4}"].item() == i
    with pytest.raises(InputError, match="no metrics.json|cannot be read"): append_run(tmp_path / "nothing", table)
    assert len(pd.read_csv(table)) == 24


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("seed", range(3))
def test_weighted_f1_and_mcc_are_those_of_scikit_learn(classes, seed):
    "With ties, which the first class wins, a class that never occurs and one that is never predicted"
    rng = np.random.default_rng(seed)
    names = [f"class {i}" for i in range(classes)]
    true = rng.integers(0, max(classes - 1, 2), 40)  # With three classes and more, the last has no row
    scores = rng.integers(0, 3, (40, classes)).astype(float)
    scores[:, 0] -= 10 * (classes > 3)
    predicted = scores.argmax(1)
    found = classification_metrics([names[i] for i in true], scores, names)
    assert found["f1_weighted"] == pytest.approx(sk.f1_score(true, predicted, average="weighted", zero_division=0))
    assert found["mcc"] == pytest.approx(sk.matthews_corrcoef(true, predicted))


@pytest.mark.parametrize("name, split", [("ipath", " -p split=all"), ("cytopath", " -p split=valid"), ("kather", "")])
def test_a_made_up_data_set_comes_with_a_command_that_takes_it(tmp_path, name, split):
    from typer.testing import CliRunner

    from medclip_nb.cli.main import app
    from medclip_nb.experiments import open_data
    said = CliRunner().invoke(app, ["data", "make", name, "--out", str(tmp_path / "data")]).output
    assert f"-p data_root={tmp_path / 'data'}{split}\n" in said
    measured = split.removeprefix(" -p split=") or "test"
    assert len(open_data(name, tmp_path / "data", measured=measured).part(measured))


def test_two_images_are_measured_though_they_cannot_be_divided(tmp_path):
    (table := tmp_path / "t.csv").write_text("image,label\na.png,x\nb.png,y\n")
    few = load_manifest("csv", table)
    assert few.unsplit and len(few.part("all")) == 2
    with pytest.raises(InputError, match="no rows in split 'train'.* too few to divide by image; give a column split"):
        few.part("train")
    with pytest.raises(InputError, match="Cannot make 3 splits out of 2"): load_manifest("csv", table, split_by="image")
