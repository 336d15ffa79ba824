"""Bootstrap intervals of AUROC and F1 against a loop over scikit-learn, as ratios.

    python benchmarks/bootstrap.py [--rows 10000] [--classes 9] [--resamples 1000] [--loop 20] [--rounds 3]
                                   [--threads 2]

Both draw the same resamples and give macro AUROC (one against the rest), macro F1 and weighted F1 of each; ours gives
the other classification metrics too. The loop is timed on `--loop` resamples and its time scaled to all of them; the
values of these are compared. Every round times each way once, in turn, in one process.
"""
import argparse
import resource
import statistics
import time

import numpy as np
from noted import note
from sklearn.metrics import f1_score, roc_auc_score
from threadpoolctl import threadpool_limits

from medclip_nb.metrics import bootstrap_weights, classification_metrics


def loop(y, p, classes, weights):
    "One resample at a time: take its rows, ask scikit-learn"
    out = {"auroc_macro": [], "f1_macro": [], "f1_weighted": []}
    for w in weights:
        rows = np.repeat(np.arange(len(y)), w)
        true, scores = y[rows], p[rows]
        out["auroc_macro"].append(roc_auc_score(true, scores, multi_class="ovr", labels=range(classes)))
        for average in ("macro", "weighted"):
            out[f"f1_{average}"].append(f1_score(true, scores.argmax(1), average=average))
    return out


def measure(work):
    start = time.perf_counter()
    value = work()
    return time.perf_counter() - start, value


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in dict(rows=10_000, classes=9, resamples=1000, loop=20, rounds=3, threads=2).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    y = rng.integers(0, args.classes, args.rows)
    z = rng.normal(size=(args.rows, args.classes)) + 1.5 * np.eye(args.classes)[y]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    before, ours, theirs, share = peak(), [], [], args.loop / args.resamples
    with threadpool_limits(args.threads):
        for _ in range(args.rounds):
            t, got = measure(lambda: classification_metrics(y, p, range(args.classes),
                                                            bootstrap_weights(args.rows, args.resamples)))
            ours.append(t)
            memory = peak() - before
            few = bootstrap_weights(args.rows, args.resamples)[:args.loop]
            t, expected = measure(lambda: loop(y, p, args.classes, few))
            theirs.append(t / share)
            for name, values in expected.items(): np.testing.assert_allclose(got[name][:args.loop], values, atol=1e-12)
    print(f"rows={args.rows} classes={args.classes} resamples={args.resamples} threads={args.threads} "
          f"rounds={args.rounds}; ours draws and scores, {memory:.0f} MB above the data")
    print(f"medclip_nb   min {min(ours):7.2f} s  median {statistics.median(ours):7.2f} s")
    print(f"scikit-learn min {min(theirs):7.2f} s  median {statistics.median(theirs):7.2f} s (from {args.loop} "
          f"resamples)"
          f"  ratio: min {min(theirs) / min(ours):5.1f}  median "
          f"{statistics.median(theirs) / statistics.median(ours):5.1f}")
    note("bootstrap intervals", "a loop over scikit-learn", ours, theirs, 20,
         size=f"{args.rows} rows, {args.classes} classes, {args.resamples} resamples")


if __name__ == "__main__": main()
