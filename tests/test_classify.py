"""Zero-shot classification: the commands classify, rank and packs, the evaluators against loops and scikit-learn, the
template"""
import json
import os
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from medclip_nb.cli import main as cli
from medclip_nb.models import load_model

ANSI_FREE = {**os.environ, "OMP_NUM_THREADS": "1"}


def call(*args, code=0):
    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("some images")
    for i, grey in enumerate((30, 120, 220)):
        Image.fromarray(np.full((80, 64), grey, np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    (folder / "empty.jpg").touch()
    return folder


@pytest.fixture(scope="module")
def clip():
    from medclip_nb.core import seed_everything
    seed_everything(0)
    return load_model("starter")


def test_classify_through_the_installed_command(command, images, clip):
    paths = [str(images / name) for name in ("0.png", "broken.png", "2.png", "empty.jpg", "nowhere.png")]
    classes, template = ["a bright, wide square", "dark", "--odd"], "an image of {}"
    done = subprocess.run([command, "classify", *paths, "--classes", *classes[:2], "--classes=--odd", "--template",
                           template, "{}", "--json", "--top", "0"], capture_output=True, text=True, env=ANSI_FREE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [one["image"] for one in found["images"]] == [paths[0], paths[2]]
    assert ([one["image"] for one in found["skipped"]] == [paths[1], paths[3], paths[4]]
            and all(one["message"].startswith(one["image"]) for one in found["skipped"]))
    assert ("3 of 5 images could not be read" in done.stderr and "random weights" in done.stderr
            and "not for clinical use" in done.stderr)
    assert found["prompts"]["classes"]["dark"] == ["an image of dark", "dark"] and found["pack"] is None
    for path, one in zip((paths[0], paths[2]), found["images"]):
        image, expected = clip.encode_images([path])[0], {}
        for c in classes:
            said = [torch.nn.functional.normalize(clip.encode_texts([s])[0], dim=0) for s in (f"an image of {c}", c)]
            expected[c] = float(torch.nn.functional.normalize(torch.stack(said).mean(0), dim=0) @ image)
        total = sum(np.exp(clip.logit_scale * v) for v in expected.values())
        assert [a["class"] for a in one["answers"]] == sorted(expected, key=expected.get, reverse=True)
        for a in one["answers"]:
            assert a["cosine"] == pytest.approx(expected[a["class"]], abs=2e-5)
            assert a["probability"] == pytest.approx(np.exp(clip.logit_scale * expected[a["class"]]) / total, abs=2e-4)


def test_classify_table_and_top(images):
    text = call("classify", images / "0.png", images / "1.png", "--pack", "kather@1", "--top", 3).stdout.splitlines()
    assert text[0].split() == ["image", "class", "probability", "cosine"] and len(text) == 7
    cosines = [float(line.split()[-1]) for line in text[1:4]]
    assert cosines == sorted(cosines, reverse=True)


def test_classify_with_packs(images, tmp_path):
    found = json.loads(call("classify", images / "0.png", "--pack", "starter", "--json").stdout)
    assert [a["label"] for a in found["images"][0]["answers"]] == ["side"] * 2 + ["lesion"] * 2 + ["finding"] * 5
    assert found["pack"]["name"] == "starter" and len(found["pack"]["hash"]) == 16
    found = json.loads(call("classify", images / "0.png", "--pack", "chexpert-chexzero", "--label", "Edema", "Fracture",
                            "--json").stdout)
    answers = found["images"][0]["answers"]
    assert ({a["class"] for a in answers} == {"Edema", "Fracture"}
            and answers[0]["probability"] >= answers[1]["probability"])
    assert found["prompts"]["classes"]["Edema"] == {"present": ["Edema"], "absent": ["no Edema"]}
    found = json.loads(call("classify", images / "0.png", "--pack", "rsna-ich-itemized", "--json").stdout)
    assert all(a["probability"] is None
               for a in found["images"][0]["answers"]), "without a sentence for absence there is no probability"
    (mine := tmp_path / "mine.yaml").write_text(
        'name: mine\nversion: "1"\ndataset: csv\norigin: convention\nsource: here\ntemplates: ["{}"]\nlabels: {label: '
        '{a: [dark, black], b: bright}}')
    assert {a["class"] for a in json.loads(call("classify", images / "0.png", "--pack", mine, "--json").stdout)[
        "images"][0]["answers"]} == {"a", "b"}


@pytest.mark.parametrize("args, says", [
    ([], "Give either --classes"), (["--classes", "a", "b", "--pack", "kather"], "Give either --classes"),
    (["--classes", "a"], "two classes or more"), (["--classes", "a", "a"], "all different"),
    (["--pack", "kathre"], "Did you mean 'kather'"),
    (["--pack", "starter", "--label", "lession"], "Did you mean 'lesion'"),
    (["--classes", "a", "b", "--label", "side"], "--label picks"),
    (["--pack", "kather", "--template", "x {}"], "brings its own templates"),
    (["--classes", "a", "b", "--template", "no braces"], "has no {}"),
    (["--classes", "a", "b", "--template", "{side} {}"], "has a slot 'side' without words"),
    (["--classes", "a", "b", "--slot", "side=left"], "Slot 'side' stands in no prompt"),
    (["--classes", "a", "b", "--slot", "side"], "write a name and its words"),
    (["--pack", "kather", "--slot", "side=left"], "brings its own templates"),
    (["--classes", "a", "b", "--model", "ViT-B32"], "Did you mean"),
    (["--classes", "a", "b", "--checkpoint", "nowhere"], "nowhere"), (["--classes", "a", "b", "--top", "-1"], "top"),
    (["--classes"], "requires an argument")])
def test_classify_mistakes(images, args, says):
    result = call("classify", images / "0.png", *args, code=2)
    assert says in result.stderr and not result.stdout


def test_slots(images):
    words = ("--slot", "size=small,large", "side=left,right", "--json")
    found = json.loads(call("classify", images / "0.png", "--classes", "a", "b", "--template", "{size} {} {side}",
                            *words).stdout)
    assert found["prompts"]["classes"]["a"] == ["small a left", "small a right", "large a left", "large a right"]
    found = json.loads(call("rank", images / "0.png", "--texts", "{size} {side}", "a knee", *words).stdout)
    assert ({s["text"] for s in found["images"][0]["texts"]}
            == {"small left", "small right", "large left", "large right", "a knee"})


def test_no_image(images):
    assert "Images stand before the options" in call("classify", "--classes", "a", "b", code=2).stderr
    assert "None of 2 images can be read. " in call("rank", images / "broken.png", images / "empty.jpg", "--texts", "a",
                                                    code=2).stderr
    assert "Usage" in call("rank", "--help").stdout


def test_folders_and_files_that_are_not_there(images, tmp_path):
    "Before the model is loaded, which these do not reach"
    (tmp_path / "notes.txt").touch()
    for words in (["classify", "--classes", "a", "b"], ["rank", "--texts", "a"]):
        ask = lambda *paths: call(words[0], *paths, *words[1:], "--model", "hf-hub:no/where", code=2).stderr
        assert ask(images).endswith(f"Name the files: {images}/*.png\n")
        assert ask(tmp_path / "a.png", tmp_path / "b.png") == f"error: {tmp_path / 'a.png'}: no such file or folder.\n"
        assert ask(tmp_path / ("x" * 300)).endswith("x: no such file or folder.\n")
        assert "Name the files" not in ask(tmp_path)


def test_rank(images, clip, tmp_path):
    (file := tmp_path / "texts.txt").write_text("\ufeffa bright square\n\n  a knee  \n", encoding="utf-8")
    texts = ["an image", "a dark, \"quiet\" square", "a bright square", "a knee"]
    result = call("rank", images / "0.png", images / "broken.png", "--texts", *texts[:2], "--texts-file", file,
                  "--json")
    found = json.loads(result.stdout)
    assert len(found["skipped"]) == 1 and "1 of 2 images could not be read" in result.stderr
    cosines = (clip.encode_texts(texts) @ clip.encode_images([images / "0.png"])[0]).numpy()
    said = found["images"][0]["texts"]
    assert ([s["text"] for s in said] == [texts[i] for i in (-cosines).argsort()]
            and [s["rank"] for s in said] == [1, 2, 3, 4])
    np.testing.assert_allclose([s["cosine"] for s in said], np.sort(cosines)[::-1], atol=2e-5)
    assert sum(s["probability"] for s in said) == pytest.approx(1, abs=1e-4)
    lines = call("rank", images / "0.png", "--texts", *texts, "--top", 2).stdout.splitlines()
    assert len(lines) == 3 and lines[0].split() == ["image", "rank", "text", "probability", "cosine"]
    assert "texts are longer than" in call("rank", images / "0.png", "--texts", "word " * 400).stderr


def test_rank_mistakes(images, tmp_path):
    assert "There is no text to rank" in call("rank", images / "0.png", code=2).stderr
    (file := tmp_path / "latin.txt").write_bytes("Ödem".encode("latin-1"))
    assert "cannot be read as UTF-8 text" in call("rank", images / "0.png", "--texts-file", file, code=2).stderr


def test_packs_are_listed():
    text = call("packs").stdout
    assert "kather-plip" in text and "rsna-ich-itemized" in text
    assert [line.split()[0]
            for line in call("packs", "--dataset", "kather").stdout.splitlines()] == [
                "name", "kather", "kather-ipclip", "kather-plip"]
    assert "An H&E image patch of mucus." in call("packs", "kather-plip").stdout
    assert "absent" in call("packs", "chexpert-chexzero").stdout


def test_start_is_light():
    import sys
    code = ("import medclip_nb.cli.ask, medclip_nb.cli.main, sys; "
            "print(*{'torch', 'pandas', 'numpy', 'open_clip', 'yaml'} & set(sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=ANSI_FREE).stdout.split() == []


@pytest.fixture(scope="module")
def spots(tmp_path_factory):
    "Squares of 24 patients: a label, two findings with unknown cells, and the same findings in one column"
    import pandas as pd
    folder, rng, rows = tmp_path_factory.mktemp("spots"), np.random.default_rng(0), []
    for i in range(96):
        bright, right = rng.random() < 0.4, rng.random() < 0.3
        pixels = rng.normal(60, 8, (64, 64))
        pixels[10:50, 32 * right + 4:32 * right + 28] += 40 + 110 * bright
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png",
                     "label": rng.choice(["dark", "bright", "grey"]) if i % 9 == 0 else ["dark", "bright"][bright],
                     "group": f"patient {i // 4}", "split": ["train", "valid", "test", "test"][i // 4 % 4],
                     "bright": None if i % 11 == 0 else int(bright), "right": ["absent", "present"][right],
                     "found": ";".join(n for n, there in (("bright", bright), ("right", right)) if there)})
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    return folder / "table.csv"


def load(spots):
    from medclip_nb.datasets import load_manifest
    return load_manifest("csv", spots)


@pytest.mark.parametrize("seed", range(3))
def test_zero_shot_against_loops(spots, clip, seed):
    from sklearn import metrics as sk

    from medclip_nb.evaluators import zero_shot
    rng = np.random.default_rng(seed)
    templates = list(rng.choice(["{}", "a {} square", "an image of {}", "something {}, somewhere"], rng.integers(1, 4),
                                replace=False))
    prompts = {"dark": ["dark", "black"], "bright": "white", "grey": ["grey", "dim", "dull"]}
    test = load(spots).part("test")
    result = zero_shot(clip, test, templates=templates, prompts=prompts, n_boot=50, sensitivity=True)
    unit = torch.nn.functional.normalize
    centres = {}
    for name, words in sorted(prompts.items()):
        said = [clip.encode_texts([t.format(w)])[0] for w in ([words] if isinstance(words, str) else words)
                for t in templates]
        centres[name] = unit(torch.stack([unit(s, dim=0) for s in said]).mean(0), dim=0)
    scores = np.array([[float(clip.encode_images([p])[0] @ c) for c in centres.values()] for p in test.paths()])
    predicted = [list(centres)[i] for i in scores.argmax(1)]
    assert result.predictions["predicted"].tolist() == predicted
    p = np.exp(clip.logit_scale * scores)
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(result.predictions[[f"p({c})" for c in centres]], p, atol=1e-5)
    place = [1 + sum(s > row[list(centres).index(t)] for s in row) for row, t in zip(scores, test["label"])]
    for name, value in {"balanced_accuracy": sk.balanced_accuracy_score(test["label"], predicted),
                        "f1_macro": sk.f1_score(test["label"], predicted, average="macro",
                                                labels=sorted({*test["label"], *predicted})),
                        "mcc": sk.matthews_corrcoef(test["label"], predicted),
                        "kappa": sk.cohen_kappa_score(test["label"], predicted), "mean_rank": np.mean(place),
                        "auroc_macro": np.mean([sk.roc_auc_score(test["label"] == c, p[:, i])
                                                for i, c in enumerate(centres)])}.items():
        assert result.value(name) == pytest.approx(value, abs=1e-6), name
    rows = result.details["sensitivity"]
    assert len(rows) == (0 if len(templates) == 1 else 2 * (1 + len(templates)))
    for row in rows[2:]:
        alone = zero_shot(clip, test, templates=[row["template"]], prompts=prompts, n_boot=50)
        assert (row["value"] == pytest.approx(alone.value(row["metric"]))
                and row["low"] == pytest.approx(alone.metrics.set_index("name").loc[row["metric"], "low"], nan_ok=True))
        assert row["change"] == pytest.approx(row["value"] - result.value(row["metric"]))


def test_order_of_the_average_matters(clip):
    from medclip_nb.evaluators import zero_shot_classifier
    texts = ["a knee", "an axial slice of the brain showing a ring-enhancing mass with surrounding oedema in the left "
                       "frontal lobe"]
    with clip.inference(): raw = clip.forward_texts(clip.tokenizer(texts)).float() * torch.tensor([[1.0], [7.0]])
    stated = torch.nn.functional.normalize(torch.nn.functional.normalize(raw, dim=-1).mean(0), dim=0)
    torch.testing.assert_close(zero_shot_classifier(clip, [texts], ["{}"])[0], stated, atol=1e-5, rtol=0)
    assert (torch.nn.functional.normalize(raw.mean(0), dim=0) - stated).abs().max() > 1e-3


@pytest.mark.parametrize("negatives", [[], ["no {}", "a square that is not {}"]])
def test_findings_against_scikit_learn(spots, clip, negatives):
    from sklearn import metrics as sk

    from medclip_nb.evaluators import zero_shot_findings
    manifest, templates = load(spots), ["{}", "a square that is {}"]
    result = zero_shot_findings(clip, manifest.part("test"), ["bright", "right"], templates, negatives,
                                {"right": ["on the right", "to the right"]}, valid=manifest.part("valid"), n_boot=50)
    kind = "p" if negatives else "cosine"
    images, mean = clip.encode_images(manifest.part("test").paths()), lambda texts: torch.nn.functional.normalize(
        clip.encode_texts(texts).mean(0), dim=0)
    for name, words in (("bright", ["bright"]), ("right", ["on the right", "to the right"])):
        scores = images @ mean([t.format(w) for w in words for t in templates])
        if negatives:
            scores = torch.softmax(
                clip.logit_scale * torch.stack([images @ mean([t.format(w) for w in words for t in negatives]), scores],
                                               1).double(), 1)[:, 1]
        np.testing.assert_allclose(result.predictions[f"{kind}({name})"], scores, atol=1e-5)
        known = result.predictions[f"true({name})"].notna()
        true, s = result.predictions.loc[known,
                                         f"true({name})"].astype(int), result.predictions.loc[known, f"{kind}({name})"]
        row = next(r for r in result.details["per_class"] if r["class"] == name)
        said = result.predictions.loc[known, f"predicted({name})"].astype(bool)
        assert (row["auroc"] == pytest.approx(sk.roc_auc_score(true, s))
                and row["average_precision"] == pytest.approx(sk.average_precision_score(true, s)))
        assert (row["sensitivity"] == pytest.approx(sk.recall_score(true, said))
                and row["f1"] == pytest.approx(sk.f1_score(true, said)) and row["unknown"] == (~known).sum())
    assert result.value("auroc_macro") == pytest.approx(np.mean([r["auroc"] for r in result.details["per_class"]]))
    assert result.details["thresholds"]["chosen_on"] == "valid"


def test_thresholds_and_temperature_do_not_look_at_the_test(spots, clip):
    from medclip_nb.core import InputError
    from medclip_nb.evaluators import zero_shot, zero_shot_findings
    manifest = load(spots)
    test, valid = manifest.part("test"), manifest.part("valid")
    turned = test.assign(bright=1 - test["bright"].astype(float),
                         right=test["right"].map({"present": "absent", "absent": "present"}),
                         label=test["label"].map({"dark": "bright", "bright": "dark", "grey": "grey"}))
    ask = lambda rows, **how: zero_shot_findings(clip, rows, ["bright", "right"], negatives=["no {}"], n_boot=0, **how)
    assert [[r["threshold"] for r in ask(rows, valid=valid).details["per_class"]]
            for rows in (test, turned)][0] == [r["threshold"] for r in ask(turned, valid=valid).details["per_class"]]
    warmth = [zero_shot(clip, rows, valid=valid, n_boot=0).details["calibration"]["temperature"]["value"]
              for rows in (test, turned)]
    assert warmth[0] == warmth[1]
    assert ("predicted(bright)" not in ask(test).predictions
            and not [n for n in ask(test).metrics["name"] if "f1" in n or "sensitivity" in n])
    for call_ in (lambda: ask(valid, valid=test), lambda: zero_shot(clip, valid, valid=test)):
        with pytest.raises(InputError, match="flatters the test"): call_()


def run(command, out, *params, code=0):
    args = [word for p in params for word in ("-p", p)]
    done = subprocess.run([command, "run", "zero_shot", "-p", "dataset=csv", "-p", "device=cpu", "-p", "n_boot=100",
                           *args, "--out", str(out)], capture_output=True, text=True, env=ANSI_FREE)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


def test_template_with_classes(command, spots, tmp_path):
    (mine := tmp_path / "mine.yaml").write_text(
        'name: mine\nversion: "1"\ndataset: csv\norigin: convention\nsource: here\ntemplates: ["{}", "a {} square & '
        '<b>more</b>"]\n'
        "labels: {label: {dark: [dark, black], bright: white, grey: grey}}")
    run(command, tmp_path / "run", f"data_root={spots}", f"pack={mine}")
    found, report = json.loads((tmp_path / "run/metrics.json").read_text()), (tmp_path / "run/report.html").read_text()
    details = found["details"]
    assert {"accuracy", "balanced_accuracy", "kappa", "mcc", "mean_rank", "ece",
            "ece_calibrated"} <= set(found["metrics"])
    assert details["prompts"]["dark"] == ["dark", "a dark square & <b>more</b>", "black",
                                          "a black square & <b>more</b>"] and details["pack"][
                                              "name"] == "mine" and "file" not in details["pack"]
    assert (details["calibration"]["temperature"]["chosen_on"] == "valid" == details["valid_split"]
            and len(details["sensitivity"]) == 6)
    assert ("a black square &amp; &lt;b&gt;more&lt;/b&gt;" in report and "<b>more</b>" not in report
            and "fitted on" in report)
    assert str(tmp_path) not in (tmp_path / "run/metrics.json").read_text()


def test_template_with_findings(command, spots, tmp_path):
    words = ("multilabel=true", 'templates=["{}", "a square, {}"]', 'negatives=["no {}", "a square, not {}"]')
    run(command, tmp_path / "columns", f"data_root={spots}", 'labels=["bright", "right"]', *words,
        'prompts={"right": {"present": "on the {far} right", "absent": "on the {far} left"}}',
        "slots={far: [far, near]}")
    found = json.loads((tmp_path / "columns/metrics.json").read_text())
    assert ({"auroc_macro", "average_precision_macro", "f1_macro"} <= set(found["metrics"])
            and found["details"]["thresholds"]["chosen_on"] == "valid")
    assert (found["details"]["prompts"]["right"]["absent"] == ["on the far left", "a square, on the far left",
                                                               "on the near left", "a square, on the near left"]
            and found["details"]["prompts"]["bright"]["absent"][0] == "no bright")
    assert "Thresholds were chosen by the rule youden on" in (tmp_path / "columns/report.html").read_text()
    run(command, tmp_path / "list", f"data_root={spots}", 'labels=["found"]', *words, "valid_split=",
        "sensitivity=false")
    found = json.loads((tmp_path / "list/metrics.json").read_text())
    assert (found["details"]["classes"] == ["bright", "right"] and "f1_macro" not in found["metrics"]
            and "sensitivity" not in found["details"])
    assert "No threshold is reported" in (tmp_path / "list/report.html").read_text()


@pytest.mark.parametrize("params, says",
                         [("valid_split=test", "temperature and thresholds are fitted"),
                          ("pack=kather", "Pack kather@1 has no words for 'grey'"),
                          ('templates=["{size} {}"]', "Prompt '{size} {}' has a slot 'size' without words")])
def test_template_mistakes(command, spots, tmp_path, params, says):
    assert says in run(command, tmp_path / "run", f"data_root={spots}", params, code=2)
    assert not (tmp_path / "run").exists()
