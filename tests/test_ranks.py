"Retrieval with several positives a query, by both paths, against brute force and scikit-learn"
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk

from medclip_nb.core import InputError
from medclip_nb.metrics import (
    bootstrap_weights,
    positive_pairs,
    query_metrics,
    rank_metrics,
    retrieval_metrics,
    retrieval_queries,
    retrieval_ranks,
)
from medclip_nb.metrics import (
    retrieval as module,
)

KS = (1, 3, 10)
WEIGHT_OF_TIES = {"mean": 0.5, "optimistic": 0.0, "pessimistic": 1.0}


def brute(images, texts, image_ids, text_ids, ties="mean"):
    "positives, rank, average precision and found@k of each image, looking at every pair in double precision"
    images, texts = (np.asarray(x, float) / np.linalg.norm(np.asarray(x, float), axis=1, keepdims=True)
                     for x in (images, texts))
    out = []
    for image, own in zip(images, (np.array([a == b for b in text_ids]) for a in image_ids)):
        s = texts @ image
        others, ranks = s[~own], []
        for place, v in enumerate(np.sort(s[own])[::-1], 1):
            level = np.isclose(others, v, rtol=0, atol=1e-12)
            ranks.append(place + ((others > v) & ~level).sum() + WEIGHT_OF_TIES[ties] * level.sum())
        ranks = np.array(ranks)
        ap = np.mean(np.arange(1, len(ranks) + 1) / ranks) if len(ranks) else np.nan
        out.append([len(ranks), ranks[0] if len(ranks) else np.nan, ap, *((ranks <= k).sum() for k in KS)])
    return np.array(out)


@pytest.mark.parametrize("ties", WEIGHT_OF_TIES)
@pytest.mark.parametrize("chunk", [1, 5, 16, 384])
@pytest.mark.parametrize("n, m, ids",
                         [(1, 1, 1), (1, 9, 3), (12, 5, 4), (33, 33, 100), (40, 21, 2), (20, 20, 1), (17, 60, 8)])
def test_queries_equal_brute_force(n, m, ids, chunk, ties, monkeypatch):
    rng = np.random.default_rng(n * m + ids)
    images, texts = rng.integers(-2, 3, (n, 3)) + 0.5, rng.integers(-2, 3, (m, 3)) + 0.5 # many exact ties
    of_image, of_text = rng.integers(0, ids, n), rng.integers(0, ids, m)
    expected = brute(images, texts, of_image, of_text, ties), brute(texts, images, of_text, of_image, ties)
    for many in (0, 1e9): # by sorting, by counting
        monkeypatch.setattr(module, "MANY", many)
        for got, want in zip(retrieval_queries(images, texts, of_image, of_text, KS, chunk, ties), expected):
            np.testing.assert_allclose(got.to_numpy(float), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    images, texts, of_image, of_text = rng.normal(size=(30, 5)), rng.normal(size=(80, 5)), rng.integers(
        0, 10, 30), rng.integers(0, 12, 80)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts)]
    scores, own = unit[0] @ unit[1].T, of_image[:, None] == of_text
    for got, s, o in zip(retrieval_queries(images, texts, of_image, of_text), (scores, scores.T), (own, own.T)):
        for value, line, mine in zip(got["average_precision"], s, o):
            if mine.any(): assert value == pytest.approx(sk.average_precision_score(mine, line))
            else: assert np.isnan(value)


def test_single_precision_and_both_paths_agree(monkeypatch):
    rng = np.random.default_rng(0)
    images, of_image = rng.normal(size=(2100, 16)).astype(np.float32), rng.integers(0, 700, 2100)
    texts, of_text = images[rng.permutation(2100)] + rng.normal(size=(2100, 16)).astype(np.float32), rng.integers(
        0, 700, 2100)
    found = []
    for many in (0, 1e9):
        monkeypatch.setattr(module, "MANY", many)
        found.append(retrieval_queries(images, texts, of_image, of_text))
    for sorted_, counted in zip(*found):
        assert (sorted_["positives"] == counted["positives"]).all()
        assert np.nanmax(np.abs(sorted_["rank"] - counted["rank"])) <= 1 # a rounding apart, at most
        np.testing.assert_allclose(sorted_["average_precision"], counted["average_precision"], atol=1e-3)


def test_many_positives_of_one_query_only():
    rng = np.random.default_rng(1)
    images, texts = rng.normal(size=(60, 4)), rng.normal(size=(70, 4))
    of_image, of_text = np.r_[np.zeros(40, int), np.arange(1, 21)], np.r_[[0], np.arange(1, 70)]
    ways = retrieval_queries(images, texts, of_image, of_text, KS, chunk=7)
    np.testing.assert_allclose(ways[1].to_numpy(float), brute(texts, images, of_text, of_image), atol=1e-9)
    assert ways[1]["positives"].tolist() == [40] + [1] * 20 + [0] * 49


def test_constant_features_by_every_rule():
    for ties, rank in (("mean", 4), ("optimistic", 1), ("pessimistic", 7)):
        for got in retrieval_ranks(np.ones((7, 3)), np.ones((7, 3)), ties=ties):
            np.testing.assert_array_equal(got, np.full(7, rank))


def test_hits_and_recall_differ_with_several_positives_only():
    rng = np.random.default_rng(2)
    images = rng.normal(size=(50, 8))
    texts = np.repeat(images, 3, axis=0) + rng.normal(size=(150, 8))
    got = retrieval_metrics(images, texts, text_ids=np.repeat(range(50), 3), ks=(1, 3, 200))
    assert got["image_to_text_R@3"] == got["image_to_text_hit@3"] > got["image_to_text_recall@3"]
    assert got["text_to_image_R@3"] == got["text_to_image_recall@3"] == pytest.approx(
        3 * got["text_to_image_precision@3"])
    assert got["image_to_text_recall@200"] == 1 and got["image_to_text_precision@200"] == pytest.approx(3 / 200)
    assert (got["text_to_image_mAP"] == pytest.approx(got["text_to_image_MRR"])
            and got["image_to_text_mAP"] < got["image_to_text_MRR"])


def test_best_ranks_summarise_alike():
    rng = np.random.default_rng(3)
    queries = retrieval_queries(rng.normal(size=(30, 3)), rng.normal(size=(30, 3)), rng.integers(0, 9, 30),
                                rng.integers(0, 9, 30))[0]
    of_queries, of_ranks = query_metrics(queries), rank_metrics(queries["rank"])
    assert {k: of_queries[k] for k in of_ranks} == pytest.approx(of_ranks)


def test_weights_are_repetitions():
    rng = np.random.default_rng(4)
    queries = retrieval_queries(rng.normal(size=(40, 3)), rng.normal(size=(40, 3)), rng.integers(0, 9, 40),
                                rng.integers(0, 12, 40))[0]
    weights = bootstrap_weights(np.arange(40) // 2, n=5)
    many = query_metrics(queries, weights)
    for i, w in enumerate(weights):
        one = query_metrics(queries.iloc[np.repeat(np.arange(40), w)])
        assert {k: v[i] for k, v in many.items()} == pytest.approx(one)


def test_queries_without_positives_are_counted_out():
    queries = retrieval_queries(np.eye(3), np.eye(3), ["a", None, "c"], ["a", np.nan, "x"])[0]
    assert queries["positives"].tolist() == [1, 0, 0] and query_metrics(queries)["n"] == 1
    nothing = query_metrics(queries.iloc[1:])
    assert nothing["n"] == 0 and all(np.isnan(v) for k, v in nothing.items() if k != "n")


def test_rows_keep_their_order():
    rng = np.random.default_rng(5)
    images, texts, shuffle = rng.normal(size=(40, 6)), rng.normal(size=(40, 6)), rng.permutation(40)
    plain, shuffled = retrieval_queries(images, texts), retrieval_queries(images[shuffle], texts, image_ids=shuffle)
    pd.testing.assert_frame_equal(plain[0].iloc[shuffle].reset_index(drop=True), shuffled[0])
    pd.testing.assert_frame_equal(plain[1], shuffled[1])


@pytest.mark.parametrize("of_image, of_text", [([], []), ([0, 0, 2], [1, 1]), ([-1, 0, 0, 3], [-2, 0, 0, 0, 3])])
def test_pairs_are_those_of_a_double_loop(of_image, of_text):
    expected = [(i, j) for i, a in enumerate(of_image) for j, b in enumerate(of_text) if a == b]
    assert list(zip(*(x.tolist() for x in positive_pairs(np.array(of_image, int), np.array(of_text, int))))) == expected


@pytest.mark.parametrize("threads", [1, 3])
def test_workers_compute_on_one_thread_each(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert module._in_threads(lambda _: torch.get_num_threads(), range(4)) == [1] * 4
        assert torch.get_num_threads() == threads
    finally: torch.set_num_threads(before)


def test_unknown_rule():
    with pytest.raises(InputError, match="Did you mean 'optimistic'"):
        retrieval_metrics(np.eye(2), np.eye(2), ties="optimist")
