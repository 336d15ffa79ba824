"Zero-shot classification: the commands classify, rank and packs, the evaluators against loops and scikit-learn, the template"
import json
import os
import subprocess

import numpy as np
import pytest
import torch
from medclip_nb import cli
from medclip_nb.models import load_model
from PIL import Image
from typer.testing import CliRunner

ANSI_FREE = {**os.environ, "OMP_NUM_THREADS": "1"}


def call(*args, code=0):
    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("some images")
    for i, grey in enumerate((30, 120, 220)): Image.fromarray(np.full((80, 64), grey, np.uint8)).save(folder / f"{i}.png")
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
    done = subprocess.run([command, "classify", *paths, "--classes", *classes[:2], "--classes=--odd", "--template", template, "{}", "--json", "--top", "0"], capture_output=True, text=True, env=ANSI_FREE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [one["image"] for one in found["images"]] == [paths[0], paths[2]]
    assert [one["image"] for one in found["skipped"]] == [paths[1], paths[3], paths[4]] and all(one["message"].startswith(one["image"]) for one in found["skipped"])
    assert "3 of 5 images could not be read" in done.stderr and "random weights" in done.stderr and "not for clinical use" in done.stderr
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
    found = json.loads(call("classify", images / "0.png", "--pack", "chexpert-chexzero", "--label", "Edema", "Fracture", "--json").stdout)
    answers = found["images"][0]["answers"]
    assert {a["class"] for a in answers} == {"Edema", "Fracture"} and answers[0]["probability"] >= answers[1]["probability"]
    assert found["prompts"]["classes"]["Edema"] == {"present": ["Edema"], "absent": ["no Edema"]}
    found = json.loads(call("classify", images / "0.png", "--pack", "rsna-ich-itemized", "--json").stdout)
    assert all(a["probability"] is None for a in found["images"][0]["answers"]), "without a sentence for absence there is no probability"
    (mine := tmp_path / "mine.yaml").write_text('name: mine\nversion: "1"\ndataset: csv\norigin: convention\nsource: here\ntemplates: ["{}"]\nlabels: {label: {a: [dark, black], b: bright}}')
    assert {a["class"] for a in json.loads(call("classify", images / "0.png", "--pack", mine, "--json").stdout)["images"][0]["answers"]} == {"a", "b"}


@pytest.mark.parametrize("args, says", [
    ([], "Give either --classes"), (["--classes", "a", "b", "--pack", "kather"], "Give either --classes"), (["--classes", "a"], "two classes or more"), (["--classes", "a", "a"], "all different"),
    (["--pack", "kathre"], "Did you mean 'kather'"), (["--pack", "starter", "--label", "lession"], "Did you mean 'lesion'"), (["--classes", "a", "b", "--label", "side"], "--label picks"),
    (["--pack", "kather", "--template", "x {}"], "brings its own templates"), (["--classes", "a", "b", "--template", "no braces"], "has no {}"), (["--classes", "a", "b", "--model", "ViT-B32"], "Did you mean"),
    (["--classes", "a", "b", "--checkpoint", "nowhere"], "nowhere"), (["--classes", "a", "b", "--top", "-1"], "top"), (["--classes"], "requires an argument")])
def test_classify_mistakes(images, args, says):
    result = call("classify", images / "0.png", *args, code=2)
    assert says in result.stderr and not result.stdout


def test_no_image(images):
    assert "Images stand before the options" in call("classify", "--classes", "a", "b", code=2).stderr
    assert "None of 2 images can be read. " in call("rank", images / "broken.png", images / "empty.jpg", "--texts", "a", code=2).stderr
    assert "Usage" in call("rank", "--help").stdout


def test_rank(images, clip, tmp_path):
    (file := tmp_path / "texts.txt").write_text("\ufeffa bright square\n\n  a knee  \n", encoding="utf-8")
    texts = ["an image", "a dark, \"quiet\" square", "a bright square", "a knee"]
    result = call("rank", images / "0.png", images / "broken.png", "--texts", *texts[:2], "--texts-file", file, "--json")
    found = json.loads(result.stdout)
    assert len(found["skipped"]) == 1 and "1 of 2 images could not be read" in result.stderr
    cosines = (clip.encode_texts(texts) @ clip.encode_images([images / "0.png"])[0]).numpy()
    said = found["images"][0]["texts"]
    assert [s["text"] for s in said] == [texts[i] for i in (-cosines).argsort()] and [s["rank"] for s in said] == [1, 2, 3, 4]
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
    assert [line.split()[0] for line in call("packs", "--dataset", "kather").stdout.splitlines()] == ["name", "kather", "kather-ipclip", "kather-plip"]
    assert "An H&E image patch of mucus." in call("packs", "kather-plip").stdout
    assert "absent" in call("packs", "chexpert-chexzero").stdout


def test_start_is_light():
    import sys
    code = "import medclip_nb.ask_commands, medclip_nb.cli, sys; print(*{'torch', 'pandas', 'numpy', 'open_clip', 'yaml'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ANSI_FREE).stdout.split() == []
