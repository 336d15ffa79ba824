"Scores of images and texts batch by batch, and the ranks of all items, against brute force on many random cases"
from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.sparse import csr_array
from sklearn import metrics as sk

from medclip_nb.core import InputError
from medclip_nb.datasets import Manifest
from medclip_nb.embeddings import encoded_images
from medclip_nb.evaluators import (
    BELOW,
    Result,
    item_pairs,
    item_retrieval,
    item_retrieval_result,
    item_scores,
    item_zero_shot,
    right_ranks,
    text_queries,
)
from medclip_nb.evaluators import (
    scores as module,
)
from medclip_nb.metrics import bootstrap_weights, interval
from medclip_nb.models import STARTER, build

WORDS = ["a nodule on the left", "Effusion", "effusion.", "clear lungs", "a fracture of a rib",
         "a very long sentence about a mass in the right upper lobe"]


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    config = deepcopy(STARTER)
    config["model_cfg"]["pooling_cfg"] = {"heads": 4}
    return build(config, "starter with pooling", torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "Eleven noisy pictures with up to three items each"
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(11): Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{i}.png")
    items = [list(rng.choice(WORDS, rng.integers(0, 4), replace=False)) for _ in range(11)]
    rows = Manifest({"image": [f"{i}.png" for i in range(11)], "items": items,
                     "group": [f"p{i // 2}" for i in range(11)], "split": "test",
                     "label": [WORDS[i % 3] for i in range(11)], "nodule": [i % 2 for i in range(11)],
                     "mass": [float(i > 5) if i else np.nan for i in range(11)]})
    rows.root = str(folder)
    return rows


def pooled(clip, rows, queries):
    "Conditioned and global cosines, everything at once"
    features, tokens = clip.encode_image_tokens(rows.paths())
    with torch.no_grad(): found = clip.pooling(queries.expand(len(rows), -1, -1), tokens)
    return F.cosine_similarity(found, queries,
                               dim=-1).numpy(), F.cosine_similarity(features[:, None], queries, dim=-1).numpy()


@pytest.mark.parametrize("batch_size, num_workers", [(1, 0), (4, 0), (32, 0), (4, 2)])
def test_scores_are_those_of_the_pooling(clip, pictures, batch_size, num_workers):
    conditioned, plain = pooled(clip, pictures, text_queries(clip, WORDS))
    how = dict(batch_size=batch_size, num_workers=num_workers)
    np.testing.assert_allclose(item_scores(clip, pictures, WORDS, **how), conditioned, atol=1e-5)
    np.testing.assert_allclose(item_scores(clip, pictures, WORDS, "global", **how), plain, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 5, 99])
def test_pairs_that_are_no_candidates_come_last_in_global_order(clip, pictures, k):
    conditioned, plain = pooled(clip, pictures, text_queries(clip, WORDS))
    best = lambda axis: np.argsort(np.argsort(-plain, axis=axis), axis=axis) < k
    for per, chosen in (("image", best(1)), ("text", best(0)), ("both", best(0) | best(1))):
        found = item_scores(clip, pictures, WORDS, "top-k", top_k=k, per=per, batch_size=3)
        np.testing.assert_allclose(found, np.where(chosen, conditioned, plain - BELOW), atol=1e-5)


def test_tokens_of_one_batch_only_are_held(clip, pictures, monkeypatch):
    sizes, real = [], module.item_similarity
    monkeypatch.setattr(module, "item_similarity",
                        lambda tokens, *args: sizes.append(len(tokens)) or real(tokens, *args))
    item_scores(clip, pictures, WORDS, batch_size=4)
    assert sizes == [4, 4, 3]


def test_order_and_length_of_texts_do_not_matter(clip):
    whole = text_queries(clip, WORDS)
    for batch_size in (1, 2, 5):
        torch.testing.assert_close(text_queries(clip, WORDS, batch_size), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text_queries(clip, WORDS[::-1]), whole.flip(0), atol=1e-5, rtol=1e-5)


def test_a_missing_file_is_named(clip, pictures):
    rows = pictures.copy()
    rows.loc[5, "image"] = "gone.png"
    with pytest.raises(InputError, match="gone.png"): item_scores(clip, rows, WORDS, batch_size=2)
    with pytest.raises(InputError, match="no column 'image'"):
        next(encoded_images(clip, pictures.drop(columns="image")))


def ranks_by_hand(line, own):
    "Rank of each right answer by score, best first: right ones by their order, wrong ones level with it half ahead"
    mine, wrong = np.sort(line[own])[::-1].astype(float), line[~own].astype(float)
    level = [np.isclose(wrong, v, rtol=0, atol=1e-7) for v in mine]
    return [place + ((wrong > v) & ~e).sum() + e.sum() / 2 for place, (v, e) in enumerate(zip(mine, level), 1)]


@pytest.mark.parametrize("seed", range(30))
def test_ranks_equal_brute_force(seed):
    rng = np.random.default_rng(seed)
    n, m = rng.integers(1, 30, 2)
    scores, own = (rng.integers(0, rng.integers(2, 40), (n, m)) / 10).astype(np.float32), rng.random(
        (n, m)) < rng.choice([.05, .3, .9])
    found = right_ranks(scores, csr_array(own), cells=int(rng.integers(1, 200)))
    assert sorted(zip(found["query"], found["answer"])) == sorted(zip(*map(list, np.nonzero(own))))
    for query, ranks in found.groupby("query")["rank"]:
        assert ranks.tolist() == ranks_by_hand(scores[query], own[query])


def summary(scores, own, rows, ks, complete_ks):
    "Metrics of item retrieval for rows drawn, some several times"
    ranks = {i: ranks_by_hand(scores[i], own[i]) for i in range(len(own)) if own[i].any()}
    best = {t: min(ranks_by_hand(scores[:, t], own[:, t])) for t in range(own.shape[1]) if own[:, t].any()}
    mine = [ranks[i] for i in rows if i in ranks]
    asked = [best[t] for i in rows for t in np.flatnonzero(own[i])]
    out = {f"image_to_text_R@{k}": np.mean([r[0] <= k for r in mine])
           for k in ks} | {f"text_to_image_R@{k}": np.mean([r <= k for r in asked]) for k in ks}
    out |= {f"image_to_text_COMPLETE@{k}": np.mean([max(r) <= k for r in mine]) for k in complete_ks}
    for way, first in (("image_to_text", [r[0] for r in mine]), ("text_to_image", asked)):
        out |= {f"{way}_mean_rank": np.mean(first), f"{way}_median_rank": np.median(first),
                f"{way}_MRR": np.mean(1 / np.array(first))}
    return out | {"image_to_text_mean_item_rank": np.mean([np.mean(r) for r in mine]),
                  "image_to_text_mean_worst_rank": np.mean([max(r) for r in mine])}


@pytest.mark.parametrize("seed", range(12))
def test_item_retrieval_equals_brute_force_and_resamples_groups(seed, tmp_path):
    rng = np.random.default_rng(seed)
    n, words = int(rng.integers(5, 25)), [f"finding {i}" for i in range(int(rng.integers(3, 12)))]
    rows = Manifest({"image": [f"{i}.png" for i in range(n)],
                     "items": [list(rng.choice(words, rng.integers(0, 4))) for _ in range(n)],
                     "group": [f"p{g}" for g in rng.integers(0, 6, n)], "split": "test"})
    rows.at[0, "items"] = [words[0]]
    texts, right = item_pairs(rows)
    scores, own = (rng.integers(0, 30, right.shape) / 10).astype(np.float32), right.toarray()
    found = item_retrieval_result(scores, rows, texts, right, (1, 3), (2, 4), n_boot=40, seed=seed)
    for name, value in summary(scores, own, range(n), (1, 3), (2, 4)).items():
        assert found.value(name) == pytest.approx(value, abs=1e-9), name
    weights = bootstrap_weights(rows["group"], 40, seed)
    many = pd.DataFrame([summary(scores, own, np.repeat(np.arange(n), w), (1, 3), (2, 4))
                         for w in weights if any(own[i].any() for i in np.flatnonzero(w))])
    units = rows["group"][own.any(1)].nunique()
    for name in many:
        row = found.metrics.set_index("name").loc[name]
        ends = interval(many[name], groups=units, bounds=None if "rank" in name else (0, 1))
        assert [row["low"], row["high"]] == pytest.approx(ends, abs=1e-9, nan_ok=True), name
        assert row["groups"] == units and bool(row["note"]) == (units < 5)
    assert found.details["images_without_items"] == (~own.any(1)).sum() and len(found.predictions) == n
    for i, line in found.predictions.iterrows():
        assert line["item_ranks"] == (ranks_by_hand(scores[i], own[i]) if own[i].any() else [])
    found.save(tmp_path)
    back = Result.load(tmp_path).metrics.set_index("name").loc[found.metrics["name"]].reset_index()
    pd.testing.assert_frame_equal(back, found.metrics)


def test_item_retrieval_of_a_model(clip, pictures):
    texts, right = item_pairs(pictures)
    assert len(texts) == len({t.lower().rstrip(".") for items in pictures["items"] for t in items})
    direct = item_retrieval_result(item_scores(clip, pictures, texts), pictures, texts, right, n_boot=30)
    pd.testing.assert_frame_equal(item_retrieval(clip, pictures, n_boot=30, batch_size=5).metrics, direct.metrics)


@pytest.mark.parametrize("mode", ["text-conditioned", "global", "top-k"])
def test_zero_shot_equals_scikit_learn(clip, pictures, mode, tmp_path):
    classes = sorted(set(pictures["label"]))
    scores = item_scores(clip, pictures, [[f"{c}", f"there is {c}"] for c in classes], mode)
    found = item_zero_shot(clip, pictures, templates=["{}", "there is {}"], mode=mode, n_boot=20)
    assert found.value("balanced_accuracy") == pytest.approx(
        sk.balanced_accuracy_score(pictures["label"], np.array(classes)[scores.argmax(1)]))
    both = item_zero_shot(clip, pictures, ["nodule", "mass"], mode=mode, test_tuned=True, n_boot=20)
    scores = item_scores(clip, pictures, ["nodule", "mass"], mode)
    assert both.value("nodule/auroc") == pytest.approx(sk.roc_auc_score(pictures["nodule"], scores[:, 0]))
    assert both.value("mass/auroc") == pytest.approx(sk.roc_auc_score(pictures["mass"][1:], scores[1:, 1]))
    both.save(tmp_path)
    assert Result.load(tmp_path).details["mode"] == mode
