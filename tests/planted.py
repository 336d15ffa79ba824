"Data, parameters and a suite with script planted in every text, for the tests of pages and of JupyterLab"
import numpy as np
import pandas as pd
import yaml
from PIL import Image

MARKS = (
    '<script>window.ran = "script"</script>',
    '<img src="x" onerror="window.ran = 1">',
    '</td></table></pre></style></title><svg onload="window.ran = 2"></svg>',
    '<a href="javascript:window.ran = 3" id="planted">here</a> [here](javascript:window.ran=3)',
    '"><iframe srcdoc="<script>parent.ran = 4</script>"></iframe>',
    "' onmouseover='window.ran = 5' x='",
    "$\\href{javascript:window.ran=6}{x}$ \\(\\unicode{x}\\) ${window.ran = 7}$ {{ window.ran }} {% raw %}",
    "&lt;script&gt;window.ran = 8&lt;/script&gt; \x1b]8;;javascript:window.ran=8\x07here\x1b]8;;\x07",
)


def plant(folder, n=24):
    "A table whose captions, items, labels, groups and file names are hostile; returns its path"
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for i in range(n):
        name = f"{i} {MARKS[i % len(MARKS)].replace('/', '').strip()[:60]}.png"
        bright = 150 * (i % 2)
        Image.fromarray((rng.integers(0, 100, (64, 64, 3)) + bright).astype("uint8")).save(folder / name)
        rows.append({
            "image": name, "caption": f"{MARKS[i % len(MARKS)]} {i}", "kind": MARKS[i % 2], "source": MARKS[3 + i % 2],
            "group": f"{MARKS[1]} {i}", "split": ("train", "valid", "test")[i % 3]})
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    return folder / "table.csv"


def plant_suite(folder):
    "A suite on such data, with planted prompts, notes and descriptions; returns its path"
    table = plant(folder / "data")
    suite = {
        "name": "planted", "title": MARKS[0], "description": " ".join(MARKS), "license": MARKS[1],
        "defaults": {"dataset": "csv", "data_root": str(table), "model": "starter"},
        "runs": [
            {"name": "audit", "template": "data_audit", "params": {"labels": ["kind", "source"]}},
            {"name": "zero-shot", "template": "zero_shot", "params": {
                "labels": ["kind"], "templates": [f"{MARKS[1]} {{}}"], "prompt_note": MARKS[2], "n_boot": 20}},
            {"name": "retrieval", "template": "retrieval", "params": {"n_boot": 20}},
            {"name": "compare", "template": "compare", "params": {"reports_dir": "{suite}", "n_boot": 20}}]}
    (folder / "planted.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    return folder / "planted.yaml"
