"""Training on items of reports: several processes against one, states, checkpoints, studies, and validation against
brute force"""
import json
import os
import subprocess
from pathlib import Path

import forks
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from medclip_nb.core import InputError, seed_everything
from medclip_nb.datasets import Manifest, text_id
from medclip_nb.images import StudyPreprocess
from medclip_nb.models import STARTER, add_lora, load_model, lock, save_checkpoint, start_from_slices, study_model
from medclip_nb.trainers import (
    ItemGallery,
    Itemized,
    ItemTexts,
    TrainConfig,
    begin_run,
    best_ranks,
    item_gallery,
    item_values,
    swap_sides,
    train,
)
from medclip_nb.trainers import (
    loop as trainers,
)

TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
VOLUME = {"width": 48, "depth": 3, "heads": 4, "patch_size": (8, 16, 16), "grid": (1, 2, 2),
          "levels": ("slice", "scan", "study"), "max_scans": 8}
ITEMS = ["A bright square on the left.", "A dark square on the left.", "A bright square on the right.",
         "A dark square on the right."]
NORMAL = "No abnormality detected."
BASE = {"objective": "itemized", "items_per_image": 3, "epochs": 2, "batch_size": 7, "lr": 1e-3, "key_token_ratio": 0.3}


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """Forty pictures with up to four squares, and forty studies of one to three series; 28 of each to learn from, some
    without items"""
    folder, rng, rows = tmp_path_factory.mktemp("squares"), np.random.default_rng(0), []
    for i in range(40):
        items = [ITEMS[n] for n in rng.permutation(4)[:i % 4]] or ([NORMAL] if i % 8 == 0 else [])
        pixels = rng.normal(90, 4, (32, 32))
        for text in items:
            if text != NORMAL:
                pixels[4 + 14 * ("dark" in text):14 + 14 * ("dark" in text),
                       4 + 14 * ("right" in text):14 + 14 * ("right" in text)] += 100
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        series = {f"s{n}": f"{i}-{n}.pt" for n in range(1 + i % 3)}
        for name in series.values():
            torch.save(torch.from_numpy(rng.normal(size=(8, 32, 32)).astype(np.float32)), folder / name)
        rows.append({"image": f"{i}.png", "series": series, "caption": " ".join(items) or "Nothing said.",
                     "items": items, "group": f"g{i}", "split": "train" if i < 28 else "valid"})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def manifest(table, split, kind="image"):
    rows = pd.DataFrame(json.loads((table / "rows.json").read_text())).drop(
        columns="series" if kind == "image" else "image")
    part = Manifest(rows[rows["split"] == split].reset_index(drop=True))
    part.root, part.dataset, part.split_source = str(table), "squares", "made"
    return part


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    "A transformer for pictures and one for studies, without dropout, as folders"
    import open_clip
    found = {name: tmp_path_factory.mktemp(name) for name in ("image", "series")}
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    torch.manual_seed(0)
    safetensors.torch.save_file({k: v.contiguous() for k, v in open_clip.CLIP(**config).state_dict().items()},
                                found["image"] / "open_clip_model.safetensors")
    (found["image"] / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}))
    save_checkpoint(study_model(VOLUME, TEXT, dim=16, preprocess=StudyPreprocess(percentiles=None, size=(8, 32, 32)),
                                device="cpu"), found["series"] / "model")
    return {"image": str(found["image"]), "series": str(found["series"] / "model")}


def begun(table, models, out, kind="image", change=lambda clip: None, **options):
    "A run at its first batch"
    seed_everything(0)
    clip = load_model(models[kind], device="cpu")
    change(clip)
    config = TrainConfig(**{**BASE, "pooling_heads": 4, **options})
    run = begin_run(clip, manifest(table, "train", kind), manifest(table, "valid", kind), out, config)
    trainers.training_mode(run)
    rows, images = next(iter(trainers.batches(run)))
    return run, trainers.draw_batch(run, rows, images)


def trained(table, models, out, kind="image", change=lambda clip: None, **options):
    seed_everything(0)
    clip = load_model(models[kind], device="cpu")
    change(clip)
    return clip, train(clip, manifest(table, "train", kind), manifest(table, "valid", kind), out,
                       **{**BASE, "pooling_heads": 4, **options})


# Several processes

CASES = {
    "plain": ("image", {}),
    "everything": ("image",
                   {"sampling": "diverse", "flip": 0.5, "token_keep_prob": 0.7, "worst_positive_factor": 1.5,
                    "chunk": 2, "clip_grad": 1e9}),
    "flair": ("image", {"item_weights": {"ila": 0.5, "mps": 0.5}, "divisor": "items", "normal_check": False,
                        "metric": "valid_mrr"}),
    "studies": ("series", {"augment": None, "token_keep_prob": 0.7}),
    "drawn series": ("series", {"num_series": 2, "flip": 0.5}),
    "studies, clip": ("series", {"objective": "clip", "num_series": 2}),
    "studies, siglip": ("series", {"objective": "siglip"}),
}

WORKER = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import test_item_training as tests
from accelerate import PartialState
torch.set_num_threads(1)
table, models, out = tests.Path(sys.argv[2]), json.loads(sys.argv[3]), tests.Path(sys.argv[4])
found = {name: tests.case(table, models, out / name.replace(" ", "-"), kind, options)
         for name, (kind, options) in tests.CASES.items()}
torch.save(found, out / f"{PartialState().process_index}.pt")
"""


def case(table, models, out, kind, options):
    "What the first batch costs, its gradients, and the history of a training"
    run, batch = begun(table, models, out, kind, **options)
    losses = trainers.reduce_means(run, trainers.backward(run, batch))
    trainers.average_gradients(run.module.parameters())
    gradients = {name: p.grad.clone() for name, p in run.clip.model.named_parameters() if p.grad is not None}
    clip, training = trained(table, models, out, kind, **options)
    return {"losses": losses, "gradients": gradients, "history": training.history.to_dict("list"),
            "hash": clip.weights_hash()}


@pytest.fixture(scope="module")
def alone(table, models, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    return {name: case(table, models, out / name.replace(" ", "-"), *how) for name, how in CASES.items()}


@pytest.fixture(scope="module", params=[2, 3])
def together(request, table, models, tmp_path_factory):
    out = tmp_path_factory.mktemp("together")
    (out / "worker.py").write_text(WORKER)
    command = [forks.forked(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(request.param),
               str(out / "worker.py"),
               str(Path(__file__).parent), str(table), json.dumps(models), str(out)]
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(out / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", CASES)
def test_processes_train_as_one(alone, together, name):
    "Batches of seven, so that shares are uneven: losses and gradients of the first, every column of the history"
    expected = alone[name]
    for found in (process[name] for process in together):
        assert found["hash"] == together[0][name]["hash"], "every process ends with the same weights"
        assert (found["losses"].keys() == expected["losses"].keys()
                and found["gradients"].keys() == expected["gradients"].keys())
        for term, value in expected["losses"].items():
            assert found["losses"][term] == pytest.approx(value, rel=1e-5, abs=1e-6)
        for key, gradient in expected["gradients"].items():
            torch.testing.assert_close(found["gradients"][key], gradient, rtol=1e-3,
                                       atol=2e-5 * max(1.0, gradient.abs().max().item()), msg=lambda m: f"{key}: {m}")
        for column, values in expected["history"].items():
            np.testing.assert_allclose(found["history"][column], values, rtol=2e-3, atol=1e-5, err_msg=column)
    if "siglip" not in name and "clip" not in name:
        assert expected["gradients"]["visual_proj.attn.in_proj_weight"].abs().max() > 1e-4


# States and checkpoints

class Killed(Exception): pass


@pytest.mark.parametrize("kind, options",
                         [("image", {"sampling": "diverse", "flip": 0.5, "token_keep_prob": 0.7, "ema": 0.9}),
                          ("series", {"num_series": 2, "flip": 0.5, "wise_ft": True})])
def test_killed_and_continued(table, models, tmp_path, monkeypatch, kind, options):
    "Bit for bit, terms of the losses included, also in the middle of an epoch"
    options = {"epochs": 3, "save_every": 1, "lr": 2e-3, **options}
    whole, _ = trained(table, models, tmp_path / "whole", kind, **options)
    original, steps = trainers.clamp_scale, []

    def dies(model):
        original(model)
        steps.append(1)
        if len(steps) == 7: raise Killed
    monkeypatch.setattr(trainers, "clamp_scale", dies)
    with pytest.raises(Killed): trained(table, models, tmp_path / "killed", kind, **options)
    monkeypatch.setattr(trainers, "clamp_scale", original)
    again, _ = trained(table, models, tmp_path / "killed", kind, **options, resume=True)
    assert again.weights_hash() == whole.weights_hash()
    assert (tmp_path / "killed" / "history.jsonl").read_bytes() == (tmp_path / "whole" / "history.jsonl").read_bytes()
    monkeypatch.setattr(trainers, "clear_state", lambda *_, **__: None)
    trained(table, models, tmp_path / "other", kind, **options, max_steps=1)
    with pytest.raises(InputError, match="token_keep_prob differ"):
        trained(table, models, tmp_path / "other", kind, **options | {"token_keep_prob": 0.9}, max_steps=1, resume=True)


@pytest.mark.parametrize("kind", ["image", "series"])
def test_a_checkpoint_brings_everything_back(table, models, tmp_path, kind):
    clip, training = trained(table, models, tmp_path / "out", kind)
    again = load_model(str(training.checkpoint), device="cpu")
    assert again.weights_hash() == clip.weights_hash() and again.pooling.heads == 4
    assert again.model.logit_bias == clip.model.logit_bias != -10
    rows, texts = manifest(table, "valid", kind), clip.encode_texts(ITEMS)
    assert torch.equal(again.encode_texts(ITEMS), texts)
    images = ([rows.paths()[:5]] if kind == "image"
              else [{n: Path(table, p) for n, p in s.items()} for s in rows["series"][:5]])
    tokens = [model.encode_image_tokens(images[0] if kind == "image" else images)[1] for model in (clip, again)]
    for a, b in zip(clip.pooling(texts, tokens[0], return_maps=True),
                    again.pooling(texts, tokens[1], return_maps=True)): assert torch.equal(a, b)
    more, _ = trained(table, {kind: str(training.checkpoint)}, tmp_path / "more", kind, pooling_heads=2)
    assert more.pooling.heads == 4, "a model that has a pooling goes on with it"


def test_a_new_pooling_depends_on_the_seed_alone(table, models, tmp_path):
    runs = []
    for n, seed in enumerate((3, 3, 4)):
        torch.manual_seed(n)
        clip = load_model(models["image"], device="cpu")
        before = torch.get_rng_state()
        runs.append(Itemized(clip, TrainConfig(**{**BASE, "pooling_heads": 4, "seed": seed}),
                             manifest(table, "train")).parts[0])
        assert torch.equal(before, torch.get_rng_state())
    assert runs[0].weights_hash() == runs[1].weights_hash() != runs[2].weights_hash()


# What is learned from

@pytest.mark.parametrize("name", ["ila", "mps", "iis", "kta"])
def test_each_loss_alone(table, models, tmp_path, name):
    clip, training = trained(table, models, tmp_path / "out", item_weights={name: 1.0}, epochs=3, lr=3e-3)
    history = training.history
    assert (np.allclose(history[f"train_{name}"], history["train_loss"])
            and history["train_loss"].iloc[-1] < history["train_loss"].iloc[0])
    assert all((history[f"train_{other}"] == 0).all() for other in {"ila", "mps", "iis", "kta"} - {name})


def test_the_history_holds_losses_without_their_weights(table, models, tmp_path):
    weights = {"ila": 0.5, "mps": 0.4, "iis": 0.3, "kta": 0.1}
    _, training = trained(table, models, tmp_path / "out", item_weights=weights, epochs=2)
    history = training.history
    terms = history[[f"train_{name}" for name in weights]]
    assert np.allclose(terms @ list(weights.values()), history["train_loss"], rtol=1e-5)
    assert (terms.sum(axis=1) > 1.5 * history["train_loss"]).all()


def test_the_text_tower_reads_each_different_text_once(table, models, tmp_path, monkeypatch):
    run, batch = begun(table, models, tmp_path, batch_size=28, items_per_image=4, augment=None)
    seen, forward = [], type(run.clip).forward_texts
    monkeypatch.setattr(type(run.clip), "forward_texts",
                        lambda self, tokens: seen.append(len(tokens)) or forward(self, tokens))
    trainers.backward(run, batch)
    said = {text for items in manifest(table, "train")["items"] for text in items}
    assert sum(seen) == len(said) == 5 and batch.drawn.text_mask.sum() > 30
    calls = []
    tokenizer = run.clip.tokenizer
    run.clip.tokenizer = lambda texts, *a, **k: calls.append(len(texts)) or tokenizer(texts, *a, **k)
    for epoch in (1, 2, 3): run.objective.items.draw(batch.rows, epoch)
    assert not calls, "tokens are made once"


@pytest.mark.parametrize("sampling", ["first", "random", "diverse"])
def test_a_batch_is_what_its_rows_say(table, models, tmp_path, sampling):
    "Every slot has a text of its own image, mirrored where the image is; ids and padding agree with it"
    run, batch = begun(table, models, tmp_path, batch_size=28, sampling=sampling, merge=2, flip=0.5, augment=None)
    drawn, clip, reports = batch.drawn, run.clip, manifest(table, "train")["items"]
    assert batch.mirrored.any() and not batch.mirrored.all()
    for row, back, index, mask, ids in zip(batch.rows.tolist(), batch.mirrored, drawn.index, drawn.text_mask,
                                           drawn.text_ids):
        own = [swap_sides(text) if back else text for text in reports[row]]
        merged = [". ".join([a.rstrip(". "), b]) for a in own for b in own if a != b] if sampling == "diverse" else []
        tokens = {text: clip.tokenizer([text])[0] for text in own + merged}
        assert mask.sum() == (0 if not own else 3 if sampling == "diverse" else min(3, len(own)))
        for slot in range(3):
            if not mask[slot]: assert ids[slot] == -1
            else:
                assert [text_id(text)
                        for text, t in tokens.items() if torch.equal(t, drawn.texts[index[slot]])] == [ids[slot]]


def test_a_locked_text_tower_is_kept(table, models, tmp_path, monkeypatch):
    "Features of all items once at the start, and again the same training as with the tower in the loop"
    expected, _ = trained(table, models, tmp_path / "looked", change=lambda clip: lock(clip, towers=["text"]))
    monkeypatch.setattr(ItemTexts, "_keep_features", lambda self: None)
    plain, _ = trained(table, models, tmp_path / "plain", change=lambda clip: lock(clip, towers=["text"]))
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(expected.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    diverse, training = trained(table, models, tmp_path / "diverse", change=lambda clip: lock(clip, towers=["text"]),
                                sampling="diverse", chunk=2)
    start = load_model(models["image"], device="cpu").model.state_dict()
    for name, tensor in diverse.model.state_dict().items():
        if name.startswith(("transformer.", "token_embedding", "text_projection")):
            assert torch.equal(tensor, start[name])
    assert training.history["train_loss"].is_monotonic_decreasing


def test_adapters_and_items(table, models, tmp_path):
    clip, training = trained(table, models, tmp_path / "out", change=lambda clip: add_lora(clip, rank=2))
    again = load_model(str(training.checkpoint), device="cpu")
    rows, texts = manifest(table, "valid"), clip.encode_texts(ITEMS)
    torch.testing.assert_close(again.encode_texts(ITEMS), texts, atol=1e-5, rtol=0)
    found = [model.pooling(texts, model.encode_image_tokens(rows.paths())[1]) for model in (clip, again)]
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind, option",
                         [("image", {"chunk": 2}), ("image", {"checkpointing": True}),
                          ("series", {"checkpointing": True}), ("image", {"mixed_precision": "bf16"})])
def test_less_memory_the_same_step(table, models, tmp_path, kind, option):
    given = {"augment": None} if kind == "image" else {}
    steps = {}
    for name, options in (("whole", {}), ("less", option)):
        run, batch = begun(table, models, tmp_path / name, kind, **given, **options)
        losses = trainers.reduce_means(run, trainers.backward(run, batch))
        steps[name] = losses, {n: p.grad for n, p in run.clip.model.named_parameters() if p.grad is not None}
    near = dict(rtol=0.1, atol=0.3) if "mixed_precision" in option else dict(rtol=1e-3, atol=1e-4)
    for term, value in steps["whole"][0].items():
        assert steps["less"][0][term] == pytest.approx(value, rel=near["rtol"])
    assert steps["whole"][1].keys() == steps["less"][1].keys()
    if "mixed_precision" not in option:
        for name, gradient in steps["whole"][1].items():
            torch.testing.assert_close(steps["less"][1][name], gradient, **near)


def test_padding_of_studies_changes_nothing(table, models, tmp_path):
    "A batch of one to three series: the losses are those of tokens without padding"
    # more key tokens than small studies have
    run, batch = begun(table, models, tmp_path, "series", batch_size=6, key_token_ratio=1.0)
    assert batch.images.scan_mask is not None and not batch.images.scan_mask.all()
    run.clip.model.eval()
    state = batch.generator.get_state()
    encode = lambda images: run.objective.encode_images(run.clip, images)
    texts = run.objective.encode_texts(run.clip, run.objective.texts(batch))
    expected = run.objective.loss(batch, encode(batch.images), texts)
    spoilt = encode(batch.images).detach()
    mask = batch.images.token_mask(spoilt.shape[1] - 1)
    spoilt[:, 1:][~mask] = 100 * torch.randn_like(spoilt[:, 1:][~mask])
    batch.generator.set_state(state)
    for name, value in run.objective.loss(batch, spoilt, texts).items():
        torch.testing.assert_close(value, expected[name])
    for i in range(len(batch.rows)):
        alone = encode(batch.images[[i]])[0]
        short = run.clip.forward_images(type(batch.images)(batch.images.volumes[i:i + 1, batch.images.scan_mask[i]]))
        torch.testing.assert_close(alone[0], short[0], atol=1e-5, rtol=1e-4)


def test_studies_in_other_ways(table, models, tmp_path):
    "Read by other processes, in chunks, with names of series, with a locked tower whose features are kept"
    plain, _ = trained(table, models, tmp_path / "plain", "series", num_series=2)
    read, _ = trained(table, models, tmp_path / "workers", "series", num_series=2, num_workers=1, memory_mb=0)
    assert read.weights_hash() == plain.weights_hash()
    torch.manual_seed(0)
    steps = StudyPreprocess(percentiles=None, size=(8, 32, 32))
    save_checkpoint(study_model({**VOLUME, "series_names": True}, TEXT, dim=16, preprocess=steps, device="cpu"),
                    tmp_path / "named")
    losses = {}
    for chunk in (0, 2):
        losses[chunk] = trained(table, {"series": str(tmp_path / "named")}, tmp_path / f"chunk{chunk}", "series",
                                chunk=chunk)[1].history["train_loss"]
    np.testing.assert_allclose(losses[0], losses[2], rtol=1e-4)
    for objective in ("clip", "itemized"):
        clip, training = trained(table, models, tmp_path / objective, "series", objective=objective,
                                 change=lambda clip: lock(clip, towers=["image"]))
        start = load_model(models["series"], device="cpu").model.visual.state_dict()
        assert all(torch.equal(tensor, start[name]) for name, tensor in clip.model.visual.state_dict().items())
        assert training.history["train_loss"].notna().all()


# Validation

def test_validation_is_brute_force(table, models, tmp_path):
    for kind in ("image", "series"):
        run, _ = begun(table, models, tmp_path, kind)
        rows, clip, found = manifest(table, "valid", kind), run.clip, trainers.validate_model(run)
        words = sorted({text for items in rows["items"] for text in items})
        texts = torch.stack([clip.encode_texts([text])[0] for text in words])
        scores = np.full((len(rows), len(words)), np.nan)
        for i in range(len(rows)):
            one = [rows.paths()[i]] if kind == "image" else [{n: Path(table, p) for n, p in rows["series"][i].items()}]
            with clip.inference(): raw = torch.cat([clip.forward_texts(clip.tokenizer([text])) for text in words])
            pooled = clip.pooling(raw, clip.encode_image_tokens(one)[1])[0]
            scores[i] = nn.functional.cosine_similarity(pooled, texts, dim=-1).detach()
        right = np.array([[text in items for text in words] for items in rows["items"]])
        ranks = [[1 + (s[~r] > s[r].max()).sum() for s, r in zip(a, b) if r.any()]
                 for a, b in ((scores, right), (scores.T, right.T))]
        for name, value in {"mrr": lambda r: 1 / r, "R@1": lambda r: r <= 1, "R@10": lambda r: r <= 10}.items():
            assert found[f"valid_item_{name}"] == pytest.approx(np.mean([value(np.array(r)).mean() for r in ranks]),
                                                                abs=1e-6)
        assert len(run.gallery.texts) == len(words) and "valid_mrr" in found


@pytest.mark.parametrize("seed", range(5))
def test_ranks_and_values(seed):
    "Ties, rows without an answer, and any division into chunks"
    rng = torch.Generator().manual_seed(seed)
    n, m = (int(torch.randint(2, 40, (1,), generator=rng)) for _ in range(2))
    scores, right = torch.randint(6, (n, m), generator=rng) / 8, torch.rand(n, m, generator=rng) < 0.15
    right[0, 0] = True
    for rank, s, r in zip(best_ranks(scores, right), scores, right):
        if not r.any(): assert rank.isnan()
        else: assert rank == 1 + (s[~r] > s[r].max()).sum() + (s[~r] == s[r].max()).sum() / 2
    gallery = ItemGallery(torch.zeros(m, 1), right.nonzero(), n)
    whole = item_values(scores, gallery)
    assert whole == pytest.approx(item_values(scores, gallery, chunk=3))
    ways = [best_ranks(a, b) for a, b in ((scores, right), (scores.T, right.T))]
    assert whole["valid_item_R@1"] == pytest.approx(np.mean([(w[~w.isnan()] <= 1).float().mean() for w in ways]))


def test_learning_shows_in_the_metric(table, models, tmp_path):
    "Items are found among images that the model has not seen, and the best epoch is kept"
    clip, training = trained(table, models, tmp_path / "out", epochs=12, batch_size=14, lr=4e-3, augment=None,
                             patience=12)
    history = training.history
    assert history["train_loss"].iloc[-1] < 0.5 * history["train_loss"].iloc[0]
    assert training.best_epoch == history.set_index("epoch")["valid_item_mrr"].idxmax()
    assert training.after["valid_item_mrr"] == history["valid_item_mrr"].max()


@pytest.mark.parametrize("objective", ["itemized", "clip"])
def test_mirrored_studies(table, models, tmp_path, objective):
    "A mirrored study is flipped from left to right in every series, and its texts exchange the sides"
    run, batch = begun(table, models, tmp_path, "series", batch_size=28, objective=objective, texts="items", flip=0.5)
    assert batch.mirrored.any() and not batch.mirrored.all()
    for row, back, volumes in zip(batch.rows.tolist(), batch.mirrored, batch.images.volumes):
        read = run.pairs.images[row].volumes
        assert torch.equal(volumes[:len(read)], read.flip(-1) if back else read)
    if objective == "itemized": return
    said = [" ".join(items) for items in manifest(table, "train")["items"]]
    expected = run.clip.tokenizer(
        [swap_sides(said[row]) if back else said[row] for row, back in zip(batch.rows.tolist(), batch.mirrored)])
    assert torch.equal(batch.texts, expected)


def test_a_study_model_starts_where_pictures_ended(table, models, tmp_path):
    """The network of slices, the projection, the text tower, the pooling, scale and bias are those of the model of
    pictures, and a saved model gives the same tokens"""
    seed_everything(0)
    pictures = load_model("starter", device="cpu")
    train(pictures, manifest(table, "train"), manifest(table, "valid"), tmp_path / "pictures",
          **{**BASE, "epochs": 1, "pooling_heads": 4, "augment": None})
    assert not pictures.untrained
    sliced = load_model("starter-studies", device="cpu")
    new = start_from_slices(sliced, pictures)
    assert (sliced.config["model_cfg"]["pooling_cfg"] == {"heads": 4}
            and not any(n.startswith("visual_proj.") for n in new))
    for name, tensor in pictures.model.state_dict().items():
        assert torch.equal(sliced.model.state_dict()[name.replace("visual.trunk.", "visual.trunk.patch_embed.net.")],
                           tensor), name
    again = load_model(str(save_checkpoint(sliced, tmp_path / "study")), device="cpu")
    study = torch.randn(1, 2, 1, 14, 80, 80)
    assert torch.equal(again.encode_image_tokens(study)[1], sliced.encode_image_tokens(study)[1])


@pytest.mark.parametrize("change, says", [
    ({"volume": {"width": 64}}, "gives 128 numbers per cell"),
    ({"volume": {"patch_size": [2, 8, 8]}}, "takes patches of one slice"), ({"dim": 64}, "does not fit"),
    ({"preprocess": {"mean": 0.5}}, "was trained on images with mean"),
    ({"volume": {"slices": None}}, "has no network that reads slices")])
def test_slices_that_do_not_fit(change, says):
    volume = {"width": 128, "depth": 1, "heads": 4, "patch_size": [1, 8, 8], "grid": [14, 10, 10], "levels": ["slice"],
              "slices": "medclip_starter"} | change.get("volume", {})
    steps = StudyPreprocess(**{"size": (14, 80, 80), "mean": 0.25, "std": 0.25} | change.get("preprocess", {}))
    with pytest.raises(InputError, match=says):
        start_from_slices(study_model(volume, STARTER["model_cfg"]["text_cfg"], dim=change.get("dim", 128),
                                      preprocess=steps, device="cpu"), load_model("starter", device="cpu"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    "A small BERT with random weights and a tokenizer, as its hub has them"
    import transformers
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".",
                   *sorted({w for t in [*ITEMS, NORMAL] for w in t.lower().rstrip(".").split()})]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(vocab_size=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                 max_position_embeddings=64)
    transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False).save_pretrained(folder)
    return f"hf:{folder}"


@pytest.mark.parametrize("locked", [False, True])
def test_a_bert_reads_the_items(table, bert, tmp_path, locked):
    """As in the published trainings: a Hugging Face encoder beside a volume encoder that reads names of series, locked
    or not"""
    seed_everything(0)
    clip = study_model(VOLUME | {"series_names": True}, bert, dim=16,
                       preprocess=StudyPreprocess(percentiles=None, size=(8, 32, 32)), device="cpu")
    if locked: lock(clip, ["text"])
    before = {n: t.clone() for n, t in clip.model.text.state_dict().items()}
    history = train(clip, manifest(table, "train", "series"), manifest(table, "valid", "series"), tmp_path / "out",
                    **{**BASE, "pooling_heads": 4, "epochs": 4, "lr": 3e-3}).history
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    same = [n for n, t in clip.model.text.state_dict().items() if torch.equal(t, before[n])]
    assert len(same) == len(before) if locked else not any("word_embeddings" in n or "layer.1" in n for n in same)
    again = load_model(str(tmp_path / "out" / "checkpoint"), device="cpu")
    assert torch.equal(again.encode_texts(ITEMS), clip.encode_texts(ITEMS))


# What cannot be

@pytest.mark.parametrize("kind, options, says", [
    ("series", {"augment": trainers.Augment(degrees=3)}, "augment varies images"),
    ("image", {"checkpointing": True, "model": "starter"}, "cannot recompute its activations"),
    ("image", {"pooling_heads": 3}, "dim must be a multiple of heads"),
    ("image", {"objective": "clip", "metric": "valid_item_mrr"}, "is measured by the objective 'itemized'")])
def test_what_cannot_be(table, models, tmp_path, kind, options, says):
    models = {**models, kind: options.pop("model", models[kind])}
    with pytest.raises(InputError, match=says): trained(table, models, tmp_path, kind, **options)


def test_manifests_that_cannot_be(table, models, tmp_path):
    clip = load_model(models["image"], device="cpu")
    rows, valid = manifest(table, "train"), manifest(table, "valid")

    def changed(rows, **columns):
        new = rows.assign(**columns)
        new.root, new.dataset, new.split_source = rows.root, rows.dataset, rows.split_source
        return new
    def without_items(rows):
        new = Manifest(rows.drop(columns="items"))
        new.root, new.dataset, new.split_source = rows.root, rows.dataset, rows.split_source
        return new
    without, bare = without_items(rows), without_items(valid)
    go = lambda a, b, **o: train(clip, a, b, tmp_path, **{**BASE, "pooling_heads": 4, **o})
    with pytest.raises(InputError, match="no column 'items'"): go(without, valid)
    with pytest.raises(InputError, match="no row has an item"): go(changed(rows, items=[[]] * len(rows)), valid)
    with pytest.raises(InputError, match="the items of row 0 are not a list"):
        go(changed(rows, items=["one; two"] * len(rows)), valid)
    with pytest.raises(InputError, match="no column 'items'"): go(rows, bare)
    with pytest.raises(InputError, match="encodes images, and .* has studies"):
        go(manifest(table, "train", "series"), manifest(table, "valid", "series"))
    with pytest.raises(InputError, match="encodes studies, and .* has images"):
        train(load_model(models["series"], device="cpu"), rows, valid, tmp_path, **BASE)
    own = load_model(models["image"], device="cpu")
    with pytest.raises(InputError, match="needs a model with a text-conditioned pooling"):
        train(own, rows, valid, tmp_path, objective=trainers.Contrastive(own, TrainConfig()), metric="valid_item_mrr")
    found = train(clip, rows, bare, tmp_path / "captions",
                  **{**BASE, "pooling_heads": 4, "metric": "valid_mrr", "epochs": 1})
    assert not [c for c in found.history if c.startswith("valid_item")]


def test_the_gallery_of_a_locked_tower_is_features(models, table):
    clip = lock(load_model(models["image"], device="cpu"), towers=["text"])
    gallery = item_gallery(clip, manifest(table, "valid"))
    assert gallery.texts.is_floating_point() and gallery.texts.shape[1] == 16


def test_a_new_pooling_may_learn_faster(table, models, tmp_path):
    "Its rate is the multiple of the others' in every step, warm-up in steps included"
    run, batch = begun(table, models, tmp_path, "image", pooling_lr=3.0, warmup=4, max_steps=12)
    assert [round(run.rate(step) / run.config.lr, 6) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    trainers.take_step(run, batch)
    own = {id(p) for p in run.clip.pooling.parameters()}
    for group in run.optimizer.param_groups:
        assert group["lr"] == (3 if id(group["params"][0]) in own else 1) * run.config.lr / 4
        assert len({id(p) in own for p in group["params"]}) == 1
    with pytest.raises(InputError, match="pooling_lr must be above 0"):
        begun(table, models, tmp_path, "image", pooling_lr=0.0)
