"The tutorials: ten of them, each a page to learn from, executed, with nothing left to be filled in"
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from medclip_nb.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
TEN = sorted((ROOT / "nbs" / "tutorials").glob("[01]?_*.ipynb"))
LARGEST = 300_000  # Bytes of figures in a notebook
named = pytest.mark.parametrize("path", TEN, ids=lambda p: p.stem)


def cells(path: Path, kind: str) -> list[dict]:
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def prose(path: Path) -> list[str]: return ["".join(c["source"]) for c in cells(path, "markdown")]


def test_there_are_ten():
    assert [int(p.stem[:2]) for p in TEN] == list(range(1, 11))
    titles = [prose(p)[0].splitlines()[0] for p in TEN]
    assert len({*titles}) == 10 and all(re.fullmatch(r"# \S.{8,}", t) for t in titles)


@named
def test_it_opens_with_a_lead_a_question_and_its_time(path):
    head, first = prose(path)[:2]
    assert re.search(r"^> \S.{30,}$", head, re.M) and f"- order: {int(path.stem[:2])}" in head
    assert "**The question of this page:**" in first
    assert re.search(r"\bruns? in (under|about) (a|two) minutes?\b", " ".join(first.split())), "how long it runs"


@named
def test_it_ends_with_what_to_try_and_what_to_read(path):
    text = "\n".join(prose(path))
    tried, read = text.split("## Try this")[1].split("## Read next")
    assert len(re.findall(r"^- ", tried, re.M)) >= 3
    links = re.findall(r"\]\(([^)\s]+\.ipynb)[^)]*\)", read)
    assert len(links) >= 2 and [x for x in links if not (path.parent / x).is_file()] == []


@named
def test_it_was_executed_and_keeps_what_teaches(path):
    shown = [o for c in cells(path, "code") for o in c["outputs"]]
    assert shown and not [o for o in shown if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert any({"image/png", "image/svg+xml"} & o.get("data", {}).keys() for o in shown) or "processes" in path.stem
    drawn = [c for c in cells(path, "code") if any("image/png" in o.get("data", {}) for o in c["outputs"])]
    assert [c["source"] for c in drawn if not re.match(r"#\| fig-alt: \S.{20,}", c["source"][0])] == []
    pictures = ["".join(v) for o in shown for k, v in o.get("data", {}).items() if k.startswith("image/")]
    assert sum(map(len, pictures)) * 3 / 4 < LARGEST


@named
def test_it_shows_the_command_line_too(path, tmp_path, monkeypatch):
    "Its commands are parsed by the program itself; a model that they take from a suite is of a run in it"
    told = "\n".join(prose(path))
    commands = re.findall(r"^ *(medclip-nb (?:.*\\\n)*.*)", told, re.M)
    assert commands
    for suite, run in re.findall(r"--model reports/([\w-]+)/([\w-]+)/checkpoint", told):
        runs = yaml.safe_load((ROOT / "nbs" / "experiments" / "suites" / f"{suite}.yaml").read_text())["runs"]
        assert run in [x["name"] for x in runs]
        (tmp_path / "reports" / suite / run / "checkpoint").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for line in commands:
        words = shlex.split(line.replace("\\\n", " "), comments=True)[1:]
        command = get_command(app)
        while words and words[0] in getattr(command, "commands", {}): command = command.commands[words.pop(0)]
        command.make_context(command.name, words)  # Raises for an unknown option or argument


def test_the_first_four_explain_their_words():
    "Who never saw CLIP finds each term explained where it first stands in emphasis"
    text = "\n".join("\n".join(prose(p)) for p in TEN[:4])
    for term in ("embedding", "cosine", "prompt", "rank", "Zero-shot", "linear probe", "Balanced accuracy"):
        assert re.search(rf"\*{term}\*", text, re.I), term
