"""Image features with bfloat16 weights against a float32 loop over open_clip's model, as ratios, and what the lower
precision changes.

    python benchmarks/image_features.py [--model ViT-B-32] [--batch 32] [--rounds 7] [--per_class 24] [--threads 2]
                                        [--device cpu] [--checkpoint ""]

The float32 loop is `model.encode_image(batch, normalize=True)` under `torch.no_grad`; ours is
`ClipModel.encode_images`. "autocast" is what one may try instead, float32 weights under bfloat16 autocast, once under
`no_grad` and once under `inference_mode`, where every cast of a weight is made anew. "GEMM" multiplies matrices as the
blocks do, as many as they do, and nothing else: what no way can beat. Every round times each way once, in turn, in one
process, after a first round that does not count; the ratios are of the minima and of the medians.

Then both encode pictures of nine kinds, gratings that differ in direction, fineness and colour, under noise. With
random weights all features of a model are close together and all classes of a zero-shot classifier get nearly the same
score, so which is highest says little: the same is asked of a nearest-mean classifier, whose classes are the float32
means of other pictures, with the common mean taken away. "margin" is the gap between the two best scores in float32,
"shift" the largest change of a score: where the first is not much larger than the second, an argmax is a matter of
chance. With `--checkpoint` the weights are trained ones.
"""
import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from noted import note

from medclip_nb.evaluators import zero_shot_classifier
from medclip_nb.models import load_model

KINDS = ("red", "green", "grey")


def pictures(n, size, generator):
    "(9 n, 3, size, size) of nine kinds in turn, and their kinds"
    kinds = torch.arange(9).repeat(n)
    x, y = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    angle, fine = (kinds % 3) * torch.pi / 3 + 0.1 * torch.randn(len(kinds),
                                                                 generator=generator), 4.0 * 2 ** (kinds // 3)
    phase = (fine[:, None, None] * 6.28 * (x * angle.cos()[:, None, None] + y * angle.sin()[:, None, None])
             + 6.28 * torch.rand(len(kinds), 1, 1, generator=generator))
    colour = torch.tensor([[1.0, 0.2, 0.2], [0.2, 1.0, 0.2], [0.7, 0.7, 0.7]])[kinds // 3]
    return (colour[:, :, None, None] * phase.sin()[:, None] * 2
            + 0.5 * torch.randn(len(kinds), 3, size, size, generator=generator), kinds)


def gemm_way(model, batch, dtype, device):
    "Products of the shapes and number that a vision transformer takes"
    blocks = model.visual.transformer.resblocks
    d, tokens = blocks[0].attn.embed_dim, model.visual.positional_embedding.shape[0] * batch
    shapes = [(tokens, d, 3 * d), (tokens, d, d), (tokens, d, 4 * d), (tokens, 4 * d, d)]
    pairs = [(torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype))
             for m, k, n in shapes]
    return lambda: [F.linear(a, b) for _ in blocks for a, b in pairs]


def autocast_way(model, images, mode):
    def encode():
        with mode(), torch.autocast(images.device.type, torch.bfloat16):
            return F.normalize(model.encode_image(images).float(), dim=-1)
    return encode


def agreement(name, scores, lower):
    "How often the highest score stays the highest"
    best = scores.topk(2, dim=1).values
    margin, shift = best[:, 0] - best[:, 1], (scores - lower).abs().amax(1)
    same = scores.argmax(1) == lower.argmax(1)
    clear = margin > 2 * shift.max()
    print(f"{name:32s} same argmax {same.float().mean():7.2%} of {len(same)}; margin median {margin.median():.1e}, 1 % "
          f"below {margin.quantile(0.01):.1e}; "
          f"shift {shift.max():.1e}; margin above twice the shift {clear.float().mean():7.2%}"
          + (f", same among them {same[clear].float().mean():.2%}" if clear.any() else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in dict(model="ViT-B-32", batch=32, rounds=7, per_class=24, threads=2, device="cpu",
                            checkpoint="").items(): parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clip = load_model(args.model, args.checkpoint or None, args.device, "fp32")
    lower = load_model(args.model, args.checkpoint or None, args.device, "bf16")
    lower.model.load_state_dict(clip.model.state_dict())
    size = clip.model.visual.image_size
    size = size[0] if isinstance(size, tuple) else size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch, 3, size, size, generator=generator).to(clip.device)

    def loop(images=images):
        with torch.no_grad(): return clip.model.encode_image(images.to(clip.device), normalize=True)
    ways = {"open_clip fp32": loop, "ours fp32": lambda: clip.encode_images(images),
            "ours bf16": lambda: lower.encode_images(images),
            "autocast, no_grad": autocast_way(clip.model, images, torch.no_grad),
            "autocast, inference_mode": autocast_way(clip.model, images, torch.inference_mode)}
    if hasattr(clip.model.visual, "transformer"):
        ways |= {f"GEMM {name}": gemm_way(clip.model, args.batch, dtype, clip.device)
                 for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    times, wait = {name: []
                   for name in ways}, torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    with torch.no_grad():
        for round in range(args.rounds + 1):
            for name, way in ways.items():
                wait()
                start = time.perf_counter()
                way()
                wait()
                if round: times[name].append(time.perf_counter() - start)
    print(f"{args.model}, batch {args.batch}, {args.threads} threads on {args.device}")
    for name, t in times.items():
        ratio = [f(times["open_clip fp32"]) / f(t) for f in (min, statistics.median)]
        print(f"{name:24s} min {min(t) * 1e3:8.1f} ms  median {statistics.median(t) * 1e3:8.1f} ms  slowest/fastest "
              f"{max(t) / min(t):.2f}"
              f"  open_clip over it: min {ratio[0]:5.2f}  median {ratio[1]:5.2f}")

    task = f"{args.model}, batch {args.batch}"
    theirs = times["open_clip fp32"]
    note("image features, fp32", "a loop over open_clip's model", times["ours fp32"], theirs, size=task,
         bound=times.get("GEMM fp32", ()))
    note("image features, bf16", "a loop over open_clip's model, fp32", times["ours bf16"], theirs, goal=1.8, size=task,
         bound=times.get("GEMM bf16", ()), needs="bf16")

    batches = [pictures(2, size, generator) for _ in range(args.per_class)]
    exact = torch.cat([loop(x).cpu() for x, _ in batches])
    rough = torch.cat([lower.encode_images(x.to(clip.device)) for x, _ in batches])
    kinds = torch.cat([k for _, k in batches])
    print(f"\ncosine to float32: least {(exact * rough).sum(1).min():.6f}, mean {(exact * rough).sum(1).mean():.6f}; "
          f"between different pictures: mean "
          f"{(exact @ exact.T).fill_diagonal_(0).sum() / (len(exact) * (len(exact) - 1)):.4f}")
    texts = zero_shot_classifier(clip, [f"{colour} stripes number {i}" for colour in KINDS for i in range(3)],
                                 ["a picture of {}.", "{}"])
    agreement("zero-shot, text classes", exact @ texts.T, rough @ texts.T)
    half, centre = len(exact) // 2, exact[:len(exact) // 2].mean(0)
    means = F.normalize(torch.stack([exact[:half][kinds[:half] == k].mean(0) for k in range(9)]) - centre, dim=-1)
    of = lambda features: F.normalize(features[half:] - centre, dim=-1) @ means.T
    agreement("nearest mean of other pictures", of(exact), of(rough))
    print(f"nearest mean is right: float32 {(of(exact).argmax(1) == kinds[half:]).float().mean():.2%}, bfloat16 "
          f"{(of(rough).argmax(1) == kinds[half:]).float().mean():.2%}")


if __name__ == "__main__": main()
