"Published protocols on files in the public formats, against plain numpy and scikit-learn on the same scores"
import io
import json
from copy import deepcopy
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.special import softmax
from sklearn import metrics as sk

from medclip_nb.core import InputError
from medclip_nb.datasets import Manifest, load_manifest
from medclip_nb.datasets.readers import chest_ct as ct
from medclip_nb.datasets.readers import neuro as studies
from medclip_nb.evaluators import (
    PROTOCOLS,
    Result,
    Scored,
    evaluate_protocol,
    item_pairs,
    item_scores,
    list_protocols,
    load_pack,
    pack_questions,
    protocol_result,
    question_scores,
    threshold_result,
)
from medclip_nb.images import StudyPreprocess
from medclip_nb.models import STARTER, build, study_model

TEXT = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)
END = "_as_published"


@pytest.fixture(scope="module")
def reader():
    "A model of studies with random weights"
    torch.manual_seed(0)
    sizes = dict(width=32, depth=2, heads=2, patch_size=(4, 16, 16), grid=(2, 2, 2), levels=("slice", "study"),
                 max_scans=8)
    return study_model(sizes, TEXT, dim=32, preprocess=StudyPreprocess(percentiles=None, divide=255, grid=(8, 32, 32)),
                       pooling_heads=2, device="cpu")


@pytest.fixture(scope="module")
def viewer():
    "A model of pictures with random weights"
    torch.manual_seed(1)
    config = deepcopy(STARTER)
    config["model_cfg"]["pooling_cfg"] = {"heads": 4}
    return build(config, "starter with pooling", torch.device("cpu"), "fp32")


def tensor(path, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.from_numpy(rng.integers(0, 255, (5, 12, 14), np.uint8)), path)


def areas(labels, scores):
    "AUROC of each column on its known rows"
    return {c: sk.roc_auc_score(y[k], s[k]) for c, y, s in zip(labels, labels.to_numpy().T, scores.T)
            for k in [~np.isnan(y)]}


def states(rows, columns):
    "1, 0 and NaN of columns that say present and absent"
    return rows[list(columns)].apply(lambda c: c.map({"present": 1.0, "absent": 0.0})).astype(float)


def published(found, name):
    "A number as published; where it is the right one, that one"
    values = found.metrics.set_index("name")["value"]
    return values[name + END] if name + END in values else values[name]


def test_every_protocol_has_its_pack_and_its_reasons():
    listed = list_protocols()
    assert {"pub-brain-5", "pub-brain-5-gt", "rsna", "cq500", "ct-rate", "rad-chestct", "rsicd-30", "coco", "flickr",
            "item-retrieval"} <= set(listed["name"])
    assert list(listed) == ["name", "dataset", "options", "task", "classes", "pack", "mode", "metrics", "source"]
    for protocol in PROTOCOLS.values():
        assert protocol.departures and bool(protocol.pack) != bool(protocol.column)
        json.dumps(protocol.record())
    assert PROTOCOLS["ct-rate"].question.present[2] == ["findings consistent with nodules or nodular density"]
    assert PROTOCOLS["rsicd-30"].question.present[0] == ["there is airport", "the airport"]


# Pub-Brain-5

PLACES = {"normal": "open_bhb/s{}", "stroke": "stroke/s{}", "glioma": "brats23/train/adult_glioma/s{}",
          "meningioma": "brats23/train/meningioma/s{}", "metastasis": "ucsf_mets/s{}"}


def pub_brain(root, n=20):
    rng, lines = np.random.default_rng(0), ["study,Normal,Stroke,Glioma,Meningioma,Metastasis"]
    for i in range(n):
        label = i % 5
        study = list(PLACES.values())[label].format(i)
        lines.append(f"/data/pub_brain_5/{study}," + ",".join(str(int(label == c)) for c in range(5)))
        for series in ("t1c", "t2f", "adc")[:1 + i % 3]: tensor(Path(root, study, f"s{i}-{series}.pt"), rng)
    Path(root, "pub_brain_5.csv").write_text("\n".join(lines) + "\n")
    Path(root, "pub_brain_5_gt.csv").write_text("\n".join(lines[:11]) + "\n")


def brain_by_hand(label, cosine, scale=1.0):
    "All numbers of all tasks"
    classes, out = list(PLACES), {}
    for disease in classes[1:]:
        keep = np.isin(label, ["normal", disease])
        y, p = label[keep] == disease, softmax(scale * cosine[keep][:, [0, classes.index(disease)]].astype(float),
                                               axis=1)
        said = p.argmax(1)
        out |= {f"{disease}/balanced_accuracy": sk.balanced_accuracy_score(y, said),
                f"{disease}/f1_weighted": sk.f1_score(y, said, average="weighted"),
                f"{disease}/recall": sk.recall_score(y, said), f"{disease}/auroc": sk.roc_auc_score(y, p[:, 1])}
        if said.any(): out[f"{disease}/precision"] = sk.precision_score(y, said)
    for task, first in (("tumour", 2), ("disease", 0)):
        keep = np.isin(label, classes[first:])
        y, p = np.array([classes.index(c) - first for c in label[keep]]), softmax(
            scale * cosine[keep][:, first:].astype(float), axis=1)
        out |= {f"{task}/balanced_accuracy": sk.balanced_accuracy_score(y, p.argmax(1)),
                f"{task}/auroc_macro": sk.roc_auc_score(y, p, multi_class="ovr")}
    return out


@pytest.mark.parametrize("name", ["pub-brain-5", "pub-brain-5-gt", "pub-brain-5-hlip", "pub-brain-5-gt-hlip"])
def test_pub_brain(reader, tmp_path, name):
    pub_brain(tmp_path)
    protocol = PROTOCOLS[name]
    rows = load_manifest(protocol.dataset, tmp_path, **protocol.options)
    assert len(rows) == (10 if "gt" in name else 20)
    found = evaluate_protocol(name, reader, rows, n_boot=20, batch_size=3)
    cosine = question_scores(reader, rows, protocol.question, protocol.mode)
    expected = brain_by_hand(rows["label"].to_numpy(), cosine, reader.logit_scale if "hlip" in name else 1.0)
    for metric, value in expected.items(): assert found.value(metric) == pytest.approx(value, abs=1e-9), metric
    assert not found.metrics["name"].str.endswith(END).any(), "here paths and labels choose the same rows"
    found.save(tmp_path / "run")
    assert Result.load(tmp_path / "run").details["protocol"]["departures"]


@pytest.mark.parametrize("seed", range(5))
def test_pub_brain_by_path(seed):
    "Rows chosen by a part of their path, as HLIP's script does it, where labels say otherwise"
    rng, classes = np.random.default_rng(seed), list(PLACES)
    label, place = rng.choice(classes, 80), rng.choice([*PLACES.values(), "elsewhere/s{}"], 80)
    rows, cosine = Manifest({"study": [p.format(i) for i, p in enumerate(place)], "label": label,
                             "split": "test"}), rng.normal(size=(80, 5)).astype(np.float32)
    found = protocol_result("pub-brain-5-hlip", rows, cosine, scale=3.0, n_boot=0)
    for metric, value in brain_by_hand(label, cosine, 3.0).items():
        assert found.value(metric) == pytest.approx(value, abs=1e-9), metric
    for disease in classes[1:]:
        parts = (("metastasis", "nyu_mets", "ucsf_mets", "open_bhb") if disease == "metastasis"
                 else (disease, "open_bhb"))
        keep = np.array([any(part in study for part in parts) for study in rows["study"]])
        y, two = label[keep] == disease, cosine[keep][:, [0, classes.index(disease)]]
        assert published(found,
                         f"{disease}/balanced_accuracy") == pytest.approx(sk.balanced_accuracy_score(y, two.argmax(1)))
        assert published(found, f"{disease}/auroc") == pytest.approx(sk.roc_auc_score(y, two[:, 1] - two[:, 0]))
    keep = np.array([any(part in study for part in ("brats23", "nyu_mets", "ucsf_mets")) for study in rows["study"]])
    y = np.stack([label == c for c in classes[2:]], 1)[keep].argmax(1)
    assert published(found,
                     "tumour/balanced_accuracy") == pytest.approx(
                         sk.balanced_accuracy_score(y, cosine[keep, 2:].argmax(1)))
    assert not protocol_result("pub-brain-5-hlip", rows, cosine, as_published=False,
                               n_boot=0).metrics["name"].str.endswith(END).any()


# Head CT

def rsna(root):
    rng, lines = np.random.default_rng(0), [
        "study,Any,Epidural,Intraparenchymal,Intraventricular,Subarachnoid,Subdural"]
    for i in range(12):
        kinds = [int(rng.random() < .5) for _ in range(5)]
        lines.append(f"ID_{i:010x},{max(kinds) if i % 3 else 0}," + ",".join(str(k) if i % 3 else "0" for k in kinds))
        for scan in range(1 + i % 2):
            for window in studies.WINDOW_FOLDERS:
                tensor(Path(root, f"RSNA_ID_{i:010x}", f"ID_{scan}", f"{window}.pt"), rng)
    Path(root, "rsna.csv").write_text("\n".join(lines) + "\n")


def test_rsna(reader, tmp_path):
    rsna(tmp_path)
    rows = load_manifest("rsna-ich", tmp_path)
    assert len(rows) == 18 and rows["group"].nunique() == 12
    found, names = evaluate_protocol("rsna", reader, rows, n_boot=20), PROTOCOLS["rsna"].question.classes
    assert names == ["any", "intraparenchymal", "intraventricular", "subarachnoid", "subdural"]
    expected = areas(states(rows, names), question_scores(reader, rows, PROTOCOLS["rsna"].question))
    for name, value in expected.items(): assert found.value(f"{name}/auroc") == pytest.approx(value)
    assert found.value("auroc_macro") == pytest.approx(np.mean(list(expected.values())))
    first = ~rows["study"].duplicated().to_numpy()
    theirs = areas(states(rows[first], names), question_scores(reader, rows[first], PROTOCOLS["rsna"].question))
    assert first.sum() == 12 and theirs["any"] != expected["any"]
    for name, value in theirs.items(): assert published(found, f"{name}/auroc") == pytest.approx(value)


def cq500(root):
    rng = np.random.default_rng(1)
    lines = [",".join(["name", "Category", *(f"R{r}:{f}" for r in (1, 2, 3) for f in studies.CQ500_FINDINGS)])]
    for number in (*range(14), 163):
        truth = rng.random(len(studies.CQ500_FINDINGS)) < .5
        votes = [(truth ^ (rng.random(len(truth)) < .1)).astype(int) for _ in range(3)]
        lines.append(f"CQ500-CT-{number},B1," + ",".join(str(v) for vote in votes for v in vote))
        for window in studies.WINDOW_FOLDERS:
            tensor(Path(root, f"CQ500CT{number} CQ500CT{number}", "Unknown Study", "CT PLAIN THIN", f"{window}.pt"),
                   rng)
    Path(root, "reads.csv").write_text("\n".join(lines) + "\n")


def test_cq500_and_its_exchanged_labels(reader, tmp_path):
    cq500(tmp_path)
    rows = load_manifest("cq500", tmp_path)
    assert len(rows) == 14, "study 163 is left out"
    found, question = evaluate_protocol("cq500", reader, rows, n_boot=20), PROTOCOLS["cq500"].question
    labels, scores = states(rows, question.classes), question_scores(reader, rows, question)
    right = areas(labels, scores)
    for name, value in right.items(): assert found.value(f"{name}/auroc") == pytest.approx(value)
    exchanged = labels.rename(columns={"MidlineShift": "MassEffect", "MassEffect": "MidlineShift"})[question.classes]
    wrong = areas(exchanged, scores)
    assert wrong["MidlineShift"] != right["MidlineShift"]
    for name in wrong: assert published(found, f"{name}/auroc") == pytest.approx(wrong[name])
    assert published(found, "auroc_macro") == pytest.approx(np.mean(list(wrong.values())))
    assert {m.removesuffix(f"/auroc{END}")
            for m in found.metrics["name"] if m.endswith(f"/auroc{END}")} <= {"MidlineShift", "MassEffect"}
    assert any("the other way round" in line for line in found.details["protocol"]["departures"])


# Chest CT

def ct_rate(root, n=16):
    rng = np.random.default_rng(2)
    for split, _long, folder in (("train", "train", "train_fixed"), ("valid", "validation", "valid_fixed")):
        labels = ["VolumeName," + ",".join(ct.CT_RATE_FINDINGS)]
        for i in range(n):
            volume = f"{split}_{i}_a_1"
            labels.append(f"{volume}.nii.gz,"
                          + ",".join(str(int(v)) for v in rng.random(len(ct.CT_RATE_FINDINGS)) < .5))
            place = Path(root, "dataset", folder, f"{split}_{i}", f"{split}_{i}_a")
            place.mkdir(parents=True)
            nibabel.save(nibabel.Nifti1Image(rng.integers(0, 255, (10, 12, 5)).astype(np.int16), np.eye(4)),
                         place / f"{volume}.nii.gz")
        path = Path(root, "dataset/multi_abnormality_labels", f"{split}_predicted_labels.csv")
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(labels) + "\n")


def rad_chest(root, n=14):
    rng = np.random.default_rng(3)
    columns = [f"{name}*{place}" for name in sorted({a for a, _, _ in ct.RAD_CLASSES.values()})
               for place in ("left_upper", "heart", "aorta")]
    for short, name in (("val", "imgvalid"), ("tst", "imgtest")):
        lines = [",".join(["NoteAcc_DEID", *columns])]
        for i in range(n):
            lines.append(",".join([f"{short}{i:05d}", *(str(float(v)) for v in rng.random(len(columns)) < .2)]))
            np.savez(Path(root, f"{short}{i:05d}.npz"), ct=rng.integers(0, 255, (6, 10, 10)).astype(np.int16))
        Path(root, f"{name}_Abnormality_and_Location_Labels.csv").write_text("\n".join(lines) + "\n")


def corner(y, s, grid=None):
    "The published search, for scores above a threshold; or among the scores themselves, for scores that reach one"
    best, found = 10000, None
    for t in np.unique(s) if grid is None else grid:
        said = s >= t if grid is None else s > t
        distance = np.hypot(1 - (said & (y == 1)).sum() / (y == 1).sum(), (said & (y == 0)).sum() / (y == 0).sum())
        if distance <= best + 1e-12: best, found = distance, t
    return found


def called(y, said):
    return {"accuracy": sk.accuracy_score(y, said), "balanced_accuracy": sk.balanced_accuracy_score(y, said),
            "f1_weighted": sk.f1_score(y, said, average="weighted"),
            "recall": sk.recall_score(y, said), "precision": sk.precision_score(y, said, zero_division=np.nan)}


@pytest.mark.parametrize("name, grid",
                         [("ct-rate", np.linspace(-1, 1, 1000)), ("rad-chestct", np.linspace(-1, 1, 4000)),
                          ("ct-rate-hlip", np.linspace(0, 1, 100)), ("rad-chestct-hlip", np.linspace(0, 1, 100))])
def test_chest_ct(reader, tmp_path, name, grid):
    (ct_rate if "rate" in name else rad_chest)(tmp_path)
    protocol, rows = PROTOCOLS[name], load_manifest(PROTOCOLS[name].dataset, tmp_path)
    tested, valid = (rows.part("valid"),
                     rows.part("train")) if "rate" in name else (rows.part("test"), rows.part("valid"))
    found, names = evaluate_protocol(name, reader, tested, valid=valid, n_boot=20,
                                     batch_size=5), protocol.question.classes
    assert len(names) == (16 if "rate" in name else 15)

    def answer(part):
        cosine = question_scores(reader, part, protocol.question, protocol.mode).astype(float)
        if "hlip" not in name: return cosine
        half = len(names)
        return softmax(reader.logit_scale * np.stack([cosine[:, half:], cosine[:, :half]], 2), axis=2)[..., 1]

    y, s, vy, vs = states(tested, names).to_numpy(), answer(tested), states(valid, names).to_numpy(), answer(valid)
    expected, tuned, halves = [], [], []
    for c in range(len(names)):
        expected.append({"auroc": sk.roc_auc_score(y[:, c], s[:, c]),
                         **called(y[:, c], s[:, c] >= corner(vy[:, c], vs[:, c]))})
        tuned.append(called(y[:, c], s[:, c] > corner(y[:, c], s[:, c], grid)))
        halves.append(called(y[:, c], s[:, c] > .5))
    for metric, value in pd.DataFrame(expected).mean().items():
        assert found.value(f"{metric}_macro") == pytest.approx(value, abs=1e-9), metric
    for line, one in zip(found.details["per_class"], expected):
        assert {m: line[m] for m in one} == pytest.approx(one, abs=1e-9, nan_ok=True)
    theirs = pd.DataFrame(tuned).fillna(0).mean()
    assert published(found, "balanced_accuracy_macro") == pytest.approx(theirs["accuracy"])
    assert found.value("balanced_accuracy_macro_test_tuned") == pytest.approx(theirs["balanced_accuracy"])
    for metric in ("f1_weighted", "recall", "precision"):
        assert published(found, f"{metric}_macro") == pytest.approx(theirs[metric])
    if "hlip" in name:
        for metric, value in pd.DataFrame(halves).mean().items():
            assert found.value(f"{metric}_macro_argmax") == pytest.approx(value, abs=1e-9)
    with pytest.raises(InputError, match="in those that are evaluated"):
        evaluate_protocol(name, reader, tested, valid=tested)
    found.save(tmp_path / "run")


def test_chest_ct_without_validation_reports_no_threshold():
    rows = Manifest({**{c: np.arange(40) % 2 for c in PROTOCOLS["ct-rate"].question.classes},
                     "image": [f"{i}.pt" for i in range(40)], "split": "valid"})
    scores = np.random.default_rng(0).normal(0, .1, (40, 16)).astype(np.float32)
    found = protocol_result("ct-rate", rows, scores, n_boot=0, as_published=False)
    assert found.metrics["name"].tolist() == ["auroc_macro", "average_precision_macro",
                                              *(f"{c}/auroc" for c in PROTOCOLS["ct-rate"].question.classes)]
    shown = protocol_result("ct-rate", rows, scores, n_boot=0)
    assert shown.metrics["name"][18:].tolist() == ["balanced_accuracy_macro_test_tuned",
                                                   *(f"{m}_macro{END}" for m in (
                                                       "balanced_accuracy", "f1_weighted", "recall", "precision"))]


@pytest.mark.parametrize("seed", range(8))
def test_published_thresholds_are_exceeded_not_reached(seed):
    "Scores on the steps of the grid and between them, where above and at least are not the same"
    rng, question = np.random.default_rng(seed), pack_questions(load_pack("ct-rate-itemized"),
                                                                ["Emphysema", "Atelectasis"])[""]
    rows = Manifest({"Emphysema": [1, 0] * 15, "Atelectasis": [0, 0, 1] * 10, "image": [f"{i}.pt" for i in range(30)],
                     "split": "test"})
    grid, y = np.linspace(-1, 1, 5), rows[question.classes].to_numpy()
    scores = (rng.choice([-0.5, -0.25, 0], (30, 2)) + rng.choice([0, 0.25, 0.5], (30, 2)) * y).astype(np.float32)
    found = threshold_result(Scored(rows, scores, question, n_boot=0), grid)
    said = [s > corner(t, s, grid) for t, s in zip(y.T, scores.T)]
    assert published(found,
                     "balanced_accuracy_macro") == pytest.approx(
                         np.mean([sk.accuracy_score(t, s) for t, s in zip(y.T, said)]))
    assert published(found,
                     "recall_macro") == pytest.approx(np.mean([sk.recall_score(t, s) for t, s in zip(y.T, said)]))


# Photographs

def jpeg(rng):
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_rsicd(viewer, tmp_path):
    rng, classes = np.random.default_rng(4), PROTOCOLS["rsicd-30"].question.classes
    numbers = [0, 3, 3, 29, 12, 20, 7, 8]
    cells = [{"filename": f"rsicd_images/{i:05d}.jpg", "captions": str(np.array([f"scene {i}"] * 5, dtype=object)),
              "image": str({"bytes": jpeg(rng), "path": None})} for i in range(8)]
    pd.DataFrame(cells).to_csv(tmp_path / "test.csv", index=False)
    (tmp_path / "large_label.json").write_text(json.dumps(numbers))
    rows = load_manifest("rsicd", tmp_path).part("test")
    assert rows["label"].tolist() == [classes[k]
                                      for k in numbers], "the order of the classes is that of the published list"
    for mode in (None, "global"):
        found = evaluate_protocol("rsicd-30", viewer, rows, mode=mode, n_boot=20)
        scores = item_scores(viewer, rows, [[f"there is {c}", f"the {c}"] for c in classes], mode or "text-conditioned")
        ranks = [(scores[i] > scores[i, k]).sum() + 1 for i, k in enumerate(numbers)]
        expected = {"accuracy": np.mean(np.array(ranks) == 1), "top5_accuracy": np.mean(np.array(ranks) <= 5),
                    "mean_rank": np.mean(ranks)}
        assert found.metrics.set_index("name")["value"].to_dict() == pytest.approx(expected)


def captions(root, name, n=9):
    rng, entries = np.random.default_rng(5), []
    for i in range(n):
        file = f"COCO_val2014_{i:012d}.jpg" if name == "coco" else f"{1000 + i}.jpg"
        folder = Path(root, "val2014" if name == "coco" else "flickr30k-images")
        folder.mkdir(exist_ok=True)
        (folder / file).write_bytes(jpeg(rng))
        said = ["A person .", f"Photograph {i} ."] if i < 2 else [f"Photograph {i} .", f"A view of {i} ."]
        entries.append({"imgid": i, "split": "test", "filename": file,
                        "sentences": [{"raw": s, "sentid": k} for k, s in enumerate(said)]}
                       | ({"filepath": "val2014", "cocoid": i} if name == "coco" else {}))
    Path(root, "dataset_coco.json"
         if name == "coco" else "dataset_flickr30k.json").write_text(json.dumps({"images": entries}))


@pytest.mark.parametrize("name", ["coco", "flickr"])
def test_captions(viewer, tmp_path, name):
    captions(tmp_path, name)
    rows = load_manifest(PROTOCOLS[name].dataset, tmp_path, **PROTOCOLS[name].options).part("test")
    found = evaluate_protocol(name, viewer, rows, n_boot=20)
    texts, right = item_pairs(rows, "captions")
    scores, own = item_scores(viewer, rows, texts), right.toarray()
    assert scores.shape == (9, 17), "two images share a caption"
    rank = lambda line, mine: 1 + (line[~mine] > line[mine].max()).sum()
    first, back = [rank(s, o) for s, o in zip(scores, own)], {t: rank(scores[:, t], own[:, t]) for t in range(17)}
    pairs = [(i, t) for i, t in zip(*np.nonzero(own))]
    for k in (1, 5, 10, 50, 100):
        assert found.value(f"image_to_text_R@{k}") == pytest.approx(np.mean(np.array(first) <= k))
        assert found.value(f"text_to_image_R@{k}") == pytest.approx(np.mean([back[t] <= k for _, t in pairs]))
    assert found.value("image_to_text_median_rank") == np.median(first)
    worst = [(s > s[o].min()).sum() + 1 for s, o in zip(scores, own)]
    assert found.value("image_to_text_mean_worst_rank") == pytest.approx(np.mean(worst))
    single = [1 + (scores[:, t] > scores[i, t]).sum() for i, t in pairs]
    for k in (1, 5): assert published(found, f"text_to_image_R@{k}") == pytest.approx(np.mean(np.array(single) <= k))
    assert published(found, "image_to_text_median_rank") == np.floor(np.median(first))
    with pytest.raises(InputError, match="no column 'captions'"):
        evaluate_protocol(name, viewer, load_manifest(PROTOCOLS[name].dataset, tmp_path, rows="captions"))


@pytest.mark.parametrize("seed", range(5))
def test_item_retrieval_counts_from_one_and_shows_what_counts_from_zero(seed):
    rng = np.random.default_rng(seed)
    rows = Manifest({"image": [f"{i}.png" for i in range(12)],
                     "items": [list(rng.choice([f"item {k}" for k in range(9)], 3)) for _ in range(12)],
                     "split": "test"})
    texts, right = item_pairs(rows)
    scores, own = rng.normal(size=right.shape).astype(np.float32), right.toarray()
    found = protocol_result("item-retrieval", rows, scores, n_boot=0)
    ranks = [[1 + (s > s[t]).sum() for t in np.flatnonzero(o)] for s, o in zip(scores, own)]
    assert found.value("image_to_text_mean_item_rank") == pytest.approx(np.mean([np.mean(r) for r in ranks]))
    assert found.value(f"image_to_text_mean_item_rank{END}") == pytest.approx(np.mean([np.mean(r) for r in ranks]) - 1)
    assert found.value(f"image_to_text_mean_worst_rank{END}") == pytest.approx(np.mean([max(r) for r in ranks]) - 1)
    single = [1 + (scores[:, t] > scores[i, t]).sum() for i, t in zip(*np.nonzero(own))]
    for k in (1, 10):
        assert found.value(f"text_to_image_R@{k}") >= published(found,
                                                                f"text_to_image_R@{k}") == pytest.approx(
                                                                    np.mean(np.array(single) <= k))


def test_rows_and_models_that_do_not_fit_are_told_before_anything_is_scored(reader, viewer, monkeypatch, tmp_path):
    rows = Manifest({"image": ["a.png"], "label": ["Airport"], "split": "test"})
    with pytest.raises(InputError, match="no words for 'Airport'"): evaluate_protocol("rsicd-30", viewer, rows)
    with pytest.raises(InputError, match="chooses no thresholds"):
        evaluate_protocol("rsicd-30", viewer, rows.assign(label="airport"), valid=rows)
    with pytest.raises(InputError, match="Did you mean 'rsicd-30'"): evaluate_protocol("rsicd", viewer, rows)
    heads = Manifest({**{c: ["maybe"] for c in PROTOCOLS["cq500"].question.classes}, "image": ["a.pt"],
                      "split": "test"})
    with pytest.raises(InputError, match="'maybe' is neither present or absent"):
        evaluate_protocol("cq500", reader, heads)
    plain = build(deepcopy(STARTER), "starter", torch.device("cpu"), "fp32")
    with pytest.raises(InputError, match="Use mode='global'"):
        evaluate_protocol("rsicd-30", plain, rows.assign(label="airport"))
