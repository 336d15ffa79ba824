"Training as a process: killed at any moment and continued, on several processes, into trackers"
import json
import os
import signal
import subprocess
import time

import forks
import numpy as np
import pandas as pd
import pytest
from PIL import Image

# Prints the hash of the final weights. Dropout makes the random numbers matter; the sleep makes room for a kill.
WORKER = """
import json, os, sys, time
import torch
from medclip_nb.trainers import loop as trainers
from medclip_nb.core import seed_everything
from medclip_nb.datasets import load_manifest
from medclip_nb.models import load_model
from medclip_nb.images import Augment

torch.set_num_threads(1)
table, out, options, model, wait = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4], float(sys.argv[5])
manifest = load_manifest("csv", table)
seed_everything(0)
clip = load_model(model, device="cpu")

class Slow(Augment):
    def __call__(self, *args):
        time.sleep(wait)
        return super().__call__(*args)

options.setdefault("augment", Slow())
training = trainers.train(clip, manifest.part("train"), manifest.part("valid"), out, **options)
os.write(1, f"hash {clip.weights_hash()} {training.best_epoch}\\n".encode())  # In one piece, whoever else writes
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MEDCLIP_NB_BATCH": "1", "CUDA_VISIBLE_DEVICES": ""}
OPTIONS = {"epochs": 3, "batch_size": 6, "lr": 2e-3, "flip": 0.5, "ema": 0.9, "wise_ft": True}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "Forty pictures with captions, 28 to learn from; 28 is not a multiple of the batches below"
    folder, rng, rows = tmp_path_factory.mktemp("squares"), np.random.default_rng(0), []
    for i in range(40):
        pixels = rng.normal(90, 4, (40, 40))
        pixels[5:35, 20 * (i // 2 % 2):20 * (i // 2 % 2) + 20] += [-60, 120][i % 2]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png",
                     "caption": f"a {['dark', 'bright'][i % 2]} square on the {['left', 'right'][i // 2 % 2]}",
                     "items": json.dumps([f"{['Dark', 'Bright'][i % 2]}.", f"{['Left', 'Right'][i // 2 % 2]} side."]),
                     "label": ["dark", "bright"][i % 2], "group": i // 4, "split": "train" if i < 28 else "valid"})
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    return folder / "table.csv"


def tiny(folder, **vision):
    "A tiny CLIP without batch norm, saved as a folder"
    import open_clip
    import safetensors.torch
    import torch
    config = {"embed_dim": 16,
              "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16, **vision},
              "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}
    torch.manual_seed(0)
    safetensors.torch.save_file({k: v.contiguous() for k, v in open_clip.CLIP(**config).state_dict().items()},
                                folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "Its patches drop out, so that torch's own random numbers matter"
    return tiny(tmp_path_factory.mktemp("dropping"), patch_dropout=0.25)


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    "No dropout: any division of a batch computes the same"
    return tiny(tmp_path_factory.mktemp("steady"))


LAUNCHERS = {"torchrun": [forks.forked(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"],
             "accelerate": [forks.forked(), "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu",
                            "--main_process_port", "0", "--num_processes"]}


def start(table, model, out, options, wait=0.0, processes=1, launcher="torchrun"):
    launch = [forks.forked()] if processes == 1 else [*LAUNCHERS[launcher], str(processes)]
    script = out.with_suffix(".py")
    script.write_text(WORKER)
    return subprocess.Popen([*launch, str(script), str(table), str(out), json.dumps(options), str(model), str(wait)],
                            text=True, env=ENVIRONMENT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def ended(process):
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, said + errors
    return [line for line in said.splitlines() if line.startswith("hash")]


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_for(seen, process, seconds=120):
    end = time.monotonic() + seconds
    while not seen():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.0005)


@pytest.fixture(scope="module")
def whole(table, model, tmp_path_factory):
    "The training that nobody stopped"
    out = tmp_path_factory.mktemp("whole") / "out"
    return ended(start(table, model, out, OPTIONS)), (out / "history.jsonl").read_bytes()


@pytest.mark.parametrize("moment", ["step", "save", "twice"])
def test_killed_and_continued(table, model, whole, tmp_path, moment):
    out, options = tmp_path / "out", {**OPTIONS, "save_every": 1 if moment == "save" else 3}
    for _ in range(2 if moment == "twice" else 1):
        process = start(table, model, out, {**options, "resume": True}, wait=0.15)
        state = out / "state" / "state.pt"
        old = state.stat().st_mtime_ns if state.exists() else 0
        if moment == "save":  # the second state is being written
            wait_for(lambda: state.exists() and list(out.glob("state/.state.pt.*")), process)
        else:
            wait_for(lambda: state.exists() and state.stat().st_mtime_ns > old, process)
            time.sleep(0.2)
        kill(process)
    if moment == "save": assert list(out.glob("state/.state.pt.*")), "the kill came after the save"
    assert state.is_file()
    said = ended(start(table, model, out, {**options, "resume": True}))
    assert (said, (out / "history.jsonl").read_bytes()) == whole
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint", "history.jsonl"]


@pytest.mark.parametrize("processes, objective, texts, launcher",
                         [(2, "clip", "caption", "accelerate"), (3, "clip", "each", "accelerate"),
                          (2, "prompts", "caption", "torchrun"), (2, "labels", "both", "torchrun")])
def test_processes_share_a_batch(table, steady, tmp_path, processes, objective, texts, launcher):
    """However they are started: the same rows, texts, mirrors and variations, the same losses and gradients, whatever
    the number of processes"""
    from medclip_nb.models import load_model
    options = {"epochs": 2, "batch_size": 7, "lr": 1e-3, "flip": 0.5, "objective": objective, "label": "label",
               "texts": texts, "clip_grad": 1e9}
    found = {}
    for n in (1, processes):
        said = ended(start(table, steady, tmp_path / str(n), options, processes=n, launcher=launcher))
        assert len(said) == n and len(set(said)) == 1, "every process ends with the same weights"
        found[n] = pd.read_json(tmp_path / str(n) / "history.jsonl", lines=True)
        assert sorted(p.name for p in (tmp_path / str(n)).iterdir()) == ["checkpoint", "history.jsonl"]
    for column in ("train_loss", "grad_norm", "logit_scale", "valid_mrr"):
        np.testing.assert_allclose(found[1][column], found[processes][column], rtol=2e-4, err_msg=column)
    weights = [load_model(str(tmp_path / str(n) / "checkpoint"), device="cpu").model.state_dict()
               for n in (1, processes)]
    if len(set(f["epoch"][f["valid_mrr"].idxmax()] for f in found.values())) == 1:
        assert max((weights[0][k] - weights[1][k]).abs().max().item() for k in weights[0]) < 1e-3


def test_chunks_train_like_the_whole_batch(table, steady, tmp_path):
    "Features in chunks, their activations again in the backward pass: the losses of the big batch"
    found = {}
    for chunk in (0, 4):
        ended(start(table, steady, tmp_path / str(chunk), {"epochs": 2, "batch_size": 14, "lr": 1e-3, "chunk": chunk}))
        found[chunk] = pd.read_json(tmp_path / str(chunk) / "history.jsonl", lines=True)
    for column in ("train_loss", "grad_norm", "logit_scale"):
        np.testing.assert_allclose(found[0][column], found[4][column], rtol=1e-4, err_msg=column)


@pytest.fixture
def squares(table):
    from medclip_nb.datasets import load_manifest
    return load_manifest("csv", table)


def remembering():
    "A tracker that remembers what Accelerate tells it"
    from accelerate.tracking import GeneralTracker

    class Remembers(GeneralTracker):
        name, requires_logging_directory, tracker = "remembers", False, None
        def __init__(self): self.told = []
        def start(self): self.told.append("start")
        def store_init_configuration(self, values): self.told.append(values)
        def log(self, values, step=None, **kwargs): self.told.append((step, values))
        def finish(self): self.told.append("finish")
    return Remembers()


def test_a_tracker_hears_every_epoch(squares, model, tmp_path):
    "Also those before the training was stopped; and it is closed when a training fails"
    from medclip_nb.models import load_model
    from medclip_nb.trainers import loop as trainers
    rows = [squares.part(s) for s in ("train", "valid")]
    options = {"epochs": 3, "batch_size": 14, "augment": None, "lr": 1e-3}
    for stopped in (False, True):
        tracker, clip = remembering(), load_model(str(model), device="cpu")
        if stopped:  # after the second epoch
            run = trainers.begin_run(clip, *rows, tmp_path / "out", trainers.TrainConfig(**options))
            trainers._start(run)
            for _ in range(2): trainers._epoch(run)
            clip = load_model(str(model), device="cpu")
        trainers.train(clip, *rows, tmp_path / "out", **options, report_to=tracker, resume=stopped)
        begin, settings, *epochs, end = tracker.told
        assert (begin, end, [step for step, _ in epochs]) == ("start", "finish", [2, 4, 6])
        assert (settings["lr"], settings["training_rows"], settings["augment"]) == (1e-3, 28, "None")
        history = pd.read_json(tmp_path / "out" / "history.jsonl", lines=True)
        np.testing.assert_allclose([values["valid_R_at_1"] for _, values in epochs], history["valid_R@1"], rtol=1e-5)
    tracker = remembering()
    with pytest.raises(FloatingPointError):
        trainers.train(load_model(str(model), device="cpu"), *rows, tmp_path / "wild",
                       **{**options, "lr": 1e30, "clip_grad": 1e9, "warmup": 0.0}, report_to=tracker)
    assert tracker.told[0] == "start" and tracker.told[-1] == "finish"


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_training_killed_before_an_epoch_is_closed(squares, model, tmp_path, epoch, monkeypatch):
    "All steps of the epoch are in the stored state: the epoch is validated when the training goes on, the last one too"
    from medclip_nb.core import seed_everything
    from medclip_nb.models import load_model
    from medclip_nb.trainers import loop as trainers
    rows = [squares.part(s) for s in ("train", "valid")]
    options = {"epochs": 2, "batch_size": 14, "augment": None, "lr": 1e-3, "save_every": 1}
    def fresh():
        seed_everything(0)
        return load_model(str(model), device="cpu")
    expected = trainers.train(fresh(), *rows, tmp_path / "whole", **options)
    close = trainers.close_epoch
    def killed(run):
        if run.progress.epoch == epoch: raise KeyboardInterrupt
        close(run)
    with monkeypatch.context() as meanwhile, pytest.raises(KeyboardInterrupt):
        meanwhile.setattr(trainers, "close_epoch", killed)
        trainers.train(fresh(), *rows, tmp_path / "out", **options)
    found = trainers.train(fresh(), *rows, tmp_path / "out", **options, resume=True)
    pd.testing.assert_frame_equal(found.history, expected.history)
    for name in ("checkpoint/open_clip_model.safetensors", "history.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("tracker, files",
                         [("wandb", "wandb/offline-run-*/*.wandb"), ("mlflow", "mlflow.db"),
                          ("trackio", "trackio/medclip_nb.db")])
def test_trackers_stay_in_the_folder_of_the_run(table, model, tmp_path, monkeypatch, tracker, files):
    "Nobody is asked, nothing is sent, a second training is a second run"
    pytest.importorskip(tracker)
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        ended(start(table, model, tmp_path / name, {"max_steps": 5, "batch_size": 8, "report_to": tracker}))
        assert list((tmp_path / name).glob(files))
    assert {p.name for p in tmp_path.iterdir()} == {"first", "second", "first.py", "second.py"}


def test_tensorboard(table, model, tmp_path):
    pytest.importorskip("tensorboard")
    ended(start(table, model, tmp_path / "out", {"max_steps": 5, "batch_size": 8, "report_to": "tensorboard"}))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = next((tmp_path / "out" / "medclip_nb").glob("events*"))
    found = EventAccumulator(str(events)).Reload()
    history = pd.read_json(tmp_path / "out" / "history.jsonl", lines=True)
    assert history["step"].tolist() == [3, 5]
    np.testing.assert_allclose([e.value for e in found.Scalars("valid_mrr")], history["valid_mrr"], rtol=1e-5)
