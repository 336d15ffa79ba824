"""A contrastive training step against the plain open_clip way, and the training loop against a bare one, as ratios.

    python benchmarks/training_step.py [--model ViT-B-32] [--batch 32] [--rounds 5] [--words 20] [--threads 2]
                                       [--device cpu] [--compile 0]

The open_clip way encodes images and captions as its tokenizer pads them, takes its `ClipLoss`, and steps AdamW. Ours is
a whole step of the loop: drawing the batch, learning rate, loss, gradients, clipping, checks. "bare" is the same model
and the same texts in a loop of nine lines. Every round times each way once, in turn, in one process; the ratios are of
the minima and of the medians. Gradients of the first step are compared before anything is timed. bf16 is autocast over
float32 weights; a processor without instructions for it would take ten times as long and leaves it out. Captions have
the length of a short radiology report.
"""
import argparse
import statistics
import tempfile
import time
from copy import deepcopy
from dataclasses import replace

import numpy as np
import open_clip
import pandas as pd
import torch
from noted import bf16_is_computed, note
from PIL import Image

from medclip_nb.datasets import load_manifest
from medclip_nb.losses import clip_loss
from medclip_nb.models import load_model
from medclip_nb.trainers import (
    TrainConfig,
    backward,
    batches,
    begin_run,
    clamp_scale,
    draw_batch,
    parameter_groups,
    take_step,
)

WORDS = ("axial t2 weighted slice of the brain at the level of the lateral ventricles with a small ring enhancing "
         "lesion in the left frontal lobe "
         "surrounded by oedema and a mild mass effect on the adjacent sulci no midline shift is seen").split()


def make_manifest(folder, n, words):
    "Random images with captions"
    rng = np.random.default_rng(0)
    for i in range(n): Image.fromarray(rng.integers(0, 255, (224, 224), dtype=np.uint8)).save(f"{folder}/{i}.png")
    captions = [" ".join((WORDS * 3)[i % 7:i % 7 + words - i % 5]) for i in range(n)]
    pd.DataFrame({"image": [f"{i}.png" for i in range(n)], "caption": captions, "split": "train"}).to_csv(
        f"{folder}/table.csv", index=False)
    return load_manifest("csv", folder)


def plain_way(clip, images, tokens, autocast):
    "A step as open_clip's training loop takes it"
    model, loss_fn = clip.model.train(), open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-6, betas=(0.9, 0.98), eps=1e-6)

    def step(update=True):
        with autocast():
            loss = loss_fn(model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True),
                           model.logit_scale.exp())
        loss.backward()
        if not update: return
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clamp_scale(model)
        return loss.item()
    return step


def bare_way(clip, images, tokens, ids):
    "The same model, the same texts, nothing around them"
    model = clip.model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-6, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def step():
        loss = clip_loss(clip.forward_images(images).float(), clip.forward_texts(tokens).float(),
                         model.logit_scale.exp(), text_ids=ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clamp_scale(model)
        return loss.item()
    return step


def our_way(clip, manifest, folder, batch, **options):
    "A step of the loop, its images decoded already"
    run = begin_run(clip, manifest, manifest, folder,
                    TrainConfig(batch_size=batch, lr=1e-6, augment=None, clip_grad=1.0, epochs=10**6, leaks="show",
                                **options))
    run.module.train()
    list(run.pairs[i] for i in range(len(run.pairs)))

    def step():
        for rows, images in batches(run): take_step(run, draw_batch(run, rows, images))
        run.progress.epoch, run.progress.losses, run.progress.norms = run.progress.epoch + 1, [], []
    return run, step


def gradient_gap(clip, manifest, folder, batch, images, tokens):
    "Largest difference of a gradient from open_clip's, relative to the largest gradient"
    run, _ = our_way(replace(clip, model=deepcopy(clip.model)), manifest, folder, batch)
    rows, pixels = next(batches(run))
    backward(run, draw_batch(run, rows, pixels))
    theirs = replace(clip, model=deepcopy(clip.model))
    plain_way(theirs, images[rows], tokens[rows], lambda: torch.autocast(clip.device.type, enabled=False))(update=False)
    largest = max(p.grad.abs().max() for p in theirs.model.parameters())
    return max((a.grad - b.grad).abs().max().item()
               for a, b in zip(run.clip.model.parameters(), theirs.model.parameters())) / largest.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in dict(model="ViT-B-32", batch=32, rounds=5, words=20, threads=2, device="cpu", compile=0).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        manifest = make_manifest(folder, args.batch, args.words)
        clip = load_model(args.model, device=args.device, precision="fp32")
        fresh = lambda: replace(clip, model=deepcopy(clip.model))
        images = torch.stack([clip.preprocess(Image.open(p).convert("RGB")) for p in manifest.paths()]).to(clip.device)
        tokens = clip.tokenizer(list(manifest["caption"])).to(clip.device)
        ids = torch.from_numpy(pd.factorize(manifest["caption"])[0]).to(clip.device)
        longest = int(tokens.argmax(1).max()) + 1
        duplicates = len(manifest) - manifest["caption"].nunique()
        print(f"{args.model}, batch {args.batch}, longest caption {longest} of {clip.context_length} tokens, "
              f"{args.threads} threads on {args.device}")
        if not duplicates:
            print(f"largest difference of a gradient from open_clip's: "
                  f"{gradient_gap(clip, manifest, folder, args.batch, images, tokens):.1e} of the largest gradient")
        autocast = {p: (lambda p=p: torch.autocast(clip.device.type, torch.bfloat16, enabled=p == "bf16"))
                    for p in ("fp32", "bf16")}
        ways = {"open_clip": plain_way(fresh(), images, tokens, autocast["fp32"]),
                "bare": bare_way(fresh(), images, tokens, ids)}
        lower = args.device != "cpu" or bf16_is_computed()
        for precision in ("fp32", "bf16")[:1 + lower]:
            ways[f"ours {precision}"] = our_way(fresh(), manifest, folder, args.batch, mixed_precision=precision,
                                                compile=bool(args.compile))[1]
        times, wait = {name: []
                       for name in ways}, torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
        for round in range(args.rounds + 1):
            for name, way in ways.items():
                wait()
                start = time.perf_counter()
                way()
                wait()
                if round: times[name].append(time.perf_counter() - start)
        for name, t in times.items():
            ratio = [f(times["open_clip"]) / f(t) for f in (min, statistics.median)]
            print(f"{name:12s} min {min(t) * 1e3:8.1f} ms  median {statistics.median(t) * 1e3:8.1f} ms  "
                  f"slowest/fastest {max(t) / min(t):.2f}"
                  f"  open_clip over it: min {ratio[0]:5.2f}  median {ratio[1]:5.2f}")
        overhead = [100 * (f(times["ours fp32"]) / f(times["bare"]) - 1) for f in (min, statistics.median)]
        print(f"overhead of the loop over the bare one: min {overhead[0]:.1f} %  median {overhead[1]:.1f} %")
    task = f"{args.model}, batch {args.batch}"
    theirs = times["open_clip"]
    note("contrastive training step, fp32", "open_clip's loop", times["ours fp32"], theirs, 1.4, size=task)
    if lower:
        note("contrastive training step, bf16", "open_clip's loop, fp32", times["ours bf16"], theirs, 2.2, size=task,
             needs="bf16")
    note("training loop, a whole step", "a loop of nine lines", times["ours fp32"], times["bare"], 0.97, size=task)


if __name__ == "__main__": main()
