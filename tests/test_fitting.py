"What is fitted where, leaks between splits, and parameters without effect, on small tables"
import json
import subprocess

import pandas as pd
import pytest
import yaml

from medclip_nb.core import InputError
from medclip_nb.datasets import load_manifest, make_squares, split_leaks
from medclip_nb.evaluators import few_shot, knn, linear_probe, robustness
from medclip_nb.experiments import check_fitting, check_parameters, load_suite, rests_on, with_defaults
from medclip_nb.models import load_model
from medclip_nb.trainers import train, train_head


@pytest.mark.parametrize("template, params, message", [
    ("linear_probe", {"split": "valid"}, "C is chosen"),
    ("linear_probe", {"split": "train", "Cs": [1.0]}, "the probe is fitted"),
    ("few_shot", {"split": "valid", "tune": True}, "settings are chosen"),
    ("robustness", {"split": "valid"}, "C is chosen"),
    ("finetune", {"split": "valid"}, "the epoch is selected"),
    ("finetune", {"split": "valid", "mode": "head", "label": "x"}, "the penalty and the temperature"),
    ("finetune", {"split": "train"}, "weights are fitted"),
    ("itemized", {"split": "valid"}, "the epoch is selected"),
    ("zero_shot", {"split": "test", "valid_split": "test"}, "temperature and thresholds"),
    ("attention_maps", {"split": "valid", "valid_split": "valid"}, "the threshold of the overlap")])
def test_a_split_is_not_both_fitted_on_and_measured(template, params, message):
    with pytest.raises(InputError, match=f"on this split .*{message}"): check_parameters(template, params)
    assert check_parameters(template, params | {"leaks": "show"})


@pytest.mark.parametrize("template, params", [
    ("linear_probe", {"split": "valid", "Cs": [1.0]}), ("linear_probe", {"split": "valid", "method": "sgd"}),
    ("few_shot", {"split": "valid"}), ("robustness", {"split": "valid", "classifier": "zero_shot"}),
    ("itemized", {"split": "valid", "epochs": 0}), ("zero_shot", {"split": "valid"}),
    ("attention_maps", {"split": "valid"}), ("retrieval", {"split": "train"}), ("zero_shot", {"split": "all"}),
    ("attention_maps", {"split": "all"}), ("robustness", {"split": "all", "classifier": "zero_shot"})])
def test_a_split_that_nothing_is_fitted_on_can_be_measured(template, params):
    assert check_parameters(template, params)


@pytest.mark.parametrize("template, params, message", [
    ("linear_probe", {}, "on split 'train' the probe is fitted"),
    ("finetune", {}, "on split 'train' weights are fitted"),
    ("few_shot", {}, "on split 'train' labelled images are drawn"),
    ("zero_shot", {"valid_split": "valid"}, "on split 'valid' temperature and thresholds are fitted")])
def test_all_rows_are_not_measured_where_some_are_fitted_on(template, params, message):
    params = {"split": "all", **params}
    with pytest.raises(InputError, match=f"split='all': {message}, and"): check_parameters(template, params)
    assert check_parameters(template, params | {"leaks": "show"})


def test_all_rows_measured_by_a_probe_are_told(tmp_path):
    from medclip_nb.experiments import open_data
    make_squares(tmp_path)
    manifest = open_data("csv", tmp_path / "table.csv")
    with pytest.raises(InputError, match="on split 'train' the probe is fitted"):
        check_fitting("linear_probe", manifest, "all", method="sgd")
    fitting = check_fitting("linear_probe", manifest, "all", "show", method="sgd")
    assert fitting.details["measured_where_fitted"] and "measured on *all* too, which flatters it" in fitting.sentence()


@pytest.mark.parametrize("template, params, idle, active", [
    ("finetune", {"mode": "head", "label": "x", "lr": 1.0}, "lr", {"solver": "adamw"}),
    ("finetune", {"mode": "head", "label": "x", "epochs": 3}, "epochs", {"backbone": "trained"}),
    ("finetune", {"mode": "head", "label": "x", "objective": "clip"}, "objective", {"mode": "full"}),
    ("finetune", {"alpha": 2.0}, "alpha", {"mode": "lora"}), ("finetune", {"hidden": 3}, "hidden", {"mode": "head"}),
    ("finetune", {"embed_dim": 8}, "embed_dim", {"image_tower": "RN50"}),
    ("finetune", {"mode": "locked-text", "freeze_text": 2}, "freeze_text", {"mode": "full"}),
    ("finetune", {"image_weight": 0.7, "objective": "siglip"}, "image_weight", {"objective": "clip"}),
    ("finetune", {"prompts": {"a": "b"}}, "prompts", {"label": "x"}),
    ("itemized", {"objective": "clip", "iis": 0.3}, "iis", {"objective": "itemized"}),
    ("itemized", {"epochs": 0, "lr": 1.0}, "lr", {"epochs": 1}),
    ("itemized", {"merge": 2}, "merge", {"sampling": "diverse"}),
    ("linear_probe", {"method": "sgd", "Cs": [1.0]}, "Cs", {"method": "logistic"}),
    ("linear_probe", {"alpha": 0.01}, "alpha", {"method": "sgd"}),
    ("finetune", {"mode": "head", "label": "x", "betas": [0.9, 0.99]}, "betas", {"solver": "adamw"}),
    ("finetune", {"mode": "head", "label": "x", "clip_grad": 2.0}, "clip_grad", {"backbone": "trained"}),
    ("finetune", {"lora_dropout": 0.1}, "lora_dropout", {"mode": "lora"}),
    ("robustness", {"prompts": {"a": "b"}}, "prompts", {"classifier": "zero_shot"}),
    ("zero_shot", {"pack": "kather", "templates": ["{}"]}, "templates", {"pack": ""}),
    ("zero_shot", {"negatives": ["no {}"]}, "negatives", {"multilabel": True}),
    ("attention_maps", {"tolerance_mm": 2.0, "tolerance": 3.0}, "tolerance", {"tolerance_mm": 0.0}),
    ("data_audit", {"images": "header", "max_distance": 2}, "max_distance", {"images": "decode"})])
def test_a_parameter_without_effect_is_refused(template, params, idle, active):
    with pytest.raises(InputError, match=f"{template}: parameter '{idle}' has no effect here: it needs"):
        check_parameters(template, params)
    assert idle in check_parameters(template, params | active)
    own = {k: v for k, v in params.items() if k != idle}
    assert idle not in with_defaults(template, own, {idle: params[idle]}), "a default for many runs is left out"


def test_defaults_of_a_suite_are_not_meant_for_every_run(tmp_path):
    runs = [{"name": "a", "template": "zero_shot"}, {"name": "b", "template": "robustness"}]
    suite = {"defaults": {"templates": ["a {}"]}, "runs": runs}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(suite))
    assert [r.params for r in load_suite(tmp_path / "mine.yaml").runs] == [{"templates": ["a {}"]}, {}]
    runs[1]["params"] = {"templates": ["b {}"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(suite))
    with pytest.raises(InputError, match="b: robustness: parameter 'templates' has no effect"):
        load_suite(tmp_path / "mine.yaml")


def test_published_settings_can_be_measured_without_training():
    from medclip_nb.experiments import read_parameters
    given = with_defaults("itemized", {"epochs": 0}, read_parameters("itemized-chest-ct"))
    assert "lr" not in given and check_parameters("itemized", given)["protocols"] == ["ct-rate"]


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    rows = pd.DataFrame(make_squares(folder))
    test = rows[rows["split"] == "test"]
    both = pd.concat([rows[rows["split"] == "train"], test.assign(split="valid"), test])
    both.to_csv(folder / "both.csv", index=False)
    rows.assign(group=["p", *rows["group"][1:-1], "p"]).to_csv(folder / "shared.csv", index=False)
    return folder


def test_one_table_as_both_valid_and_test(squares):
    manifest = load_manifest("csv", squares / "both.csv")
    leaks = split_leaks(manifest)
    assert (leaks["kind"] == "same file").sum() == (leaks["kind"] == "same group").sum() == 16
    for template, params in (("linear_probe", {"method": "logistic", "Cs": [1, 2]}),
                             ("zero_shot", {"valid_split": "auto"}),
                             ("finetune", {"mode": "full", "backbone": "frozen", "solver": "auto"}),
                             ("itemized", {"epochs": 3, "max_steps": 0}), ("few_shot", {"tune": True}),
                             ("robustness", {"classifier": "probe"}), ("attention_maps", {"valid_split": "auto"})):
        with pytest.raises(InputError, match=r"16 row\(s\) share a file or a group"):
            check_fitting(template, manifest, "test", **params)
        shown = check_fitting(template, manifest, "test", "show", **params)
        assert "which flatters the result" in shown.sentence() and shown.details["leaks"]["same file"] == 16
    assert not len(check_fitting("linear_probe", manifest, "test", method="sgd", Cs=[1]).leaks), "valid is not used"


@pytest.mark.parametrize("table, message", [("both.csv", "whose file"), ("shared.csv", "whose group 'p'")])
def test_leaks_stop_a_run_unless_they_are_shown(command, squares, tmp_path, table, message):
    call = [command, "run", "linear_probe", "-p", "dataset=csv", "-p", f"data_root={squares / table}",
            "-p", "n_boot=20", "--out", str(tmp_path / "run")]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and "give leaks=show" in done.stderr
    if table == "shared.csv": return
    done = subprocess.run([*call, "-p", "leaks=show"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    details = json.loads((tmp_path / "run" / "metrics.json").read_text())["details"]
    assert details["leaks"] == {"same file": 16, "same group": 16} and not details["measured_where_fitted"]
    assert details["fitted_on"] == {"train": "the probe is fitted", "valid": "C is chosen"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "16 row(s) share a file or a group with a row of another split, which flatters the result" in page
    assert "on 16 images of 2 groups of split" in page


def test_evaluators_and_trainers_refuse_tables_that_share_rows(squares, tmp_path):
    clip = load_model("starter", device="cpu")
    manifest = load_manifest("csv", squares / "table.csv")
    parts = [manifest.part(s) for s in ("train", "test")]
    shared = "train and test rows share 24 image"
    for evaluate in (linear_probe, knn):
        with pytest.raises(InputError, match=shared): evaluate(clip, parts[0], parts[0])
    with pytest.raises(InputError, match="valid and test rows share 16"):
        robustness(clip, parts[1], train=parts[0], valid=parts[1], corruptions=["blur"], levels=[1])
    with pytest.raises(InputError, match="train and valid rows share 24"): few_shot(clip, *parts, valid=parts[0])
    for fit in (lambda: train(clip, parts[0], parts[0], tmp_path), lambda: train_head(clip, parts[0], parts[0])):
        with pytest.raises(InputError, match="train and valid rows share 24"): fit()
    found = linear_probe(clip, parts[0], parts[0], Cs=[1.0], leaks="show", n_boot=2)
    assert rests_on(found, parts[0]) == "24 images of 3 groups"
