"""Where a model looks: maps on pixels against the real preprocessing, measures against brute force, the verb attend,
the template attention_maps"""
import json
import os
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist
from sklearn.metrics import jaccard_score, roc_auc_score
from typer.testing import CliRunner

from medclip_nb.cli import main as cli
from medclip_nb.core import InputError
from medclip_nb.datasets import load_manifest
from medclip_nb.evaluators import evaluate_grounding
from medclip_nb.metrics import choose_map_threshold, localize, overlaps, pointing, within
from medclip_nb.models import (
    TextConditionedPooling,
    item_maps,
    load_model,
    relevance_maps,
    save_checkpoint,
    shown_box,
    swap_towers,
    upsample_to_image,
)

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    clip = load_model("starter", device="cpu", precision="fp32")
    clip.model.visual_proj = TextConditionedPooling(clip.dim, heads=8)
    clip.config["model_cfg"]["pooling_cfg"] = {"heads": 8}
    return clip


@pytest.fixture(scope="module")
def folder(clip, tmp_path_factory):
    "Twelve patients with three pictures of different shape; two squares on most of them, with masks; and a model"
    root, rng, rows = tmp_path_factory.mktemp("marked pictures"), np.random.default_rng(0), []
    for name in ("images", "masks"): (root / name).mkdir()
    for i in range(36):
        height, width = rng.integers(70, 160, 2)
        pixels, mask = rng.normal(80, 4, (height, width)), np.zeros((height, width), np.uint8)
        items = ["A bright square.", "A dark square."][:[2, 1, 2, 0][i % 4]]
        for k, item in enumerate(items):
            y, x = rng.integers(0, [height - 24, width - 24])
            pixels[y:y + 20, x:x + 20] += 100 if "bright" in item else -60
            mask[y:y + 20, x:x + 20] = k + 1
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"images/{i}.png")
        if items: Image.fromarray(mask).save(root / f"masks/{i}.png")
        rows.append({"image": f"images/{i}.png", "mask": f"masks/{i}.png" if items else "",
                     "items": json.dumps(items or ["Nothing & <b>no</b> $x$."]), "group": f"patient {i // 3}",
                     "caption": " ".join(items) or "Nothing.", "split": ["train", "valid", "test"][i // 3 % 3],
                     "kind": ["a", "b"][i % 2]})
    pd.DataFrame(rows).to_csv(root / "table.csv", index=False)
    save_checkpoint(clip, root / "model")
    return root


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("sides", [(80, 80), (64, 96)])
def test_shown_box_against_the_transforms(clip, mode, sides):
    from open_clip.transform import image_transform
    rng = np.random.default_rng(0)
    class Other:
        config = {"preprocess_cfg": {"resize_mode": mode}}
        model = type("Model", (), {"visual": type("Visual", (), {"image_size": sides})})
    transform = image_transform(sides, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode,
                                interpolation="bilinear", fill_color=0)
    for height, width in [*rng.integers(30, 400, (10, 2)), (80, 80), (81, 80)]:
        ramps = [np.broadcast_to(v, (height, width))
                 for v in ((np.arange(height)[:, None] + 0.5) / height, (np.arange(width) + 0.5) / width)]
        images = [transform(Image.fromarray((250 * r).round().astype(np.uint8)).convert("RGB"))[0].numpy() * 255 / 250
                  for r in ramps]
        top, left, tall, wide = shown_box((height, width), Other)
        for axis, (image, start, extent, side,
                   n) in enumerate(zip(images, (top, left), (tall, wide), sides, (height, width))):
            place = (start + extent * (np.arange(side) + 0.5) / side) / n
            middle = image[:, sides[1] // 2] if axis == 0 else image[sides[0] // 2]
            there = (place > 0.05) & (place < 0.95)
            assert np.abs(middle - place)[there].max() < 1.2 / n + 0.01, (mode, sides, height, width, axis)


def test_item_maps_against_the_layer(clip):
    torch.manual_seed(1)
    images, texts = torch.rand(3, 3, 80, 80), ["a mass", "an infarct", "a mass", "nothing at all"]
    found = item_maps(clip, images, texts, "attention", of=[2, 0, 0, 1])
    _, tokens = clip.encode_image_tokens(images)
    for pair, (image, text) in enumerate(zip((2, 0, 0, 1), texts)):
        with torch.no_grad(): raw = clip.forward_texts(clip.tokenize([text]))
        p = clip.pooling
        out, weights = p.attn(p.ln_q(raw)[None], p.ln_k(tokens[image])[None], p.ln_v(tokens[image])[None],
                              average_attn_weights=True)
        torch.testing.assert_close(found.maps[pair].flatten(), weights[0, 0, :-1], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(found.zero_mass[pair], weights[0, 0, -1], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(found.similarity[pair], torch.cosine_similarity(out[0, 0], raw[0], dim=0), atol=1e-5,
                                   rtol=1e-4)


def test_a_map_of_zeros_finds_nothing():
    "Neither above any share of its maximum, nor where a threshold is chosen; and a mask says yes or no everywhere"
    masks = np.zeros((2, 4, 4))
    masks[:, :2] = 1
    maps = np.stack([np.zeros((4, 4)), masks[0]])
    assert localize(maps, masks, threshold=0.5)["iou"].tolist() == [0, 1]
    assert overlaps(maps, masks, [0.05, 0.95]).tolist() == [[0, 0], [1, 1]]
    masks[0, 3, 3] = np.nan
    for ask in (lambda: localize(maps, masks), lambda: within(masks, 1)):
        with pytest.raises(InputError, match="A mask has values that are not numbers"): ask()


@pytest.mark.parametrize("seed", range(6))
def test_measures_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    shape = [(9, 11), (4, 5, 6), (2, 3, 4, 5)][seed % 3]
    maps, masks = rng.integers(0, 7, (5, *shape)).astype(float), rng.random((5, *shape)) < 0.25
    maps[rng.random(maps.shape) < [0, 0.2][seed % 2]] = np.nan
    masks[4] = False
    rows, tolerance = localize(maps, masks, threshold=0.55), 1.5
    for i, (m, k) in enumerate(zip(maps[:4], masks[:4])):
        seen = ~np.isnan(m)
        top = np.argwhere(m == np.nanmax(m))
        assert rows["pointing"][i] == pytest.approx(np.mean([k[tuple(at)] for at in top]))
        assert pointing(maps, masks,
                        tolerance)[i] == pytest.approx(np.mean(cdist(top, np.argwhere(k)).min(1) <= tolerance))
        assert (rows["mass"][i] == pytest.approx(m[k & seen].sum() / m[seen].sum())
                and rows["mask_share"][i] == pytest.approx(k[seen].mean()))
        assert rows["pixel_auroc"][i] == pytest.approx(roc_auc_score(k[seen], m[seen]))
        found = np.where(seen, m, -1) >= 0.55 * np.nanmax(m)
        assert rows["iou"][i] == pytest.approx(jaccard_score(k.ravel(), found.ravel()))
    assert rows.loc[4].isna().all() and np.isnan(overlaps(maps, masks, [0.3, 0.6])[4]).all()
    assert choose_map_threshold(maps, masks, [0.3, 0.6]) == [0.3,
                                                             0.6][int(np.nanmean(
                                                                 overlaps(maps, masks, [0.3, 0.6]), 0).argmax())]


def test_tolerance_knows_the_spacing():
    mask = np.zeros((1, 5, 9, 9), bool)
    mask[0, 2, 4, 4] = True
    wide = within(mask, 4, (4, 2, 1))
    for at in np.ndindex(5, 9, 9):
        assert wide[(0, *at)] == (np.linalg.norm((np.array(at) - (2, 4, 4)) * (4, 2, 1)) <= 4)


@pytest.mark.parametrize("method", ["attention", "relevance", "similarity"])
def test_ground_against_a_loop(clip, folder, method):
    rows = load_manifest("csv", folder / "table.csv").part("test")
    result = evaluate_grounding(clip, rows, method, tolerance=5, n_boot=20, batch_size=4)
    told = result.predictions.set_index(["row", "item"])
    expected = [(row, k) for row, mask in rows["mask"].items() if isinstance(mask, str) and mask
                for k in range(2) if (np.asarray(Image.open(folder / mask)) == k + 1).any()]
    assert list(told.index) == expected and len(expected) > 10
    for (row, k), found in told.iterrows():
        image, mask = Image.open(folder / rows.loc[row, "image"]).convert("RGB"), np.asarray(
            Image.open(folder / rows.loc[row, "mask"])) == k + 1
        shown = upsample_to_image(item_maps(clip, [image], [found["text"]], method).maps, image.size[::-1], clip)[0]
        assert found["text"] == rows.loc[row, "items"][k]
        assert found["mass"] == pytest.approx(np.nansum(shown * mask) / np.nansum(shown), rel=1e-3, abs=1e-6)
        assert found["mask_share"] == pytest.approx(mask[np.isfinite(shown)].mean())
        assert found["diameter"] == pytest.approx(2 * np.sqrt(mask.sum() / np.pi))
    assert result.details["without_mask"]["rows"] == (rows["mask"].fillna("") == "").sum()
    assert result.value("mass") == pytest.approx(told["mass"].mean())


def call(*args, code=0):
    result = CliRunner().invoke(cli.app, ["attend", *map(str, args)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def test_attend_through_the_installed_command(command, folder, tmp_path):
    texts = ["A bright square.",
             "$5 & a dark square, with a description so long that it has to be broken into several lines of the title"]
    done = subprocess.run([command, "attend", folder / "images/0.png", "--texts", *texts, "--model", folder / "model",
                           "--mask", folder / "masks/0.png", "--out", tmp_path / "look.png"],
                          capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    header, *lines = done.stdout.splitlines()
    assert header.split() == ["text", "similarity", "on", "nothing", "peak", "(px)", "inside"] and len(lines) == 2
    assert "not for clinical use" in done.stderr and "attention: " in done.stderr
    assert min(Image.open(tmp_path / "look.png").size) > 400


def test_attend_many_images(folder, tmp_path):
    (broken := tmp_path / "broken.png").write_bytes(b"not an image")
    done = call(folder / "images/0.png", broken, folder / "images/1.png", "--texts", "a", "b", "c", "--model",
                folder / "model", "--method", "similarity", "--out", tmp_path / "look.png", "--json")
    found = json.loads(done.stdout)
    assert (len(found["images"]) == 6 and [one["image"] for one in found["skipped"]] == [str(broken)]
            and "1 of" in done.stderr)
    assert (sorted(p.name for p in tmp_path.glob("look*")) == ["look-1.png", "look-3.png"]
            and all(one["on_nothing"] is None for one in found["images"]))
    (texts := tmp_path / "texts.txt").write_text("one\n\ntwo\n")
    assert len(json.loads(call(folder / "images/2.png", "--texts-file", texts, "--model", folder / "model", "--out",
                               tmp_path / "a.pdf", "--json").stdout)["images"]) == 2
    assert (tmp_path / "a.pdf").read_bytes()[:4] == b"%PDF"


@pytest.mark.parametrize("args, says", [
    (["images/0.png"], "There is no text"),
    (["images/0.png", "--texts", "a", "--method", "atention"], "Did you mean 'attention'"),
    (["images/0.png", "--texts", "a", "--out", "a.jpg"], ".png, .pdf or .svg"),
    (["--texts", "a"], "No image is given"), (["nowhere.png", "--texts", "a"], "nowhere.png: no such file"),
    (["images/0.png", "--texts", "a", "--mask", "masks/0.png"], "a value of 2 in the mask"),
    (["images/0.png", "--texts", "a", "b", "--mask", "masks/1.png"], "A mask has one number per pixel of its image"),
    (["images/0.png", "images/1.png", "--texts", "a", "--mask", "masks/0.png"], "--mask is of one image"),
    (["images/0.png", "--texts", "a", "--model", "starter", "--method", "attention"],
     "has no text-conditioned pooling")])
def test_attend_mistakes(folder, monkeypatch, args, says):
    monkeypatch.chdir(folder)
    done = call(*args, *([] if "--model" in args else ["--model", "model"]), code=2)
    assert says in done.stderr.replace("\n", " ")
    assert not list(folder.glob("attend*"))


def command_line(command, *args, code=0):
    done = subprocess.run([command, *map(str, args)], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


SETTINGS = ["-p", "dataset=csv", "-p", "device=cpu", "-p", "n_boot=20", "-p", "n_examples=2"]


def test_template_with_masks(command, folder, tmp_path):
    own = ["-p", f"data_root={folder / 'table.csv'}", "-p", f"model={folder / 'model'}", "-p", "tolerance=5", "-p",
           'subgroups=["kind"]']
    for name in "ab": command_line(command, "run", "attention_maps", *SETTINGS, *own, "--out", tmp_path / name)
    for name in ("report.ipynb", "metrics.json", "predictions.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    found = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert {f"{m}_{name}" for m in ("attention", "relevance", "similarity")
            for name in ("pointing", "pointing_within", "mass", "pixel_auroc", "iou")} <= set(found["metrics"])
    assert ("attention_zero_mass" in found["metrics"]
            and found["details"]["headline"] == ["attention_pointing", "attention_pointing_within"])
    assert (found["details"]["without_mask"]["rows"] == 3
            and found["details"]["methods"]["attention"]["cut"]["split"] == ["valid"])
    report = (tmp_path / "a" / "report.html").read_text()
    assert "3 images without a mask" in report and "<b>no</b>" not in report


def test_template_without_masks(command, folder, tmp_path):
    pd.read_csv(folder / "table.csv").drop(columns="mask").to_csv(folder / "bare.csv", index=False)
    command_line(command, "run", "attention_maps", *SETTINGS, "-p", f"data_root={folder / 'bare.csv'}", "-p",
                 "model=starter", "-p", 'texts=["a bright square", "nothing"]', "--out", tmp_path / "run")
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (set(found["metrics"]) == {"relevance_similarity", "similarity_similarity"}
            and found["details"]["masks"] is False)
    assert "nothing is measured" in (tmp_path / "run" / "report.html").read_text()


def test_template_mistakes(command, folder, tmp_path):
    said = command_line(command, "run", "attention_maps", *SETTINGS, "-p", f"data_root={folder / 'table.csv'}", "-p",
                        "model=starter", "-p", 'methods=["attention"]', "--out", tmp_path / "run", code=2)
    assert "has no text-conditioned pooling" in said and not (tmp_path / "run").exists()


def test_a_swin_transformer_keeps_its_channels_last(tmp_path):
    "Tokens and relevance of a tower (n, rows, columns, c) against its layers, one position at a time"
    vision = {"timm_model_name": "swin_tiny_patch4_window7_224", "timm_model_pretrained": False, "timm_pool": "",
              "timm_proj": "linear", "image_size": 224}
    torch.manual_seed(0)
    swin = swap_towers(vision, "scratch", 32, device="cpu", precision="fp32")
    images, visual = torch.randn(2, 3, 224, 224), swin.model.visual
    with torch.no_grad(): grid = visual.trunk.forward_features(images)
    assert grid.shape == (2, 7, 7, 768)
    found = swin.encode_image_tokens(images)[1]
    with torch.no_grad():
        for row, column in ((0, 6), (3, 2)):
            assert torch.allclose(found[:, 7 * row + column], visual.head(grid[:, row, column]), atol=1e-5)
    texts = ["a lesion", "no lesion"]
    maps = relevance_maps(swin, images, texts)
    for map_, cells, text in zip(maps, grid, swin.encode_texts(texts)):
        cells = cells.clone().requires_grad_()
        feature = visual.head(cells.mean((0, 1))[None])[0]
        slope, = torch.autograd.grad(torch.cosine_similarity(feature, text, 0), cells)
        expected = [[max(0, float(slope[i, j] @ cells[i, j].detach())) for j in range(7)] for i in range(7)]
        assert map_.max() > 0 and torch.allclose(map_, torch.tensor(expected), atol=1e-6)
