"""Every command of the README, as it stands there, on a reader's own data; weights from the network give way to the
starter model"""
import re
import shlex
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from medclip_nb.datasets import make_squares

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
LINES = [line.split("   #")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S)
         for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("medclip-nb")]


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
    return root


def test_what_is_tried():
    assert [line for line in LINES
            if not line.startswith("medclip-nb")] == ["make reports", "make test", "source .venv/bin/activate"]
    inline = set(re.findall(r"`medclip-nb ([a-z]+)", README))
    assert inline <= {shlex.split(c)[1] for c in COMMANDS} | {"params", "packs", "suite", "doctor", "slurm"}


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: "-".join(shlex.split(line)[1:3]))
def test_command(command, folder, line):
    # Convolutions are no CLIPModel; test_exports has one
    instead = line.replace("ViT-B-32/openai", "starter").replace("--to huggingface", "--to open_clip")
    words = [command, *shlex.split(instead)[1:]]
    if "mode=lora" in words: words += ["-p", 'towers=["text"]'] # The starter's image tower has no attention to adapt
    if {"finetune", "itemized"} & set(words): words += ["-p", "epochs=1", "-p", "batch_size=12"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in re.findall(r"(?:--out|-o) (\S+)", line): assert (folder / name).exists(), name


@pytest.mark.parametrize("words", [["params", "linear_probe"], ["packs"], ["suite", "starter", "--dry-run"]],
                         ids=lambda words: words[0])
def test_command_in_a_sentence(command, folder, words):
    done = subprocess.run([command, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr
