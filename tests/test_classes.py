"The classes that are offered do not depend on the rows that are evaluated; every evaluator agrees on them"
import json
import pickle

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medclip_nb.core import InputError
from medclip_nb.datasets import ClassList, Manifest, class_list, load_manifest, validate, with_classes
from medclip_nb.evaluators import (
    few_shot,
    item_zero_shot,
    knn,
    linear_probe,
    prompt_spec,
    robustness,
    run_zero_shot,
    zero_shot,
)
from medclip_nb.experiments import steps
from medclip_nb.models import load_model
from medclip_nb.trainers import classify, train_head

CURVES = {"shots": [1], "seeds": [0], "methods": ["nearest_mean"]}
BLUR = {"corruptions": ["blur"], "levels": [3]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "Four classes; the test split lacks one of them, the validation split has a single one"
    folder, rng, rows = tmp_path_factory.mktemp("classes"), np.random.default_rng(0), []
    for i in range(48):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        split = "test" if i >= 36 else "valid" if i >= 32 else "train"
        name = {"test": "abc"[i % 3], "valid": "a", "train": "abcd"[i % 4]}[split]
        rows.append((f"{i}.png", name, split, f"{name};d" if i % 2 else "a"))
    pd.DataFrame(rows, columns=["image", "label", "split", "found"]).to_csv(folder / "t.csv", index=False)
    return folder / "t.csv"


@pytest.fixture(scope="module")
def data(root): return load_manifest("csv", root)


@pytest.fixture(scope="module")
def clip(): return load_model("starter", device="cpu", precision="fp32")


def test_every_evaluator_offers_the_classes_of_the_data_set(clip, data):
    train, test = data.part("train"), data.part("test")
    head, _ = train_head(clip, train, data.part("valid"))
    results = [
        zero_shot(clip, test, n_boot=2),
        run_zero_shot(clip, test.limited(2), prompt_spec(templates=["{}"]).on(data.limited(2)), n_boot=2)["label"],
        item_zero_shot(clip, test, mode="global", n_boot=2),
        linear_probe(clip, train, test, Cs=[1.0], n_boot=2),
        knn(clip, train, test, ks=[1], n_boot=2),
        few_shot(clip, train, test, templates=["{}"], n_boot=2, **CURVES),
        robustness(clip, test, n_boot=2, **BLUR),
        robustness(clip, test, train=train, n_boot=2, **BLUR),
        classify(clip, head, test, n_boot=2),
    ]
    for found in results:
        assert found.details["classes"] == list("abcd"), found.task
        assert found.details["classes_from"] == "all splits of the data set"
        assert "d" in found.details["classes_without_rows"] and "other_labels" not in found.details
    assert results[0].details["chance"] == 1 / 4
    value = results[0].metrics.set_index("name")["value"]
    true, said = results[0].predictions["label"], results[0].predictions["predicted"]
    assert value["accuracy"] == (true == said).mean()
    assert value["balanced_accuracy"] == pytest.approx((true == said).groupby(true).mean().mean())
    table = pd.DataFrame(results[0].details["per_class"]).set_index("class")
    assert table.loc["d", "support"] == 0 and np.isnan(table.loc["d", "recall"])


def test_one_class_in_a_split_is_named_and_measured_as_far_as_it_goes(clip, data):
    found = zero_shot(clip, data.part("valid"), n_boot=2).metrics.set_index("name")["value"]
    assert np.isfinite(found["accuracy"]) and found["accuracy"] == found["balanced_accuracy"]
    assert np.isnan(found["auroc_macro"])
    said = validate(data, images="none").set_index("kind")["message"]["one class in a split"]
    assert said == "column 'label': split 'valid' has rows of one class only, 'a'"
    assert not (validate(data.part("valid"), images="none")["severity"] == "error").any()
    alone = data.part("valid")
    alone._whole = None
    assert (validate(alone, images="none")["kind"] == "one class").any()


def test_the_parameter_comes_first_and_other_labels_are_counted(clip, data):
    narrow = with_classes(data, ["c", "a"], ["label"])
    test = narrow.part("test")
    found = zero_shot(clip, test, n_boot=2)
    assert found.details["classes"] == ["c", "a"] and found.details["positive"] == "a"
    assert found.details["classes_from"] == "the parameter classes"
    assert found.details["other_labels"] == {"b": 12, "d": 8}
    assert found.details["unlabelled"] == 4 and found.value("accuracy") >= 0
    head, _ = train_head(clip, narrow.part("train"), narrow.part("valid"))
    assert head.classes == ["c", "a"]
    assert linear_probe(clip, narrow.part("train"), test, Cs=[1.0], n_boot=2).details["classes"] == ["c", "a"]


def test_classes_without_training_rows_are_named(clip, data):
    train, test = data.part("train"), data.part("test")
    few = train[train["label"] != "d"]
    for fit in (lambda: linear_probe(clip, few, test), lambda: knn(clip, few, test),
                lambda: few_shot(clip, few, test, **CURVES), lambda: train_head(clip, few, data.part("valid"))):
        with pytest.raises(InputError, match="no row of split 'train' has a class of column 'label': 'd'. Raise limit"):
            fit()


def test_words_and_their_sources(data):
    pack = prompt_spec("kather")
    names = list(pack.prompts["label"])
    assert pack.classes["label"] == names and pack.classes_from["label"].startswith("the prompt pack kather@")
    some = prompt_spec("kather", classes=names[:1:-1])
    assert some.classes["label"] == names[:1:-1] == list(some.prompts["label"])
    assert some.classes_from["label"] == "the parameter classes"
    with pytest.raises(InputError, match="has no words for class 'bone'"): prompt_spec("kather", classes=["bone", "b"])
    assert prompt_spec(labels=["found"], multilabel=True, classes=["d", "a", "b", "c"]).findings == list("dabc")
    with pytest.raises(InputError, match="label columns are the findings"):
        prompt_spec(labels=["x", "y"], multilabel=True, classes=["x"])


def test_findings_of_a_list_are_those_of_the_data_set(data):
    few = data.part("valid").limited(1)
    assert prompt_spec(labels=["found"], multilabel=True).on(few).findings == list("abcd")


def test_the_card_lists_classes_that_files_on_disk_may_lack():
    few = Manifest({"side": ["left", "left"]})
    few.dataset, few._whole = "starter", few
    assert class_list(few, "side") == ClassList(["left", "right"], "the card of the data set")
    few["side"] = "up"
    with pytest.raises(InputError, match="one class only"): class_list(few, "side")


def test_lists_in_the_files_of_a_data_set_are_used(data, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    feature = {"info": {"features": {"kind": {"names": ["z", "a", "m"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": ["1.png", "2.png"], "kind": [0, 1], "split": ["train", "test"]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(feature)}), tmp_path / "t.parquet")
    rows = load_manifest("parquet", tmp_path, columns={"label": "kind"})
    assert rows["label"].tolist() == ["z", "a"]
    found = class_list(rows.part("test"), "label")
    assert (found.names, found.source) == (["a", "m", "z"], "the files of the data set")


def test_groups_that_look_alike_across_splits(data):
    rows = data.assign(group=[f"p{i}" for i in range(len(data))])
    assert "groups alike" not in set(validate(rows, images="none")["kind"])
    rows.loc[[0, 40], "group"] = ["Patient 7", "patient\N{NO-BREAK SPACE}7 "]
    rows.loc[[1, 2], "group"] = ["Patient 8", "patient 8"]
    said = validate(rows, images="none").set_index("kind").loc["groups alike"]
    assert said["count"] == 2 and "'Patient 7'" in said["message"] and "8" not in said["message"]


def test_the_whole_survives_selection_copies_and_other_processes(data):
    for rows in (data.part("test").copy(), data[["image", "label"]].head(2), pickle.loads(pickle.dumps(data.tail(1)))):
        assert class_list(rows, "label").names == list("abcd")
    changed = data.part("test").assign(label="x")
    changed.loc[changed.index[0], "label"] = "y"
    assert class_list(changed, "label").names == ["x", "y"]


def table_of(folder, rows, columns="image,label"):
    "A table beside its pictures"
    for i, row in enumerate(rows): Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / row.split(",")[0])
    (folder / "t.csv").write_text("\n".join([columns, *rows]) + "\n")
    return folder / "t.csv"


@pytest.mark.parametrize(("cells", "warned"), [
    (["red", "red|green", "green", "blue"], "red|green"), (["red;green", "red; blue", "green"], "red; blue"),
    (["a|b", "c", "d"], ""), (["red", "green", "blue"], ""), (["T1; axial", "T2; sagittal"], ""),
])
def test_cells_that_list_several_labels(tmp_path, monkeypatch, cells, warned):
    shown = []
    monkeypatch.setattr(steps, "display", lambda *what: shown.extend(str(w.data) for w in what))
    data = load_manifest("csv", table_of(tmp_path, [f"{i}.png,{cell}" for i, cell in enumerate(cells)]), split="all")
    steps.show_classes(data, ["label"])
    kinds = set(validate(data, "none")["kind"])
    assert ("labels listed" in kinds) == bool(warned) == any("multilabel=true" in text for text in shown)
    if warned: assert any(f"such as {warned!r}" in text and "Warning" in text for text in shown)


def test_an_image_with_two_labels(tmp_path, monkeypatch):
    "The same image twice is fine; with another label it is said, by `validate` and by the run"
    shown = []
    monkeypatch.setattr(steps, "display", lambda *what: shown.extend(str(w.data) for w in what))
    fine = table_of(tmp_path, ["a.png,red", "a.png,red", "b.png,blue", "c.png,"])
    data = load_manifest("csv", fine, split="all")
    steps.show_classes(data, ["label"])
    assert "labels that contradict" not in set(validate(data, "none")["kind"]) and "several rows" not in str(shown)
    data = load_manifest("csv", table_of(tmp_path, ["a.png,red", "a.png,blue", "b.png,blue", "c.png,red"]), split="all")
    steps.show_classes(data, ["label"])
    found = validate(data, "header").set_index("kind").loc["labels that contradict"]
    said = "column 'label': 1 images have several rows with different labels, such as 'a.png' with 'red' and 'blue'"
    assert said in found["message"] and any(said in text and "Warning" in text for text in shown)


def test_what_splits_are_made_by_is_the_unit_of_intervals(tmp_path):
    "Also where no split is made, and for leaks; a group of the table goes before it"
    rows = [f"{i}.png,{'ab'[i % 2]},p{i // 2}" for i in range(24)]
    table = table_of(tmp_path, rows, "image,label,patient")
    made = load_manifest("csv", table, split_by="patient")
    assert (made["group"] == made["patient"]).all() and made.groupby("group")["split"].nunique().max() == 1
    every = load_manifest("csv", table, split="all", split_by="patient")
    assert every["split"].unique().tolist() == ["all"] and every["group"].nunique() == 12
    assert every.split_source == "none: all rows are taken"
    assert "group" not in load_manifest("csv", table, split="all")
    own = load_manifest("csv", table, columns={"group": "label"}, split_by="patient", split="all")
    assert set(own["group"]) == {"a", "b"}
    with pytest.raises(InputError, match="split_by='patent': no such column. Did you mean 'patient'"):
        load_manifest("csv", table, split="all", split_by="patent")
    clip = load_model("starter", device="cpu", precision="fp32")
    by = zero_shot(clip, made.part("test"), "label", n_boot=5)
    assert by.details["bootstrap"]["unit"] == "group"
