"""Training steps with freed memory kept by the process, and given back to the system, as a ratio of times.

    python benchmarks/reuse_memory.py [--model starter-studies] [--batch 16] [--steps 4] [--rounds 3] [--threads 2]

The setting of `reuse_memory` holds for a process until its end, so each round starts one process of either kind, in
turn. A step is the pixels of a batch through the image tower, the itemized losses with four items an image and all
gradients; the first is not timed. Time of the system is what the pages cost, and the peak is that of the process. Needs
glibc.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time


def steps(model, batch, n, threads, keep):
    "Seconds, seconds of the system and peak memory of some steps"
    import torch

    from medclip_nb.core import reuse_memory, seed_everything
    from medclip_nb.losses import itemized_losses
    from medclip_nb.models import forward_image_tokens, give_pooling, load_model
    if keep and not reuse_memory(): raise SystemExit("The C library of this machine cannot keep freed memory.")
    torch.set_num_threads(threads)
    seed_everything(0)
    clip = load_model(model, device="cpu")
    give_pooling(clip)
    size = clip.model.visual.image_size
    pixels = torch.randn(batch, 3, *([1] if len(size) == 3 else []), *size)
    texts, mask = torch.randn(batch, 4, clip.dim), torch.ones(batch, 4, dtype=torch.bool)
    clip.model.train()
    for i in range(n + 1):
        if i == 1: start, system = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_stime
        features, tokens = forward_image_tokens(clip, pixels)
        itemized_losses(features, tokens, texts, mask, clip.pooling, clip.model.logit_scale.exp(), -10.0,
                        key_token_ratio=0.03)["loss"].backward()
        clip.model.zero_grad()
    used = resource.getrusage(resource.RUSAGE_SELF)
    return [(time.perf_counter() - start) / n, (used.ru_stime - system) / n, used.ru_maxrss / 1e6]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in dict(model="starter-studies", batch=16, steps=4, rounds=3, threads=2, only="").items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    if args.only: return print(json.dumps(steps(args.model, args.batch, args.steps, args.threads, args.only == "kept")))
    print(" ".join(f"{name}={value}" for name, value in vars(args).items() if name != "only"))
    found = {"kept": [], "given back": []}
    for _ in range(args.rounds):
        for kind in found:
            done = subprocess.run([sys.executable, *sys.argv, "--only", kind], capture_output=True, text=True)
            if done.returncode: sys.exit(done.stderr)
            found[kind].append(json.loads(done.stdout.splitlines()[-1]))
    base = [one[0] for one in found["kept"]]
    print(
        f"{'a step':<12}{'fastest':>10}{'median':>10}{'system':>10}{'peak':>10}"
        f"{'ratio of fastest':>18}{'of medians':>12}")
    for kind, rows in found.items():
        seconds, system, peak = zip(*rows)
        print(
            f"{kind:<12}{min(seconds):>9.3f}s{statistics.median(seconds):>9.3f}s{statistics.median(system):>9.3f}s"
            f"{max(peak):>7.2f} GB{min(seconds) / min(base):>17.2f}x"
            f"{statistics.median(seconds) / statistics.median(base):>11.2f}x")


if __name__ == "__main__": main()
