"Curves, multi-label metrics and calibration against scikit-learn and brute force, and what has no value"

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import brute
from scipy.special import log_softmax
from sklearn import metrics as sk

from medclip_nb.core import InputError
from medclip_nb.metrics import (
    RULES,
    auroc,
    average_precision,
    bootstrap_weights,
    calibration_metrics,
    choose_threshold,
    choose_thresholds,
    class_areas,
    class_ranks,
    classification_metrics,
    confidence_bins,
    fit_temperature,
    interval,
    multilabel_metrics,
    multilabel_table,
    per_class_metrics,
    reliability_table,
    resample_blocks,
)


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_areas_equal_scikit_learn(levels, share, seed):
    rng = np.random.default_rng(seed)
    y, s = rng.random(90) < share, rng.integers(0, levels, 90) / levels
    y[:2] = True, False
    weights = bootstrap_weights(90, n=8, seed=seed)
    assert auroc(y, s) == pytest.approx(sk.roc_auc_score(y, s))
    assert average_precision(y, s) == pytest.approx(sk.average_precision_score(y, s))
    for w, a, p in zip(weights, auroc(y, s, weights), average_precision(y, s, weights)):
        known = w > 0
        if not y[known].any(): assert np.isnan(a) and np.isnan(p)
        else: assert p == pytest.approx(sk.average_precision_score(y, s, sample_weight=w))
        if y[known].any() and not y[known].all(): assert a == pytest.approx(sk.roc_auc_score(y, s, sample_weight=w))


def test_areas_of_a_class_use_its_labelled_rows_only():
    rng = np.random.default_rng(0)
    y, s = (rng.random((50, 3)) < 0.4).astype(float), rng.normal(size=(50, 3))
    y[rng.random((50, 3)) < 0.3] = np.nan
    s[np.isnan(y)] = np.nan
    for c, (a, p) in enumerate(zip(*(x[0] for x in class_areas(y, s)))):
        known = np.isfinite(y[:, c])
        assert (a, p) == pytest.approx(
            (sk.roc_auc_score(y[known, c], s[known, c]), sk.average_precision_score(y[known, c], s[known, c])))


def test_many_classes_are_taken_some_at_a_time(monkeypatch):
    rng = np.random.default_rng(0)
    y, s = np.eye(9)[rng.integers(0, 9, 40)], rng.normal(size=(40, 9))
    weights, whole = bootstrap_weights(40, n=3), None
    whole = class_areas(y, s, weights)
    big = np.concatenate([y] * 1, 0)
    many = class_areas(np.repeat(big, 20_000, 0), np.repeat(s, 20_000, 0)) # more cells than are held at once
    np.testing.assert_allclose(many[0], class_areas(y, s)[0])
    assert whole[0].shape == (3, 9)


def test_blocks_cover_every_resample_once():
    weights = bootstrap_weights(7, n=10)
    for cells in (1, 20, 10**6):
        np.testing.assert_array_equal(np.concatenate(list(resample_blocks(weights, cells)), 1).T, weights)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(4))
def test_thresholds_equal_a_search(rule, seed):
    rng = np.random.default_rng(seed)
    y, s = rng.random(60) < 0.4, rng.integers(0, 15, 60) / 10
    gain = {"youden": lambda t: (s[y] >= t).mean() - (s[~y] >= t).mean(),
            "corner": lambda t: -np.hypot(1 - (s[y] >= t).mean(), (s[~y] >= t).mean()),
            "f1": lambda t: sk.f1_score(y, s >= t)}[rule]
    best = max(gain(t) for t in s)
    got = choose_threshold(y, s, rule)
    assert got.value == max(t for t in s if gain(t) >= best - 1e-12)
    assert (got.sensitivity, got.specificity,
            got.f1) == pytest.approx((sk.recall_score(y, s >= got.value), sk.recall_score(~y, s < got.value),
                                      sk.f1_score(y, s >= got.value)))
    assert (got.rows, got.positives, got.chosen_on, got.rule) == (60, y.sum(), "valid", rule)


def test_a_grid_of_candidates_takes_the_largest_of_equals():
    got = choose_threshold([0, 0, 1, 1], [-0.5, -0.4, 0.4, 0.5], "corner", candidates=np.linspace(-1, 1, 1000))
    assert got.value == pytest.approx(0.4, abs=0.002) and got.value <= 0.4


@pytest.mark.parametrize("name", ["test", "Test", "TEST"])
def test_the_test_split_is_refused(name):
    with pytest.raises(InputError, match="validation"): choose_threshold([0, 1], [0, 1], chosen_on=name)
    with pytest.raises(InputError, match="validation"): choose_thresholds([[0], [1]], [[0], [1]], ["a"], chosen_on=name)
    with pytest.raises(InputError, match="validation"): fit_temperature([0, 1], np.eye(2), [0, 1], chosen_on=name)


@pytest.mark.parametrize("classes", [2, 3, 9])
@pytest.mark.parametrize("seed", range(3))
def test_classification_agrees_with_scikit_learn(classes, seed):
    rng = np.random.default_rng(seed)
    y, p = rng.integers(0, classes, 80), rng.dirichlet(np.ones(classes), 80)
    got, predicted = classification_metrics(y, p, range(classes), top_k=(3, 5)), p.argmax(1)
    assert got["kappa"] == pytest.approx(sk.cohen_kappa_score(y, predicted))
    assert got["mcc"] == pytest.approx(sk.matthews_corrcoef(y, predicted))
    each = [sk.average_precision_score(y == c, p[:, c]) for c in range(classes)]
    assert got["average_precision_macro"] == pytest.approx(np.mean(each))
    if classes == 2: assert got["average_precision"] == pytest.approx(each[1])
    assert got["mean_rank"] == pytest.approx(np.mean([1 + (row > row[c]).sum() for row, c in zip(p, y)]))
    if classes > 3: assert got["top3_accuracy"] == pytest.approx(sk.top_k_accuracy_score(y, p, k=3))
    assert ("top3_accuracy" in got, "top5_accuracy" in got) == (classes > 3, classes > 5)


@pytest.mark.parametrize("seed", range(3))
def test_weights_equal_sample_weights(seed):
    rng = np.random.default_rng(seed)
    y, p = rng.integers(0, 4, 50), rng.dirichlet(np.ones(4), 50)
    weights = bootstrap_weights(np.arange(50) // 2, n=6, seed=seed)
    got, predicted = classification_metrics(y, p, range(4), weights), p.argmax(1)
    for i, w in enumerate(weights):
        assert got["kappa"][i] == pytest.approx(sk.cohen_kappa_score(y, predicted, sample_weight=w))
        assert got["mcc"][i] == pytest.approx(sk.matthews_corrcoef(y, predicted, sample_weight=w))
        assert got["average_precision_macro"][i] == pytest.approx(
            np.mean([sk.average_precision_score(y == c, p[:, c], sample_weight=w) for c in range(4)]))


def test_the_place_of_the_right_class():
    mean, ordered = class_ranks(np.array([0, 1, 2, 0]), np.array([[1, 1, 1], [1, 1, 0], [3, 2, 1], [0, 5, 5.]]))
    assert mean.tolist() == [2, 1.5, 3, 3] and ordered.tolist() == [1, 2, 3, 3]


def test_per_class_table_with_intervals():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 3, 90), rng.dirichlet(np.ones(4), 90) # the fourth class has no row
    weights = bootstrap_weights(90, n=50)
    table = per_class_metrics(y, p, range(4), weights)
    for c in range(3):
        for name, f in (("auroc", sk.roc_auc_score), ("average_precision", sk.average_precision_score)):
            assert table.loc[str(c), name] == pytest.approx(f(y == c, p[:, c]))
        assert (table.loc[str(c), "auroc_low"],
                table.loc[str(c), "auroc_high"]) == pytest.approx(interval(auroc(y == c, p[:, c], weights)))
        recalls = [sk.recall_score(y == c, p.argmax(1) == c, sample_weight=w) for w in weights]
        assert (table.loc[str(c), "recall_low"], table.loc[str(c), "recall_high"]) == pytest.approx(interval(recalls))
    assert (table.loc["3", "support"] == 0
            and table.loc["3", ["recall", "auroc", "average_precision", "recall_low"]].isna().all())
    pd.testing.assert_frame_equal(table[[c for c in table if not c.endswith(("_low", "_high"))]],
                                  per_class_metrics(y, p, range(4)))


@pytest.mark.parametrize("y, expected", [(["a"], 1.0), (["b"], 0.0)])
def test_one_row(y, expected):
    got = classification_metrics(y, [[.9, .1]], ["a", "b"])
    assert got["accuracy"] == got["balanced_accuracy"] == expected and got["n"] == 1 and got["mcc"] == 0
    assert np.isnan(got["auroc"]) and got["mean_rank"] == 2 - expected
    assert np.isnan(got["kappa"]) if expected else got["kappa"] == 0
    assert np.isnan(interval(classification_metrics(y, [[.9, .1]], ["a", "b"], bootstrap_weights(1))["accuracy"])).all()


def test_resamples_that_draw_nothing_are_undefined():
    got = classification_metrics(["a", "b", None], [[1, 0], [0, 1], [0, 1]], ["a", "b"],
                                 np.array([[0, 0, 3], [1, 1, 1]]))
    for name, values in got.items():
        assert (values[0] == 0 if name == "n" else np.isnan(values[0])) and np.isfinite(values[1]), name


@pytest.mark.parametrize("seed", range(3))
def test_multilabel_agrees_with_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    y, s = (rng.random((70, 3)) < 0.4).astype(float), rng.normal(size=(70, 3)).round(1)
    names, weights = ["x", "y", "z"], bootstrap_weights(70, n=4, seed=seed)
    got, many = multilabel_metrics(y, s, names,
                                   [0.0, 0.2, -0.3]), multilabel_metrics(y, s, names, [0.0, 0.2, -0.3], weights)
    called = s >= [0.0, 0.2, -0.3]
    for name, f, x in (("auroc", sk.roc_auc_score, s), ("average_precision", sk.average_precision_score, s),
                       ("f1", sk.f1_score, called), ("sensitivity", sk.recall_score, called)):
        assert got[f"{name}_macro"] == pytest.approx(f(y, x, average="macro")) and got[f"{name}_classes"] == 3
        for i, w in enumerate(weights):
            assert many[f"{name}_macro"][i] == pytest.approx(f(y, x, average="macro", sample_weight=w))
    assert got["balanced_accuracy_macro"] == pytest.approx(
        np.mean([sk.balanced_accuracy_score(y[:, c], called[:, c]) for c in range(3)]))


def test_undefined_labels_are_skipped_and_counted():
    y = np.array([[1, 1, np.nan, 0], [0, 1, np.nan, 0], [1, np.nan, np.nan, 0]])
    got = multilabel_metrics(y, np.zeros((3, 4)), list("abcd"), thresholds=0.5)
    assert [got[f"{m}_classes"]
            for m in ("auroc", "average_precision", "sensitivity", "specificity", "balanced_accuracy", "f1")] == [
                1, 2, 2, 2, 1, 2]
    table = multilabel_table(y, np.zeros((3, 4)), list("abcd"))
    assert table[["positives", "negatives", "unknown"]].to_numpy().tolist() == [
        [2, 1, 0], [2, 0, 1], [0, 0, 3], [0, 3, 0]]


def test_thresholds_come_by_name():
    rng = np.random.default_rng(0)
    y, s = (rng.random((60, 3)) < 0.4).astype(float), rng.normal(size=(60, 3))
    y[:, 2] = 0
    chosen = choose_thresholds(y, s, ["a", "b", "c"])
    got = multilabel_metrics(y[:, :2], s[:, :2], ["a", "b"], chosen)
    assert got == multilabel_metrics(y[:, :2], s[:, :2], ["a", "b"],
                                     chosen["value"].to_dict()) == multilabel_metrics(
                                         y[:, :2], s[:, :2], ["a", "b"], chosen["value"][:2].tolist())
    assert multilabel_metrics(y, s, ["a", "b", "c"], chosen)["specificity_classes"] == 2 # no threshold for c
    with pytest.raises(InputError, match="'d'"): multilabel_metrics(y, s, ["a", "b", "d"], chosen)
    with pytest.raises(InputError, match="2 thresholds for 3"): multilabel_metrics(y, s, ["a", "b", "c"], [0.1, 0.2])


@pytest.mark.parametrize("bins", [1, 7, 15])
@pytest.mark.parametrize("classes", [2, 5])
def test_calibration_equals_a_loop(bins, classes):
    rng = np.random.default_rng(bins)
    y, p = rng.integers(0, classes, 200), rng.dirichlet(np.ones(classes), 200)
    confidence, right = p.max(1), p.argmax(1) == y
    got, ece = calibration_metrics(y, p, range(classes), bins=bins), 0
    for m in range(bins):
        inside = (confidence > m / bins) & (confidence <= (m + 1) / bins)
        if inside.any(): ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    order = np.argsort(confidence)
    mass = sum(len(part) / 200 * abs(right[part].mean() - confidence[part].mean())
               for part in np.split(order, [int(np.ceil(200 * k / bins)) for k in range(1, bins)]))
    assert (got["ece"], got["ece_equal_mass"]) == pytest.approx((ece, mass))
    assert got["nll"] == pytest.approx(sk.log_loss(y, p, labels=range(classes)))
    assert got["brier"] == pytest.approx(sk.brier_score_loss(y, p[:, 1])
                                         if classes == 2 else ((p - np.eye(classes)[y])**2).sum(1).mean())
    weights = bootstrap_weights(200, n=3)
    for i, w in enumerate(weights):
        if bins == 7:
            assert calibration_metrics(y, p, range(classes), weights,
                                       bins)["nll"][i] == pytest.approx(
                                           sk.log_loss(y, p, labels=range(classes), sample_weight=w))


def test_certain_and_wrong_is_expensive_but_finite():
    got = calibration_metrics(["a"], [[0.0, 1.0]], ["a", "b"])
    assert got["nll"] == pytest.approx(-np.log(np.finfo(float).eps)) and got["brier"] == 1 and got["ece"] == 1


@pytest.mark.parametrize("p", [[[2.0, -1.0]], [[0.4, 0.4]], [[3.2, 1.1]]])
def test_logits_are_refused(p):
    with pytest.raises(InputError, match="after the softmax"): calibration_metrics(["a"], p, ["a", "b"])


def test_equal_confidences_share_a_bin():
    codes, edges = confidence_bins(np.array([0.5] * 5 + [0.6, 0.7]), 4, equal_mass=True)
    assert len(set(codes[:5])) == 1 and codes.max() < len(edges) - 1
    with pytest.raises(InputError, match="at least one bin"): confidence_bins(np.ones(3), 0)


def test_reliability_covers_every_labelled_row():
    table = reliability_table([0, 1, None, 1], [[.9, .1], [.2, .8], [.5, .5], [.6, .4]], [0, 1], bins=4)
    assert table["rows"].sum() == 3 and table["accuracy"].between(0, 1).all() and (table["above"] < table["upto"]).all()


@pytest.mark.parametrize("scale", [0.3, 1, 8])
def test_temperature_equals_a_search(scale):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(300, 4)) * 2
    y = (np.exp(log_softmax(z, 1)).cumsum(1) < rng.random((300, 1))).sum(1)
    got, z = fit_temperature(y, scale * z, range(4)), scale * z
    nll = lambda x: -log_softmax(z / np.exp(np.ravel(x)[0]), 1)[np.arange(300), y].mean()
    assert np.log(got.value) == pytest.approx(brute(nll, [(-4.6, 4.6)], Ns=400)[0], abs=1e-3)
    assert got.nll_after <= got.nll_before and not got.at_bound
    assert got.nll_after == pytest.approx(sk.log_loss(y, got(z)))


def test_abstaining_rows_do_not_move_a_temperature():
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(40, 3)), rng.integers(0, 3, 40).astype(float)
    more = fit_temperature(np.r_[y, [np.nan] * 5], np.r_[z, np.full((5, 3), np.nan)], range(3))
    assert more == fit_temperature(y, z, range(3)) and more.rows == 40


def test_logits_are_not_taken_for_probabilities():
    z, y = np.array([-2, -1, 0.3, 0.4, 2]), ["a", "a", "b", "b", "b"]
    for score in (lambda: classification_metrics(y, z, ["a", "b"]), lambda: per_class_metrics(y, z, ["a", "b"])):
        with pytest.raises(InputError, match="Row 0 has -2 as the probability of 'b' .3 such rows."): score()
    with pytest.raises(InputError, match=r"shape \(5,\) are no"): fit_temperature(y, z, ["a", "b"])
    both = np.stack([0 * z, z], 1)
    assert classification_metrics(y, both, ["a", "b"])["accuracy"] == 1
    assert fit_temperature(y, both, ["a", "b"]).value == 0.01
    assert classification_metrics([*y[:4], None], [0, 0.2, 1, 0.9, 7], ["a", "b"])["accuracy"] == 1, "no label"


def test_thresholds_need_a_column_per_class_and_no_test_split():
    y, s = np.zeros((4, 2)), np.zeros((4, 2))
    for labels, scores in ((y, s), (y[:, :1], s), (y, s[:3])):
        with pytest.raises(InputError, match="1 classes for labels of shape"):
            choose_thresholds(labels, scores, ["a"])
    with pytest.raises(InputError, match="flatters the test"): choose_thresholds(y, s, ["a", "b"], chosen_on="test")
