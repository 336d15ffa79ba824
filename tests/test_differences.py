"Hand-made runs against each other: tests, seeds, subgroups, retrieval with several captions, and the compare template"
import json
import os
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_array
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from medclip_nb.core import InputError
from medclip_nb.datasets import Manifest
from medclip_nb.evaluators import (
    Result,
    best_answers,
    caption_pairs,
    chance_levels,
    difference_table,
    join_results,
    metric_table,
    paired_differences,
    paired_rows,
    paired_tests,
    rank_pairs,
    small_subgroups,
    subgroups,
    with_columns,
)
from medclip_nb.experiments import compare, over_runs, seed_groups
from medclip_nb.metrics import mcnemar


def run(seed, skill, rows=120, patients=40, classes=("no", "yes"), task="zero_shot", split="test"):
    "A classification of which a share of the rows is right"
    rng, truth = np.random.default_rng(seed), np.random.default_rng(99).integers(0, len(classes), rows)
    scores = rng.normal(size=(rows, len(classes)))
    scores[np.arange(rows), truth] += skill
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    predicted = np.array(classes)[p.argmax(1)]
    table = pd.DataFrame({"row": range(rows), "image": [f"{split}/{i}.png" for i in range(rows)],
                          "group": [f"p{i % patients}" for i in range(rows)], "label": np.array(classes)[truth],
                          "predicted": predicted, "correct": predicted == np.array(classes)[truth],
                          **{f"p({c})": p[:, i] for i, c in enumerate(classes)}})
    metrics = metric_table({"accuracy": table.correct.mean(), "balanced_accuracy": 0.5},
                           {"accuracy": [], "balanced_accuracy": []}, rows)
    return Result(task, metrics, table,
                  {"classes": list(classes), "chance": 1 / len(classes),
                   **({"positive": classes[-1]} if len(classes) == 2 else {})})


@pytest.mark.parametrize("seed", range(5))
def test_each_test_says_what_it_should(seed):
    a, b = run(seed, 0.8), run(seed + 50, 1.4)
    found = paired_tests(a, b, n_boot=300).set_index(["metric", "test"])
    x, y = a.predictions, b.predictions
    assert set(found.index) == {("accuracy", "paired bootstrap"), ("accuracy", "McNemar, by group"),
                                ("balanced_accuracy", "paired bootstrap"), ("auroc", "paired bootstrap"),
                                ("auroc", "DeLong, by group")}
    score = lambda p: {"accuracy": p.correct.mean(), "balanced_accuracy": balanced_accuracy_score(p.label, p.predicted),
                       "auroc": roc_auc_score(p.label == "yes", p["p(yes)"])}
    for (metric, test), row in found.iterrows():
        assert (row.before, row.after) == pytest.approx((score(x)[metric], score(y)[metric])), (metric, test)
        assert row.difference == pytest.approx(row.after - row.before)
        assert (row["rows"], row.groups) == (120, 40)
    gained, lost = (y.correct & ~x.correct).sum(), (x.correct & ~y.correct).sum()
    assert found.loc[("accuracy", "McNemar, by group"), "p"] == pytest.approx(
        mcnemar(x.correct, y.correct, groups=x.group)["p"])
    for r in (a, b): r.predictions["group"] = range(120)
    alone = paired_tests(a, b, n_boot=20).set_index(["metric", "test"])
    assert alone.loc[("accuracy", "McNemar"), "p"] == pytest.approx(
        binomtest(int(gained), int(gained + lost)).pvalue)
    for r in (a, b): r.predictions["group"] = [f"p{i % 40}" for i in range(120)]
    short = paired_differences(a, b, n_boot=300)
    assert [d["metric"] for d in short] == ["accuracy"]
    assert (short[0]["value"], short[0]["low"],
            short[0]["high"]) == tuple(found.loc[("accuracy", "paired bootstrap"), ["difference", "low", "high"]])


def test_order_of_rows_does_not_matter_and_a_run_equals_itself():
    a, b = run(1, 0.8), run(2, 1.4)
    shuffled = Result(b.task, b.metrics, b.predictions.sample(frac=1, random_state=0), b.details)
    pd.testing.assert_frame_equal(paired_tests(a, b, 100), paired_tests(a, shuffled, 100))
    same = paired_tests(a, a, 100)
    assert (same.difference == 0).all() and (same.p == 1).all()


def test_rows_that_only_one_run_answered_are_left_out():
    a, b = run(1, 0.8), run(2, 1.4)
    a.predictions["correct"] = a.predictions["correct"].astype(object)
    a.predictions.loc[:9, "correct"] = None
    b = Result(b.task, b.metrics, b.predictions.iloc[20:], b.details)
    found = paired_tests(a, b, 100).set_index(["metric", "test"])
    assert found.loc[("accuracy", "McNemar, by group"), "rows"] == 100
    with pytest.raises(InputError, match="no row in common"): paired_tests(a, run(1, 1, split="valid"))


def test_other_classes_are_compared_by_accuracy_only():
    a, b, three = run(1, 1.0), run(2, 1.0), run(2, 1.0, classes=("no", "maybe", "yes"))
    b.predictions["p(maybe)"], b.details = 0.0, {"classes": ["no", "maybe", "yes"]} # Offered; the answer to no row
    assert set(paired_tests(a, b, 50).metric) == {"accuracy"}
    assert set(paired_tests(three, three, 50).metric) == {"accuracy", "balanced_accuracy"}
    with pytest.raises(InputError, match="disagree about the label"): paired_tests(a, three, 50)


def test_unknown_labels_abstain():
    a, b = run(1, 0.8), run(2, 1.4)
    for r in (a, b):
        r.predictions.loc[:4, "label"] = None
        r.predictions["correct"] = r.predictions["correct"].astype(object).where(r.predictions["label"].notna(), None)
    found = paired_tests(a, b, 50)
    assert (found["rows"] == 115).all()
    known = a.predictions.iloc[5:]
    assert found.set_index(["metric", "test"]).loc[("auroc", "DeLong, by group"),
                                                   "before"] == pytest.approx(
                                                       roc_auc_score(known.label == "yes", known["p(yes)"]))


def test_several_labels_and_robustness_are_kept_apart():
    a, b = (join_results({"side": run(s, 1), "lesion": run(s + 1, 1, classes=("absent", "present"))}) for s in (3, 7))
    found = paired_tests(a, b, 50)
    assert {m.split("/")[0] for m in found.metric} == {"side", "lesion"} and (found["rows"] == 120).all()
    worse = []
    for s in (1, 2):
        r = run(s, 1)
        r.predictions = pd.concat(
            [r.predictions.assign(corruption=c, level=n) for c, n in (("clean", 0), ("jpeg", 1), ("jpeg", 2))],
            ignore_index=True).drop(columns=["p(no)", "p(yes)"])
        worse.append(r)
    assert len(paired_rows(*worse)) == 360
    counts = paired_tests(*worse, 50).set_index(["metric", "test"])["rows"]
    assert counts["clean/accuracy", "McNemar, by group"] == 120 and counts["jpeg/accuracy", "McNemar, by group"] == 240


def test_holm_is_over_the_whole_report():
    runs = {name: run(seed, skill) for name, seed, skill in (("a", 1, 0.2), ("b", 2, 2.5), ("c", 3, 0.3))}
    found = difference_table([("a", "b"), ("a", "c")], runs.get, n_boot=1000)
    p = found.p.to_numpy()
    order, adjusted, most = np.argsort(p, kind="stable"), np.empty(len(p)), 0
    for place, i in enumerate(order):
        most = max(most, min(1, p[i] * (len(p) - place)))
        adjusted[i] = most
    assert found.p_holm.to_numpy() == pytest.approx(adjusted)
    assert found[found.after_run == "b"].p_holm.max() < 0.05 < found[found.after_run == "c"].p_holm.min()


def table_of(result, **columns):
    manifest = Manifest(result.predictions[["image"]].assign(split="test", **columns))
    manifest.dataset = "made"
    return manifest


def test_subgroups_by_hand():
    result, ages = run(1, 1.0), np.linspace(20, 80, 120)
    manifest = table_of(result, sex=["f", "m", None] * 40, age=ages)
    found = subgroups(result, manifest, ["sex", "age"], n_boot=100)
    by = found[found.metric == "accuracy"].set_index(["column", "subgroup"])
    p = result.predictions
    for name, rows in (("f", p[::3]), ("m", p[1::3]), ("(missing)", p[2::3]), ("all", p)):
        assert by.loc[("sex", name), "value"] == pytest.approx(rows.correct.mean())
        assert by.loc[("sex", name), "rows"] == len(rows) and by.loc[("sex", name), "groups"] == rows.group.nunique()
    balanced = found[found.metric == "balanced_accuracy"].set_index(["column", "subgroup"]).value["sex", "f"]
    assert balanced == pytest.approx(balanced_accuracy_score(p.label[::3], p.predicted[::3]))
    assert len(by.loc["age"]) == 5 and by.loc["age"]["rows"].tolist() == [120, 30, 30, 30, 30]
    few = subgroups(result, table_of(result, site=["A"] * 112 + ["B"] * 8), ["site"], n_boot=50)
    assert (few[~few.few & (few.metric == "accuracy")].subgroup.tolist() == ["all", "A"]
            and "site B (8)" in small_subgroups(few))


def test_subgroups_of_another_table_are_refused():
    result = run(1, 1.0)
    with pytest.raises(InputError, match="Did you mean 'sex'"): subgroups(result, table_of(result, sex="f"), ["sx"])
    with pytest.raises(InputError, match="120 of 120 predictions are not of this table"):
        with_columns(result, table_of(run(1, 1, split="valid"), sex="f"), ["sex"])


def write(folder, name, result, template="zero_shot.ipynb", **parameters):
    result.save(folder / name)
    (folder / name / "run.json").write_text(
        json.dumps({"template": template,
                    "parameters": {"dataset": "csv", "model": "starter", "out_dir": name, **parameters}}))


def test_seeds_are_gathered(tmp_path):
    for seed in range(3):
        write(tmp_path, f"tune-{seed}", run(seed, 1), "finetune.ipynb", seed=seed, lr=0.1)
        write(tmp_path, f"tune-low-{seed}", run(seed, 1), "finetune.ipynb", seed=seed, lr=0.01)
        write(tmp_path, f"eval-{seed}", run(seed, 1), seed=0, checkpoint=f"../tune-{seed}/checkpoint")
    write(tmp_path, "eval-low", run(9, 1), seed=0, checkpoint="../tune-low-0/checkpoint")
    write(tmp_path, "eval-0-again", run(0, 1), seed=0, checkpoint="../tune-0/checkpoint")
    groups = seed_groups(tmp_path)
    assert sorted(map(sorted, groups.values())) == [["eval-0", "eval-1", "eval-2"], ["tune-0", "tune-1", "tune-2"],
                                                    ["tune-low-0", "tune-low-1", "tune-low-2"]]
    found = over_runs(compare(tmp_path), groups).set_index(["group", "metric"])
    name = next(k for k, names in groups.items() if "eval-1" in names)
    values = [run(seed, 1).predictions.correct.mean() for seed in range(3)]
    assert found.loc[(name, "accuracy"),
                     ["mean", "sd", "n"]].tolist() == pytest.approx([np.mean(values), np.std(values, ddof=1), 3],
                                                                    rel=1e-5)


def test_groups_with_one_prefix_are_all_there(tmp_path):
    for kind, lr in (("x", 0.1), ("y", 0.2)):
        for seed in range(2): write(tmp_path, f"run{kind}-{seed}"[:-2] + f"{seed}", run(seed, 1), seed=seed, lr=lr)
    assert len(seed_groups(tmp_path)) == 2


@pytest.mark.parametrize("seed", range(6))
def test_any_pairing_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    n, m, k = 23, 17, 4
    v, t = rng.normal(size=(n, 5)), rng.normal(size=(m, 5))
    right = rng.random((n, m)) < rng.choice([0.05, 0.2, 0.5])
    right[np.arange(n), rng.integers(m, size=n)] = True
    right[rng.integers(n, size=m), np.arange(m)] = True
    cosine = (v / np.linalg.norm(v, axis=1, keepdims=True)) @ (t / np.linalg.norm(t, axis=1, keepdims=True)).T
    found = rank_pairs(v, t, csr_array(right), ks=(k,))
    for way, scores, own in (("image_to_text", cosine, right), ("text_to_image", cosine.T, right.T)):
        for i, row in enumerate(found[way].to_dict("records")):
            places = np.empty(scores.shape[1], int)
            places[np.argsort(-scores[i])] = 1 + np.arange(scores.shape[1])
            mine = np.sort(places[own[i]])
            assert (row["positives"] == own[i].sum() and row["rank"] == mine[0]
                    and row[f"found@{k}"] == (mine <= k).sum())
            assert row["average_precision"] == pytest.approx(np.mean(np.arange(1, len(mine) + 1) / mine))


def test_several_captions_and_shared_captions():
    rows = Manifest({"image": ["a", "a", "b", "c", "c"], "caption": ["x", "y", "x", "z", "z"],
                     "study": [1, 1, 1, 2, 2]})
    image, text, right = caption_pairs(rows)
    assert image.tolist() == [0, 0, 1, 2, 2] and text.tolist() == [0, 1, 0, 2, 2]
    assert right.toarray().tolist() == [[True, True, False], [True, False, False], [False, False, True]]
    assert caption_pairs(rows, merge_duplicates=False)[2].toarray().sum() == 5
    assert caption_pairs(rows, pair_column="study")[2].toarray()[:2, :2].all()
    with pytest.raises(InputError, match="row 4 has an empty study"):
        caption_pairs(rows.assign(study=[1, 1, 1, 2, None]), pair_column="study")


@pytest.mark.parametrize("chunk", [3, 10, 100])
def test_best_answers_do_not_depend_on_the_chunk(chunk):
    v, t = (torch.nn.functional.normalize(torch.randn(n, 16, generator=torch.Generator().manual_seed(n)), dim=1).numpy()
            for n in (41, 29))
    texts, images = best_answers(v, t, 6, chunk)
    assert ((texts == np.argsort(-v @ t.T, axis=1)[:, :6]).all()
            and (images == np.argsort(-t @ v.T, axis=1)[:, :6]).all())


def test_chance_is_the_mean_over_random_orders():
    rng, g, p = np.random.default_rng(0), 12, 3
    orders = np.argsort(rng.random((20000, g)), axis=1)[:, :p] + 1
    places = np.sort(orders, axis=1)
    found = chance_levels(np.array([p]), g, (2, 5))
    assert found["R@2"] == pytest.approx((places[:, 0] <= 2).mean(), abs=0.01)
    assert found["recall@5"] == pytest.approx((places <= 5).mean(), abs=0.01)
    assert found["precision@5"] == pytest.approx((places <= 5).sum(1).mean() / 5, abs=0.01)
    assert found["mAP"] == pytest.approx((np.arange(1, p + 1) / places).mean(), abs=0.01)


def test_compare_template_on_hand_made_runs(command, tmp_path):
    reports = tmp_path / "reports"
    for seed in range(2): write(reports, f"after-{seed}", run(seed, 2.0), seed=seed)
    write(reports, "before", run(9, 0.3), seed=0, checkpoint="x")
    rows = run(0, 1).predictions
    rows[["image", "label"]].assign(split="test",
                                    site=["A"] * 112 + ["B"] * 8).to_csv(tmp_path / "table.csv", index=False)
    done = subprocess.run([command, "run", "compare", "-p", f"reports_dir={reports}", "-p", "pairs=[[before, after-0]]",
                           "-p", "subgroups=[site]", "-p", "n_boot=200",
                           "-p", "dataset=csv", "-p", f"data_root={tmp_path / 'table.csv'}", "--out",
                           str(tmp_path / "out")], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"before -> after-0: accuracy", "before -> after-0: auroc"} <= set(found["metrics"])
    assert found["metrics"]["before -> after-0: accuracy"]["low"] > 0
    tests = {t["test"] for t in found["details"]["tests"]}
    assert tests == {"McNemar, by group", "DeLong, by group", "paired bootstrap"}
    assert {(s["group"], s["n"]) for s in found["details"]["seeds"]} == {("after", 2)}
    assert any(s["subgroup"] == "B" and s["few"] for s in found["details"]["subgroups"]["after-0"])
    report = (tmp_path / "out" / "report.html").read_text()
    assert "is higher than" in report and "site B (8)" in report
