"Few-shot draws, methods and curves: many random cases, short classes, shared groups, bad input, and the template"
import json
import os
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats

from medclip_nb.core import InputError
from medclip_nb.datasets import make_squares
from medclip_nb.evaluators import (
    FEW_SHOT_METHODS,
    Result,
    Support,
    blend,
    draw_order,
    few_shot,
    join_results,
    nearest_mean,
    plain_probe,
    tip_adapter,
    zero_shot,
)
from medclip_nb.models import load_model
from medclip_nb.plots import curve_table


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    manifest = make_squares(tmp_path_factory.mktemp("squares"))
    return load_model("starter"), *(manifest.part(s) for s in ("train", "valid", "test"))


def made(classes=4, shots=3, d=16, seed=0, scale=20.0):
    torch.manual_seed(seed)
    return Support(F.normalize(torch.randn(classes * shots, d), dim=1), torch.arange(classes * shots) % classes,
                   F.normalize(torch.randn(classes, d), dim=1), scale, shots, False)


@pytest.mark.parametrize("seed", range(10))
def test_draws_are_nested_fair_and_spread_over_groups(seed):
    rng = np.random.default_rng(seed)
    codes, groups = rng.integers(0, 3, 90), rng.integers(0, 12, 90)
    place = draw_order(codes, groups, seed)
    for c in range(3):
        own = np.flatnonzero(codes == c)
        assert sorted(place[own]) == list(range(len(own)))
        have = len(set(groups[own]))
        assert len(set(groups[own[place[own] < have]])) == have, "every group once before any twice"


def test_draws_differ_between_seeds_and_reach_every_row():
    codes, groups = np.zeros(20, int), np.arange(20) // 2
    first = [int(np.flatnonzero(draw_order(codes, groups, seed) == 0)[0]) for seed in range(400)]
    assert set(first) == set(range(20))


def test_order_of_other_classes_does_not_matter_for_counts():
    place = draw_order(np.array([0] * 10 + [1]), np.array([None] * 11, dtype=object), 0)
    assert [(place[:10] < s).sum() for s in (1, 4, 16)] == [1, 4, 10] and place[10] == 0


@pytest.mark.parametrize("seed", range(5))
def test_blended_probe_never_climbs_and_matches_autograd(seed):
    support = made(seed=seed)
    steps = list(blend(support.features, support.codes, support.texts, 40))
    losses = [loss for loss, _, _ in steps]
    assert all(b <= a + 1e-6 for a, b in zip(losses, losses[1:]))
    ten, eleven = steps[9][2], steps[10][2]
    prototypes = steps[9][1].weight - ten[:, None] * support.texts
    alpha = ten.clone().requires_grad_()
    F.cross_entropy(support.features @ (prototypes + alpha[:, None] * support.texts).T, support.codes).backward()
    step = len(support.codes) / (4 * ((support.features @ support.texts.T)**2).sum(0).max())
    torch.testing.assert_close(eleven, ten - step * alpha.grad, atol=1e-5, rtol=1e-5)


def test_blended_probe_keeps_good_texts_and_survives_useless_ones():
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(5, 64), dim=1)
    y = torch.arange(500) % 5
    x = F.normalize(centres[y] + 0.35 * torch.randn(500, 64), dim=1)
    def accuracy(texts, shots):
        support = Support(x[:5 * shots], y[:5 * shots], texts, 50.0, shots, False)
        return {name: float(
            (next(iter(FEW_SHOT_METHODS[name](support)(x[250:]).values())).argmax(1) == y[250:]).float().mean())
                for name in FEW_SHOT_METHODS}
    named = float(((x[250:] @ centres.T).argmax(1) == y[250:]).float().mean())
    good, useless = accuracy(centres, 1), accuracy(F.normalize(torch.randn(5, 64), dim=1), 16)
    assert good["blended_probe"] > good["linear_probe"] and good["blended_probe"] > 0.9 * named
    assert useless["blended_probe"] > 0.8 * useless["linear_probe"]


def test_without_temperature_the_cache_is_the_sum_over_keys():
    support = made()
    found = tip_adapter(support, alpha=2.0, beta=3.0)(support.features)[2.0, 3.0]
    by_hand = np.array([
        [20 * float(t @ f) + 2 * sum(np.exp(-3 * (1 - float(k @ f)))
                                     for k, c in zip(support.features, support.codes) if c == j)
         for j, t in enumerate(support.texts)] for f in support.features])
    np.testing.assert_allclose(found, by_hand, atol=1e-3)


def test_one_shot_nearest_mean_is_the_nearest_neighbour():
    support = made(shots=1)
    rows = F.normalize(torch.randn(50, 16), dim=1)
    said = nearest_mean(support)(rows)[0].argmax(1)
    assert torch.equal(said, (rows @ support.features.T).argmax(1))
    assert torch.equal(said, FEW_SHOT_METHODS["knn"](support)(rows)[1].argmax(1))


def test_every_method_answers_with_finite_scores_for_every_class():
    for classes, shots in ((2, 1), (3, 16)):
        support = made(classes, shots)
        for tune in (False, True):
            support.tune = tune
            for name, method in FEW_SHOT_METHODS.items():
                for scores in method(support)(support.features).values():
                    assert scores.shape == (classes * shots, classes) and torch.isfinite(scores).all(), name


def test_interval_over_draws(squares):
    clip, train, valid, test = squares
    found = few_shot(clip, train, test, shots=(1,), seeds=range(4), methods=["tip_adapter"], n_boot=5)
    values = [d["f1_macro"] for d in found.details["draws"]]
    row = found.metrics.set_index("name").loc["tip_adapter@1/f1_macro"]
    assert row["value"] == pytest.approx(np.mean(values)) and row["n"] == 4
    if np.ptp(values) > 0:
        assert (row["low"], row["high"]) == pytest.approx(stats.t.interval(0.95, 3, np.mean(values), stats.sem(values)))
    assert np.isnan(few_shot(clip, train, test, shots=(1,), seeds=(0,), methods=["knn"], n_boot=5).metrics["low"][0])


def test_curves_are_reproducible_and_follow_the_draws(squares):
    clip, train, valid, test = squares
    a, b = (few_shot(clip, train, test, shots=(4, 1), seeds=(3, 5), n_boot=20) for _ in range(2))
    pd.testing.assert_frame_equal(a.metrics, b.metrics)
    pd.testing.assert_frame_equal(a.predictions, b.predictions)
    draws = pd.DataFrame(a.details["draws"])
    for row in curve_table(a).itertuples():
        part = draws[(draws.method == row.method) & (draws.shots == row.shots)]
        assert row.value == pytest.approx(part.balanced_accuracy.mean()) and row.n == 2
    assert sorted(curve_table(a).shots.unique()) == [1, 4]
    assert a.value("zero_shot/balanced_accuracy") == pytest.approx(
        zero_shot(clip, test, n_boot=5).value("balanced_accuracy"))


def test_saves_loads_and_joins(squares, tmp_path):
    clip, train, valid, test = squares
    found = few_shot(clip, train, test, shots=(1, 2), seeds=(0, 1), methods=["knn", "tip_adapter"], n_boot=20)
    found.save(tmp_path)
    again = Result.load(tmp_path)
    assert again.value("knn@2/balanced_accuracy") == pytest.approx(found.value("knn@2/balanced_accuracy"), abs=1e-5)
    assert len(again.predictions) == len(test) * (1 + 2 * 2 * 2)
    joined = join_results({"a": found, "b": found})
    assert {"a/knn@1/balanced_accuracy", "b/zero_shot/auroc_macro"} <= set(joined.metrics["name"])


def test_missing_labels_short_classes_and_shared_groups_are_recorded(squares):
    clip, train, valid, test = squares
    rare = train.assign(label=train.label.where((train.label == "bright") | (train.index < 6), None))
    found = few_shot(clip, rare, test, shots=(1, 2, 8), seeds=(0,), methods=["nearest_mean"], n_boot=5)
    have = int((rare.label == "dark").sum())
    assert found.details["short"] == {"8": {"dark": have}} and found.details["train_counts"]["dark"] == have
    assert [d["images"] for d in found.details["draws"]] == [2, 4, 8 + have]
    unknown = test.assign(label=test.label.where(test.index > test.index[3], None))
    assert few_shot(clip, train, unknown, shots=(1,), seeds=(0,), methods=["knn"], n_boot=5).details["unlabelled"] == 4
    shared = test.assign(group=test.group.where(test.index > test.index[7], train.group.iloc[0]))
    found = few_shot(clip, train, shared, shots=(99,), seeds=(0,), methods=["knn"], n_boot=5)
    assert found.details["set_aside"] == 8 and found.details["draws"][0]["images"] == len(train) - 8


def test_settings_are_chosen_on_validation_rows_only(squares):
    clip, train, valid, test = squares
    plain, tuned = (few_shot(clip, train, test, shots=(2,), seeds=(0,), valid=v, n_boot=5) for v in (None, valid))
    assert {d["setting"] for d in plain.details["draws"]} == {""} and plain.details["tuned_on"] == "nothing"
    assert {d["method"] for d in tuned.details["draws"] if d["setting"]} == {"linear_probe", "tip_adapter", "knn"}
    turned = few_shot(clip, train, test.assign(label=test.label.map({"dark": "bright", "bright": "dark"})), shots=(2,),
                      seeds=(0,), valid=valid, n_boot=5)
    assert [d["setting"] for d in turned.details["draws"]] == [d["setting"] for d in tuned.details["draws"]]


@pytest.mark.parametrize("options, message", [
    ({"shots": ()}, "shots must be"), ({"shots": (0, 1)}, "shots must be"), ({"seeds": ()}, "seeds must be"),
    ({"seeds": (1, 1)}, "seeds must be"),
    ({"methods": ["lp++"]}, "Unknown few-shot method"), ({"label": "lable"}, "Did you mean 'label'"),
    ({"prompts": {"drak": "x"}}, "Did you mean 'dark'"),
    ({"templates": ["a square"]}, "has no {}")])
def test_bad_options_are_named(squares, options, message):
    clip, train, valid, test = squares
    with pytest.raises(InputError, match=message): few_shot(clip, train, test, **options)


def test_bad_splits_are_named(squares):
    clip, train, valid, test = squares
    with pytest.raises(InputError, match="one class only"): few_shot(clip, train.assign(label="dark"), test)
    with pytest.raises(InputError, match="training has not seen"): few_shot(clip, train, test.assign(label="grey"))
    with pytest.raises(InputError, match="is left once the groups"): few_shot(clip, train, train)


def test_plain_probe_is_logistic_regression():
    from sklearn.linear_model import LogisticRegression
    support = made(3, 8)
    scores = plain_probe(support)(support.features)[10.0]
    trusted = LogisticRegression(C=10.0, class_weight="balanced", tol=1e-6).fit(support.features, support.codes)
    np.testing.assert_allclose(scores.softmax(1), trusted.predict_proba(support.features), atol=0.02)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "Sixteen patients with four pictures each: bright or dark squares; no split"
    folder, rng, rows = tmp_path_factory.mktemp("own data"), np.random.default_rng(0), []
    for i in range(64):
        bright = i // 4 % 2
        pixels = rng.normal(80, 5, (64, 72))
        pixels[20:44, 20:44] += [-60, 120][bright]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
        rows.append({"image": f"{i:03d}.png", "label": ["dark <b>", "bright"][bright], "group": f"patient {i // 4}",
                     "caption": f"no. {i}", "size": ["small", "large", "huge"][i % 3]})
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    return folder / "table.csv"


@pytest.mark.parametrize("extra",
                         [["-p", "shots=[1, 2]", "-p", "seeds=[0, 1]"],
                          ["-p", "labels=['label', 'size']", "-p", "shots=[1, 4, 64]", "-p", "seeds=[0]", "-p",
                           "tune=true"]])
def test_template_on_an_own_table(command, table, tmp_path, extra):
    done = subprocess.run([command, "run", "few_shot", "-p", "dataset=csv", "-p", f"data_root={table}", "-p",
                           "device=cpu", *extra, "--out", str(tmp_path / "run")],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stdout + done.stderr
    found, report = json.loads((tmp_path / "run" / "metrics.json").read_text()), (
        tmp_path / "run" / "report.html").read_text()
    assert all(name in found["metrics"] for name in found["details"]["headline"]) and len(found["details"]["headline"])
    assert ("<b>" not in report.replace("<b></b>", "")
            and "Not for clinical use" in report.replace("not for clinical use", "Not for clinical use"))
    if "tune=true" in extra: assert "64 shots" in report
