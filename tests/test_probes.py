"Solver, probes and neighbours on many random cases and on bad input"
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from medclip_nb.core import InputError
from medclip_nb.datasets import make_squares
from medclip_nb.evaluators import (
    IPCLIP,
    Linear,
    balanced_weights,
    choose,
    knn,
    linear_probe,
    logistic_path,
    neighbor_votes,
)
from medclip_nb.evaluators.logistic import _Loss
from medclip_nb.evaluators.probes import _balanced_accuracy, _folds, _standardized
from medclip_nb.models import load_model


def made(classes, n=300, d=20, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    y = np.r_[np.arange(classes), rng.choice(classes, n - classes, p=(p := 1 / (1 + np.arange(classes))) / p.sum())]
    return (rng.normal(size=(n, d)) + 0.5 * rng.normal(size=(classes, d))[y]).astype(dtype), y


def objective(C, x, y, sample_weight, model):
    scores = model.scores(torch.from_numpy(x.astype(float)))
    loss = (torch.nn.functional.cross_entropy(scores, torch.from_numpy(y),
                                              reduction="none") * torch.from_numpy(sample_weight)).sum()
    return float(loss + (model.weight**2).sum() / (2 * C) * (2 if len(model.weight) == 2 else 1))


def of_scikit(fit):
    "Its classifier with a line for each class"
    weight, bias = torch.from_numpy(fit.coef_.astype(float)), torch.from_numpy(fit.intercept_.astype(float))
    return (Linear(weight, bias) if len(weight) > 1
            else Linear(torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2))


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("weighting", ["none", "balanced", "random"])
@pytest.mark.parametrize("seed", range(2))
def test_the_optimum_is_that_of_scikit_learn(classes, weighting, seed):
    x, y = made(classes, seed=seed)
    codes, Cs = torch.from_numpy(y), [1e-3, 1e-1, 10.0]
    weights = {"none": np.ones(len(y)), "balanced": balanced_weights(codes, classes).double().numpy(),
               "random": np.random.default_rng(seed).random(len(y))}[weighting]
    path = logistic_path(torch.from_numpy(x), codes, classes, Cs, torch.from_numpy(weights), tol=1e-9)
    for C, found in path.items():
        trusted = of_scikit(LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(x, y, sample_weight=weights))
        np.testing.assert_allclose(found.weight - found.weight.mean(0), trusted.weight - trusted.weight.mean(0),
                                   atol=2e-4)
        np.testing.assert_allclose(found.bias - found.bias.mean(), trusted.bias - trusted.bias.mean(), atol=2e-4)
        assert objective(C, x, y, weights, found) <= objective(C, x, y, weights, trusted) * (1 + 1e-8)


@pytest.mark.parametrize("classes, n, d", [(2, 40, 100), (3, 200, 30), (5, 60, 60), (9, 500, 8)])
def test_single_precision_reaches_the_loss_of_scikit_learn(classes, n, d):
    x, y = made(classes, n, d, dtype=np.float32)
    for C, found in logistic_path(torch.from_numpy(x), torch.from_numpy(y), classes, [1e-4, 1e-2, 1.0, 100.0]).items():
        trusted = of_scikit(LogisticRegression(C=C, max_iter=5000).fit(x, y))
        assert found.weight.dtype == torch.float32
        ones, value = np.ones(n), objective(C, x, y, np.ones(n), Linear(found.weight.double(), found.bias.double()))
        assert value <= 1.002 * objective(C, x, y, ones, trusted) + 1e-4 * n, C


def test_a_path_equals_its_single_fits():
    x, y = made(4)
    x, y, Cs = torch.from_numpy(x), torch.from_numpy(y), [1e-2, 1.0, 50.0]
    path = logistic_path(x, y, 4, Cs[::-1], tol=1e-9)
    assert list(path) == Cs
    for C in Cs:
        torch.testing.assert_close(path[C].weight, logistic_path(x, y, 4, [C], tol=1e-9)[C].weight, atol=1e-4, rtol=0)


def test_features_and_weights_stay_as_they_were():
    x, y = made(3, dtype=np.float32)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    before, weights = x.clone(), balanced_weights(y, 3)
    kept = weights.clone()
    logistic_path(x, y, 3, [1.0], weights)
    assert torch.equal(x, before) and torch.equal(weights, kept)


def test_shifted_and_constant_features_are_no_trouble():
    x, y = made(3)
    x[:, 0] = 7
    shifted = torch.from_numpy(x + 100)
    plain, moved = (logistic_path(f, torch.from_numpy(y), 3, [1.0], tol=1e-8)[1.0]
                    for f in (torch.from_numpy(x), shifted))
    torch.testing.assert_close(plain.weight, moved.weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(plain.scores(torch.from_numpy(x)), moved.scores(shifted), atol=1e-2, rtol=0)
    assert _standardized({"train": torch.from_numpy(x)})["train"][:, 0].abs().max() == 0


def test_few_evaluations(monkeypatch):
    "The reason of the whole page: far fewer passes over the features than scikit-learn's fits from nothing"
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 2000)
    x = rng.normal(size=(2000, 200)) + 0.1 * rng.normal(size=(5, 200))[y]
    x = x @ np.random.default_rng(1).normal(size=(200, 200))
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    counts, Cs, evaluate = [], np.logspace(-4, 2, 7), _Loss.__call__
    monkeypatch.setattr(_Loss, "__call__", lambda self, *args: (counts.append(1), evaluate(self, *args))[1])
    logistic_path(torch.from_numpy(x), torch.from_numpy(y), 5, Cs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps = sum(int(LogisticRegression(C=C, max_iter=1000).fit(x, y).n_iter_[0]) for C in Cs)
    assert 3 * len(counts) < steps


@pytest.mark.parametrize("classes, Cs, message",
                         [(4, [1.0], "No row for class number 3"), (3, [], "C must be positive"),
                          (3, [-1.0], "C must be positive")])
def test_bad_problems_are_named(classes, Cs, message):
    x, y = made(3)
    with pytest.raises(InputError, match=message): logistic_path(torch.from_numpy(x), torch.from_numpy(y), classes, Cs)


@pytest.mark.parametrize("k", [1, 5, 40, 99])
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_votes_are_those_of_scikit_learn(k, chunk):
    rng = np.random.default_rng(k)
    x, y = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(60, 5))),
                                         dim=1), torch.from_numpy(rng.integers(0, 4, 60))
    votes = neighbor_votes(x[:20], x[20:], y[20:], 4, [k], 0.1, chunk)[k].numpy()
    weight = lambda distance: np.exp(-(distance - distance.min(1, keepdims=True)) / 0.1)
    trusted = KNeighborsClassifier(min(k, 40), metric="cosine",
                                   weights=weight).fit(x[20:], y[20:]).predict_proba(x[:20])
    np.testing.assert_allclose(votes[:, np.unique(y[20:])], trusted, atol=1e-6)


def test_equal_votes_go_to_the_nearer_class():
    support = torch.nn.functional.normalize(torch.tensor([[1, .1], [1, .2], [1, 0.]]), dim=1)
    votes = neighbor_votes(torch.tensor([[1, 0.]]), support, torch.tensor([0, 0, 1]), 2, [2], temperature=100.0)
    assert votes[2].argmax() == 1 and abs(float(votes[2][0, 1]) - 0.5) < 1e-3


def test_a_class_missing_from_a_fold_is_never_said():
    x, y = torch.randn(12, 3), torch.tensor([0, 1] * 5 + [2, 2])
    def fit(features, codes, classes):
        seen.append(classes)
        return lambda rows: {
            1.0: torch.nn.functional.one_hot(torch.zeros(len(rows), dtype=torch.long), classes).double()}
    seen = []
    best, found, _ = choose(fit, {"train": x}, {"train": y}, np.array(["a", "b", "c", "d"] * 2 + ["a", "b", "c", "d"]),
                            0)
    assert best == 1.0 and seen[0] == 3 and set(seen) <= {2, 3} and "folds of train" in found["chosen_on"]
    assert _balanced_accuracy(torch.tensor([0, 0]), torch.tensor([0, 2])) == 0.5


def test_folds_keep_groups_whole():
    y, groups = np.arange(40) % 2, np.arange(40) // 4
    folds = _folds(y, groups, 3)
    assert len(folds) == 5 and all(not set(groups[a]) & set(groups[b]) for a, b in folds)
    with pytest.raises(InputError, match="two groups of every class"): _folds(y, np.where(y == 0, 1, groups), 0)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    manifest = make_squares(tmp_path_factory.mktemp("squares"))
    return load_model("starter"), *(manifest.part(s) for s in ("train", "valid", "test"))


def test_the_published_settings():
    assert IPCLIP == {"loss": "log_loss", "penalty": "l2", "alpha": 1e-3, "max_iter": 10_000, "random_state": 7}


@pytest.mark.parametrize("evaluate", [linear_probe, knn])
def test_rows_without_a_label_are_left_out_and_classes_may_be_missing(squares, evaluate):
    clip, train, valid, test = squares
    three = train.assign(label=train.label.where(train.index % 5 > 0, None))
    one_class = test[test.label == "dark"]
    found = evaluate(clip, three, one_class, valid=valid, n_boot=20)
    assert found.details["train_rows"] == three.label.notna().sum() and found.details["classes"] == ["bright", "dark"]
    assert found.value("accuracy") == found.value("balanced_accuracy") and np.isnan(found.value("auroc"))
    names = [f"p({c})" for c in found.details["classes"]]
    np.testing.assert_allclose(found.predictions[names].sum(axis=1), 1, atol=1e-5)


def test_standardising_changes_the_probe_and_is_recorded(squares):
    clip, train, valid, test = squares
    with_it, without = (linear_probe(clip, train, test, Cs=[0.01], n_boot=5, standardize=s) for s in (True, False))
    assert with_it.details["standardised"] and not without.details["standardised"]
    assert np.abs(with_it.predictions["p(dark)"] - without.predictions["p(dark)"]).max() > 1e-3
    assert not linear_probe(clip, train, test, method="sgd", n_boot=5).details["standardised"]


def test_the_end_of_the_range_is_told(squares):
    clip, train, valid, test = squares
    assert linear_probe(clip, train, test, valid=valid, Cs=[1.0, 10.0], n_boot=5).details["C_at_edge"]
    assert not linear_probe(clip, train, test, valid=valid, Cs=[1.0], n_boot=5).details["C_at_edge"]


@pytest.mark.parametrize("options, message",
                         [({"method": "svm"}, "Unknown method"), ({"class_weight": "equal"}, "class_weight must be"),
                          ({"label": "lable"}, "Did you mean 'label'")])
def test_bad_options_are_named(squares, options, message):
    clip, train, valid, test = squares
    with pytest.raises(InputError, match=message): linear_probe(clip, train, test, **options)


def test_one_group_a_class_needs_a_validation_split(squares):
    clip, train, valid, test = squares
    alone = train.assign(group=train.label)
    with pytest.raises(InputError, match="needs a validation split"): linear_probe(clip, alone, test)
    assert linear_probe(clip, alone, test, valid=valid, n_boot=5).details["chosen_on"] == "valid"
    # Features of random weights are so alike that the published settings rank the rows and hardly move the threshold
    assert linear_probe(clip, alone, test, method="sgd", n_boot=5).value("auroc") > 0.9


def test_groups_may_be_missing(squares):
    clip, train, valid, test = squares
    assert linear_probe(clip, train.assign(group=pd.Series([None] * len(train), dtype=object, index=train.index)), test,
                        n_boot=5).details["chosen_on"] == "5 folds of train"
