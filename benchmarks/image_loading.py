"""Images a second of ImageDataset in a DataLoader against PIL's plain decoding and resizing of the same files, as
ratios.

    python benchmarks/image_loading.py [--n 200] [--side 1024] [--size 224] [--rounds 5] [--workers 0] [--threads 1]

Every round reads all files each way once, in turn, in one process (or with that many workers); the ratios are of the
minima and of the medians. "2 threads" is what `embed` does while the model computes. The files are JPEGs. "draft" lets
the decoder leave out what the resizing would throw away, which changes pixels a little.
"""
import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from medclip_nb.images import ImageDataset, prefetched


class Resize:
    "PIL image -> tensor of bytes"
    def __init__(self, size): self.size = size
    def __call__(self, image):
        return torch.from_numpy(np.array(image.resize((self.size, self.size), Image.Resampling.BICUBIC)))


class Plain(Dataset):
    "What one would write by hand"
    def __init__(self, paths, preprocess): self.paths, self.preprocess = paths, preprocess
    def __len__(self): return len(self.paths)
    def __getitem__(self, i):
        with Image.open(self.paths[i]) as image: return self.preprocess(image.convert("RGB"))


def make_files(root, n, side):
    "JPEGs that compress as photographs do"
    rng, paths = np.random.default_rng(0), []
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).resize(
            (side, side), Image.Resampling.BICUBIC)
        coarse.save(path := root / f"{i:06d}.jpg", quality=90)
        paths.append(path)
    return paths


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in dict(n=200, side=1024, size=224, rounds=5, workers=0, threads=1).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as root:
        paths, resize = make_files(Path(root), args.n, args.side), Resize(args.size)
        ways = {"medclip_nb": ImageDataset(paths, resize),
                "medclip_nb draft": ImageDataset(paths, resize, draft=args.size), "PIL": Plain(paths, resize)}
        assert torch.equal(ways["medclip_nb"][0], ways["PIL"][0])
        changed = (ways["medclip_nb draft"][0].float() - ways["PIL"][0].float()).abs().mean()
        read = {name: lambda data=data: DataLoader(data, batch_size=32, num_workers=args.workers)
                for name, data in ways.items()}
        batches = [range(i, min(i + 32, args.n)) for i in range(0, args.n, 32)]
        read |= {"medclip_nb, 2 threads": lambda: prefetched(ways["medclip_nb"], batches)}
        times = {name: [] for name in read}
        for _ in range(args.rounds):
            for name, start_reading in read.items():
                start = time.perf_counter()
                for _ in start_reading(): pass
                times[name].append(time.perf_counter() - start)
    ours = times["medclip_nb"]
    print(f"n={args.n} side={args.side} size={args.size} workers={args.workers} rounds={args.rounds}; draft changes a "
          f"pixel by {changed:.2f} of 255")
    for name, t in times.items():
        print(f"{name:22s} {args.n / min(t):7.0f} images/s  slowest/fastest {max(t) / min(t):.2f}"
              f"  ratio to medclip_nb: min {min(t) / min(ours):5.2f}  median "
              f"{statistics.median(t) / statistics.median(ours):5.2f}")


if __name__ == "__main__": main()
