"""Every command of the README and of the how-to page, on a reader's own data; weights from the network give way to the
starter model. The demo is executed by test_start.py, on fewer patients"""
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from medclip_nb.datasets import make_squares

ROOT = Path(__file__).resolve().parent.parent


def lines_of(page):
    "The lines of the blocks for a shell, without what is said of them"
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    return [line.split("   #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def chosen(lines):
    "The commands, each template once, and once with a file of splits: test_site.py checks parameters of all of them"
    seen, found = [], []
    for words, line in ((shlex.split(line), line) for line in lines):
        if words[0] != "medclip-nb" or words[1:] == ["demo"]: continue
        kind = words[2:3], "splits:" in line
        if words[1] == "run" and kind in seen: continue
        if words[1] == "run": seen.append(kind)
        found.append(line)
    return found


README, HOWTO = lines_of("README.md"), lines_of("docs/pages/howto.md")
COMMANDS = [*chosen(README), *(line for line in chosen(HOWTO) if line not in README)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder with the data that the README speaks of"
    root = tmp_path_factory.mktemp("reader")
    (data := root / "my_data" / "images").mkdir(parents=True)
    rows = pd.DataFrame(make_squares(data)).drop(columns="split")
    (data / "table.csv").unlink()
    (data / "0.png").rename(data / "000.png")
    rows["image"] = ["images/000.png" if name == "0.png" else f"images/{name}" for name in rows["image"]]
    rows.drop(columns="caption").to_csv(root / "my_data" / "labels.csv", index=False)
    rows.drop(columns="label").to_csv(root / "my_data" / "captions.csv", index=False)
    items = [f"{caption} | a plain background" for caption in rows["caption"]]
    rows.drop(columns=["label", "caption"]).assign(items=items).to_csv(root / "my_data" / "items.csv", index=False)
    other = {"image": "file", "label": "diagnosis", "group": "patient_id"}
    rows.drop(columns="caption").rename(columns=other).to_csv(root / "my_data" / "export.csv", index=False)
    for row in rows.itertuples():
        (root / "my_data" / "tiles" / row.label).mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "my_data" / row.image, root / "my_data" / "tiles" / row.label)
    return root


def test_what_is_tried():
    others = ["make reports", "make test", "source .venv/bin/activate", "medclip-nb demo", "cd my_project"]
    assert [line for line in README if line not in COMMANDS] == others
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    inline = set(re.findall(r"`medclip-nb ([a-z]+)", text))
    assert inline <= {shlex.split(c)[1] for c in COMMANDS} | {"demo"}
    tried = {shlex.split(c)[2] for c in COMMANDS if shlex.split(c)[1] == "run"}
    assert {"data_audit", "zero_shot", "linear_probe", "few_shot", "robustness", "retrieval", "finetune", "itemized",
            "attention_maps", "evaluate", "compare"} <= tried


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: "-".join(shlex.split(line)[1:3]))
def test_command(command, folder, line):
    # Convolutions are no CLIPModel; test_exports has one
    instead = line.replace("ViT-B-32/openai", "starter").replace("--to huggingface", "--to open_clip")
    words = [command, *shlex.split(instead)[1:]]
    if {"finetune", "itemized"} & set(words): words += ["-p", "epochs=1", "-p", "batch_size=12"]
    inside = folder / "my_project" if "suite.yaml" in words else folder
    if "suite.yaml" in words: # `cd my_project` stands before it; without a network it begins with the starter model
        text = (inside / "suite.yaml").read_text().replace("ViT-B-32/openai", "starter")
        (inside / "suite.yaml").write_text(text.replace("epochs: 10", "epochs: 1"))
    if line.startswith("medclip-nb init") and (folder / "my_project").exists(): words[2] = "another_project"
    done = subprocess.run(words, cwd=inside, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in re.findall(r"(?:--out|-o) (\S+)", line): assert (folder / name).exists(), name


def test_the_suite_of_the_project(folder):
    "What the commands of the README have left: reports of the small scale, and of all of it"
    assert {p.name for p in (folder / "my_project" / "reports").iterdir() if p.name[0] != "."} == {
        "my_project", "my_project-tiny"}


@pytest.mark.parametrize("words", [["params", "linear_probe"], ["packs"], ["suite", "starter", "--dry-run"]],
                         ids=lambda words: words[0])
def test_command_in_a_sentence(command, folder, words):
    done = subprocess.run([command, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr
