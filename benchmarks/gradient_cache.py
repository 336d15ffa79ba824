"""Peak memory and time of a contrastive step in chunks against the same batch at once, as ratios.

    python benchmarks/gradient_cache.py [--batch 256] [--chunk 16] [--width 256] [--layers 6] [--rounds 3] [--threads 1]

Each way has a process of its own, since memory's high-water mark belongs to a process, and they step in
turn. The model is a ViT-B-32 in all but its size:
patches of 32 of 224 pixels, 77 tokens, heads of 64. `wall` is time on the clock and `cpu` the processor's, which other
work on the machine disturbs less. `peak` is the whole process, libraries, weights and gradients with it; `batch` is
what a step adds to them. The loss and all gradients of both ways are compared first.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from open_clip.model import CLIP

from medclip_nb.losses import clip_loss
from medclip_nb.trainers import cached_step

SIZES = dict(batch=256, chunk=16, width=256, layers=6, rounds=3, threads=1)


def peak() -> float: # Megabytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def child(args):
    """Step whenever a line comes in, and answer with time, loss and memory; the first time, leave the gradients in a
    file"""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    vision = dict(image_size=224, patch_size=32, width=args.width, layers=args.layers, head_width=64)
    model = CLIP(256, vision, dict(width=args.width, heads=args.width // 64, layers=args.layers))
    images, tokens = torch.randn(args.batch, 3, 224, 224), torch.randint(1, 49407, (args.batch, 77))
    loss_fn = lambda v, t: clip_loss(v, t, model.logit_scale.exp())
    run = lambda n: cached_step(model.encode_image, model.encode_text, images[:n], tokens[:n], loss_fn,
                                args.chunk if args.child == "chunks" else 0)
    run(2)
    before = peak()
    print(flush=True)
    for _ in sys.stdin:
        model.zero_grad()
        wall, cpu = time.perf_counter(), time.process_time()
        loss = run(args.batch).item()
        found = dict(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu, loss=loss, before=before,
                     peak=peak())
        file = Path(args.gradients, f"{args.child}.pt")
        if not file.exists(): torch.save([p.grad for p in model.parameters()], file)
        print(json.dumps(found), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in SIZES.items(): parser.add_argument(f"--{name}", type=int, default=value)
    for name in ("child", "gradients"): parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child: return child(args)
    with tempfile.TemporaryDirectory() as folder:
        found, ways = {"at once": [], "chunks": []}, {}
        for way in found:
            command = [sys.executable, __file__, "--child", way, "--gradients", folder,
                       *(f"--{name}={getattr(args, name)}" for name in SIZES)]
            ways[way] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            ways[way].stdout.readline()
        for _ in range(args.rounds):
            for way, process in ways.items():
                print(file=process.stdin, flush=True)
                found[way].append(json.loads(process.stdout.readline()))
        for process in ways.values(): process.communicate()
        ours, theirs = (torch.load(Path(folder, f"{way}.pt")) for way in ("chunks", "at once"))
    worst = max(float((a - b).abs().max()) for a, b in zip(ours, theirs))
    assert worst < 1e-5 and abs(
        found["chunks"][0]["loss"] - found["at once"][0]["loss"]) < 1e-5, f"the gradients differ by {worst}"
    print(" ".join(f"{name}={getattr(args, name)}" for name in SIZES), f"largest difference of a gradient {worst:.1e}")
    memory = {way: (rows[-1]["peak"], rows[-1]["peak"] - rows[-1]["before"]) for way, rows in found.items()}
    times = {way: [f([x[clock] for x in rows]) for clock in ("wall", "cpu") for f in (min, statistics.median)]
             for way, rows in found.items()}
    for way, (wall, wall_median, cpu, cpu_median) in times.items():
        print(f"{way:8s} wall min {wall:6.2f} s  median {wall_median:6.2f} s  cpu min {cpu:6.2f} s  median "
              f"{cpu_median:6.2f} s"
              f"  peak {memory[way][0]:6.0f} MB  batch {memory[way][1]:6.0f} MB")
    wall, wall_median, cpu, cpu_median = (a / b for a, b in zip(times["chunks"], times["at once"]))
    whole, batch = (a / b for a, b in zip(memory["chunks"], memory["at once"]))
    print(f"chunks over at once: wall min {wall:.2f}  median {wall_median:.2f}  cpu min {cpu:.2f}  median "
          f"{cpu_median:.2f}  peak {whole:.2f}  batch {batch:.2f}")


if __name__ == "__main__": main()
