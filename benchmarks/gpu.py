"""The library on a graphics card: whether it is right there, and how fast beside open_clip's own training loop.

    python benchmarks/gpu.py [--out benchmarks/gpu/CARD.json] [--minutes 8] [--model ViT-B-16] [--batch 256]
                             [--rounds 7] [--only training_step,features]
    python benchmarks/gpu.py --table benchmarks/gpu/CARD.json
    python benchmarks/gpu.py --device cpu --quick --out FILE.json

First come checks: each compares what the card computes with the CPU, or one way with another, and has a limit. A gap is
the length of the difference over the length of what it is compared with. Then come times: both ways are called in turn,
round by round, in one process, after two calls that do not count; a ratio is the rival's time over ours, its median
over the rounds, with the lowest and the highest beside it. Peak memory is what a call allocates above what was held
before. Weights are random and images are noise.

Every section is caught on its own and the file is written after each, so that one failure costs one section. Sections
that would start after `--minutes` are left out, and the file says which. `--only NAMES` runs some of them. The exit
status is 1 if a check fails or a section breaks. `--quick` makes everything tiny and `--device cpu` needs no card: a
rehearsal, whose times mean nothing.
"""
import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import item_similarity as similarity_benchmark
import itemized_loss as itemized_benchmark
import lora_step
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
import volume_encoder
from image_features import autocast_way, gemm_way
from open_clip_train.train import train_one_epoch
from PIL import Image
from retrieval_metrics import argsort_ranking
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training_step import gradient_gap, make_manifest
from zero_shot_classifier import CLASSES, TEMPLATES

import medclip_nb
from medclip_nb.datasets import load_manifest, make_squares
from medclip_nb.distributed import _Gather
from medclip_nb.embeddings import embed
from medclip_nb.evaluators import zero_shot_classifier
from medclip_nb.losses import (
    clip_loss,
    draw_token_mask,
    itemized_losses,
    sample_negatives,
    siglip_loss,
    soft_clip_loss,
)
from medclip_nb.metrics import retrieval_metrics
from medclip_nb.models import (
    TextConditionedPooling,
    VolumeEncoder,
    add_lora,
    forward_image_tokens,
    item_similarity,
    layout,
    load_model,
)
from medclip_nb.trainers import (
    TrainConfig,
    backward,
    batches,
    begin_run,
    draw_batch,
    load_state,
    parameter_groups,
    save_state,
    take_step,
    train,
)

START, ROOT = time.monotonic(), Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "transformers", "accelerate", "peft", "numpy")
TINY = {"embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}}
SECTIONS: dict[str, Callable] = {}


def section(run):
    SECTIONS[run.__name__] = run
    return run


def gap(found, expected):
    "Length of the difference over the length of what is expected; tensors or lists of them"
    whole = lambda x: x if isinstance(x, (list, tuple)) else [x]
    flat = lambda x: torch.cat([t.detach().double().cpu().flatten() for t in whole(x)])
    return ((flat(found) - flat(expected)).norm() / flat(expected).norm().clamp(min=1e-30)).item()


@dataclass
class Bench:
    "Sizes, a folder to write in, and what the present section has found"
    device: torch.device
    quick: bool
    model: str
    batch: int
    rounds: int
    folder: Path
    record: dict = field(default_factory=dict)
    built: dict = field(default_factory=dict) # Precision -> a model on the CPU

    @property
    def on_card(self) -> bool: return self.device.type == "cuda"

    def wait(self):
        if self.on_card: torch.cuda.synchronize()

    def clip(self, device=None, precision="fp32"):
        "The model with the same random weights every time"
        if precision not in self.built:
            torch.manual_seed(0)
            own = self.built[precision] = load_model(self.model, device="cpu", precision=precision)
            if precision != "fp32": own.model.load_state_dict(self.clip("cpu").model.state_dict())
        own, device = self.built[precision], torch.device(device or self.device)
        return replace(own, model=deepcopy(own.model).to(device), device=device, config=deepcopy(own.config))

    def manifest(self, n, name="images"):
        "n images of noise with captions"
        folder = self.folder / f"{name}{n}"
        if folder.exists(): return load_manifest("csv", folder)
        folder.mkdir()
        return make_manifest(folder, n, 20)

    def check(self, what, found, limit):
        "Record a number that must not be above its limit"
        found = float(found)
        self.record["checks"].append({"what": what, "found": found, "limit": limit, "holds": found <= limit})

    def peak(self, way):
        "Megabytes at the highest point of a call above what was held before"
        if not self.on_card: return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def compare(self, path, ours, rival, against, items=0, unit="images", modules=(), seconds=15):
        "Record times and memory of two ways, called in turn; modules lose their gradients before memory is measured"
        ways, times, peaks = (ours, rival), ([], []), []
        for way in ways:
            way()
            way()
        for way in ways:
            for module in modules: module.zero_grad(set_to_none=True)
            peaks.append(self.peak(way))
        begin = time.perf_counter()
        for done in range(self.rounds):
            for way, own in zip(ways, times):
                self.wait()
                start = time.perf_counter()
                way()
                self.wait()
                own.append(time.perf_counter() - start)
            if done >= 2 and time.perf_counter() - begin > seconds: break
        ratios, middle = [b / a for a, b in zip(*times)], [statistics.median(own) for own in times]
        row = {"path": path, "rival": against, "ours_ms": 1e3 * middle[0], "rival_ms": 1e3 * middle[1],
               "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios), "rounds": len(ratios),
               "ours_mb": peaks[0], "rival_mb": peaks[1]}
        if items: row |= {"unit": unit, "ours_per_s": items / middle[0], "rival_per_s": items / middle[1]}
        self.record["speed"].append(row)


# What must be right


@section
def losses(b):
    "Losses and their gradients: the card against the CPU, float32 on both"
    n, k, l, d = (8, 3, 20, 64) if b.quick else (64, 5, 49, 256)
    torch.manual_seed(0)
    pooling, ids = TextConditionedPooling(d, 8), torch.arange(n) // 2
    real = torch.arange(k) < torch.randint(1, k + 1, (n, 1))
    negatives, mask = sample_negatives(real), draw_token_mask((n, 8, n + k - 1, l), 0.9, n)
    same = (ids[:, None] == ids).float()

    def items(v, tokens, texts):
        here = lambda x: x.to(v.device)
        return itemized_losses(v, tokens, texts, here(real), deepcopy(pooling).to(v.device), 14.3, -10.0,
                               here(negatives), worst_positive_factor=1.5, token_mask=here(mask))["loss"]
    cases = {"clip_loss": (lambda v, t: clip_loss(v, t, 14.3, text_ids=ids.to(v.device)), [(n, d), (n, d)]),
             "siglip_loss": (lambda v, t: siglip_loss(v, t, 14.3, -10.0, ids.to(v.device)), [(n, d), (n, d)]),
             "soft_clip_loss": (lambda v, t: soft_clip_loss(v, t, 14.3, same.to(v.device)), [(n, d), (n, d)]),
             "itemized_losses": (items, [(n, d), (n, l, d), (n, k, d)])}
    for name, (loss, shapes) in cases.items():
        inputs, found = [torch.randn(*shape) for shape in shapes], []
        for device in (b.device, "cpu"):
            own = [x.to(device).requires_grad_() for x in inputs]
            value = loss(*own)
            found.append((value, torch.autograd.grad(value, own)))
        b.check(f"{name}: value", gap(found[0][0], found[1][0]), 1e-5)
        b.check(f"{name}: gradients", gap(found[0][1], found[1][1]), 1e-4)


@section
def kernels(b):
    "Pooling, item similarity, adapters and the volume encoder: the card against the CPU, float32 on both"
    n, l, m, d = (4, 20, 9, 64) if b.quick else (32, 196, 300, 512)
    torch.manual_seed(0)
    pooling, tokens, texts = TextConditionedPooling(d, 8).eval(), torch.randn(n, l, d), torch.randn(m, d)
    card, mask = deepcopy(pooling).to(b.device), torch.rand(n, l) < 0.8
    to = lambda *xs: [x.to(b.device) for x in xs]
    with torch.no_grad():
        b.check("pooling with a mask", gap(card(*to(texts, tokens, mask)), pooling(texts, tokens, mask)), 1e-5)
        b.check("pooling with maps", gap(card(*to(texts, tokens), return_maps=True),
                                         pooling(texts, tokens, return_maps=True)), 1e-5)
        b.check("item_similarity", gap(item_similarity(*to(tokens, texts), card),
                                       item_similarity(tokens, texts, pooling)), 1e-5)
        own = _layout(b)
        encoder = VolumeEncoder(**own).eval()
        x = torch.randn(1, 2, 1, *(a * p for a, p in zip(own["grid"], own["patch_size"])))
        b.check("volume encoder", gap(list(deepcopy(encoder).to(b.device)(x.to(b.device))), list(encoder(x))), 1e-4)
        clip, found = add_lora(b.clip("cpu"), rank=4), []
        for name, p in clip.model.named_parameters():
            if "lora_B" in name: p.normal_(std=0.05)
        pixels, words = torch.randn(4, 3, *_size(clip)), clip.tokenizer(["a nodule in the left lobe", "no finding"])
        for device in (torch.device("cpu"), b.device):
            own = replace(clip, model=clip.model.to(device), device=device)
            found.append([x.cpu() for x in (*forward_image_tokens(own, pixels), own.forward_images(pixels),
                                            own.forward_texts(words))])
        b.check("a model with adapters: features and tokens", gap(found[1], found[0]), 1e-4)


def _layout(b):
    "Parameters of a volume encoder"
    small = {"width": 48, "heads": 2, "depth": 3, "grid": (2, 3, 3), "levels": ("slice", "scan", "study")}
    return layout("multiscan_h3_token1176") | (small if b.quick else {})


def _size(clip):
    size = clip.model.visual.image_size
    return size if isinstance(size, tuple) else (size, size)


@section
def embeddings(b):
    "Features of files, their cache, classifier weights and retrieval: the card against the CPU"
    manifest, cache = b.manifest(8 if b.quick else 64), b.folder / "cache"
    expected, clip = embed(b.clip("cpu"), manifest), b.clip()
    found, again = embed(clip, manifest, cache), embed(clip, manifest, cache)
    pairs = lambda e: [torch.from_numpy(e.images), torch.from_numpy(e.texts)]
    b.check("embed", gap(pairs(found), pairs(expected)), 1e-4)
    b.check("embed from its cache", gap(pairs(again), pairs(found)), 0)
    b.check("embed from its cache: features computed again", sum(c["computed"] for c in again.counts.values()), 0)
    for precision in ("bf16", "fp16")[:2 if b.on_card else 1]:
        rough = embed(b.clip(precision=precision), manifest)
        b.check(f"embed in {precision}", gap(pairs(rough), pairs(expected)), {"bf16": 5e-2, "fp16": 1e-2}[precision])
    weights = [zero_shot_classifier(c, CLASSES, TEMPLATES) for c in (clip, b.clip("cpu"))]
    b.check("zero_shot_classifier", gap(*weights), 1e-4)


def run_of(b, n, device=None, folder="run", clip=None, **options):
    "A training run on n pairs, one batch of which is a third of them"
    manifest = b.manifest(n)
    config = dict(batch_size=n // 3, lr=1e-4, warmup=0, augment=None, epochs=10, schedule="constant",
                  leaks="show") | options
    return begin_run(clip or b.clip(device), manifest, manifest, b.folder / folder, TrainConfig(**config))


def epoch_of(run):
    "The losses of an epoch's steps"
    run.module.train()
    for rows, images in batches(run): take_step(run, draw_batch(run, rows, images))
    found, run.progress.losses, run.progress.norms = run.progress.losses, [], []
    run.progress.epoch += 1
    return found


def gradients_of(run):
    "Loss and gradients of the first batch"
    run.module.train()
    value = backward(run, draw_batch(run, *next(batches(run))))["loss"]
    return value, [p.grad.clone() for p in run.clip.model.parameters()]


@section
def precisions(b):
    "Steps in float32, bfloat16 and float16, the scaler of float16, and a state stored and loaded"
    n = 12 if b.quick else 48
    tensor, losses = torch.tensor, {}
    expected = epoch_of(run_of(b, n, "cpu"))
    for precision in ("fp32", "bf16", "fp16")[:3 if b.on_card else 2]:
        run = run_of(b, n, mixed_precision=precision)
        losses[precision] = [loss for _ in range(5) for loss in epoch_of(run)]
        limit = 5e-3 if precision == "fp32" else 5e-2
        b.check(f"{precision}: losses of three steps", gap(tensor(losses[precision][:3]), tensor(expected)), limit)
        b.check(f"{precision}: losses of 15 steps beside float32's",
                gap(tensor(losses[precision]), tensor(losses["fp32"])), 0.1)
    if b.on_card: overflow(b, run)
    first = run_of(b, n, folder="state", epochs=3)
    epoch_of(first)
    first.out_dir.mkdir(exist_ok=True)
    save_state(first)
    second = run_of(b, n, folder="state", epochs=3)
    b.check("a stored state is found (0) or not (1)", not load_state(second), 0)
    b.check("losses from a stored state", gap(*(tensor(epoch_of(run)) for run in (second, first))), 1e-4)


def overflow(b, run):
    "A gradient beyond float16 takes no step and lowers the scale; the next one takes a step again"
    scaler, weights = run.accelerator.scaler, lambda: [p.detach().clone() for p in run.clip.model.parameters()]
    scaler.update(2.0**60)
    before = weights()
    epoch_of(run)
    b.check("fp16: weights after three steps that overflow", gap(weights(), before), 0)
    b.check("fp16: exponent of the scale after them", abs(torch.tensor(scaler.get_scale()).log2().item() - 57), 0)
    scaler.update(2.0**10)
    epoch_of(run)
    b.check("fp16: weights that did not move afterwards (0: they moved)", gap(weights(), before) == 0, 0)


@section
def gradients(b):
    "The gradient of a batch: on the CPU, as open_clip has it, in chunks, with checkpoints, compiled"
    n = 12 if b.quick else 48
    loss, expected = gradients_of(run_of(b, n, "cpu"))
    value, whole = gradients_of(run_of(b, n))
    b.check("the card and the CPU: loss", gap(value, loss), 1e-4)
    b.check("the card and the CPU: gradients", gap(whole, expected), 1e-3)
    for name, options, limit in (("chunks", {"chunk": 2}, 1e-4), ("checkpoints", {"checkpointing": True}, 1e-4),
                                 ("compiled", {"compile": True}, 1e-3)):
        if name == "compiled" and not b.on_card: continue
        b.check(f"{name} and all at once", gap(gradients_of(run_of(b, n, **options))[1], whole), limit)
    rows = b.manifest(n // 3, "few")
    rows = rows.drop_duplicates("caption")
    clip = b.clip()
    images = torch.stack([clip.preprocess(Image.open(p).convert("RGB")) for p in rows.paths()]).to(b.device)
    tokens = clip.tokenizer(list(rows["caption"])).to(b.device)
    b.check("ours and open_clip's: largest difference over the largest gradient",
            gradient_gap(clip, rows, b.folder / "gap", len(rows), images, tokens), 1e-4)


@section
def one_process(b):
    "A process group of one process, nccl on a card, against no group: our trainer, DistributedDataParallel, gathering"
    value, expected = gradients_of(run_of(b, 12))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port)}
    file = b.folder / "group.pt"
    call = [sys.executable, __file__, "--device", str(b.device), "--model", b.model, "--child", str(file)]
    done = subprocess.run(call, env=os.environ | group, capture_output=True, text=True, timeout=150)
    if done.returncode: raise RuntimeError(done.stderr[-3000:])
    found = torch.load(file, map_location="cpu", weights_only=True)
    b.record["backend"] = found["backend"]
    b.check("our trainer: loss", gap(found["loss"], value), 1e-6)
    b.check("our trainer: gradients", gap(found["gradients"], expected), 1e-5)
    b.check("DistributedDataParallel: loss", found["ddp_loss"], 1e-6)
    b.check("DistributedDataParallel: gradients", found["ddp_gradients"], 1e-5)
    b.check("gathered rows and their gradients", found["gathered"], 0)


class Both(nn.Module):
    "Both towers in one call, as DistributedDataParallel wants it"
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, tokens):
        model = self.model
        return clip_loss(model.encode_image(images), model.encode_text(tokens), model.logit_scale.exp())


def child(b, file):
    "What `one_process` compares, computed in a group of one process"
    torch.backends.cudnn.allow_tf32 = False # As in `run_section`
    run = run_of(b, 12)
    if not dist.is_initialized(): dist.init_process_group("nccl" if b.on_card else "gloo")
    loss, gradients = gradients_of(run)
    found = {"backend": dist.get_backend(), "loss": loss.cpu(), "gradients": [g.cpu() for g in gradients]}
    clip, ways = b.clip(), []
    torch.manual_seed(0)
    images = torch.randn(8, 3, *_size(clip), device=b.device)
    tokens = clip.tokenizer([f"finding number {i}" for i in range(8)]).to(b.device)
    card = [torch.cuda.current_device()] if b.on_card else None
    for wrap in (lambda m: m, lambda m: DistributedDataParallel(m, card)):
        whole = Both(deepcopy(clip.model))
        value = wrap(whole)(images, tokens)
        value.backward()
        ways.append((value, [p.grad for p in whole.parameters()]))
    found |= {"ddp_loss": gap(ways[1][0], ways[0][0]), "ddp_gradients": gap(ways[1][1], ways[0][1])}
    x = torch.randn(5, 3, device=b.device, requires_grad=True)
    rows = _Gather.apply(x, [5])
    (rows**2).sum().backward()
    found["gathered"] = gap([rows, x.grad], [x, 2 * x])
    torch.save(found, file)
    dist.destroy_process_group()


@section
def training(b):
    "Whole runs of `train` with the starter model, on squares: the loss falls, and the checkpoint is what was trained"
    rows = make_squares(b.folder / "squares", 6 if b.quick else 12)
    rows["items"] = [[caption, "a plain background"] for caption in rows["caption"]]
    parts = [rows.part(split) for split in ("train", "valid")]
    how = dict(epochs=3 if b.quick else 8, batch_size=8, lr=1e-3, augment=None, warmup=0)
    for objective, precision in (("clip", "fp32"), ("clip", "bf16"), ("clip", "fp16"), ("itemized", "bf16")):
        if not b.on_card and precision == "fp16": continue
        torch.manual_seed(0)
        clip, out = load_model("starter", device=str(b.device), precision="fp32"), b.folder / f"{objective}-{precision}"
        done = train(clip, *parts, out, objective, mixed_precision=precision, **how)
        losses = done.history["train_loss"]
        b.check(f"{objective}, {precision}: last loss over first", losses.iloc[-1] / losses.iloc[0], 1.0)
        saved = load_model("starter", done.checkpoint, "cpu", "fp32") if objective == "clip" else None
        if saved: b.check(f"{objective}, {precision}: features of the checkpoint on the CPU",
                          gap(saved.encode_images(parts[1].paths()), clip.encode_images(parts[1].paths())), 1e-3)


@section
def command(b):
    "`medclip-nb run finetune` from the command line"
    if missing := [name for name in ("papermill", "ipykernel") if not importlib.util.find_spec(name)]:
        b.record["note"] = f"not run: {', '.join(missing)} not installed"
        return
    make_squares(b.folder / "table")
    given = {"dataset": "csv", "data_root": b.folder / "table", "device": b.device.type, "epochs": 2, "batch_size": 8,
             "lr": 1e-3, "n_boot": 100}
    call = [sys.executable, "-m", "medclip_nb.cli", "run", "finetune", "--out", str(b.folder / "command"),
            *(word for name, value in given.items() for word in ("-p", f"{name}={value}"))]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(call, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=240)
    if done.returncode: raise RuntimeError((done.stdout + done.stderr)[-3000:])
    b.check("files that are missing", sum(not (b.folder / "command" / name).is_file() for name in
                                          ("report.ipynb", "metrics.json", "predictions.parquet", "run.json")), 0)


# What must be quick


def open_clip_epoch(b, clip, loader, steps, precision, compiled=False):
    "open_clip's own training loop over a loader, and its model"
    model = clip.model.train()
    model.output_dict = True
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-6, betas=(0.9, 0.98), eps=1e-6)
    loader.num_batches, loader.num_samples = steps, steps * b.batch
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
    args = SimpleNamespace(device=str(b.device), precision={"bf16": "amp_bf16", "fp16": "amp"}[precision],
                           distill=False, accum_freq=1, skip_scheduler=True, horovod=False, grad_clip_norm=1.0,
                           log_every_n_steps=100, rank=0, local_rank=0, world_size=1, batch_size=b.batch, wandb=False)
    scaler = torch.amp.GradScaler(b.device.type) if precision == "fp16" else None
    called = torch.compile(model) if compiled else model
    return lambda: train_one_epoch(called, data, open_clip.ClipLoss(), 0, optimizer, scaler, None, None, args)


class Repeated(list):
    "A loader of open_clip's kind: a list to which it adds what it counts"


class Kept(torch.utils.data.Dataset):
    "Images and tokens in memory"
    def __init__(self, images, tokens): self.images, self.tokens = images, tokens
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return self.images[i], self.tokens[i]


def our_steps(run, batch, steps):
    "Steps on a batch that is on the card"
    def way():
        for _ in range(steps): take_step(run, batch)
        run.progress.losses, run.progress.norms = [], []
    return way


@section
def training_step(b):
    "A training step: ours, captions cut at the longest, beside open_clip's `train_one_epoch`, captions padded"
    steps = 2 if b.quick else 4
    manifest, clip = b.manifest(steps * b.batch), b.clip()
    config = dict(batch_size=b.batch, lr=1e-6, augment=None, epochs=10**6, memory_mb=8192,
                  leaks="show")
    ours = lambda precision, **more: begin_run(b.clip(), manifest, manifest, b.folder / "steps",
                                               TrainConfig(mixed_precision=precision, **config, **more))
    first = ours("bf16")
    images = torch.stack([first.pairs[i][0] for i in range(len(manifest))])
    tokens = clip.tokenizer(list(manifest["caption"]))
    here = [(images[:b.batch].to(b.device), tokens[:b.batch].to(b.device))] * steps

    def compare(name, run, rival, way, precision):
        run.module.train()
        b.compare(f"training step, {precision}, {name}", way, rival, "open_clip's loop", steps * b.batch,
                  modules=(run.clip.model, clip.model))
    for precision in ("bf16", "fp16")[:2 if b.on_card else 1]:
        run = first if precision == "bf16" else ours(precision)
        run.pairs = first.pairs
        batch = draw_batch(run, list(range(b.batch)), images[:b.batch])
        compare("images on the card", run, open_clip_epoch(b, clip, Repeated(here), steps, precision),
                our_steps(run, batch, steps), precision)
        loader = torch.utils.data.DataLoader(Kept(images, tokens), b.batch, shuffle=True, pin_memory=b.on_card)
        compare("images in memory", run, open_clip_epoch(b, clip, loader, steps, precision),
                lambda run=run: epoch_of(run), precision)


@section
def features(b):
    "Image features: ours in bfloat16, beside what one may do with open_clip's model"
    clip, lower = b.clip(), b.clip(precision="bf16")
    images = torch.randn(b.batch, 3, *_size(clip), device=b.device)

    def plain():
        with torch.no_grad(): return lower.model.encode_image(images.bfloat16(), normalize=True)
    encode = lambda: lower.encode_images(images)
    autocast = autocast_way(clip.model, images, torch.no_grad)
    b.compare("encode_images, bf16", encode, autocast, "open_clip under autocast", b.batch)
    b.compare("encode_images, bf16", encode, plain, "open_clip, weights in bfloat16", b.batch)
    if b.on_card: b.compare("encode_images, bf16", encode, gemm_way(clip.model, b.batch, torch.bfloat16, b.device),
                            "matrix products alone (a bound)", b.batch)
    manifest, workers = b.manifest(4 * b.batch), 0 if b.quick else min(8, os.cpu_count() or 1)

    class Files(torch.utils.data.Dataset):
        def __init__(self): self.paths, self.words = manifest.paths(), clip.tokenizer(list(manifest["caption"]))
        def __len__(self): return len(self.paths)
        def __getitem__(self, i): return clip.preprocess(Image.open(self.paths[i]).convert("RGB")), self.words[i]

    def loop():
        found = []
        loader = torch.utils.data.DataLoader(Files(), b.batch, num_workers=workers, pin_memory=b.on_card)
        with torch.no_grad(), torch.autocast(b.device.type, torch.bfloat16):
            for pixels, words in loader:
                pixels, words = pixels.to(b.device, non_blocking=True), words.to(b.device, non_blocking=True)
                found.append([clip.model.encode_image(pixels, normalize=True).float().cpu(),
                              clip.model.encode_text(words, normalize=True).float().cpu()])
        return found
    b.compare(f"embed, files and captions, {workers} workers",
              lambda: embed(lower, manifest, batch_size=b.batch, num_workers=workers), loop,
              "a loop over open_clip's model", len(manifest))


@section
def classifier(b):
    "The weights of a zero-shot classifier beside open_clip's `build_zero_shot_classifier`"
    sentences = [lambda name, t=t: t.replace("{}", name) for t in TEMPLATES]
    for precision in ("fp32", "bf16"):
        clip = b.clip(precision=precision)
        b.compare(f"zero_shot_classifier, {precision}", lambda: zero_shot_classifier(clip, CLASSES, TEMPLATES),
                  lambda: open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer, CLASSES, sentences,
                                                               num_classes_per_batch=10, device=b.device),
                  "open_clip's", len(CLASSES) * len(TEMPLATES), "sentences")


@section
def retrieval(b):
    "All retrieval metrics, which we compute on the CPU, beside a sort of every row on the card"
    n, d = (300, 32) if b.quick else (20_000, 512)
    torch.manual_seed(0)
    images = F.normalize(torch.randn(n, d), dim=1)
    texts = F.normalize(images + 4 * torch.randn(n, d) / d**0.5, dim=1)
    here = images.to(b.device), texts.to(b.device)
    found, expected = retrieval_metrics(images, texts), argsort_ranking(*here)
    b.check("ours and the sort's", max(abs(found[name] - value) for name, value in expected.items()), 3 / n)
    b.compare(f"retrieval_metrics, {n} pairs", lambda: retrieval_metrics(images, texts), lambda: argsort_ranking(*here),
              "a sort on the card", n, "pairs")


@section
def itemized(b):
    "The itemized losses, forward and backward, beside attention over copies of the texts"
    n, k, l, d = (6, 3, 20, 64) if b.quick else (96, 7, 196, 512)
    torch.manual_seed(0)
    pooling = TextConditionedPooling(d, 8).to(b.device)
    inputs = [torch.randn(*shape, device=b.device, requires_grad=True) for shape in ((n, d), (n, l, d), (n, k, d))]
    real = torch.arange(k, device=b.device) < torch.randint(1, k + 1, (n, 1), device=b.device)
    negatives = sample_negatives(real)
    losses = {"ours": lambda v, x, t: itemized_losses(v, x, t, real, pooling, 14.3, -10.0, negatives)["loss"]}
    losses |= {size: lambda v, x, t, size=size: itemized_benchmark.straightforward(
        pooling, v, x, t, real, 14.3, -10.0, negatives, None, 1.0, 0.1, size == "all") for size in ("list", "all")}
    step = {name: lambda loss=loss: itemized_benchmark.measure(loss, inputs, [*pooling.parameters()], b.device.type)[1]
            for name, loss in losses.items()}
    for size, against in (("list", "texts that are met, copied"), ("all", "all texts, copied")):
        b.check(f"ours and with {against}", gap(step["ours"](), step[size]()), 2e-3)
        b.compare("itemized losses", step["ours"], step[size], against, n)


@section
def similarity(b):
    "Similarity of images and texts by text-conditioned pooling, beside attention over copies of the texts"
    n, m, l, d = (6, 30, 20, 64) if b.quick else (160, 2000, 196, 512)
    torch.manual_seed(0)
    pooling = TextConditionedPooling(d, 8).to(b.device).requires_grad_(False)
    tokens, texts = torch.randn(n, l, d, device=b.device), torch.randn(m, d, device=b.device)
    ours = lambda: item_similarity(tokens, texts, pooling, 1024 if b.quick else 2**17)
    rival = lambda: similarity_benchmark.straightforward(tokens, texts, pooling)
    b.check("ours and with copies", gap(ours(), rival()), 1e-4)
    b.compare("item_similarity, fp32", ours, rival, "texts copied for each image", n * m, "pairs")
    b.compare("item_similarity, fp32", ours, lambda: item_similarity(tokens, texts, pooling), "ours, default chunk",
              n * m, "pairs")


@section
def adapters(b):
    "A training step with LoRA in bfloat16 beside PEFT on the fused attention"
    clip, n = b.clip(precision="bf16"), b.batch // 4
    images = torch.randn(n, 3, *_size(clip), device=b.device, dtype=clip.dtype)
    tokens = clip.tokenizer([" ".join((lora_step.WORDS * 2)[i % 7:i % 7 + 20]) for i in range(n)]).to(b.device)
    ours = add_lora(replace(clip, model=deepcopy(clip.model)), 8, 8, targets=("q", "k", "v", "out"))
    theirs = lora_step.peft_fused(clip, 8)
    inner = theirs.base_model.model
    step = [lora_step.make_step(image, text, model.logit_scale, parameters, images, tokens)
            for image, text, model, parameters in (
                (ours.forward_images, ours.forward_texts, ours.model, ours.model.parameters()),
                (inner.encode_image, inner.encode_text, inner, theirs.parameters()))]
    b.check("first losses", gap(torch.tensor(step[0]()), torch.tensor(step[1]())), 1e-2)
    b.compare("LoRA step, bf16", *step, "PEFT on the fused attention", n, modules=(ours.model, theirs))


@section
def chunks(b):
    "A batch in chunks that are encoded twice, beside the batch at once: what memory costs"
    clip, n = b.clip(), 2 * b.batch
    manifest = b.manifest(4 * b.batch)
    config = dict(batch_size=n, lr=1e-6, augment=None, epochs=10**6, mixed_precision="bf16", leaks="show")
    runs = [begin_run(clip, manifest, manifest, b.folder / "chunks", TrainConfig(chunk=chunk, **config))
            for chunk in (n // 8, 0)]
    pixels = torch.randn(n, 3, *_size(clip))
    batch = draw_batch(runs[0], list(range(n)), pixels)
    b.compare(f"gradient of {n} pairs, chunks of {n // 8}", *(lambda run=run: backward(run, batch) for run in runs),
              "ours, all at once", n, modules=(clip.model,))


@section
def volumes(b):
    "The volume encoder, forward and backward in bfloat16, beside a plain vision transformer of the same blocks"
    own = _layout(b)
    torch.manual_seed(0)
    encoder, n = VolumeEncoder(**own).to(b.device), 1 if b.quick else 8
    x = torch.randn(n, 4, 1, *(a * p for a, p in zip(own["grid"], own["patch_size"])), device=b.device)
    plain = volume_encoder.plain(encoder)

    def step(way):
        with torch.autocast(b.device.type, torch.bfloat16): y = way(x)
        sum(part.float().square().mean() for part in (y if isinstance(y, tuple) else (y,))).backward()
        encoder.zero_grad()
    b.compare(f"volume encoder, {n} studies of 4 scans", lambda: step(encoder), lambda: step(plain),
              "plain transformer", 4 * n, "scans", modules=(encoder,))


@section
def compiled_step(b):
    "A training step with compiled towers: ours compiles that of images, open_clip's loop the whole model"
    if not b.on_card: return
    steps, manifest, clip = 4, b.manifest(4 * b.batch), b.clip()
    run = begin_run(b.clip(), manifest, manifest, b.folder / "compiled",
                    TrainConfig(batch_size=b.batch, lr=1e-6, augment=None, epochs=10**6, mixed_precision="bf16",
                                compile=True, leaks="show"))
    run.module.train()
    batch = draw_batch(run, list(range(b.batch)), torch.randn(b.batch, 3, *_size(clip)))
    tokens = clip.tokenizer(list(manifest["caption"])[:b.batch]).to(b.device)
    rival = open_clip_epoch(b, clip, Repeated([(batch.images, tokens)] * steps), steps, "bf16", compiled=True)
    b.compare("training step, bf16, compiled", our_steps(run, batch, steps), rival, "open_clip's loop, compiled",
              steps * b.batch, modules=(run.clip.model, clip.model))


# Running, writing and printing


def machine(device):
    "What was measured on: card, driver, versions"
    found = {"card": platform.processor() or platform.machine(), "python": platform.python_version(),
             "system": platform.system(), "cpus": os.cpu_count(), "date": date.today().isoformat(),
             "versions": {"medclip_nb": medclip_nb.__version__} | {p: importlib.metadata.version(p) for p in PACKAGES}}
    if device.type != "cuda": return found
    properties = torch.cuda.get_device_properties(device)
    found |= {"card": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1), "cuda": torch.version.cuda,
              "capability": f"{properties.major}.{properties.minor}", "processors": properties.multi_processor_count}
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired): found["driver"] = "unknown"
    return found


def write(found, file):
    "All that was found so far, whole or not at all"
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def table(found):
    "What was found, for people"
    m, lines = found["machine"], []
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    lines += [f"{m['card']}, driver {m.get('driver', 'none')}, Python {m['python']}, {versions}", ""]
    checks = [(name, c) for name, s in found["sections"].items() for c in s["checks"]]
    lines += [f"{'check':<78}{'found':>10}{'limit':>10}"]
    lines += [f"{f'{name}: ' + c['what']:<78}{c['found']:>10.1e}{c['limit']:>10.0e}{'' if c['holds'] else '   FAILS'}"
              for name, c in checks]
    rows = [row for s in found["sections"].values() for row in s["speed"]]
    lines += ["", f"{'path':<44}{'beside':<32}{'ours':>10}{'ratio':>7}  {'lowest, highest':<16}{'per second':>16}"
                  f"{'peak MB, ours and its':>22}"]
    for r in rows:
        rate = f"{r['ours_per_s']:,.0f} {r['unit']}" if "unit" in r else ""
        memory = f"{r['ours_mb']:,.0f}  {r['rival_mb']:,.0f}" if r["ours_mb"] is not None else ""
        spread = f"{r['lowest']:.2f}, {r['highest']:.2f}"
        lines += [f"{r['path']:<44}{r['rival']:<32}{r['ours_ms']:>7.1f} ms{r['ratio']:>7.2f}  {spread:<16}{rate:>16}"
                  f"{memory:>22}"]
    lines += [""] + [f"{name}: {s['note']}" for name, s in found["sections"].items() if s.get("note")]
    lines += [f"{name} broke: {s['error'].strip().splitlines()[-1]}" for name, s in found["sections"].items()
              if s.get("error")]
    failed = sum(not c["holds"] for _, c in checks)
    lines += [f"{len(checks)} checks, {failed} failed; {found['seconds']:.0f} seconds"]
    return "\n".join(lines)


def run_section(b, name):
    "What a section has found, with the traceback if it broke"
    b.record, start = {"about": SECTIONS[name].__doc__, "checks": [], "speed": []}, time.monotonic()
    # Convolutions in float32 proper where results are compared; as PyTorch has them where times are
    exact = list(SECTIONS).index(name) <= list(SECTIONS).index("command")
    torch.backends.cudnn.allow_tf32 = not exact
    try: SECTIONS[name](b)
    except Exception: b.record["error"] = traceback.format_exc()
    b.record["seconds"] = round(time.monotonic() - start, 1)
    if b.on_card: torch.cuda.empty_cache()
    torch._dynamo.reset()
    return b.record


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options = dict(device="cuda", model="ViT-B-16", batch=256, rounds=7, minutes=8.0, only="", out="", table="",
                   child="")
    for name, value in options.items(): parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.table: return print(table(json.loads(Path(args.table).read_text(encoding="utf-8"))))
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        return print("No CUDA card here, so nothing is measured. A rehearsal: --device cpu --quick --out FILE.json")
    device = torch.device(args.device)
    found = {"machine": machine(device), "settings": {k: v for k, v in vars(args).items() if k not in ("out", "child")},
             "left_out": [], "sections": {}, "seconds": 0}
    slug = re.sub(r"\W+", "-", found["machine"]["card"]).strip("-").lower()
    out = Path(args.out or ROOT / "benchmarks" / "gpu" / f"{slug}.json")
    with tempfile.TemporaryDirectory() as folder:
        b = Bench(device, args.quick, args.model, args.batch, args.rounds, Path(folder))
        if args.child: return child(b, args.child)
        if args.quick:
            torch.set_num_threads(1)
            b.model, b.batch, b.rounds = f"{folder}/tiny", 8, 3
            Path(b.model).mkdir()
            Path(b.model, "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}))
        for name in args.only.split(",") if args.only else SECTIONS:
            if time.monotonic() - START > 60 * args.minutes: found["left_out"].append(name)
            else:
                found["sections"][name] = run_section(b, name)
                print(f"{name}: {found['sections'][name]['seconds']} s", flush=True)
            found["seconds"] = round(time.monotonic() - START, 1)
            write(found, out)
    print(table(found))
    if found["left_out"]: print(f"left out after {args.minutes:g} minutes: {', '.join(found['left_out'])}")
    broken = [s for s in found["sections"].values() if s.get("error") or not all(c["holds"] for c in s["checks"])]
    return sys.exit(bool(broken))


if __name__ == "__main__": main()
