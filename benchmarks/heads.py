"""A classification head on cached features, the whole Kather-size job, against what a user would pick, as ratios.

    python benchmarks/heads.py [--rows 100000] [--width 512] [--classes 9] [--hidden 256] [--rounds 2] [--threads 2]
                               [--scale 24]

Features are made: nine classes of six clusters each on a curved surface of `scale` dimensions, with noise, of unit
length; rows / 14 of them choose the best point (penalty, step, temperature), as many measure it. The linear head stands
against scikit-learn's LogisticRegression, once for each of the same five penalties, the best of which is taken; the
hidden layer against scikit-learn's MLPClassifier with early stopping, and against the loop that one would write in
PyTorch: a DataLoader of a TensorDataset, Adam at 1e-3, until five epochs in a row validate no better. Every round fits
each once, in turn. Times are wall times; CPU seconds of the process are shown beside them, which a busy machine changes
less.
"""
import argparse
import statistics
import time
import warnings
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from medclip_nb.trainers import PENALTIES, fit_head


def make(rows, width, classes, scale):
    "Features and labels of three splits"
    draw, n = torch.Generator().manual_seed(0), rows + 2 * (rows // 14)
    centres, mix = torch.randn(classes * 6, scale,
                               generator=draw), torch.randn(scale, width, generator=draw) / scale**0.5
    kind = torch.randint(classes * 6, (n,), generator=draw)
    inside = (centres[kind] + 0.9 * torch.randn(n, scale, generator=draw)).tanh()
    x = F.normalize(inside @ mix + 0.15 * torch.randn(n, width, generator=draw), dim=-1)
    return [(a.numpy(), b.numpy())
            for a, b in zip(x.split([rows, rows // 14, rows // 14]),
                            (kind % classes).split([rows, rows // 14, rows // 14]))]


def scores(predict, held): return float((predict(held[0]) == held[1]).mean())


def logistic(train, valid):
    "The best of five penalties"
    fitted = [LogisticRegression(C=1 / (p * len(train[0])), max_iter=100).fit(*scaled(train, train)) for p in PENALTIES]
    best = max(fitted, key=lambda m: scores(m.predict, scaled(valid, train)))
    return lambda x: best.predict(scaled((x, None), train)[0])


def scaled(some, train):
    "As our head standardises"
    mean, deviation = train[0].mean(0), np.sqrt(train[0].var(0).mean())
    return (some[0] - mean) / deviation, some[1]


def multilayer(train, valid, hidden):
    model = MLPClassifier((hidden,), early_stopping=True, validation_fraction=1 / 14, n_iter_no_change=5,
                          batch_size=1024, random_state=0)
    model.fit(*scaled(train, train))
    return lambda x: model.predict(scaled((x, None), train)[0])


def dataloader(train, valid, hidden):
    "The loop that one would write"
    torch.manual_seed(0)
    x, y = (torch.as_tensor(v) for v in scaled(train, train))
    held = [torch.as_tensor(v) for v in scaled(valid, train)]
    model = nn.Sequential(nn.Linear(x.shape[1], hidden), nn.GELU(), nn.Linear(hidden, int(y.max()) + 1))
    optimizer, best, value, since = torch.optim.Adam(model.parameters(), lr=1e-3), None, -1.0, 0
    while since < 5:
        for a, b in DataLoader(TensorDataset(x, y), 256, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(a), b).backward()
            optimizer.step()
        with torch.no_grad(): now = float((model(held[0]).argmax(1) == held[1]).float().mean())
        since = 0 if now > value else since + 1
        if now > value: best, value = deepcopy(model), now
    with torch.no_grad(): return lambda x: best(torch.as_tensor(scaled((x, None), train)[0])).argmax(1).numpy()


def ours(train, valid, hidden):
    head = fit_head(*train, valid, hidden, class_weight="none")
    return lambda x: head.probabilities(x).argmax(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in dict(rows=100_000, width=512, classes=9, hidden=256, rounds=2, threads=2, scale=24).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    train, valid, test = make(args.rows, args.width, args.classes, args.scale)
    ways = {"linear: ours": lambda: ours(train, valid, 0), "linear: scikit-learn": lambda: logistic(train, valid),
            "hidden: ours": lambda: ours(train, valid, args.hidden),
            "hidden: scikit-learn": lambda: multilayer(train, valid, args.hidden),
            "hidden: DataLoader loop": lambda: dataloader(train, valid, args.hidden)}
    wall, cpu, right = {w: [] for w in ways}, {w: [] for w in ways}, {}
    print(f"{args.rows} x {args.width}, {args.classes} classes, hidden layer of {args.hidden}, {args.threads} threads")
    with threadpool_limits(args.threads):
        for _ in range(args.rounds):
            for name, way in ways.items():
                start, used = time.perf_counter(), time.process_time()
                predict = way()
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - used)
                right[name] = scores(predict, test)
    for name in ways:
        ratio = [statistics.median(t[name]) / statistics.median(t[name.split(":")[0] + ": ours"]) for t in (wall, cpu)]
        print(f"{name:24s} {statistics.median(wall[name]):7.1f} s  {statistics.median(cpu[name]):7.1f} CPU s  over "
              f"ours {ratio[0]:5.2f} (CPU {ratio[1]:5.2f})  accuracy {right[name]:.4f}", flush=True)


if __name__ == "__main__": main()
