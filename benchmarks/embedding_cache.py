"""Features from the cache against computing them, and a large cache read as a whole.

    python benchmarks/embedding_cache.py [--model ViT-B-32] [--n 192] [--rounds 5] [--rows 100000] [--width 512]
                                         [--threads 2]

The first part embeds n pictures with captions: "compute" without a cache, "warm" with one that holds all of them, which
still identifies the weights, the preprocessing and every file. Every round times each way once, in turn, in one
process; the ratios are of the minima and of the medians. Computing grows with n, and most of "warm" does not, so a
larger n gives a larger ratio; "a row more" is the ratio without the fixed part. The second part reads a store of rows x
width in a fresh process, all rows in a random order, and says how long that takes, how long plain `np.load` takes for
the same numbers, and how much memory it needs (Linux only).
"""
import argparse
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import pandas as pd
import torch
from noted import note
from PIL import Image

from medclip_nb.datasets import load_manifest
from medclip_nb.embeddings import FeatureCache, embed, feature_identity
from medclip_nb.models import load_model

WORDS = ("axial t2 weighted slice of the brain with a small ring enhancing lesion in the left frontal lobe "
         "surrounded by oedema").split()
READER = """
import sys, time
import numpy as np
from medclip_nb.embeddings import FeatureCache
folder, rows, plain = sys.argv[1], int(sys.argv[2]), sys.argv[3]
keys = [f"key {i}" for i in np.random.default_rng(0).permutation(rows)]
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
before, start = peak(), time.perf_counter()
out = FeatureCache(folder).fill(keys, None) if plain == "-" else np.load(plain)
print(time.perf_counter() - start, peak() - before, out.nbytes / 2**20)
"""


def make_manifest(folder, n):
    "Pictures of noise, with captions that differ"
    rng = np.random.default_rng(0)
    for i in range(n): Image.fromarray(rng.integers(0, 255, (224, 224), dtype=np.uint8)).save(f"{folder}/{i}.png")
    captions = [" ".join([*WORDS[i % 9:], str(i)]) for i in range(n)]
    pd.DataFrame({"image": [f"{i}.png" for i in range(n)], "caption": captions, "split": "test"}).to_csv(
        f"{folder}/table.csv", index=False)
    return load_manifest("csv", folder)


def against_computing(args, folder):
    "Part one"
    clip, manifest, cache = load_model(args.model, device="cpu",
                                       precision="fp32"), make_manifest(folder, args.n), f"{folder}/cache"
    time.sleep(2.5) # files that were just written are not trusted yet
    computed = embed(clip, manifest, cache)
    ways = {"compute": lambda: embed(clip, manifest), "warm": lambda: embed(clip, manifest, cache),
            "identity": lambda: [feature_identity(clip, kind) for kind in ("images", "texts")]}
    warm = ways["warm"]()
    assert (warm.counts["images"]["found"] == warm.counts["texts"]["found"] == args.n
            and np.array_equal(warm.images, computed.images))
    times = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    print(f"{args.model}, {args.n} pictures and captions, {args.threads} threads")
    for name, t in times.items():
        ratio = [f(times["compute"]) / f(t) for f in (min, statistics.median)]
        print(f"{name:10s} min {min(t) * 1e3:9.1f} ms  median {statistics.median(t) * 1e3:9.1f} ms  slowest/fastest "
              f"{max(t) / min(t):.2f}"
              f"  compute over it: min {ratio[0]:6.1f}  median {ratio[1]:6.1f}")
    note("features from the cache", "computing them", times["warm"], times["compute"], 50,
         size=f"{args.model}, {args.n} pictures and captions")
    least = {name: min(t) for name, t in times.items()}
    print(f"a row more: {least['compute'] / max(least['warm'] - least['identity'], 1e-9):.0f}")


def large(args, folder):
    "Part two"
    rng, store = np.random.default_rng(0), FeatureCache(f"{folder}/large", args.width)
    def compute(positions):
        for i in range(0, len(positions), 1000):
            yield positions[i:i + 1000], rng.standard_normal((len(positions[i:i + 1000]), args.width), dtype=np.float32)
    rows = store.fill([f"key {i}" for i in range(args.rows)], compute)
    np.save(f"{folder}/plain.npy", rows)
    size = rows.nbytes / 2**20
    read = {name: [] for name in ("store", "np.load")}
    for _ in range(args.rounds):
        for name, plain in (("store", "-"), ("np.load", f"{folder}/plain.npy")):
            read[name].append(list(
                map(float, subprocess.run([sys.executable, "-c", READER, f"{folder}/large", str(args.rows), plain],
                                          capture_output=True, text=True, check=True).stdout.split())))
    print(f"\n{args.rows} rows of {args.width}, {size:.0f} MB, {len(store.shards())} shards")
    for name, found in read.items():
        seconds, memory = [f[0] for f in found], max(f[1] for f in found)
        print(f"{name:10s} min {min(seconds):6.3f} s  median {statistics.median(seconds):6.3f} s  memory {memory:.0f} "
              f"MB, {memory / size:.2f} of the answer")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in dict(model="ViT-B-32", n=192, rounds=5, rows=100_000, width=512, threads=2).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        against_computing(args, folder)
        large(args, folder)


if __name__ == "__main__": main()
