"Edge cases of the metrics: what a notebook would only make tedious"
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk

from medclip_nb.core import InputError
from medclip_nb.evaluators.results import metric_table
from medclip_nb.metrics import (
    Units,
    auroc,
    bootstrap,
    bootstrap_weights,
    chance_recall,
    class_units,
    classification_metrics,
    classification_units,
    interval,
    label_codes,
    per_class_metrics,
    rank_metrics,
    retrieval_metrics,
    retrieval_ranks,
    weighted_median,
)


def brute_ranks(images, texts, image_ids, text_ids):
    "Rank of the best positive by looking at every pair, in double precision"
    images, texts = (np.asarray(x, float) / np.linalg.norm(np.asarray(x, float), axis=1, keepdims=True)
                     for x in (images, texts))
    scores, own = images @ texts.T, np.array([[a == b for b in text_ids] for a in image_ids])
    def one_way(scores, own):
        out = np.full(len(scores), np.nan)
        for i, (row, mine) in enumerate(zip(scores, own)):
            if not mine.any(): continue
            others, best = row[~mine], row[mine].max()
            level = np.isclose(others, best, rtol=0, atol=1e-12)
            out[i] = 1 + ((others > best) & ~level).sum() + level.sum() / 2
        return out
    return one_way(scores, own), one_way(scores.T, own.T)


@pytest.mark.parametrize("chunk", [1, 3, 16, 512])
@pytest.mark.parametrize("n, m, ids", [(1, 1, 1), (1, 7, 3), (12, 5, 4), (33, 33, 100), (40, 21, 2), (20, 20, 1)])
def test_ranks_equal_brute_force(n, m, ids, chunk):
    rng = np.random.default_rng(n * m + ids)
    images, texts = rng.normal(size=(n, 6)), rng.normal(size=(m, 6))
    image_ids, text_ids = rng.integers(0, ids, n), rng.integers(0, ids, m)
    for got, expected in zip(retrieval_ranks(images, texts, image_ids, text_ids, chunk),
                             brute_ranks(images, texts, image_ids, text_ids)):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("n", [1, 2, 37, 513])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_constant_features_land_in_the_middle(n, dtype):
    ranks = retrieval_ranks(np.full((n, 5), 0.3, dtype), np.full((n, 5), -0.7, dtype))
    for r in ranks: np.testing.assert_array_equal(r, np.full(n, (n + 1) / 2))


def test_constant_features_land_in_the_middle_in_single_precision():
    features = np.tile(np.random.default_rng(0).normal(size=(1, 100)).astype(np.float32), (2100, 1))
    for r in retrieval_ranks(features, features): np.testing.assert_array_equal(r, np.full(2100, 1050.5))


def test_large_sets_agree_with_sorting():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2100, 16)).astype(np.float32)
    texts = images + rng.normal(size=images.shape).astype(np.float32)
    unit = [x / np.linalg.norm(x.astype(float), axis=1, keepdims=True) for x in (images, texts)]
    scores = unit[0] @ unit[1].T
    for got, s in zip(retrieval_ranks(images, texts), (scores, scores.T)):
        assert np.abs(got - 1 - (s > np.diag(s)[:, None]).sum(1)).max() <= 1


def test_duplicates_share_a_rank():
    images = np.eye(4)[[0, 0, 1, 2]]
    ranks = retrieval_ranks(images, images)
    np.testing.assert_array_equal(ranks[0], [1.5, 1.5, 1, 1])
    merged = retrieval_ranks(images, images, ["a", "a", "b", "c"], ["a", "a", "b", "c"])
    np.testing.assert_array_equal(merged[0], [1, 1, 1, 1])


def test_threads_are_left_as_they_were():
    before = torch.get_num_threads()
    retrieval_ranks(np.eye(3), np.eye(3))
    with pytest.raises(InputError): retrieval_ranks(np.eye(3), np.zeros((3, 3)))
    assert torch.get_num_threads() == before


def test_missing_ids_pair_with_nothing():
    ranks = retrieval_ranks(np.eye(3), np.eye(3), ["a", None, "c"], ["a", np.nan, "c"])
    np.testing.assert_array_equal(np.isnan(ranks[0]), [False, True, False])
    assert retrieval_metrics(np.eye(3), np.eye(3), ["a", None, "c"], ["a", np.nan, "c"])["image_to_text_n"] == 2


def test_directions_are_not_swapped():
    images, texts = np.array([[1, 0], [0.9, 0.1]]), np.array([[1, 0], [1, 0.05]])
    swapped, got = (retrieval_metrics(a, b, ks=(1,)) for a, b in ((texts, images), (images, texts)))
    assert got["image_to_text_mean_rank"] == swapped["text_to_image_mean_rank"] != got["text_to_image_mean_rank"]


def test_five_captions_an_image():
    rng = np.random.default_rng(1)
    images = rng.normal(size=(8, 16))
    texts = np.repeat(images, 5, axis=0) + 0.01 * rng.normal(size=(40, 16))
    found = retrieval_metrics(images, texts, text_ids=np.repeat(range(8), 5), ks=(1,))
    assert found["image_to_text_R@1"] == found["text_to_image_R@1"] == 1
    assert (found["image_to_text_n"], found["text_to_image_n"]) == (8, 40)


@pytest.mark.parametrize("images, texts, options, message", [
    (np.eye(3), np.ones((4, 3)), {}, "3 images and 4 texts"),
    (np.eye(3), np.ones((3, 2)), {}, "3 dimensions and texts 2"),
    (np.eye(3), np.ones(3), {}, "must be"),
    (np.zeros((2, 3)), np.ones((2, 3)), {}, "Image features, row 0"),
    (np.ones((2, 3)), np.array([[1, 2, 3], [1, np.nan, 1]]), {}, "Text features, row 1"),
    (np.ones((2, 3)), np.ones((2, 3)), {"image_ids": [1], "text_ids": [1, 2]}, "1 image ids"),
    (np.eye(2), np.eye(2), {"image_ids": ["a", "b"], "text_ids": ["c", "d"]}, "no value in common")])
def test_bad_features_are_named(images, texts, options, message):
    with pytest.raises(InputError, match=message): retrieval_metrics(images, texts, **options)


@pytest.mark.parametrize("ranks", [[], [np.nan]])
def test_no_ranks(ranks):
    found = rank_metrics(ranks, ks=(1,))
    assert found["n"] == 0 and all(np.isnan(found[k]) for k in ("R@1", "MRR", "median_rank", "mean_rank"))


@pytest.mark.parametrize("seed", range(5))
def test_weighted_median_equals_repetition(seed):
    rng = np.random.default_rng(seed)
    values, weights = rng.integers(0, 6, 7).astype(float), rng.integers(0, 4, (6, 7))
    weights[0] = 0
    weights[1:, 0] += 1
    assert np.isnan(weighted_median(values, weights)[0])
    assert list(weighted_median(values, weights)[1:]) == [np.median(np.repeat(values, w)) for w in weights[1:]]


def test_chance_recall_of_a_small_gallery(): assert chance_recall([1, 3], 4, 10) == 1


@pytest.mark.parametrize("classes", [2, 3, 6, 9])
@pytest.mark.parametrize("seed", range(3))
def test_classification_agrees_with_scikit_learn(classes, seed):
    rng = np.random.default_rng(seed)
    y, p = rng.integers(0, classes, 70), rng.dirichlet(np.ones(classes), 70).round(2) + 1e-3
    p /= p.sum(1, keepdims=True)
    got, predicted = classification_metrics(torch.tensor(y), torch.tensor(p), range(classes)), p.argmax(1)
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(y, predicted))
    assert got["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, predicted))
    assert got["f1_macro"] == pytest.approx(sk.f1_score(y, predicted, average="macro"))
    assert got["f1_weighted"] == pytest.approx(sk.f1_score(y, predicted, average="weighted"))
    expected = (sk.roc_auc_score(y, p[:, 1]) if classes == 2
                else sk.roc_auc_score(y, p, multi_class="ovr", labels=range(classes)))
    assert got["auroc_macro"] == pytest.approx(expected)
    assert ("top5_accuracy" in got) == (classes > 5)


def test_weights_equal_sample_weights_of_scikit_learn():
    rng = np.random.default_rng(0)
    y, p, weights = rng.integers(0, 3, 50), rng.dirichlet(np.ones(3), 50), bootstrap_weights(50, n=10)
    got = classification_metrics(y, p, range(3), weights)
    for i, w in enumerate(weights):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert got["balanced_accuracy"][i] == pytest.approx(
                sk.balanced_accuracy_score(y, p.argmax(1), sample_weight=w))
        assert got["auroc_macro"][i] == pytest.approx(
            np.mean([sk.roc_auc_score(y == c, p[:, c], sample_weight=w) for c in range(3)]))


def test_one_class_only_has_no_auroc():
    got = classification_metrics(["a", "a"], [[.9, .1], [.2, .8]], ["a", "b"])
    assert (got["accuracy"] == 0.5 and np.isnan(got["auroc_macro"])
            and np.isnan(got["specificity"] if got["sensitivity"] == 0.5 else got["sensitivity"]))


def test_a_class_without_rows_is_left_out_of_the_macro_mean():
    scores = [[.8, .1, .1], [.3, .6, .1], [.1, .8, .1], [.7, .2, .1]]
    got = classification_metrics(["a", "a", "b", "b"], scores, ["a", "b", "c"])
    assert got["auroc_macro"] == pytest.approx(
        np.mean([sk.roc_auc_score([1, 1, 0, 0], [.8, .3, .1, .7]), sk.roc_auc_score([0, 0, 1, 1], [.1, .6, .8, .2])]))
    assert np.isnan(per_class_metrics(["a", "a", "b", "b"], scores, ["a", "b", "c"]).loc["c", "auroc"])


def test_positive_swaps_sensitivity_and_specificity():
    y, p = ["x", "x", "y", "y", "y"], [.1, .7, .8, .9, .3]
    first, last = (classification_metrics(y, p, ["x", "y"], positive=c) for c in ("x", "y"))
    assert (first["sensitivity"], first["specificity"]) == (last["specificity"],
                                                            last["sensitivity"]) == (0.5, pytest.approx(2 / 3))
    assert first["auroc"] == last["auroc"]
    with pytest.raises(InputError, match="'z'"): classification_metrics(y, p, ["x", "y"], positive="z")


def test_equal_scores_go_to_the_first_class():
    assert classification_metrics(["a", "b"], [[1, 1], [1, 1]], ["a", "b"])["accuracy"] == 0.5
    assert classification_metrics(list("abcdef"), np.zeros((6, 6)),
                                  list("abcdef"))["top5_accuracy"] == pytest.approx(5 / 6)


@pytest.mark.parametrize("labels",
                         [["1", "0"], [1, 0], [1.0, 0.0], np.array([1, 0]), pd.Series([1, 0]), torch.tensor([1, 0]),
                          pd.Categorical([1, 0])])
@pytest.mark.parametrize("classes", [["0", "1"], [0, 1], [0.0, 1.0]])
def test_labels_are_compared_by_name(labels, classes): assert list(label_codes(labels, classes)) == [1, 0]


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, pd.NaT])
def test_missing_labels_abstain(missing):
    assert list(label_codes(["a", missing], ["a", "b"])) == [0, -1]
    assert classification_metrics(["a", missing, "b"], [[1, 0], [1, 0], [1, 0]], ["a", "b"])["n"] == 2


@pytest.mark.parametrize("y, scores, classes, message", [
    (["a", "c"], np.eye(2), ["a", "b"], "Row 1: label 'c'"),
    ([None, np.nan], np.eye(2), ["a", "b"], "every label is missing"),
    (["a"], [[.5, np.nan]], ["a", "b"], "Row 0 has a score"),
    (["a"], np.eye(2), ["a", "b"], "1 labels and 2 classes"),
    (["a"], [[1.]], ["a"], "two classes or more"),
    (["a"], np.eye(2)[:1], ["a", "a"], "must differ")])
def test_bad_labels_and_scores_are_named(y, scores, classes, message):
    with pytest.raises(InputError, match=message): classification_metrics(y, scores, classes)


def test_a_score_of_an_unlabelled_row_may_be_missing():
    assert classification_metrics(["a", None, "b"], [[1, 0], [np.nan, 0], [0, 1]], ["a", "b"])["accuracy"] == 1


def test_auroc_without_resamples(): assert auroc([0, 1], [0, 1], np.zeros((0, 2))).shape == (0,)


def test_intervals_of_one_group_are_undefined():
    weights = bootstrap_weights(["p"] * 6)
    got = classification_metrics(["a", "b"] * 3, np.eye(2)[[0, 1] * 3], ["a", "b"], weights)
    assert all(np.isnan(interval(v)).all() for v in got.values())
    assert np.isnan(interval(rank_metrics([1, 2, 3, 4, 5, 6], weights=weights)["MRR"])).all()


def test_weights_draw_whole_groups():
    weights = bootstrap_weights(["a", "b", "a", "c", None, None], n=50)
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 4] != weights[:, 5]).any()
    assert (weights[:, [0, 1, 3, 4, 5]].sum(1) == 5).all()
    assert not np.array_equal(weights, bootstrap_weights(["a", "b", "a", "c", None, None], n=50, seed=1))


def test_bootstrap_of_a_frame_by_a_column_of_groups():
    frame = pd.DataFrame({"p": list("aabbccdd"), "y": [0, 1] * 4, "s": [.1, .8, .4, .3, .2, .9, .6, .7]})
    low, high = bootstrap(frame, lambda f: sk.roc_auc_score(f["y"], f["s"]), n=100, groups="p")
    weights = bootstrap_weights(frame["p"], n=100)
    assert (low, high) == pytest.approx(interval(auroc(frame["y"], frame["s"], weights)))


def test_bootstrap_skips_resamples_without_a_value():
    values = np.array([1., 2., 3.])
    low, high = bootstrap(values, lambda v: np.nan if v.min() > 1 else v.mean(), n=200)
    assert 1 <= low <= high < 3
    assert np.isnan(bootstrap(values, lambda v: np.nan)).all()


def test_bootstrap_of_a_mean_leaves_nan_out(): assert bootstrap([1., np.nan, 1., 1.]) == (1, 1)


def test_a_bool_column_is_a_share(): assert 0 <= bootstrap(pd.Series([True, False, True, True]))[0] <= 0.75


def test_bad_levels_and_shapes():
    with pytest.raises(InputError, match="between 0 and 1"): bootstrap([1., 2.], level=0)
    with pytest.raises(InputError, match="one value per row"): bootstrap(np.ones((3, 2)))


def test_one_answer_for_everybody_has_the_mean_of_the_exact_intervals_of_its_recalls():
    true, constant = np.repeat([0, 1], [24, 6]), np.tile([1., 0.], (30, 1))
    weights = bootstrap_weights(30, 200)
    many, units = classification_metrics(true, constant, [0, 1], weights), classification_units(true, [0, 1], 30)
    rare = [interval([v, v], groups=6, bounds=(0, 1)) for v in (1, 0)]
    ends = interval(many['balanced_accuracy'], groups=units['balanced_accuracy'].groups, bounds=(0, 1))
    assert ends == pytest.approx(np.mean(rare, 0), abs=1e-9)
    assert ends == pytest.approx((0.2704, 0.7296), abs=1e-4)
    low, high = interval(many['mcc'], groups=units['mcc'].groups, bounds=(-1, 1))
    assert low == -high == pytest.approx(0.025 ** (1 / 6) - 1)


def test_each_metric_of_a_class_names_its_own_groups():
    true, called = np.repeat([0, 1], [20, 3]), np.repeat([0, 1], [16, 7])
    table = per_class_metrics(true, np.eye(2)[called], [0, 1], bootstrap_weights(23, 100), groups=np.arange(23))
    units = class_units(table.iloc[1])
    assert {name: units[name].groups for name in ('recall', 'specificity', 'precision', 'auroc')} == {
        'recall': 3, 'specificity': 20, 'precision': 7, 'auroc': 3,
    }
    for name in ('recall', 'specificity', 'precision', 'auroc'):
        assert pd.isna(table.iloc[1][f'{name}_low']) == bool(units[name].note)
    assert class_units(per_class_metrics(true, np.eye(2)[called], [0, 1]).iloc[1]) == {}


def test_the_weighted_f1_has_no_interval_where_kappa_has_none():
    for rare, groups in ((3, 3), (8, 38)):
        units = classification_units(np.repeat([0, 1], [30, rare]), [0, 1], 30 + rare)
        assert units['f1_weighted'].groups == groups
        assert bool(units['f1_weighted'].note) == bool(units['kappa'].note)


def test_ranks_that_all_agree_have_no_interval_and_say_why():
    ranks = {'mean_rank': np.ones(50), 'median_rank': np.ones(50)}
    table = metric_table({'mean_rank': 1., 'median_rank': 1.}, ranks, 12, Units(12)).set_index('name')
    assert pd.isna(table.loc['mean_rank', 'low']) and table.loc['mean_rank', 'note'] == 'all 12 groups agree'
    assert list(table.loc['median_rank', ['low', 'high', 'note']]) == [1, 1, '']
