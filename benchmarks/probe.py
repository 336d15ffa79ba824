"""A path of logistic regressions against scikit-learn from scratch, as ratios.

    python benchmarks/probe.py [--n 20000] [--dim 512] [--classes 9] [--rounds 3] [--threads 2]

Every round times each way once, in turn, in one process: our path over seven values of C; scikit-learn's
LogisticRegression for each C from nothing, in single precision as it comes; and the same with `warm_start`. The ratios
are of the minima and of the medians. Features are standardised, classes overlap and are not equally frequent.
Accuracies are those on rows that were not fitted; the objective is scikit-learn's, in double precision, and must not be
higher than its own.
"""
import argparse
import statistics
import time
import warnings

import numpy as np
import torch
from noted import note
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from medclip_nb.evaluators import C_GRID, Linear, logistic_path


def features(n, dim, classes, seed=0):
    "Standardised features with a decaying spectrum and overlapping classes: train and held-out"
    rng = np.random.default_rng(seed)
    spread, share = (1 + np.arange(dim))**-0.5, 1 / (1 + np.arange(classes))
    centres, turn = 0.12 * rng.normal(size=(classes, dim)) * spread, np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    y = rng.choice(classes, n + n // 4, p=share / share.sum())
    x = (0.1 * rng.normal(size=dim) + centres[y] + spread * rng.normal(size=(len(y), dim))) @ turn
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x = ((x - x[:n].mean(0)) / x[:n].std(0)).astype(np.float32)
    return x[:n], y[:n], x[n:], y[n:]


def ours(x, y, classes): return logistic_path(torch.from_numpy(x), torch.from_numpy(y), classes, C_GRID)


def from_scratch(x, y, classes):
    return {C: Linear(*map(torch.from_numpy, (m.coef_, m.intercept_))) for C in C_GRID
            for m in [LogisticRegression(C=C, max_iter=1000).fit(x, y)]}


def warm(x, y, classes):
    model, path = LogisticRegression(max_iter=1000, warm_start=True), {}
    for C in C_GRID:
        model.set_params(C=C).fit(x, y)
        path[C] = Linear(torch.from_numpy(model.coef_.copy()), torch.from_numpy(model.intercept_.copy()))
    return path


def objective(x, y, C, model):
    weight, bias = (part.double().numpy() for part in model)
    return (-log_softmax(x.astype(float) @ weight.T + bias, axis=1)[np.arange(len(y)), y].mean()
            + (weight**2).sum() / (2 * C * len(y)))


def accuracy(model, x, y):
    return float((model.scores(torch.from_numpy(x).to(model.weight)).argmax(1).numpy() == y).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in dict(n=20_000, dim=512, classes=9, rounds=3, threads=2).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    x, y, held_x, held_y = features(args.n, args.dim, args.classes)
    ways = {"medclip_nb": ours, "from scratch": from_scratch, "warm start": warm}
    times, found = {name: [] for name in ways}, {}
    with threadpool_limits(args.threads):
        for _ in range(args.rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                found[name] = way(x, y, args.classes)
                times[name].append(time.perf_counter() - start)
                print(f"  {name:12s} {times[name][-1]:8.2f} s", flush=True)
    print(f"n={args.n} dim={args.dim} classes={args.classes} values of C={len(C_GRID)} threads={args.threads} "
          f"rounds={args.rounds}")
    for C in C_GRID:
        values = {name: (accuracy(path[C], held_x, held_y), objective(x, y, C, path[C]))
                  for name, path in found.items()}
        print(f"C={C:<8g}" + "".join(f"  {name}: accuracy {a:.4f} objective {o:.5f}"
                                     for name, (a, o) in values.items()))
    best = {name: max(accuracy(model, held_x, held_y) for model in path.values()) for name, path in found.items()}
    print("accuracy of the best C: " + ", ".join(f"{name} {value:.4f}" for name, value in best.items()))
    assert abs(best["medclip_nb"] - best["from scratch"]) <= 0.002, "accuracies differ by more than 0.2 points"
    for C in C_GRID:
        assert objective(x, y, C, found["medclip_nb"][C]) <= 1.001 * objective(x, y, C, found["from scratch"][C]), C
    for name, t in times.items():
        print(f"{name:12s} min {min(t):7.2f} s  median {statistics.median(t):7.2f} s  ratio to medclip_nb: min "
              f"{min(t) / min(times['medclip_nb']):5.2f}"
              f"  median {statistics.median(t) / statistics.median(times['medclip_nb']):5.2f}")
    task = f"{args.n} rows, {args.classes} classes, {len(C_GRID)} values of C"
    note("linear probe, a path of C", "scikit-learn, each from nothing", times["medclip_nb"], times["from scratch"], 3,
         size=task)
    note("linear probe, a path of C", "scikit-learn, warm start", times["medclip_nb"], times["warm start"], size=task)


if __name__ == "__main__": main()
