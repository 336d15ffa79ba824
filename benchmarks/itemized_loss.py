"""The itemized losses, forward and backward, against the straightforward way, as ratios of time and memory.

    python benchmarks/itemized_loss.py [--batch 32] [--items 7] [--tokens 196] [--dim 512] [--heads 8] [--rounds 5]
                                       [--threads 2] [--device cpu] [--clock wall]

The straightforward way gives every image its own copy of its texts, and calls torch's attention, with weights and the
masks of all heads, once for each loss:
for item alignment, for the key tokens and for the separation of items. It comes in two sizes. "list" copies the texts
that an image meets, its own and one of each other image. "all" copies every text of the batch and picks what is met
afterwards. Values and gradients are compared before anything is timed. Every round times each way once, in turn, in one
process; the ratios are of the minima and of the medians. Memory is the peak above what the inputs take, counted by
torch's profiler on a CPU and by the allocator on a GPU. `--clock cpu` counts processor time instead, for a machine that
has other work; give it one thread. Each is given twice: with all tokens, and with a tenth of them left out at random
and worst items up-weighted.
"""
import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from noted import note

from medclip_nb.losses import draw_token_mask, itemized_losses, sample_negatives, text_lists
from medclip_nb.models import TextConditionedPooling

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def straightforward(pooling, image_features, image_tokens, text_features, real, scale, bias, neg_index, token_mask,
                    factor, ratio, everything):
    "All four losses, by `nn.MultiheadAttention`"
    b, k, d = text_features.shape
    index = text_lists(neg_index, k)
    own = index // k == torch.arange(b, device=index.device)[:, None]
    texts = text_features.flatten(0, 1)
    asked = texts.expand(b, -1, -1).contiguous() if everything else texts[index]
    pick = (lambda x: x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))) if everything else (lambda x: x)

    def attend(queries, mask):
        found, weights = pooling.attn(pooling.ln_q(queries), pooling.ln_k(image_tokens), pooling.ln_v(image_tokens),
                                      attn_mask=None if mask is None else ~mask.flatten(0, 1))
        return found, weights[..., :-1]

    def listed(mask):
        "A mask of lists as one of all texts"
        if mask is None or not everything: return mask
        wide = torch.ones(b, mask.shape[1], b * k, mask.shape[-1], dtype=torch.bool, device=mask.device)
        return wide.scatter(2, index[:, None, :, None].expand_as(mask), mask)

    def sigmoid(logits, right, weights): return -(weights * F.logsigmoid(logits * (2.0 * right - 1))).sum()
    met = texts[index]
    weights = real.flatten()[index].float()
    found, maps = attend(asked, listed(token_mask))
    found, maps = pick(found), pick(maps)
    logits = scale * F.cosine_similarity(found, met, dim=-1) + bias
    worst = logits.masked_fill(~own | (weights == 0), torch.inf).argmin(1)
    weights = weights * (1 + (factor - 1) * F.one_hot(worst, own.shape[1]))
    ila = sigmoid(logits, own, weights) / b
    top = maps.topk(max(1, int(ratio * maps.shape[-1]))).indices
    keys = torch.zeros_like(maps, dtype=torch.bool).scatter(-1, top, True)[:, None].expand(-1, pooling.heads, -1, -1)
    kta = sigmoid(scale * F.cosine_similarity(pick(attend(asked, listed(keys))[0]), met, dim=-1) + bias, own,
                  weights) / b
    own_mask = (None if token_mask is None
                else token_mask.transpose(1, 2)[own].view(b, k, pooling.heads, -1).transpose(1, 2))
    separate = F.normalize(attend(text_features, own_mask)[0],
                           dim=-1) @ F.normalize(text_features, dim=-1).transpose(1, 2)
    iis = sigmoid(scale * separate + bias, torch.eye(k, device=real.device),
                  (real[:, :, None] & real[:, None]).float()) / (b * k)
    everyone = scale * F.normalize(image_features, dim=-1) @ F.normalize(texts, dim=-1).T + bias
    mps = sigmoid(everyone, torch.eye(b, device=real.device).repeat_interleave(k, 1), real.flatten().float()) / (b * k)
    return ila + kta + iis + mps


def measure(loss, inputs, parameters, device, clock=time.perf_counter):
    start = clock()
    value = loss(*inputs)
    gradients = torch.autograd.grad(value, [*inputs, *parameters])
    if device == "cuda": torch.cuda.synchronize()
    return clock() - start, [value, *gradients]


def peak(loss, inputs, parameters, device):
    "Bytes at the highest point of a step, above those at its start"
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        measure(loss, inputs, parameters, device)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        measure(loss, inputs, parameters, device)
    events = sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
                    key=lambda e: e.start_ns())
    now = top = 0
    for event in events:
        now += event.nbytes()
        top = max(top, now)
    return top


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options = dict(batch=32, items=7, tokens=196, dim=512, heads=8, rounds=5, threads=2, device="cpu", clock="wall")
    for name, value in options.items(): parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(" ".join(f"{name}={value}" for name, value in vars(args).items()))
    b, k, l, d = args.batch, args.items, args.tokens, args.dim
    pooling = TextConditionedPooling(d, args.heads).to(args.device)
    parameters = list(pooling.parameters())
    inputs = [torch.randn(*shape, device=args.device, requires_grad=True) for shape in ((b, d), (b, l, d), (b, k, d))]
    real = torch.arange(k, device=args.device) < torch.randint(1, k + 1, (b, 1), device=args.device)
    neg_index = sample_negatives(real)
    for name, keep, factor in (("all tokens", 1.0, 1.0), ("keep 0.9, worst item 1.5", 0.9, 1.5)):
        mask = None if keep == 1 else draw_token_mask((b, args.heads, b + k - 1, l), keep, b, device=args.device)
        ours = lambda v, x, t: itemized_losses(v, x, t, real, pooling, 14.3, -10.0, neg_index,
                                               worst_positive_factor=factor, token_mask=mask)["loss"]
        ways = {"medclip_nb": ours}
        for size in ("list", "all"):
            ways[f"straightforward, {size}"] = lambda v, x, t, size=size: straightforward(
                pooling, v, x, t, real, 14.3, -10.0, neg_index, mask, factor, 0.1, size == "all")
        expected = measure(ours, inputs, parameters, args.device)[1]
        memory, seconds = {}, {way: [] for way in ways}
        for way, loss in ways.items():
            for a, e in zip(measure(loss, inputs, parameters, args.device)[1], expected):
                torch.testing.assert_close(a, e, atol=2e-4, rtol=2e-3)
            memory[way] = peak(loss, inputs, parameters, args.device)
        for _ in range(args.rounds):
            for way, loss in ways.items():
                seconds[way].append(measure(loss, inputs, parameters, args.device, CLOCKS[args.clock])[0])
        base = seconds["medclip_nb"]
        print(
            f"{name:<26}{'fastest':>10}{'median':>10}{'ratio of fastest':>18}{'of medians':>12}"
            f"{'peak memory':>14}{'ratio':>8}")
        for way in list(ways)[1:]:
            note(f"itemized loss, {name}", way, base, seconds[way], 3 if way.endswith("list") else None,
                 memory=(memory["medclip_nb"] / 1e6, memory[way] / 1e6), size=f"{b} images, {k} items, {l} tokens")
        for way, found in seconds.items():
            print(f"{way:<26}{min(found):>9.3f}s{statistics.median(found):>9.3f}s{min(found) / min(base):>17.2f}x"
                  f"{statistics.median(found) / statistics.median(base):>11.2f}x{memory[way] / 1e6:>11.0f} "
                  f"MB{memory[way] / memory['medclip_nb']:>7.2f}x")


if __name__ == "__main__": main()
