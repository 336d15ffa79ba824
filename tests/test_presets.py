"Published settings on data in the published layouts, each to its end; studies in every form; the cures of messages"
import json
import re
import shutil
import subprocess
from dataclasses import replace

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from typer.testing import CliRunner

from medclip_nb.cli.main import app
from medclip_nb.core import InputError
from medclip_nb.datasets import (
    class_lists,
    load_manifest,
    make_ct_rate,
    make_headct_studies,
    make_miniature,
    make_mri_studies,
    marked_volume,
    write_dicom_series,
)
from medclip_nb.embeddings import open_rows
from medclip_nb.evaluators import Result
from medclip_nb.experiments import check_split, open_data, read_parameters
from medclip_nb.images import StudyPreprocess
from medclip_nb.models import PUBLISHED, STAND_INS, load_model, save_checkpoint, study_model
from medclip_nb.trainers import train

AT_ONCE = {"epochs": 1, "max_steps": 2, "batch_size": 4, "chunk": 0, "n_boot": 20}
SMALL = (8, 24, 24)


def words(**params):
    "Parameters as a shell gives them"
    plain = lambda value: value if isinstance(value, str) else json.dumps(value)
    return [word for name, value in params.items() for word in ("-p", f"{name}={plain(value)}")]


def run(command, *args):
    done = subprocess.run([command, "run", *map(str, args)], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


# Settings -> what makes their data, the metrics that their question asks for, and the rows that were published
PRESETS = {
    "mri": (lambda at: make_mri_studies(at, 0, SMALL, (8, 3)), {"image_to_text_R@1"}, "valid"),
    "head-ct": (lambda at: make_headct_studies(at, 0, SMALL, (8, 3)), {"text_to_image_R@10"}, "valid"),
    "chest-ct": (lambda at: make_ct_rate(at, 0, SMALL, (24, 8)),
                 {"ct-rate/auroc_macro", "ct-rate/balanced_accuracy_macro"}, "valid"),
    "rsicd": (lambda at: make_miniature("rsicd", at), {"rsicd-30/accuracy", "rsicd-30/mean_rank"}, "test"),
    "cc0.3m": (lambda at: make_miniature("cc03m-itemized", at), {"image_to_text_COMPLETE@10"}, "valid"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_finishes(command, tmp_path, name):
    make, metrics, measured = PRESETS[name]
    preset = read_parameters(f"itemized-{name}")
    root, out = make(tmp_path / "data"), tmp_path / "run"
    given = AT_ONCE | {"data_root": str(root), "model": f"{preset['model']}-tiny"}
    status, said = run(command, "itemized", "-f", f"itemized-{name}", *words(**given), "--out", out)
    assert status == 0, said
    result = Result.load(out)
    assert metrics <= set(result.metrics["name"])
    assert not result.details["measured_where_fitted"] and not any(result.details["leaks"].values())
    published = load_manifest(preset["dataset"], root).part(measured)
    assert set(result.predictions["row"]) <= set(published.index) and len(result.predictions)
    source = result.details["split_source"]
    if measured == "valid":
        share = f"valid: {preset['valid_fraction']:g} of the training groups, seed 0"
        assert source == f"given with the data; their valid is measured, as test; {share}"
    report = (out / "report.html").read_text()
    assert f"split <em>test</em> ({source})" in report and f"in the place of {preset['model']}" in report
    assert load_model(out / "checkpoint", device="cpu").config["stand_in"] == preset["model"]


def test_stand_ins_for_every_published_model(monkeypatch):
    assert STAND_INS == tuple(f"{name}-tiny" for name in PUBLISHED)
    def offline(*args, **kwargs): raise OSError("no network here")
    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", offline)
    with pytest.raises(InputError) as caught: load_model("itemizedclip-ct-rate", device="cpu")
    said = str(caught.value)
    monkeypatch.undo()
    assert "CXR-BERT" in said and "no network here" in said and "\n" not in said
    assert "stand_in" in load_model(re.search(r"the model (\S+-tiny)", said)[1], device="cpu").config


# Forms of a study: NIfTI files and DICOM folders in one table, and tensors in JSON lists
def mixed_studies(root):
    "Rows of six studies, each with a NIfTI file and a folder of DICOM slices"
    rng, rows = np.random.default_rng(0), []
    for row in range(6):
        marks = [row % 4] if row % 3 else []
        values = marked_volume(rng, (10, 32, 32), marks, 4)
        image = nibabel.Nifti1Image((1000 * values).transpose(2, 1, 0), np.diag([-6, -6, 12, 1.0]))
        (root / f"{row}").mkdir(parents=True)
        nibabel.save(image, root / f"{row}" / "t1.nii.gz")
        write_dicom_series(root / f"{row}" / "ct", 1000 * values - 500, f"patient {row}", (12, 6, 6))
        item = f"finding {row % 4} in the brain" if marks else "no significant abnormality"
        split = ["train", "train", "train", "train", "valid", "test"][row % 6]
        rows.append({"T1": f"{row}/t1.nii.gz", "CT": f"{row}/ct", "items": item, "group": row, "split": split})
    return rows


def mixed_table(root):
    pd.DataFrame(mixed_studies(root)).to_csv(root / "studies.csv", index=False)
    return root


def mixed_lists(root, name):
    "The same in JSON lists, where every series is a folder that holds a file of a name, or DICOM slices"
    rows, kind = mixed_studies(root / "made"), {"img.nii.gz": "T1", "": "CT"}[name]
    for split in ("train", "valid", "test"):
        listed = {}
        for row in rows:
            if row["split"] != split: continue
            for series in ("before", "after"):
                place = root / split / f"study {row['group']}" / series
                if name:
                    place.mkdir(parents=True)
                    shutil.copy(root / "made" / row[kind], place / name)
                else: shutil.copytree(root / "made" / row[kind], place)
            listed[f"study {row['group']}"] = {"series": {"before": {}, "after": {}}, "report": [row["items"]]}
        (root / f"{split}.json").write_text(json.dumps(listed))
    return root


def train_and_look(command, tmp_path, data, files, *attend):
    "Train `starter-studies` by one command and look at one study; the checkpoint and the series of the peak"
    given = {"model": "starter-studies"} | AT_ONCE | data
    status, said = run(command, "itemized", *words(**given), "--out", tmp_path / "run")
    assert status == 0, said
    figure, checkpoint = tmp_path / "where.png", str(tmp_path / "run" / "checkpoint")
    asked = ["attend", *files, "--texts", "an infarct", "--model", checkpoint, "--out", figure, "--device", "cpu",
             "--json", *attend]
    done = CliRunner().invoke(app, [*map(str, asked)])
    assert done.exit_code == 0 and figure.stat().st_size > 5000, done.output
    return checkpoint, json.loads(done.stdout)["images"][0]["peak"][0]


def test_nifti_and_dicom_in_one_table(command, tmp_path):
    root = mixed_table(tmp_path / "data")
    data = {"dataset": "study-csv", "data_root": str(root), "data_options": {"series": ["T1", "CT"]}}
    checkpoint, peak = train_and_look(command, tmp_path, data, [f"T1={root}/0/t1.nii.gz", f"CT={root}/0/ct"])
    assert peak in ("T1", "CT")
    maps = {"model": checkpoint, "n_boot": 20, "n_examples": 1, "methods": ["attention"]} | data
    status, said = run(command, "attention_maps", *words(**maps), "--out", tmp_path / "maps")
    assert status == 0 and "attention" in (tmp_path / "maps" / "report.html").read_text(), said


@pytest.mark.parametrize("name", ["img.nii.gz", ""], ids=["nifti", "dicom"])
def test_json_lists_of_scans(command, tmp_path, name):
    root = mixed_lists(tmp_path / "data", name)
    data = {"dataset": "study-json", "data_root": str(root), "data_options": {"file": name}}
    series = load_manifest("study-json", root, file=name).series[0]
    checkpoint, peak = train_and_look(command, tmp_path, data, [f"{k}={root / path}" for k, path in series.items()])
    assert peak in ("before", "after")
    maps = {"model": checkpoint, "n_boot": 20, "n_examples": 1, "methods": ["attention"]} | data
    status, said = run(command, "attention_maps", *words(**maps), "--out", tmp_path / "maps")
    assert status == 0 and "attention" in (tmp_path / "maps" / "report.html").read_text(), said


def test_tensors_without_spacing(command, tmp_path):
    root = make_mri_studies(tmp_path / "data", 0, (16, 64, 64), (6, 2))
    data = {"dataset": "mri-study", "data_root": str(root), "data_options": {"test_split": "valid"}}
    series = load_manifest("mri-study", root).series[0]
    files = [f"{name}={root / path}" for name, path in series.items()]
    _, peak = train_and_look(command, tmp_path, data, files, "--file-spacing", "3,1,1")
    assert peak in series and "3 x 1 x 1 mm is assumed" in (tmp_path / "run" / "report.html").read_text()


def test_models_of_studies_train_on_tensors(tmp_path):
    "The models of HLIP, without pooling and bias of their own, and what one of single scans answers"
    rows = load_manifest("mri-study", make_mri_studies(tmp_path / "data", 0, SMALL, (6, 2)))
    parts, how = (rows.part("train"), rows.part("valid")), {"max_steps": 1, "batch_size": 3}
    for name in ("hlip-multiscan-h2-token588", "hlip-multiscan-h2-token1176", "hlip-multiscan-h3-token1176"):
        clip = load_model(f"{name}-tiny", device="cpu")
        assert len(train(clip, *parts, tmp_path / name, "itemized", **how).history) and clip.pooling is not None
    single = load_model("hlip-singlescan-h2-token2744-tiny", device="cpu")
    with pytest.raises(InputError, match="several .*hlip-multiscan-h2-token1176, or data with one scan a study"):
        train(single, *parts, tmp_path / "single", "itemized", **how)


# What a message tells the user to give, given as it says
def studies_of_tensors(root):
    for split, names in {"train": ["A", "B"], "test": ["C"]}.items():
        listed = {name: {"series": {"T1": {}, "T2": {}}, "report": ["a lesion"]} for name in names}
        (root / f"{split}.json").write_text(json.dumps(listed))
        for name in names:
            for series, size in (("T1", (8, 24, 24)), ("T2", (6, 20, 20))):
                place = root / name / series
                place.mkdir(parents=True)
                torch.save(torch.rand(size), place / "img.pt")
    return root


def first_study(model):
    "Reads the first row as a run does"
    def read(root, **options):
        rows = open_data("study-json", root, options)
        return open_rows(model(), rows)[0]
    return read


def no_grid():
    torch.manual_seed(0)
    tower = dict(width=32, depth=2, heads=2, patch_size=(8, 16, 16), grid=(2, 3, 3), levels=("scan", "study"))
    return study_model(tower, dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1), dim=32,
                       preprocess=StudyPreprocess(), device="cpu")


def tables(root):
    for name in ("one", "two"): (root / f"{name}.csv").write_text("scan,label\na.png,x\nb.png,x\nc.png,x\n")
    (root / "more").mkdir()
    pairs = [{"picture": f"{name}.png", "said": name} for name in "abc"]
    (root / "more" / "pairs.json").write_text(json.dumps(pairs))
    (root / "more" / "studies.csv").write_text("name,scan\nA,a.nii.gz\nB,b.nii.gz\nC,c.nii.gz\n")
    return root


def reader(name):
    return lambda root, **options: load_manifest(name, root, **options)


CURES = {
    "a spacing": (studies_of_tensors, first_study(lambda: load_model("starter-studies", device="cpu")), {}, None),
    "one size": (studies_of_tensors, first_study(no_grid), {}, None),
    "how files are read": (studies_of_tensors, reader("study-json"), {"file_spacing": [8, 3, 3]},
                           lambda said: {"read": json.loads(said.partition("the option read: ")[2])}),
    "what is measured": (lambda root: make_mri_studies(root, 0, SMALL, (3, 2)), reader("mri-study"), {"split": "test"},
                         lambda said: {"split": "test", "test_split": re.search(r"test_split=(\w+)", said)[1]}),
    "the lists": (lambda root: apart(root), reader("mri-study"), {},
                  lambda said: {re.search(r"option '(\w+)'", said)[1]: "lists"}),
    "a table": (tables, reader("csv"), {"columns": {"image": "scan"}},
                lambda said: {"columns": {"image": "scan"}, re.search(r"name one with '(\w+)'", said)[1]: "one.csv"}),
    "a column": (tables, reader("csv"), {"table": "one.csv"},
                 lambda said: {"table": "one.csv", "columns": {"image": re.search(r"It has '(\w+)'", said)[1]}}),
    "keys of pairs": (lambda root: tables(root) / "more" / "pairs.json", reader("json-pairs"), {"caption": "said"},
                      lambda said: {"caption": "said", re.search(r"the option '(\w+)'", said)[1]: "picture"}),
    "series of a table": (lambda root: tables(root) / "more", reader("study-csv"), {},
                          lambda said: {re.search(r"the option (\w+);", said)[1]: ["scan"]}),
}


def apart(root):
    make_mri_studies(root, 0, SMALL, (3, 2))
    (root / "lists").mkdir()
    for name in ("train.json", "valid.json"): shutil.move(root / name, root / "lists" / name)
    return root


@pytest.mark.parametrize("name", CURES)
def test_the_cure_that_a_message_names_works(tmp_path, name, monkeypatch):
    make, attempt, given, cure = CURES[name]
    root = make(tmp_path)
    with pytest.raises(InputError) as caught: attempt(root, **given)
    said = str(caught.value)
    if cure: options = cure(said)
    else: options = yaml.safe_load(re.search(r"data_options=(\{.*\})\.$", said)[1])
    if name == "the lists": monkeypatch.chdir(root)
    assert len(attempt(root, **options))


def training(tmp_path, **how):
    "Train on studies with nine series, whose preprocessing does not know left from right"
    clip = load_model("hlip-multiscan-h2-token588-tiny", device="cpu")
    clip.preprocess = replace(clip.preprocess, orientation=None)
    clip.model.visual.trunk.max_scans = 8
    rows = load_manifest("mri-study", make_mri_studies(tmp_path / "data", 0, SMALL, (4, 2)))
    rows["series"] = [{f"T{n}": next(iter(series.values())) for n in range(9)} for series in rows["series"]]
    return train(clip, rows.part("train"), rows.part("valid"), tmp_path / "run", "itemized", max_steps=1, batch_size=2,
                 **how)


@pytest.mark.parametrize("given, pattern", [({}, r"(num_series)=(\d+)"),
                                            ({"num_series": 2, "flip": 0.5}, r"set (flip) to (\d+)")])
def test_what_training_is_told(tmp_path, given, pattern):
    with pytest.raises(InputError) as caught: training(tmp_path, **given)
    name, value = re.search(pattern, str(caught.value)).groups()
    assert len(training(tmp_path, **given | {name: int(value)}).history)


def test_a_list_of_classes_for_several_labels():
    with pytest.raises(InputError) as caught: class_lists(["yes", "no"], ["grade", "side"])
    said = yaml.safe_load(re.search(r"classes=(\{.*\})", str(caught.value))[1])
    assert class_lists(said, ["grade", "side"]) == {"grade": ["a", "b"]}


def test_leaks_are_shown_where_a_message_says_so():
    given = {"split": "train", "epochs": 1, "max_steps": 0, "leaks": "stop"}
    with pytest.raises(InputError) as caught: check_split("itemized", given)
    name, value = re.search(r"give (\w+)=(\w+),", str(caught.value)).groups()
    check_split("itemized", given | {name: value})


def test_where_a_command_is_told_the_spacing(tmp_path):
    model = save_checkpoint(load_model("starter-studies", device="cpu"), tmp_path / "model")
    torch.save(torch.rand(*SMALL), tmp_path / "img.pt")
    asked = ["attend", f"T1={tmp_path}/img.pt", "--texts", "a lesion", "--model", model, "--out", tmp_path / "a.png",
             "--method", "relevance", "--device", "cpu"]
    done = CliRunner().invoke(app, [*map(str, asked)])
    option = re.search(r"Give (\w+) in mm", f"{done.exception}{done.output}")[1].replace("_", "-")
    done = CliRunner().invoke(app, [*map(str, asked), f"--{option}", "3,1,1"])
    assert done.exit_code == 0, done.output
