"""The contrastive loss, forward and backward, against open_clip's ClipLoss, as ratios.

    python benchmarks/loss.py [--dim 512] [--rounds 20] [--threads 1]

Both get raw features and return the gradients of features and scale; open_clip's come normalised from its model, so
normalising is part of its time. Every round times each way once, in turn, in one process; the ratios are of the minima
and of the medians.
"""
import argparse
import statistics
import time

import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss

from medclip_nb.losses import clip_loss, siglip_loss, soft_clip_loss

SIZES = (64, 256, 1024, 2048)


def ways(n):
    "Pairs of functions that are the same loss: ours and open_clip's"
    theirs, sigmoid, eye = open_clip.ClipLoss(), SigLipLoss(), torch.eye(n)
    unit = lambda loss: lambda v, t, s: loss(F.normalize(v, dim=-1), F.normalize(t, dim=-1), s)
    return {"clip_loss": (clip_loss, unit(theirs)),
            "siglip_loss": (lambda v, t, s: siglip_loss(v, t, s, -10.0), unit(lambda v, t, s: sigmoid(v, t, s, -10.0))),
            "soft_clip_loss": (lambda v, t, s: soft_clip_loss(v, t, s, eye), unit(theirs))}


def measure(loss, inputs):
    start = time.perf_counter()
    value = loss(*inputs)
    gradients = torch.autograd.grad(value, inputs)
    return time.perf_counter() - start, (value, *gradients)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in dict(dim=512, rounds=20, threads=1).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"dim={args.dim} threads={args.threads} rounds={args.rounds}; ratio is open_clip's time over ours")
    for n in SIZES:
        inputs = [*torch.randn(2, n, args.dim), torch.tensor(14.3)]
        inputs = [x.clone().requires_grad_() for x in inputs]
        for name, pair in ways(n).items():
            times = [[], []]
            for a, b in zip(*(measure(loss, inputs)[1] for loss in pair)):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
            for _ in range(args.rounds):
                for loss, t in zip(pair, times): t.append(measure(loss, inputs)[0])
            ours, theirs = times
            print(f"n={n:<5d} {name:15s} ours min {min(ours) * 1e3:7.2f} ms  open_clip min {min(theirs) * 1e3:7.2f} ms"
                  f"  ratio: min {min(theirs) / min(ours):5.2f}  median "
                  f"{statistics.median(theirs) / statistics.median(ours):5.2f}")


if __name__ == "__main__": main()
