"AUROC and average precision of three classes and more: what scikit-learn finds in the saved predictions"
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    f1_score,
    matthews_corrcoef,
    precision_score,
    recall_score,
    roc_auc_score,
)

from medclip_nb.datasets import make_squares
from medclip_nb.evaluators import Result, few_shot, item_zero_shot, knn, linear_probe, robustness, zero_shot
from medclip_nb.metrics import classification_metrics, per_class_metrics
from medclip_nb.models import load_model
from medclip_nb.trainers import classify, train_head


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    "Four classes, one of which is rare and missing from the test split, in images of the starter model"
    manifest = make_squares(tmp_path_factory.mktemp("squares"), patients=12)
    side = manifest["caption"].str.extract("on the (left|right)")[0]
    label = manifest["label"] + " " + side
    rare = (manifest["split"] != "test") & (manifest.groupby("split").cumcount() < 3)
    label = label.where(~rare, "odd")
    return load_model("starter"), {s: manifest.assign(label=label).part(s) for s in ("train", "valid", "test")}


def by_sklearn(rows, classes):
    "Mean over the classes that occur, from the columns of probabilities"
    p, present = rows[[f"p({c})" for c in classes]].to_numpy(), [c for c in classes if (rows["label"] == c).any()]
    assert np.allclose(p.sum(1), 1, atol=1e-6) and p.dtype == np.float64
    areas = [[f(rows["label"] == c, p[:, classes.index(c)]) for c in present]
             for f in (roc_auc_score, average_precision_score)]
    return [np.mean(a) for a in areas], dict(zip(present, zip(*areas)))


EVALUATORS = {
    "zero_shot": lambda clip, part, **how: zero_shot(clip, part["test"], class_names=CLASSES, **how),
    "items": lambda clip, part, **how: item_zero_shot(clip, part["test"], class_names=CLASSES, **how),
    "linear_probe": lambda clip, part, **how: linear_probe(clip, part["train"], part["test"], Cs=(1.0,), **how),
    "sgd": lambda clip, part, **how: linear_probe(clip, part["train"], part["test"], method="sgd", **how),
    "knn": lambda clip, part, **how: knn(clip, part["train"], part["test"], ks=(5,), **how),
    "head": lambda clip, part, **how: classify(clip, train_head(clip, part["train"], part["valid"])[0], part["test"],
                                               **how),
}
CLASSES = ["bright left", "bright right", "dark left", "dark right", "odd"]


@pytest.mark.parametrize("name", EVALUATORS)
def test_saved_predictions_repeat_the_areas(name, places, tmp_path):
    EVALUATORS[name](*places, n_boot=20).save(tmp_path)
    found = Result.load(tmp_path)
    assert found.details["classes"] == CLASSES
    means, each = by_sklearn(found.predictions, CLASSES)
    assert [found.value("auroc_macro"), found.value("average_precision_macro")] == pytest.approx(means, abs=1e-6)
    table = {row["class"]: (row["auroc"], row["average_precision"]) for row in found.details["per_class"]}
    for c in each: assert table[c] == pytest.approx(each[c], abs=1e-6)
    assert table["odd"][0] is None


def test_each_template_alone_ranks_probabilities(places):
    clip, part = places
    templates = ["a square: {}", "{}"]
    found = zero_shot(clip, part["test"], class_names=CLASSES, templates=templates, sensitivity=True, n_boot=20)
    for row in found.details["sensitivity"]:
        if row["metric"] != "auroc_macro": continue
        used = templates if row["template"] == "all together" else [row["template"]]
        alone = zero_shot(clip, part["test"], class_names=CLASSES, templates=used, n_boot=20)
        assert row["value"] == pytest.approx(by_sklearn(alone.predictions, CLASSES)[0][0], abs=1e-12)


def test_every_few_shot_method_is_on_one_scale(places):
    clip, part = places
    found = few_shot(clip, part["train"], part["test"], shots=(2,), seeds=(0, 1), n_boot=20)
    for method, rows in found.predictions.groupby("method"):
        values = [by_sklearn(draw, CLASSES)[0][0] for _, draw in rows.groupby("seed")]
        name = "zero_shot" if method == "zero_shot" else f"{method}@2"
        assert found.value(f"{name}/auroc_macro") == pytest.approx(np.mean(values), abs=1e-12), method
    whole = zero_shot(clip, part["test"], class_names=CLASSES, n_boot=20)
    assert found.value("zero_shot/auroc_macro") == pytest.approx(whole.value("auroc_macro"), abs=1e-6)


@pytest.mark.parametrize("probe", [False, True])
def test_robustness_ranks_probabilities(probe, places):
    clip, part = places
    fitted = {"train": part["train"], "valid": part["valid"]} if probe else {"class_names": CLASSES}
    how = {"corruptions": ["noise"], "levels": (3,), "metric": "auroc_macro", "n_boot": 20}
    found = robustness(clip, part["test"], **how, **fitted)
    for (name, level), rows in found.predictions.groupby(["corruption", "level"]):
        key = f"{name}-{level}" if level else name
        assert found.value(f"{key}/auroc_macro") == pytest.approx(by_sklearn(rows, CLASSES)[0][0], abs=1e-12)


def softmax(z):
    odds = np.exp(z - z.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [3, 4, 9])
def test_a_constant_added_to_a_row_changes_nothing(classes):
    rng = np.random.default_rng(classes)
    y = rng.integers(0, classes, 300)
    z = rng.normal(size=(300, classes)) + 1.5 * np.eye(classes)[y]
    z = (1024 * z).round() / 1024
    z[:40] = z[:40].round()
    shift = (3 * rng.normal(size=(300, 1))).round()
    expected = roc_auc_score(y, softmax(z), multi_class="ovr", average="macro")
    for scores in (z, z + shift, softmax(z)):
        assert classification_metrics(y, scores, range(classes))["auroc_macro"] == pytest.approx(expected, abs=1e-9)
        each = per_class_metrics(y, scores, range(classes))
        assert each["auroc"].mean() == pytest.approx(expected, abs=1e-9)
        assert each["average_precision"].tolist() == pytest.approx(
            [average_precision_score(y == c, softmax(z)[:, c]) for c in range(classes)], abs=1e-9)


def test_large_logits_are_not_all_certain():
    "In float32 the softmax of these is exactly one in every row, and every order is lost"
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 200)
    z = np.eye(3)[y] * 20 + rng.normal(size=(200, 3))
    z[:, 0] += np.where(y == 1, 30, 0)
    assert classification_metrics(y, z, range(3))["auroc_macro"] == pytest.approx(
        roc_auc_score(y, softmax(z), multi_class="ovr"), abs=1e-12)


def sklearn_metrics(y, guess):
    "The metrics of labels and predicted labels, under our names"
    macro, weighted = {"average": "macro", "zero_division": 0}, {"average": "weighted", "zero_division": 0}
    return {
        "accuracy": accuracy_score(y, guess), "balanced_accuracy": balanced_accuracy_score(y, guess),
        "f1_macro": f1_score(y, guess, **macro), "f1_weighted": f1_score(y, guess, **weighted),
        "mcc": matthews_corrcoef(y, guess), "kappa": cohen_kappa_score(y, guess),
    }


@pytest.mark.parametrize("template", ["zero_shot", "linear_probe"])
def test_report_on_a_table_of_ones_own(template, places, command, tmp_path):
    "Every number of the report, from a table with a class that the test split lacks and a row without a label"
    clip, part = places
    rows = pd.concat(part.values())
    rows.loc[rows.index[rows["split"] == "test"][0], "label"] = None
    rows.to_csv(table := Path(part["test"].root) / f"{template}.csv", index=False)
    done = subprocess.run([command, "run", template, "-p", "dataset=csv", "-p",
                           f"data_root={table}", "-p", "n_boot=20", "-p", "seed=1",
                           "-p", "leaks=show", "--out", tmp_path / "run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = Result.load(tmp_path / "run")
    told = found.predictions[found.predictions["label"].notna()]
    assert len(told) == (rows["split"] == "test").sum() - 1
    for name, value in sklearn_metrics(told["label"], told["predicted"]).items():
        assert found.value(name) == pytest.approx(value, abs=1e-6), name
    means, _ = by_sklearn(told, found.details["classes"])
    assert [found.value("auroc_macro"), found.value("average_precision_macro")] == pytest.approx(means, abs=1e-6)
    for row in found.details["per_class"]:
        is_class, called = told["label"] == row["class"], told["predicted"] == row["class"]
        assert row["support"] == is_class.sum()
        if not is_class.any(): continue
        assert row["recall"] == pytest.approx(recall_score(is_class, called), abs=1e-6)
        if called.any(): assert row["precision"] == pytest.approx(precision_score(is_class, called), abs=1e-6)
