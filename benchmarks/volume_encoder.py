"""The volume encoder against a plain vision transformer of the same blocks on the same tokens, as ratios of time.

    python benchmarks/volume_encoder.py [--layout multiscan_h3_token1176] [--width 384] [--heads 6] [--depth 6]
                                        [--scans 4] [--batch 1]
                                        [--rounds 5] [--threads 1] [--device cpu] [--precision fp32] [--train 0]

Four ways to encode the same studies with the same weights:
    plain         timm's blocks one after the other on all tokens of a study, cut by the same patch layer
    one level     the encoder with all blocks at the study level: what its bookkeeping costs (over plain)
    hierarchy     the encoder with the levels of the layout
    grouped       the same blocks on sequences of the same lengths that nobody has to regroup: what regrouping
                  costs (hierarchy over grouped)
Every round times each way once, in turn, in one process; the ratios are of the minima and of the medians. `--train 1`
adds the backward pass. On a CPU the clock is that of the process, so that other work on the machine counts less.
"""
import argparse
import statistics
import time
from copy import deepcopy

import torch

from medclip_nb.models import VolumeEncoder, layout


def plain(encoder):
    "What a vision transformer does, written down: one sequence a study"
    def run(x):
        tokens = (encoder.patch_embed(x.flatten(0, 1)) + encoder.spatial_posemb).flatten(1, 3).unflatten(0, x.shape[:2])
        if encoder.max_scans > 1: tokens = tokens + encoder.sequential_posemb[0, :x.shape[1], None]
        tokens = torch.cat([encoder.cls_token.expand(len(x), -1, -1), tokens.flatten(1, 2)], 1)
        for block in encoder.blocks: tokens = block(tokens)
        return encoder.norm(tokens)
    return run


def grouped(encoder):
    "Every block on the groups of its level, the tokens not carried from one to the next level"
    def run(x):
        tokens, parts = encoder.embed(x, None, None)
        slab = tokens[:, 1:].reshape(-1, (tokens.shape[1] - 1) // parts.slabs, tokens.shape[2])
        lengths = {"slice": 1, "scan": parts.slabs, "study": parts.slabs * parts.scans}
        state = {level: torch.cat([slab[:len(slab) // n, :1], slab.reshape(len(slab) // n, -1, slab.shape[2])], 1)
                 for level, n in lengths.items() if level in encoder.levels}
        for block, level in zip(encoder.blocks, encoder.levels): state[level] = block(state[level])
        return encoder.norm(torch.cat([x.flatten(0, 1) for x in state.values()])
                            if torch.is_grad_enabled() else state["study"])
    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options = dict(layout="multiscan_h3_token1176", width=384, heads=6, depth=6, scans=4, batch=1, rounds=5, threads=1,
                   device="cpu", precision="fp32", train=0)
    for name, value in options.items(): parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    own = layout(args.layout)
    own |= {"width": args.width, "heads": args.heads, "depth": args.depth,
            "levels": tuple(own["levels"] * args.depth)[:args.depth]}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    encoder = VolumeEncoder(**own).eval().to(args.device, dtype)
    level = deepcopy(encoder)
    level.levels = ("study",) * args.depth
    scans = 1 if own.get("max_scans") == 1 else args.scans
    x = torch.randn(args.batch, scans, 1, *(n * p for n, p in zip(own["grid"], own["patch_size"])), device=args.device,
                    dtype=dtype)
    joined = lambda model: lambda x: torch.cat([part[:, None] if part.ndim == 2 else part for part in model(x)], 1)
    ways = {"plain": plain(encoder), "one level": joined(level), "hierarchy": joined(encoder),
            "grouped": grouped(encoder)}

    def step(way):
        with torch.set_grad_enabled(bool(args.train)):
            y = way(x)
            if args.train: y.float().square().mean().backward()
        encoder.zero_grad(), level.zero_grad()
        return y

    first = {name: step(way) for name, way in ways.items()}
    assert args.precision != "fp32" or torch.allclose(first["plain"], first["one level"],
                                                      atol=1e-4), "the plain transformer computes something else"
    for way in ways.values(): step(way)
    gpu, seconds = args.device.startswith("cuda"), {name: [] for name in ways}
    clock = time.perf_counter if gpu else time.process_time
    for _ in range(args.rounds):
        for name, way in ways.items():
            if gpu: torch.cuda.synchronize()
            start = clock()
            step(way)
            if gpu: torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    where = torch.cuda.get_device_name() if gpu else f"{args.threads} threads"
    print(f"{args.layout}, width {args.width}, {args.depth} blocks, {args.batch} x {scans} scans, "
          f"{first['plain'].shape[1] - 1} tokens a study, {args.precision}, "
          f"{'forward and backward' if args.train else 'forward'}, {where}")
    for name, found in seconds.items():
        print(f"{name:<12} fastest {min(found) * 1e3:9.1f} ms   median {statistics.median(found) * 1e3:9.1f} ms   "
              f"{args.batch * scans / min(found):8.2f} scans/s")
    for a, b in (("one level", "plain"), ("hierarchy", "grouped"), ("hierarchy", "plain")):
        print(f"{a} / {b:<8} ratio of fastest {min(seconds[a]) / min(seconds[b]):6.3f}   of medians "
              f"{statistics.median(seconds[a]) / statistics.median(seconds[b]):6.3f}")


if __name__ == "__main__": main()
