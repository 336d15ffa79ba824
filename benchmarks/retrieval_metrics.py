"""Retrieval metrics against ranking by argsort and against a faiss index, as ratios.

    python benchmarks/retrieval_metrics.py [--n 5000] [--dim 512] [--rounds 5] [--threads 2]
    python benchmarks/retrieval_metrics.py --n 25000 --alone

Every round times each way once, in turn, in one process; the ratios are of the minima and of the medians. The plain
matrix product of the same size, done in tiles, shows what no exact method can go below. With --alone nothing else runs,
for sizes whose whole matrix would not fit. Ours gives all metrics of both directions, mean average precision included;
its peak memory is counted above what the features take.
"""
import argparse
import resource
import statistics
import time

import torch
from noted import note

from medclip_nb.metrics import retrieval_metrics

try:
    import faiss
except ImportError: faiss = None

KS = (1, 5, 10, 50)


def argsort_ranking(images, texts):
    "Both directions with the whole similarity matrix and a sort of each of its rows"
    scores, own, out = images @ texts.T, torch.arange(len(images), device=images.device)[:, None], {}
    for way, s in (("image_to_text", scores), ("text_to_image", scores.T)):
        rank = 1 + torch.where(torch.argsort(s, descending=True) == own)[1]
        out |= {f"{way}_R@{k}": (rank <= k).float().mean().item() for k in KS}
        out[f"{way}_MRR"] = (1 / rank).mean().item()
    return out


def faiss_search(images, texts):
    "Both directions with an exact inner-product index: the top 50 only, hence no ranks beyond"
    out, own = {}, torch.arange(len(images))[:, None]
    for way, queries, gallery in (("image_to_text", images, texts), ("text_to_image", texts, images)):
        index = faiss.IndexFlatIP(gallery.shape[1])
        index.add(gallery.numpy())
        hits = torch.from_numpy(index.search(queries.numpy(), max(KS))[1]) == own
        out |= {f"{way}_R@{k}": hits[:, :k].any(1).float().mean().item() for k in KS}
    return out


def product(images, texts, tile=512):
    "The matrix product alone"
    for a in images.split(tile):
        for b in texts.split(tile): a @ b.T


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in dict(n=5000, dim=512, rounds=5, threads=2).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--alone", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if faiss: faiss.omp_set_num_threads(args.threads)
    torch.manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(args.n, args.dim), dim=1)
    texts = torch.nn.functional.normalize(images + torch.randn(args.n, args.dim) / args.dim**0.5 * 4, dim=1)
    retrieval_metrics(images[:600], texts[:600])
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    before = peak()
    retrieval_metrics(images, texts)
    memory = peak() - before
    others = {"argsort": argsort_ranking, "matrix product": product} | ({"faiss": faiss_search} if faiss else {})
    ways = {"medclip_nb": retrieval_metrics} | ({"matrix product": product} if args.alone else others)
    answers = {name: way(images, texts) for name, way in ways.items()}
    for name in ways.keys() & {"argsort", "faiss"}:
        worst = max(abs(answers["medclip_nb"][key] - value) for key, value in answers[name].items())
        assert worst < 3 / args.n, f"{name} disagrees by {worst}"
    times = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way(images, texts)
            times[name].append(time.perf_counter() - start)
    ours = times["medclip_nb"]
    print(f"n={args.n} dim={args.dim} threads={args.threads} rounds={args.rounds}; medclip_nb takes {memory:.2f} GB "
          f"above the features")
    for name, t in times.items():
        spread = f"slowest/fastest {max(t) / min(t):.2f}"
        print(f"{name:15s} min {min(t) * 1e3:8.1f} ms  median {statistics.median(t) * 1e3:8.1f} ms  {spread}"
              f"  ratio to medclip_nb: min {min(t) / min(ours):5.2f}  median "
              f"{statistics.median(t) / statistics.median(ours):5.2f}")
    rivals = {"argsort": ("ranking by argsort", 8), "faiss": ("a faiss index", None)}
    for name in rivals.keys() & times.keys():
        note("retrieval metrics", rivals[name][0], ours, times[name], rivals[name][1], times["matrix product"],
             size=f"{args.n} images and texts")


if __name__ == "__main__": main()
