"The figures of a report: their size, and the files that are saved beside it"
import base64
import io
import json
import os
import re
import subprocess

import nbformat
import pytest
import yaml
from PIL import Image

PARAMETERS = 'out_dir: str = "out"'
BODY = """import json, pathlib
import matplotlib.pyplot as plt
import numpy as np
from medclip_nb.plots import use_style
use_style()
figure, ax = plt.subplots(figsize=(4, 2))
ax.plot([1, 3, 2])
figure, ax = plt.subplots(figsize=(3, 3))
ax.imshow(np.arange(256 * 256).reshape(256, 256))
figure, ax = plt.subplots(figsize=(4, 2))
figure.text(0.9, 1.2, "above the page")
text = {"schema": 1, "task": "stub", "metrics": {"value": {"value": 1.0}}, "details": {}}
_ = pathlib.Path(out_dir, "metrics.json").write_text(json.dumps(text))"""


def pictures(folder):
    "Sizes in dots, and what the report says of each picture"
    outputs = [o for cell in nbformat.read(folder / "report.ipynb", 4).cells for o in cell.get("outputs", [])]
    for o in outputs:
        if "image/png" in o.get("data", {}):
            picture = Image.open(io.BytesIO(base64.b64decode(o["data"]["image/png"])))
            yield picture.size, o["metadata"].get("image/png", {})


@pytest.fixture(scope="module")
def stub(make_template, tmp_path_factory):
    return make_template(tmp_path_factory.mktemp("stub") / "stub.ipynb", PARAMETERS, BODY)


def call(command, *words, folder, code=0):
    done = subprocess.run([command, *map(str, words)], cwd=folder, env=os.environ, capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stderr


def test_lines_are_sharp_and_images_small(command, stub, tmp_path):
    call(command, "run", stub, "--out", "one", folder=tmp_path)
    lines, image, beyond = pictures(tmp_path / "one")
    for (width, height), about in (lines, beyond):
        assert (about["width"], about["height"]) == (width // 2, height // 2)
    assert abs(lines[1]["width"] - 400) < 20 and beyond[1]["height"] > 220
    assert not image[1] and image[0][0] < 310
    assert f'width="{lines[1]["width"]}"' in (tmp_path / "one" / "report.html").read_text()
    assert not (tmp_path / "one" / "figures").exists()


def test_figures_are_saved_beside_the_report(command, stub, tmp_path):
    for name in ("one", "two"):
        call(command, "run", stub, "--out", name, "--figures", "svg,pdf", folder=tmp_path)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name / "figures").iterdir()} for name in ("one", "two"))
    assert one == two and sorted(one) == [f"figure-0{n}.{form}" for n in (1, 2, 3) for form in ("pdf", "svg")]
    assert b"above the page" in one["figure-03.svg"]
    page = (tmp_path / "one" / "report.html").read_text()
    assert re.findall(r'href="(figures/[^"]+)"', page) == [f"figures/figure-0{n}.svg" for n in (1, 2, 3)]
    record = json.loads((tmp_path / "one" / "run.json").read_text())
    assert "figures/figure-01.svg" in record["artefacts"]


def test_a_suite_saves_the_figures_of_its_runs(command, stub, tmp_path):
    runs = [{"name": name, "template": str(stub)} for name in ("one", "two")]
    (tmp_path / "many.yaml").write_text(yaml.safe_dump({"runs": runs}))
    call(command, "suite", "many.yaml", "--out", "reports", "--workers", 2, "--figures", "svg", folder=tmp_path)
    for name in ("one", "two"): assert len(list((tmp_path / "reports" / "many" / name / "figures").iterdir())) == 3


def test_an_unknown_format_is_refused(command, stub, tmp_path):
    said = call(command, "run", stub, "--out", "one", "--figures", "svgz", folder=tmp_path, code=2)
    assert "there is no format 'svgz'. Did you mean 'svg'" in said and not (tmp_path / "one").exists()
