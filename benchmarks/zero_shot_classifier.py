"""The weights of a zero-shot classifier against open_clip's `build_zero_shot_classifier`, as ratios.

    python benchmarks/zero_shot_classifier.py [--model ViT-B-32] [--rounds 7] [--threads 2] [--device cpu]

Nine classes of histology in ten templates, one class after the other, random weights. open_clip encodes the sentences
padded to the context; ours cuts each batch at its longest sentence and takes sentences of like length together. "one
batch" is ours without the latter. Tokenizing is part of every way and is timed on its own as well. "tokens" is a bound:
the share of the padded tokens that sentences consist of. Every round times each way once, in turn, in one process,
after a first round that does not count; the ratios are of the minima and of the medians. The results are compared
before anything is timed.
"""
import argparse
import statistics
import time

import open_clip
import torch
import torch.nn.functional as F
from noted import note

from medclip_nb.evaluators import class_sentences, zero_shot_classifier
from medclip_nb.models import load_model

CLASSES = ["adipose tissue", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
           "cancer-associated stroma",
           "colorectal adenocarcinoma epithelium"]
TEMPLATES = ["a histopathology slide showing {}.", "histopathology image of {}.", "pathology tissue showing {}.",
             "presence of {} tissue on image.",
             "an H&E stained image of {}.", "{} is shown.", "this is {}.", "there is {}.",
             "an example of {}, magnified.", "shows {}, H&E."]


def one_batch(clip, sentences):
    "All sentences cut at the longest of them"
    with clip.inference(): features = F.normalize(clip.forward_texts(clip.tokenizer(sentences)), dim=-1)
    return F.normalize(features.view(len(CLASSES), len(TEMPLATES), -1).mean(1), dim=-1).cpu()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in dict(model="ViT-B-32", rounds=7, threads=2, device="cpu").items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clip = load_model(args.model, device=args.device, precision="fp32")
    sentences = [s for group in class_sentences(CLASSES, TEMPLATES) for s in group]
    lengths, functions = clip.token_counts(sentences), [lambda name, t=t: t.replace("{}", name) for t in TEMPLATES]
    ways = {"open_clip": lambda: open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer, CLASSES, functions,
                                                                      num_classes_per_batch=10,
                                                                      device=clip.device).T.cpu(),
            "one batch": lambda: one_batch(clip, sentences),
            "ours": lambda: zero_shot_classifier(clip, CLASSES, TEMPLATES),
            "tokenizer": lambda: clip.tokenizer(sentences)}
    gap = (ways["ours"]() - ways["open_clip"]()).abs().max().item()
    print(f"{args.model}, {len(sentences)} sentences of {min(lengths)} to {max(lengths)} tokens, {args.threads} "
          f"threads on {args.device}; largest difference {gap:.1e}; "
          f"tokens: {clip.context_length * len(lengths) / sum(lengths):.2f}")
    times, wait = {name: []
                   for name in ways}, torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    for round in range(args.rounds + 1):
        for name, way in ways.items():
            wait()
            start = time.perf_counter()
            way()
            wait()
            if round: times[name].append(time.perf_counter() - start)
    for name, t in times.items():
        ratio = [f(times["open_clip"]) / f(t) for f in (min, statistics.median)]
        print(f"{name:10s} min {min(t) * 1e3:8.1f} ms  median {statistics.median(t) * 1e3:8.1f} ms  slowest/fastest "
              f"{max(t) / min(t):.2f}"
              f"  open_clip over it: min {ratio[0]:5.2f}  median {ratio[1]:5.2f}")
    note("zero-shot classifier", "open_clip's build_zero_shot_classifier", times["ours"], times["open_clip"], goal=3,
         bound=times["tokenizer"], size=f"{args.model}, {len(sentences)} sentences")


if __name__ == "__main__": main()
