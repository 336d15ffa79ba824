"Every way to train, on a small table of a user's own, through the installed command"
import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from PIL import Image

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
DEFAULTS = {"dataset": "csv", "device": "cpu", "epochs": 2, "batch_size": 16, "lr": 1e-3, "n_boot": 100}
HEAD = {"mode": "head", "label": "shade", "epochs": None, "batch_size": None, "lr": None} # Its optimum needs no steps


def call(command, table, out, *more, **params):
    "The command line of a run"
    params = {**DEFAULTS, "data_root": table, **params}
    given = [x for k, v in params.items() if v is not None for x in ("-p", f"{k}={v}")]
    return [command, "run", "finetune", *given, "--out", str(out), *more]


def run(command, table, out, code=0, **params):
    done = subprocess.run(call(command, table, out, **params), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    if code: return done.stdout + done.stderr
    return json.loads((out / "metrics.json").read_text()), (out / "report.html").read_text()


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "Bright or dark squares, on the left or on the right, of sixteen patients"
    folder, rng, rows = tmp_path_factory.mktemp("own data"), np.random.default_rng(0), []
    for i in range(64):
        bright, right = i // 2 % 2, i % 2
        pixels = rng.normal(80, 5, (64, 72))
        pixels[20:44, 36 * right + 6:36 * right + 30] += [-60, 120][bright]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
        rows.append({"image": f"{i:03d}.png", "shade": ["dark", "bright"][bright], "number": bright,
                     "group": f"patient {i // 4}",
                     "caption": f"A {['dark', 'bright'][bright]} square on the {['left', 'right'][right]}"})
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    pd.DataFrame(rows).drop(columns="caption").to_csv(folder / "images.csv", index=False)
    return folder / "table.csv"


@pytest.mark.parametrize("params, metric, files", [
    ({"objective": "labels", "label": "shade", "wise_ft": True, "ema": 0.5, "patience": 1}, "image_to_text_R@10",
     {"history.jsonl", "checkpoint"}),
    ({"mode": "lora", "towers": "[text]", "rank": 4, "alpha": 2, "betas": "[0.9, 0.999]", "eps": 1e-8,
      "clip_grad": 0.5}, "text_to_image_R@10",
     {"history.jsonl", "checkpoint"}),
    ({"mode": "locked-image", "objective": "siglip", "augment": False, "schedule": "linear"}, "image_to_text_R@1",
     {"history.jsonl", "checkpoint"}),
    ({"mode": "locked-text", "objective": "prompts", "label": "shade", "templates": "['a {} square']"},
     "balanced_accuracy", {"history.jsonl", "checkpoint"}),
    ({**HEAD, "label": "number", "hidden": 8}, "balanced_accuracy", {"head"}),
    ({"mode": "head", "label": "shade", "solver": "adamw", "epochs": 20, "batch_size": 8, "lr": 1e-2, "warmup": 0.1,
      "betas": "[0.9, 0.99]", "eps": 1e-7}, "balanced_accuracy", {"head", "history.jsonl", "history.csv"}),
    ({"mode": "head", "label": "shade", "backbone": "trained", "max_steps": 3, "table": "images.csv"},
     "balanced_accuracy", {"history.jsonl", "checkpoint", "head"})],
    ids=["full, labels, WiSE", "lora", "locked-image, siglip", "locked-text, prompts", "head", "head in epochs",
         "head and tower"])
def test_modes(command, table, tmp_path, params, metric, files):
    found, page = run(command, table.with_name(params.pop("table", table.name)), tmp_path / "out", **params)
    assert np.isfinite(found["metrics"][metric]["value"]) and found["details"]["before"]
    if metric.startswith(("image", "text")): # A cut-off as large as the gallery finds everything
        chance = {name: found["details"]["chance"][name] for name in found["details"]["headline"]}
        assert len(chance) == 2 and max(chance.values()) <= 0.5
        assert all(f"R@{k}" not in name for name in chance for k in (10, 50)) and "by chance it would be" in page
    assert files <= {p.name for p in (tmp_path / "out").iterdir()} and not (tmp_path / "out" / "state").exists()
    assert 0 <= found["details"]["trained_share"] <= 1
    if params.get("mode") == "lora":
        assert found["details"]["adapters"]["scale"] == 0.5 and "0.5" in page
        assert (tmp_path / "out" / "checkpoint" / "adapter_config.json").is_file()
    if params.get("wise_ft"): assert 0 <= found["details"]["wise_alpha"] <= 1 and "best on validation" in page
    if params.get("mode") == "head": assert found["metrics"]["balanced_accuracy"]["value"] > 0.9
    if params.get("solver"):
        assert len((tmp_path / "out" / "history.jsonl").read_text().splitlines()) == 20
        history = pd.read_csv(tmp_path / "out" / "history.csv")
        assert list(history) == ["epoch", "val_loss", "f1_weighted", "f1_macro"] and len(history) == 20


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    "A BERT with random weights and a tokenizer that knows the captions, as the hub has it"
    import transformers
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a dark bright square on the left right".split()]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    config = transformers.BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=64, max_position_embeddings=7)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_other_towers(command, table, bert, tmp_path):
    "Two towers from two libraries: one folder afterwards, which everything can load, wherever it is moved"
    from medclip_nb.models import load_model
    found, page = run(command, table, tmp_path / "out", image_tower="timm:test_resnet", text_tower=f"hf:{bert}",
                      embed_dim=24, long_text="chunks", epochs=1)
    assert found["details"]["towers"] == "timm:test_resnet + tiny-bert" and found["details"]["embed_dim"] == 24
    assert (found["details"]["long_text"] == "chunks" and found["details"]["cut_share"] == 1
            and "100.0% of the different training texts" in page)
    checkpoint = shutil.move(tmp_path / "out" / "checkpoint", tmp_path / "moved")
    shutil.move(bert, bert.with_name("gone"))
    try:
        clip = load_model(str(checkpoint), device="cpu")
        assert ((clip.dim, clip.context_length, clip.long_text) == (24, 7, "chunks")
                and clip.config["model_cfg"]["vision_cfg"]["timm_model_name"] == "test_resnet")
        given = {k: v for k, v in DEFAULTS.items()
                 if k in ("dataset", "device", "n_boot")} | {"data_root": table, "model": checkpoint,
                                                             "data_options": "{split_by: group}"}
        done = subprocess.run([command, "run", "retrieval", *(x for k, v in given.items() for x in ("-p", f"{k}={v}")),
                               "--out", str(tmp_path / "retrieval")], capture_output=True, text=True, env=ENVIRONMENT)
        assert done.returncode == 0, done.stdout + done.stderr
        elsewhere = json.loads((tmp_path / "retrieval" / "metrics.json").read_text())["metrics"]
        assert elsewhere["image_to_text_R@1"] == found["metrics"]["image_to_text_R@1"]
    finally: shutil.move(bert.with_name("gone"), bert)


def test_scratch_beside_the_image_tower_of_the_model(command, table, tmp_path):
    from medclip_nb.models import load_model
    run(command, table, tmp_path / "out", text_tower="scratch", max_steps=2)
    clip = load_model(str(tmp_path / "out" / "checkpoint"), device="cpu")
    assert (clip.dim == 128 and clip.config["model_cfg"]["vision_cfg"]["timm_model_name"] == "medclip_starter"
            and clip.config["model_cfg"]["text_cfg"]["width"] == 256)


RESULTS = ("report.ipynb", "report.html", "metrics.json", "predictions.parquet", "history.jsonl",
           "checkpoint/open_clip_model.safetensors", "checkpoint/training.json")
LONG = {"epochs": 4, "batch_size": 8, "save_every": 1, "flip": 0.5, "ema": 0.9, "lr": 3e-3}


@pytest.fixture(scope="module")
def whole(command, table, tmp_path_factory):
    "The run that nobody stopped"
    out = tmp_path_factory.mktemp("whole") / "finetune"
    run(command, table, out, **LONG)
    return {name: (out / name).read_bytes() for name in RESULTS}


def kill_in_training(process, folder, kernel=False):
    "Kill a run, or its kernel, in the middle of the second epoch or later"
    epochs = lambda: max((len(p.read_text().splitlines()) for p in folder.glob(".partial/*/history.jsonl")), default=0)
    end = time.monotonic() + 240
    while not (epochs() >= 1 and list(folder.glob(".partial/finetune.state.*/*/state.pt"))):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)
    kernels = [c.pid for c in psutil.Process(process.pid).children(recursive=True)
               if "ipykernel_launcher" in " ".join(c.cmdline()) and not c.children()] # The server that forks has one
    os.kill(kernels[0] if kernel else process.pid, signal.SIGKILL)
    return process.communicate(timeout=120), process.returncode


def start(arguments):
    "A process of its own, with a kernel of its own: forks die after those who stand for them"
    own = {k: v for k, v in ENVIRONMENT.items() if k != "JUPYTER_PATH"}
    return subprocess.Popen(arguments, text=True, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("kernel", [False, True], ids=["runner", "kernel"])
def test_killed_and_resumed(command, installed, table, whole, tmp_path, kernel):
    "kill -9 of the run or of its kernel, then --resume: every byte as if nothing had happened"
    out = tmp_path / "finetune"
    (_, said), code = kill_in_training(start(call(installed, table, out, **LONG)), tmp_path, kernel)
    if kernel: assert code == 1 and "the same run with --resume continues from it" in said
    assert not out.exists() and list(tmp_path.glob(".partial/finetune.state.*/*/state.pt"))
    refused = subprocess.run(call(command, table, out, "--resume", **{**LONG, "lr": 1e-3}), capture_output=True,
                             text=True, env=ENVIRONMENT)
    assert refused.returncode == 2 and "the run that was killed differs in parameter lr" in refused.stderr
    done = subprocess.run(call(command, table, out, "--resume", **LONG), capture_output=True, text=True,
                          env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in RESULTS: assert (out / name).read_bytes() == whole[name], name
    assert not (tmp_path / ".partial").exists()


def test_a_suite_goes_on_by_itself(installed, table, whole, tmp_path):
    "The second call of a suite continues the training that died in the first"
    suite = tmp_path / "mine.yaml"
    suite.write_text(yaml.safe_dump(
        {"name": "mine", "runs": [{"name": "finetune", "template": "finetune",
                                   "params": {**DEFAULTS, "data_root": str(table), **LONG}}]}, sort_keys=False))
    arguments, folder = [installed, "suite", str(suite), "--out", str(tmp_path)], tmp_path / "mine"
    kill_in_training(start(arguments), folder)
    before = next(folder.glob(".partial/finetune.state.*/*/state.pt")).stat()
    second = start(arguments)
    end = time.monotonic() + 240
    while not [p for p in folder.glob(f".partial/finetune.state.{second.pid}/*/state.pt")
               if p.stat().st_ino == before.st_ino]:
        assert second.poll() is None and time.monotonic() < end, "the state was not taken over"
        time.sleep(0.005)
    said = second.communicate(timeout=300)
    assert second.returncode == 0, said
    link = b'<p class="quiet"><a href="../index.html">All reports of this suite</a></p>' # The run alone has none
    page = (folder / "finetune" / "report.html").read_bytes()
    assert page.count(link) == 1 and page.replace(link, b"") == whole["report.html"]
    for name in {*RESULTS} - {"report.html"}: assert (folder / "finetune" / name).read_bytes() == whole[name], name


@pytest.mark.parametrize("params, message",
                         [({"mode": "lorra"}, "Did you mean 'lora'"),
                          ({**HEAD, "label": ""}, "Columns with few different values: 'shade', 'number'"),
                          ({"objective": "siglipp"}, "Did you mean 'siglip'"),
                          ({"mode": "lora"}, "it has some for conv. Add one of these to the targets"),
                          ({"image_tower": "timm:test_resnets"}, "Did you mean 'test_resnet"),
                          ({"text_tower": "timm:test_vit"}, "is an image tower"),
                          ({"text_tower": "hf:no/such/folder"}, "could not be found"),
                          ({"image_tower": "RN50x9"}, "Unknown model 'RN50x9'"),
                          ({"mode": "head", "label": "shade"}, "parameter 'lr' has no effect here: it needs another"),
                          ({**HEAD, "solver": "sgd"}, "There is: 'adamw', 'auto'"),
                          ({"rank": 4}, "parameter 'rank' has no effect here: it needs mode=lora"),
                          ({**HEAD, "eps": 1e-7}, "parameter 'eps' has no effect here: it needs another mode"),
                          ({"betas": "[0.9]"}, "betas must be two numbers"), ({"eps": -1}, "eps must be above 0"),
                          ({"image_weights": "w.pth"}, "w.pth"), ({"long_text": "chunk"}, "Did you mean 'chunks'")])
def test_mistakes_are_one_message(command, table, tmp_path, params, message):
    assert message in run(command, table, tmp_path / "out", code=2, **params)
