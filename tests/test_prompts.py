"""Prompt packs: every one loads and agrees with its card and its reader; slips are one message; they travel with the
package"""
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from medclip_nb.core import InputError
from medclip_nb.datasets import card, phantom
from medclip_nb.datasets.readers import (
    chest_ct as ct,
)
from medclip_nb.datasets.readers import (
    chest_xray as chest,
)
from medclip_nb.datasets.readers import (
    natural_images as photographs,
)
from medclip_nb.datasets.readers import (
    neuro as studies,
)
from medclip_nb.datasets.readers import (
    pathology as microscopy,
)
from medclip_nb.datasets.readers import (
    radiology as radiographs,
)
from medclip_nb.evaluators import (
    class_sentences,
    fill_slots,
    finding_sentences,
    list_packs,
    load_pack,
    pack_folder,
    prompts,
    read_pack,
)
from medclip_nb.experiments import check_parameters, load_suite

ROOT = Path(__file__).resolve().parent.parent
PACKS = sorted((ROOT / "data" / "prompts").glob("*.yaml"))
LABELS = {"kather": {"label": microscopy.TISSUES.values()}, "ham10000": {"label": photographs.LESIONS.values()},
          "rsicd": {"label": photographs.SCENES.values()},
          "pub-brain-5": {"label": [c.lower() for c in studies.BRAIN_CLASSES]},
          "medpix": {"label": radiographs.MEDPIX_NAMES.values()}, "openi": {"label": ["normal", "abnormal"]},
          "mri-study": {"normal": ["present", "absent"]}, "headct-study": {"normal": ["present", "absent"]},
          "starter": {"side": ["left", "right"], "lesion": ["absent", "present"],
                      "finding": ["normal", *phantom.FINDING_KINDS, phantom.VENTRICLES]}}
FINDINGS = {"chexpert": chest.CHEXPERT_FINDINGS, "mimic-cxr-jpg": chest.CHEXPERT_FINDINGS,
            "nih-cxr14": chest.NIH_FINDINGS, "ct-rate": ct.PROTOCOL_CLASSES, "rad-chestct": ct.RAD_CLASSES,
            "rsna-ich": studies.SUBTYPES, "cq500": studies.CQ500_FINDINGS}
LEFT_OUT = {"rsna-ich-itemized": {"epidural"},
            "cq500-itemized": {"ChronicBleed", "Fracture", "CalvarialFracture", "OtherFracture"}}
NO_CLASSES = {"cc03m-itemized", "coco-captions", "csv", "cytopath", "flickr30k", "huggingface", "imagefolder", "ipath",
              "json-pairs", "parquet", "quilt1m", "rocov2", "study-csv", "study-json", "webdataset"}


@pytest.mark.parametrize("path", PACKS, ids=[p.stem for p in PACKS])
def test_pack_agrees_with_its_dataset(path):
    pack, columns = read_pack(path), card(read_pack(path).dataset)["columns"]
    assert pack.id == path.stem and len(pack.hash) == 16
    if pack.dataset == "medmnist": return  # the classes come from the package, see below
    if pack.findings:
        assert set(pack.findings) | LEFT_OUT.get(pack.name, set()) == set(FINDINGS[pack.dataset])
        assert all(c in columns for c in pack.findings) or "the 14 findings" in columns
        present, absent = finding_sentences(list(pack.findings.values()), pack.templates, pack.negatives)
        assert len(present) == len(pack.findings) and len(absent) in (0, len(present))
        assert not any(set(p) & set(a) for p, a in zip(present, absent)), "presence and absence must not be said alike"
    for column, classes in pack.labels.items():
        assert column in columns
        if pack.dataset != "covid-chestxray": assert set(classes) == set(LABELS[pack.dataset][column])
        assert len({tuple(s) for s in class_sentences(list(classes.values()), pack.templates)}) == len(classes)


@pytest.mark.parametrize("flag", [p.stem.partition("@")[0] for p in PACKS if "dataset: medmnist" in p.read_text()])
def test_medmnist_classes(flag):
    names = list(pytest.importorskip("medmnist").INFO[flag]["label"].values())
    pack = load_pack(flag)
    assert pack.options == {"flag": flag} and (list(pack.findings) or list(pack.labels["label"])) == names


def test_every_dataset_with_classes_has_a_pack_of_convention():
    from medmnist import INFO
    packs, cards = list_packs(), {p.stem for p in (ROOT / "data" / "cards").glob("*.yaml")}
    assert set(packs["dataset"]) == cards - NO_CLASSES
    assert set(packs.loc[packs["origin"] == "convention", "dataset"]) == cards - NO_CLASSES
    assert set(INFO) <= set(packs["name"])
    assert list_packs("kather")["name"].tolist() == ["kather", "kather-ipclip", "kather-plip"]


@pytest.mark.parametrize("name, sentence", [
    ("kather-ipclip", "colorectal adenocarcinoma epithelium"), ("kather-plip", "An H&E image patch of mucus."),
    ("medpix-clip", "Medical image of Computed tomography"),
    ("pub-brain-5-itemized", "Study is unremarkable"),
    ("pub-brain-5-hlip", "This MRI study shows: No significant abnormalities."), ("rsicd-itemized", "there is stadium"),
    ("rsna-ich-itemized", "Intracranial hemorrhage with subdural hemorrhage"), ("cq500-itemized", "Mass Effect"),
    ("ct-rate-itemized", "findings consistent with nodules or nodular density"),
    ("rad-chestct-itemized", "findings consistent with opacity"),
    ("ct-rate-hlip", "The volume shows: Not lung nodule."), ("chexpert-chexzero", "no Pleural Effusion")])
def test_published_words(name, sentence):
    pack = load_pack(name)
    said = [class_sentences(list(classes.values()), pack.templates) for classes in pack.labels.values()]
    if pack.findings: said = finding_sentences(list(pack.findings.values()), pack.templates, pack.negatives)
    assert sentence in [s for part in said for group in part for s in group]
    assert pack.origin == "published"


def test_starter_pack_says_what_the_suite_says():
    suite, pack = yaml.safe_load((ROOT / "nbs/experiments/suites/starter.yaml").read_text())["defaults"], load_pack(
        "starter")
    many = lambda said: [said] if isinstance(said, str) else said
    assert (pack.columns == suite["labels"] and pack.templates == suite["templates"]
            and pack.positive == suite["positive"])
    assert pack.labels == {column: {name: many(said) for name, said in classes.items()}
                           for column, classes in suite["prompts"].items()}


GOOD = {"name": "mine", "version": "1", "dataset": "csv", "origin": "convention", "source": "here", "templates": ["{}"]}
LABEL, FINDING = {"labels": {"label": {"a": "x", "b": ["y", "z"]}}}, {
    "findings": {"a": "x", "b": {"present": ["y"], "absent": ["z"]}}}


@pytest.mark.parametrize("name", ["starter", "starter-more", "ablation", "balance"])
def test_slots_of_the_suites_stand_for_every_sentence(name):
    "Lesions in all sizes, on both sides and in all lobes, in this order"
    expected = {kind: [f"{size} {kind} in the {side} {lobe} lobe."
                       for size in ("Small", "Medium-sized", "Large")
                       for side in ("left", "right")
                       for lobe in ("frontal", "parietal", "temporal", "occipital")]
                for kind in ("white-matter lesion", "ring-enhancing mass", "haemorrhage", "infarct")}
    expected |= {"normal": "No significant abnormality.", "enlarged ventricles": "Enlarged lateral ventricles."}
    runs = [r for r in load_suite(name).runs if "slots" in r.params]
    assert len(runs) == sum(r.template == "itemized" for r in load_suite(name).runs) >= 3
    for r in runs:
        (column, filled), = fill_slots(r.params["prompts"], r.params["slots"]).items()
        assert filled == {kind: expected[kind] for kind in filled}, r.name
        assert expected.keys() - filled.keys() == ({"normal"} if column == "findings" else set())


@pytest.mark.parametrize("template, extra", [
    ("zero_shot", {}), ("few_shot", {}), ("robustness", {"classifier": "zero_shot"}),
    ("finetune", {"mode": "head"}), ("itemized", {"labels": ["finding"]})])
def test_slots_are_checked_before_a_kernel_starts(template, extra):
    given = extra | {"prompts": {"finding": {"infarct": "{size} infarct"}}, "slots": {"size": ["Small", "Large"]}}
    assert check_parameters(template, given)["slots"] == given["slots"]
    for change, says in (({"slots": {}}, "'{size} infarct' has a slot 'size' without words. No slots are given."),
                         ({"slots": {"siez": ["Small"]}}, "The slots are siez. A literal brace is doubled."),
                         ({"slots": {"size": ["Small"], "lobe": ["frontal"]}}, "Slot 'lobe' stands in no prompt"),
                         ({"prompts": {}}, "'slots' has no effect here: it needs a prompt or template with a slot"),
                         ({"slots": {"size": [str(k) for k in range(10001)]}}, "stand for 10,001 texts; 10,000 are")):
        with pytest.raises(InputError, match=re.escape(says)): check_parameters(template, given | change)
    assert check_parameters(template, extra | {"templates": ["{{size}} {}"]})


def test_slots_run_fastest_at_the_end():
    slots = {"b": ["1", "2"], "a": ["x", "y", "z"], "c": ["!"]}
    assert (fill_slots("{a}{b}{a}{c}{}", slots)
            == [f"{a}{b}{a}!{{}}" for a, b in itertools.product("xyz", "12")])


@pytest.mark.parametrize("change, says", [
    (LABEL | {"templates": ["no braces"]}, "templates has 'no braces' without {}"),
    (LABEL | {"templates": ["{}", "{}"]}, "templates has '{}' twice"), (LABEL | {"templates": "{}"}, "list of texts"),
    ({"labels": {"label": {"a": "x"}}}, "two classes or more"),
    ({"labels": {"label": {"a": "x", "b": "x"}}}, "could not be distinguished"),
    ({"labels": {"label": {"a": ["x", "x"], "b": "y"}}}, "'x' twice"),
    ({"labels": {"label": {1: "x", "b": "y"}}}, "class 1 that is not text; put quotes"),
    ({"labels": {"label": {"a": [], "b": "y"}}}, "should be a list of texts"),
    ({"labels": {"label": {"a": " ", "b": "y"}}}, "list of texts"),
    (LABEL | {"positive": {"label": "c"}}, "positive names a class 'c'"),
    (LABEL | {"positive": {"side": "a"}}, "positive names a label 'side'"),
    ({"labels": {"label": {"a": "x", "b": "y", "c": "z"}}, "positive": {"label": "a"}}, "3 classes; only one of two"),
    (LABEL | FINDING, "either labels or findings"), ({}, "either labels or findings"),
    (LABEL | {"negatives": ["no {}"]}, "negatives are for findings"), (FINDING, "others none"),
    (FINDING | {"negatives": ["no {}", "without {}"]}, "1 templates and 2 negatives"),
    ({"findings": {"a": {"present": ["y"], "abstent": ["z"]}}},
     "words for present and absent, not for abstent, present"), ({"findings": {"a": 3}}, "should be a list of texts"),
    ({"findings": []}, "either labels or findings"),
    (LABEL | {"name": "My Pack"}, "small letters"), (LABEL | {"version": 1}, "put quotes around a number"),
    (LABEL | {"version": "v1"}, "whole number"), (LABEL | {"origin": "paper"}, "published or convention"),
    (LABEL | {"dataset": "cvs"}, "Did you mean 'csv'"), (LABEL | {"source": ""}, "lacks source"),
    (LABEL | {"sauce": "x"}, "Did you mean 'source'"), (LABEL | {"options": ["x"]}, "names with values")])
def test_slips(tmp_path, change, says):
    (path := tmp_path / "mine.yaml").write_text(yaml.safe_dump(GOOD | change))
    with pytest.raises(InputError, match=f"mine.yaml: .*{re.escape(says)}"): read_pack(path)


def test_files_that_are_no_packs(tmp_path):
    for text, says in (("- 1", "keys and values"), ("a: [", "not YAML"),
                       ("!!python/object/apply:os.system [echo]", "not YAML"),
                       ("name: a\nname: b", "'name' stands twice"), ("", "keys and values"),
                       ("? [a]\n: 1", "not YAML")):
        (path := tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(InputError, match=says): read_pack(path)
    with pytest.raises(InputError, match="cannot be read"): load_pack(tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match="No prompt pack '../kather'"): load_pack("../kather")


def test_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "pack_folder", lambda: tmp_path)
    for version in ("2", "10"):
        (tmp_path / f"mine@{version}.yaml").write_text(yaml.safe_dump(GOOD | LABEL | {"version": version}))
    assert [load_pack(*a).version for a in (("mine",), ("mine@2",), ("mine", 2))] == ["10", "2", "2"]
    with pytest.raises(InputError, match="no version '3'. There is: 2, 10"): load_pack("mine@3")
    (tmp_path / "mine@2.yaml").write_text(yaml.safe_dump(GOOD | LABEL))
    with pytest.raises(InputError, match="the pack is mine@1; file and name should agree"): load_pack("mine@2")


def test_packs_travel_with_the_package(tmp_path):
    for name in ("setup.py", "settings.ini", "pyproject.toml"): shutil.copy(ROOT / name, tmp_path)
    for name in ("medclip_nb", "nbs/experiments", "data/cards", "data/prompts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-lib", tmp_path / "installed"], cwd=tmp_path,
                   check=True, capture_output=True)
    code = ("from medclip_nb.evaluators.prompts import list_packs, load_pack, pack_folder; "
            "print(pack_folder(), len(list_packs()), load_pack('kather').id)")
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env={"PYTHONPATH": str(tmp_path / "installed")},
                          check=True, capture_output=True, text=True)
    assert done.stdout.split() == [f"{tmp_path}/installed/medclip_nb/prompt_packs", str(len(PACKS)), "kather@1"]
    assert pack_folder() == ROOT / "data" / "prompts"


@pytest.mark.parametrize("name", [n for n in LABELS if card(n)["classes"]])
def test_cards_list_the_classes_of_their_readers(name):
    for column, names in card(name)["classes"].items():
        if column in LABELS[name]: assert sorted(names) == sorted(LABELS[name][column]), column
