"""Text-conditioned similarity of images and texts against the straightforward way, as ratios of time and memory.

    python benchmarks/item_similarity.py [--images 80] [--texts 2000] [--tokens 196] [--dim 512] [--heads 8]
                                         [--chunk 1024] [--rounds 3] [--threads 2] [--device cpu] [--clock wall]

The straightforward way gives every image its own copy of every text and calls torch's attention, with weights and the
masks of all heads, for blocks of 80 images and 100 texts. Results are compared before anything is timed. "top 128"
computes the 128 texts of each image that are nearest by global similarity. Every round times each way once, in turn, in
one process; the ratios are of the minima and of the medians; `--clock cpu` counts processor time instead, for a machine
that has other work, and wants one thread. Memory is the peak above what is there before, counted by torch's profiler on
a CPU and by the allocator on a GPU; it is also given for twice the images and for a quarter of the chunk.
"""
import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from noted import note

from medclip_nb.models import TextConditionedPooling, item_similarity, top_candidates

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@torch.no_grad()
def straightforward(image_tokens, texts, pooling, images=80, some=100, masks=True):
    "Blocks of 80 images and 100 texts, as in published evaluation code's defaults"
    rows = []
    for tokens in image_tokens.split(images):
        row = []
        for part in texts.split(some):
            copies = part.expand(len(tokens), -1, -1).contiguous()
            masked = torch.zeros(len(tokens) * pooling.heads, len(part), tokens.shape[1], dtype=torch.bool,
                                 device=tokens.device) if masks else None
            found, _ = pooling.attn(pooling.ln_q(copies), pooling.ln_k(tokens), pooling.ln_v(tokens), attn_mask=masked)
            row.append((F.normalize(found, dim=-1) * F.normalize(copies, dim=-1)).sum(-1))
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


def timed(way, device, clock):
    start = clock()
    way()
    if device == "cuda": torch.cuda.synchronize()
    return clock() - start


def peak(way, device):
    "Bytes at the highest point, above those at the start"
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile: way()
    events = sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
                    key=lambda e: e.start_ns())
    now = top = 0
    for event in events:
        now += event.nbytes()
        top = max(top, now)
    return top


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options = dict(images=80, texts=2000, tokens=196, dim=512, heads=8, chunk=1024, rounds=3, threads=2, device="cpu",
                   clock="wall")
    for name, value in options.items(): parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(" ".join(f"{name}={value}" for name, value in vars(args).items()))
    pooling = TextConditionedPooling(args.dim, args.heads).to(args.device).requires_grad_(False)
    image_tokens, image_features, texts = (torch.randn(*shape, args.dim, device=args.device)
                                           for shape in ((args.images, args.tokens), (args.images,), (args.texts,)))
    few = top_candidates(image_features, texts, 128, "image")
    ways = {"medclip_nb": lambda: item_similarity(image_tokens, texts, pooling, args.chunk),
            "medclip_nb, top 128": lambda: item_similarity(image_tokens, texts, pooling, args.chunk, few),
            "straightforward": lambda: straightforward(image_tokens, texts, pooling),
            "the same, no masks": lambda: straightforward(image_tokens, texts, pooling, masks=False)}
    expected = straightforward(image_tokens, texts, pooling)
    torch.testing.assert_close(ways["medclip_nb"](), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(ways["medclip_nb, top 128"]()[few], expected[few], atol=1e-5, rtol=0)
    memory, seconds = {name: peak(way, args.device) for name, way in ways.items()}, {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items(): seconds[name].append(timed(way, args.device, CLOCKS[args.clock]))
    base = seconds["medclip_nb"]
    print(f"{'':<24}{'fastest':>10}{'median':>10}{'ratio of fastest':>18}{'of medians':>12}{'peak memory':>14}")
    for name, found in seconds.items():
        print(f"{name:<24}{min(found):>9.3f}s{statistics.median(found):>9.3f}s{min(found) / min(base):>17.2f}x"
              f"{statistics.median(found) / statistics.median(base):>11.2f}x{memory[name] / 1e6:>11.0f} MB")
    note("item similarity", "attention for copies of every text", base, seconds["straightforward"], 5,
         memory=(memory["medclip_nb"] / 1e6, memory["straightforward"] / 1e6),
         size=f"{args.images} images, {args.texts} texts")
    twice = torch.cat([image_tokens, image_tokens])
    for name, way in {"twice the images": lambda: item_similarity(twice, texts, pooling, args.chunk),
                      "a quarter of the chunk": lambda: item_similarity(image_tokens, texts, pooling,
                                                                        args.chunk // 4)}.items():
        print(f"medclip_nb, {name:<44}{'peak memory':>22}{peak(way, args.device) / 1e6:>11.0f} MB")


if __name__ == "__main__": main()
