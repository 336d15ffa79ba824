"Every way to train, on a small table of a user's own, through the installed command"
import json
import os
import subprocess

import numpy as np
import pandas as pd
import pytest
from PIL import Image


def run(command, table, out, code=0, **params):
    given = [x for k, v in {"dataset": "csv", "data_root": table, "device": "cpu", "epochs": 2, "batch_size": 16, "lr": 1e-3, "n_boot": 100, **params}.items() for x in ("-p", f"{k}={v}")]
    done = subprocess.run([command, "run", "finetune", *given, "--out", str(out)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    if code: return done.stdout + done.stderr
    return json.loads((out / "metrics.json").read_text()), (out / "report.html").read_text()


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "Bright or dark squares, on the left or on the right, of sixteen patients"
    folder, rng, rows = tmp_path_factory.mktemp("own data"), np.random.default_rng(0), []
    for i in range(64):
        bright, right = i // 2 % 2, i % 2
        pixels = rng.normal(80, 5, (64, 72))
        pixels[20:44, 36 * right + 6:36 * right + 30] += [-60, 120][bright]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
        rows.append({"image": f"{i:03d}.png", "shade": ["dark", "bright"][bright], "number": bright, "group": f"patient {i // 4}",
                     "caption": f"A {['dark', 'bright'][bright]} square on the {['left', 'right'][right]}"})
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    pd.DataFrame(rows).drop(columns="caption").to_csv(folder / "images.csv", index=False)
    return folder / "table.csv"


@pytest.mark.parametrize("params, metric, files", [
    ({"objective": "labels", "label": "shade", "wise": True, "ema": 0.5, "patience": 1}, "image_to_text_R@10", {"history.jsonl", "checkpoint"}),
    ({"mode": "lora", "towers": "[text]", "rank": 4, "alpha": 2}, "text_to_image_R@10", {"history.jsonl", "checkpoint"}),
    ({"mode": "locked-image", "objective": "siglip", "augment": False, "schedule": "linear"}, "image_to_text_R@1", {"history.jsonl", "checkpoint"}),
    ({"mode": "locked-text", "objective": "prompts", "label": "shade", "templates": "['a {} square']"}, "balanced_accuracy", {"history.jsonl", "checkpoint"}),
    ({"mode": "head", "label": "number", "hidden": 8}, "balanced_accuracy", {"head"}),
    ({"mode": "head", "label": "shade", "backbone": "trained", "max_steps": 3, "table": "images.csv"}, "balanced_accuracy", {"history.jsonl", "checkpoint", "head"})],
    ids=["full, labels, WiSE", "lora", "locked-image, siglip", "locked-text, prompts", "head", "head and tower"])
def test_modes(command, table, tmp_path, params, metric, files):
    found, page = run(command, table.with_name(params.pop("table", table.name)), tmp_path / "out", **params)
    assert np.isfinite(found["metrics"][metric]["value"]) and found["details"]["before"]
    assert files <= {p.name for p in (tmp_path / "out").iterdir()} and not (tmp_path / "out" / "state").exists()
    assert 0 <= found["details"]["trained_share"] <= 1
    if params.get("mode") == "lora":
        assert found["details"]["adapters"]["scale"] == 0.5 and "0.5" in page
        assert (tmp_path / "out" / "checkpoint" / "adapter_config.json").is_file()
    if params.get("wise"): assert 0 <= found["details"]["wise_alpha"] <= 1 and "best on validation" in page
    if params.get("mode") == "head": assert found["metrics"]["balanced_accuracy"]["value"] > 0.9


@pytest.mark.parametrize("params, message", [({"mode": "lorra"}, "Did you mean 'lora'"), ({"mode": "head"}, "needs a label column"),
                                             ({"objective": "siglipp"}, "Did you mean 'siglip'"), ({"mode": "lora"}, "has no layers for targets")])
def test_mistakes_are_one_message(command, table, tmp_path, params, message):
    assert message in run(command, table, tmp_path / "out", code=2, **params)
