"""Images a second from shards against the same files from a folder and against the webdataset library, as ratios.

    python benchmarks/shards.py [--n 2000] [--size 256] [--rounds 5] [--workers 0] [--decode 1] [--cold 0]
                                [--folder DIR]

Every round reads all images each way once, in turn, in one process (or with that many workers); the ratios are of the
minima and of the medians. The files are JPEGs of the given size in one folder, the shards hold their bytes. With
--decode 0 bytes are read and nothing else, which shows the reading alone. Unless asked with --cold 1, every way finds
its data in the memory of the system, the most favourable case for single files; with it, the system is asked to forget
the files before each way (Linux only).
"""
import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from medclip_nb.datasets import ShardLoader, Shards, load_manifest, write_shards
from medclip_nb.images import read_image

try:
    import webdataset
except ImportError: webdataset = None

BATCH = 64


def make_files(root, n, size):
    "JPEGs that compress as photographs do, and a table of them"
    rng = np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC)
        coarse.save(root / f"{i:06d}.jpg", quality=90)
    (root / "t.csv").write_text("image,caption,split\n" + "".join(f"{i:06d}.jpg,picture {i},train\n" for i in range(n)))
    return load_manifest("csv", root)


class Files(Dataset):
    "The same images one file at a time"
    def __init__(self, paths, decode): self.paths, self.decode = paths, decode
    def __len__(self): return len(self.paths)
    def __getitem__(self, i):
        return pixels(read_image(self.paths[i])) if self.decode else len(self.paths[i].read_bytes())


def forget(root):
    "Ask the system to drop what it holds of the files"
    for path in (p for p in root.rglob("*") if p.is_file()):
        with open(path, "rb") as f: os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def pixels(image): return torch.from_numpy(np.array(image)).float().mean()
def of_sample(sample):
    return pixels(sample["image"]) if isinstance(sample["image"], Image.Image) else len(sample["image"])
def raw_bytes(raw, extension, volume): return raw


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in dict(n=2000, size=256, rounds=5, workers=0, decode=1, cold=0).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--folder", type=Path, help="where to make the files; a temporary folder by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        manifest = make_files(Path(root), args.n, args.size)
        write_shards(manifest, shards := Path(root, "shards"), per_shard=500)
        urls = sorted(str(p) for p in shards.glob("*.tar"))
        stream = Shards(shards, of_sample, **({} if args.decode else {"decode": raw_bytes}))
        ways = {"shards": lambda: ShardLoader(stream, BATCH, args.workers),
                "folder": lambda: DataLoader(Files(manifest.paths(), args.decode), BATCH, shuffle=True,
                                             num_workers=args.workers)}
        if webdataset:
            library = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(1000)
            unpack = (lambda s: pixels(s["jpg"])) if args.decode else (lambda s: len(s["jpg"]))
            library = (library.decode("pil") if args.decode else library).map(unpack)
            ways["webdataset"] = lambda: DataLoader(library, BATCH, num_workers=args.workers)
        os.sync()
        times = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                if args.cold: forget(Path(root))
                start = time.perf_counter()
                seen = sum(len(batch) for batch in way())
                times[name].append(time.perf_counter() - start)
                assert seen == args.n, f"{name}: {seen} of {args.n}"
    print(f"n={args.n} size={args.size} workers={args.workers} decode={args.decode} cold={args.cold} "
          f"rounds={args.rounds}")
    ours = times["shards"]
    for name, t in times.items():
        print(f"{name:11s} {args.n / min(t):9.0f} images/s at best  {args.n / statistics.median(t):9.0f} in the median "
              f" slowest/fastest {max(t) / min(t):.2f}"
              f"  time as a ratio to shards: min {min(t) / min(ours):5.2f}  median "
              f"{statistics.median(t) / statistics.median(ours):5.2f}")


if __name__ == "__main__": main()
