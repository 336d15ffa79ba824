"Paired tests, corrections, seeds and subgroups against independent computations"
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn import metrics as sk

from medclip_nb.core import InputError
from medclip_nb.metrics import (
    auroc,
    bootstrap,
    bootstrap_weights,
    classification_metrics,
    delong,
    delong_covariance,
    delong_test,
    holm,
    interval,
    mcnemar,
    over_seeds,
    paired_bootstrap,
    paired_table,
    pairwise_bootstrap,
    subgroup_table,
    unit_count,
)


def structural_components(positive, scores):
    "DeLong's covariance by the definition: the kernel of every pair, its row and column means"
    kernel = np.array([[[1.0 if a > b else 0.5 if a == b else 0.0 for b in s[~positive]] for a in s[positive]]
                       for s in scores])
    v, w = kernel.mean(2), kernel.mean(1)
    s10, s01 = (np.array([[sum((x[r] - x[r].mean()) * (x[q] - x[q].mean())) / (x.shape[1] - 1) for q in range(len(x))]
                          for r in range(len(x))]) for x in (v, w))
    return kernel.mean((1, 2)), s10 / v.shape[1] + s01 / w.shape[1]


@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_delong_equals_structural_components(levels, seed):
    rng = np.random.default_rng(seed)
    y = rng.random(45) < 0.35
    y[:4] = True, True, False, False
    scores = rng.integers(0, levels, (3, 45)) / levels + 0.3 * y
    areas, covariance = delong_covariance(y, scores)
    expected = structural_components(y, scores)
    np.testing.assert_allclose(areas, expected[0], atol=1e-12)
    np.testing.assert_allclose(covariance, expected[1], atol=1e-12)
    one, two = delong(y, scores[0]), delong_test(y, scores[0], scores[1])
    assert (one["auroc"] == pytest.approx(sk.roc_auc_score(y, scores[0]))
            and one["variance"] == pytest.approx(covariance[0, 0]))
    assert two["z"] == pytest.approx(
        (areas[1] - areas[0]) / np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]))
    assert two["p"] == pytest.approx(2 * stats.norm.sf(abs(two["z"])))


def test_delong_interval_is_near_that_of_the_bootstrap():
    rng = np.random.default_rng(0)
    y = rng.random(400) < 0.4
    s = rng.normal(size=400) + y
    one, boot = delong(y, s), interval(auroc(y, s, bootstrap_weights(400)))
    assert (one["low"], one["high"]) == pytest.approx(boot, abs=0.01)


def test_delong_leaves_unlabelled_rows_out():
    rng = np.random.default_rng(0)
    y, s = np.r_[rng.integers(0, 2, 30), [np.nan] * 4], rng.normal(size=34)
    assert delong(y, s) == delong(y[:30], s[:30])


@pytest.mark.parametrize("y", [[1, 1, 1], [0, 0, 0], []])
def test_one_class_has_no_auroc(y):
    got = delong(y, np.arange(len(y)))
    assert np.isnan([got["auroc"], got["variance"], got["low"]]).all()
    assert np.isnan(delong_test(y, np.arange(len(y)), np.arange(len(y)))["p"])


def test_perfect_models_do_not_differ(): assert delong_test([0, 0, 1, 1], [1, 2, 3, 4], [0, 0, 9, 9])["p"] == 1


def test_no_variance_and_a_difference_is_undecided():
    assert np.isnan(delong_test([0, 0, 1, 1], [1, 2, 3, 4], [4, 3, 2, 1])["p"])


@pytest.mark.parametrize("seed", range(5))
def test_mcnemar_equals_scipy(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.random(60) < 0.6, rng.random(60) < 0.75
    lost, gained = (a & ~b).sum(), (~a & b).sum()
    exact, approximate = mcnemar(a, b), mcnemar(a, b, "continuity")
    assert (exact["p"] == pytest.approx(stats.binomtest(int(lost), int(lost + gained)).pvalue)
            and exact["method"] == "exact")
    assert approximate["p"] == pytest.approx(stats.chi2.sf(max(abs(lost - gained) - 1, 0)**2 / (lost + gained), 1))
    assert (exact["lost"], exact["gained"]) == (lost, gained)


def test_mcnemar_reads_the_predictions_of_two_runs():
    before, after = pd.Series([True, None, False, True],
                              dtype=object), pd.Series([True, True, True, None], dtype=object)
    assert mcnemar(before, after) == {"lost": 0, "gained": 1, "rows": 2, "statistic": 0.0, "p": 1.0, "method": "exact"}


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03, 0.005], [0.2, 0.2, 0.2], [1.0], [0.9, 0.8, 0.0]])
def test_holm_equals_a_loop(p):
    order, out, largest = np.argsort(p, kind="stable"), np.empty(len(p)), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1, p[i] * (len(p) - place)))
        out[i] = largest
    np.testing.assert_allclose(holm(p), out)


def test_holm_leaves_nan_out(): np.testing.assert_allclose(holm([np.nan, 0.01, 0.04]), [np.nan, 0.02, 0.04])


def test_a_paired_difference_of_means_is_the_mean_difference():
    rng = np.random.default_rng(0)
    a, b, groups = rng.normal(size=60), rng.normal(size=60), np.arange(60) // 3
    got = paired_bootstrap(a, b, groups=groups)
    assert (got["low"], got["high"]) == pytest.approx(bootstrap(b - a, groups=groups, units=20))
    assert (got["before"], got["after"], got["difference"]) == pytest.approx((a.mean(), b.mean(), b.mean() - a.mean()))
    assert (got["rows"], got["groups"]) == (60, 20)


def test_a_paired_table_is_one_bootstrap_after_another():
    rng = np.random.default_rng(0)
    y, a, b = rng.integers(0, 3, 60), rng.random((60, 3)), rng.random((60, 3))
    metrics = lambda s, w: classification_metrics(y, s, range(3), w)
    table = paired_table(a, b, metrics, n=100, groups=np.arange(60) // 2)
    for name, row in table.drop(columns="p_holm").iterrows():
        assert row.to_dict() == pytest.approx(
            paired_bootstrap(a, b, lambda s, w: metrics(s, w)[name], np.arange(60) // 2, n=100))
    np.testing.assert_allclose(table["p_holm"], holm(table["p"]))


def test_the_p_value_falls_with_the_difference_and_is_never_zero():
    rng = np.random.default_rng(0)
    a = rng.normal(size=80)
    p = [paired_bootstrap(a, a + shift + rng.normal(size=80))["p"] for shift in (0, 0.3, 3)]
    assert p[0] > p[1] > p[2] == pytest.approx(2 * stats.t.cdf(stats.norm.ppf(1 / 1001) * (79 / 80) ** 0.5, 79))


def test_one_group_says_nothing():
    got = paired_bootstrap([0, 1, 1], [1, 1, 1], groups=["a"] * 3)
    assert got["difference"] == pytest.approx(1 / 3) and np.isnan([got["low"], got["high"], got["p"]]).all()


def test_units_without_a_group_stand_alone(): assert unit_count(["a", "a", None, np.nan, "b"]) == 4


@pytest.mark.parametrize("values", [[0.8, 0.82, 0.79, 0.85, 0.81], [1.0, 1.0, 1.0], [0.1, 0.9]])
def test_seeds_have_a_students_interval(values):
    got = over_seeds(values)
    assert (got["mean"], got["sd"], got["n"]) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)),
                                                  len(values))
    if got["sd"] > 0:
        assert (got["low"], got["high"]) == pytest.approx(
            stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values)))
    else: assert (got["low"], got["high"]) == (1, 1)


@pytest.fixture
def frame():
    rng = np.random.default_rng(0)
    out = pd.DataFrame({"sex": rng.choice(["F", "M", None], 200), "age": rng.integers(20, 90, 200).astype(float),
                        "group": np.arange(200) // 2,
                        "correct": (rng.random(200) < 0.8).astype(object), "label": rng.integers(0, 2, 200),
                        "score": rng.random(200)})
    out.loc[:4, "correct"] = None
    out.loc[5:9, "age"] = np.nan
    return out


def test_subgroups_are_their_own_bootstrap(frame):
    table = subgroup_table(frame, "sex")
    known = frame[frame["correct"].notna()]
    assert table["rows"].tolist() == [195,
                                      *known["sex"].fillna("(missing)").value_counts().reindex(["F", "M", "(missing)"])]
    women = known[known["sex"] == "F"]
    assert (table.loc["F", "value"] == pytest.approx(women["correct"].astype(float).mean())
            and table.loc["F", "units"] == women["group"].nunique())
    assert (table.loc["F", "low"],
            table.loc["F", "high"]) == pytest.approx(bootstrap(
                women["correct"].astype(float), groups=women["group"], units=women["group"].nunique(), bounds=(0, 1)))


def test_subgroups_of_any_metric(frame):
    table = subgroup_table(frame, "age", lambda rows, w: auroc(rows["label"], rows["score"], w), bins=[0, 50, 90],
                           groups=None)
    for name, rows in (("[0, 50]", frame[frame["age"] <= 50]), ("(50, 90]", frame[frame["age"] > 50])):
        assert table.loc[name, "value"] == pytest.approx(sk.roc_auc_score(rows["label"], rows["score"]))
    assert table.loc["(missing)", "rows"] == 5 and table["rows"].iloc[1:].sum() == 200


def test_ranges_hold_their_ends_and_tell_what_lies_outside():
    ages = [0, 20, 40, 70, 85, 90, None]
    table = subgroup_table(pd.DataFrame({"age": ages, "correct": 1.0}), "age", bins=[0, 40, 80], n=10)
    assert table["rows"].to_dict() == {"all": 7, "[0, 40]": 3, "(40, 80]": 1, "(outside)": 2, "(missing)": 1}
    mixed = subgroup_table(pd.DataFrame({"site": [1, "a", 1, "b"], "correct": 1.0}), "site", n=10)
    assert mixed["rows"].to_dict() == {"all": 4, "1": 2, "a": 1, "b": 1}


@pytest.mark.parametrize("metric, summary", [("mean", np.mean), ("median", np.median)])
def test_models_are_compared_where_both_have_a_value(metric, summary):
    before, after = np.array([0, 1, 1] + [np.nan] * 3), np.array([0, 1, 1, 1, 1, 1.0])
    found = paired_bootstrap(before, after, metric, groups=[1, 1, 2, 3, 3, 3], n=50)
    assert (found["difference"], found["rows"], found["groups"]) == (0, 3, 2)
    rng = np.random.default_rng(0)
    values = {name: np.where(rng.random(60) < 0.2, np.nan, rng.random(60)) for name in "abc"}
    groups = pd.Series(rng.integers(0, 20, 60)).where(rng.random(60) < 0.9)
    for row in pairwise_bootstrap(values, metric, groups, n=50).to_dict("records"):
        a, b = values[row.pop("before_run")], values[row.pop("after_run")]
        both = ~np.isnan(a + b)
        assert row == paired_bootstrap(a, b, metric, groups, n=50) == pytest.approx(
            paired_bootstrap(a[both], b[both], metric, groups[both], n=50))
        assert row["before"] == pytest.approx(summary(a[both])) and row["rows"] == both.sum() < 60
    with pytest.raises(InputError, match="no row where both"): paired_bootstrap([1, np.nan], [np.nan, 1], metric)


def test_a_flag_under_ten_units():
    rows = lambda n, groups: pd.DataFrame({"site": ["x"] * n, "correct": [1.0, 0.0] * (n // 2), "group": groups})
    few = lambda frame, **options: subgroup_table(frame, "site", n=10, **options).loc["x", "few"]
    assert few(rows(8, range(8))) and not few(rows(10, range(10)))
    assert few(rows(18, [i // 2 for i in range(18)])) and not few(rows(18, [i // 2 for i in range(18)]), groups=None)


def test_equally_filled_ranges(frame):
    assert subgroup_table(frame, "age", "score", bins=4, n=10)["rows"].iloc[1:5].between(45, 55).all()


@pytest.mark.parametrize("call, message", [
    (lambda f: subgroup_table(f, "sexe"), "no column 'sexe'. Did you mean 'sex'"),
    (lambda f: subgroup_table(f, "sex", "corect"), "Did you mean 'correct'"),
    (lambda f: paired_bootstrap([1, 2], [1]), "same rows"),
    (lambda f: paired_bootstrap([1, 2], [1, 2], groups=[1]), "1 groups for 2 rows"),
    (lambda f: paired_bootstrap([1, 2], [1, 2], "mode"), "Unknown metric 'mode'"),
    (lambda f: mcnemar([1], [1, 0]), "same rows"),
    (lambda f: delong_test([1, 0], [1, 2], [1]), "same rows"),
    (lambda f: delong([1, 0, 3], [1, 2, 3]), "neither 0 nor 1")])
def test_bad_input_is_named(frame, call, message):
    with pytest.raises(InputError, match=message): call(frame)
