"""How often a nominal 95 % interval holds the truth, with few groups and rare classes.

    python benchmarks/coverage.py [--trials 400] [--resamples 1000] [--seed 0]

Groups (patients) of two to seven rows; half of the variance of a score is that of its group. The class is a property of
the group, which `positive` groups have, or of the row, with the share `positive` / `groups`. Scores of the class lie
`effect` standard deviations higher. Each line gives the coverage of the interval that reports show and, after the
stroke, of plain percentiles; a dash stands where no interval is shown because too few groups have the class.
"""
import argparse

import numpy as np
from scipy.stats import norm

from medclip_nb.metrics import bootstrap_weights, classification_metrics, classification_units, interval

METRICS = ("accuracy", "sensitivity", "balanced_accuracy", "auroc")
CASES = [(10, 3), (10, 5), (30, 3), (30, 5), (30, 10), (100, 5), (100, 10), (100, 30), (300, 5), (300, 30), (300, 90)]


def draw(rng, groups, positive, by_row, effect):
    "Group, class and score of each row"
    owner = np.repeat(np.arange(groups), rng.integers(2, 8, groups))
    y = rng.random(len(owner)) < positive / groups if by_row else rng.permutation(groups)[owner] < positive
    y = y.astype(int)
    return owner, y, effect * y + (rng.normal(size=groups)[owner] + rng.normal(size=len(owner))) / np.sqrt(2)


def held(rng, groups, positive, by_row, effect, resamples):
    "Metric -> whether the shown interval and plain percentiles hold the truth; None where none is shown"
    owner, y, score = draw(rng, groups, positive, by_row, effect)
    if len(set(y)) < 2: return {}
    weights = bootstrap_weights(owner, resamples, int(rng.integers(2**31)))
    many = classification_metrics(y, np.stack([0 * score + effect / 2, score], 1), [0, 1], weights)
    units, right = classification_units(y, [0, 1], owner), norm.cdf(effect / 2)
    out = {}
    for metric in METRICS:
        truth = norm.cdf(effect / np.sqrt(2)) if metric == "auroc" else right
        count = units.get(metric, units[""]).groups
        shown, plain = interval(many[metric], groups=count, bounds=(0, 1)), interval(many[metric])
        out[metric] = (None if np.isnan(shown[0]) else shown[0] <= truth <= shown[1], plain[0] <= truth <= plain[1])
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in dict(trials=400, resamples=1000, seed=0).items(): parser.add_argument(f"--{name}", type=int,
                                                                                            default=value)
    args, least = parser.parse_args(), 1.0
    print("| groups | with the class | label of | effect | " + " | ".join(METRICS) + " |")
    print("|---" * (4 + len(METRICS)) + "|", flush=True)
    for groups, positive in CASES:
        for by_row in (False, True):
            for effect in (1.2, 2.5):
                rng = np.random.default_rng([args.seed, groups, positive, by_row])
                found = [held(rng, groups, positive, by_row, effect, args.resamples) for _ in range(args.trials)]
                cells = []
                for metric in METRICS:
                    pairs = [one[metric] for one in found if one]
                    shown = [s for s, _ in pairs if s is not None]
                    enough = len(shown) > args.trials / 4
                    if enough: least = min(least, np.mean(shown))
                    cells.append(f"{np.mean(shown) if enough else np.nan:.2f} / {np.mean([p for _, p in pairs]):.2f}")
                line = " | ".join(cells).replace("nan", "–")
                print(f"| {groups} | {positive} | {'row' if by_row else 'group'} | {effect} | {line} |", flush=True)
    print(f"least coverage of a shown interval: {least:.3f}")


if __name__ == "__main__": main()
