"The prose of the notebooks: lines that fit, links that lead somewhere, and plain words"
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PAGES = [*NOTEBOOKS, *ROOT.glob("*.md"), *(ROOT / "docs" / "pages").glob("*.md"), ROOT / "data" / "README.md"]
DIALECT = (r"held against", r"hangs? on", r"that there is not", r"(not|cannot) be told from",
           r"\brows? a (metric|class|label)\b",
           r"\ba training (run )?(is|was|that|which) (asked|told|judged)", r"what was said")
named = lambda path: path.relative_to(ROOT).as_posix()


def texts(path: Path) -> list[str]:
    "The pieces of prose of a page: markdown cells, or a whole file of markdown"
    if path.suffix == ".md": return [path.read_text(encoding="utf-8")]
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]


def prose_lines(text: str) -> list[str]:
    "Lines that can be wrapped: no tables, headings, descriptions, code, formulas or links"
    outside = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return [line for line in outside.splitlines() if not re.match(r"\s*(\||#|>|!\[|<|\$\$)", line) and "](" not in line]


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_lines_fit(path):
    assert [line for text in texts(path) for line in prose_lines(text) if len(line) > 120 and " " in line.strip()] == []


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_lead_somewhere(path):
    found = [m for text in texts(path) for m in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text))]
    inside = [m.partition("#")[0] for m in found if not re.match(r"[a-z][a-z+.-]*:|#", m)]
    assert [m for m in inside if not (path.parent / m).exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_words_are_plain(path):
    text = " ".join(" ".join(texts(path)).split())
    assert [m[0] for pattern in DIALECT if (m := re.search(pattern, text, re.I))] == []


def code_blocks(text: str) -> list[str]:
    "Fenced blocks, and lines that are indented as such"
    return [*re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.M | re.S), *re.findall(r"(?:^ {4}.*\n?)+", text, re.M)]


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_commands_go_on_after_one_backslash(path):
    assert [line for text in texts(path) for block in code_blocks(text) for line in block.splitlines()
            if line.endswith("\\\\")] == []


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_nothing_is_installed_from_where_it_is_not(path):
    "Before the first release no package index has the library"
    assert re.findall(r"pip install\s+\S?medclip_nb\S*", "\n".join(texts(path))) == []


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_checkpoints_of_reports_come_from_somewhere(path):
    "Git ignores them: a page that uses one has made it by a command before, or says in the same cell what makes it"
    whole = "\n".join(texts(path))
    missing = [m for text in texts(path) for m in re.findall(r"(reports/[\w/-]+)/checkpoint", text)
               if "make reports" not in text and f"--out {m}" not in whole and f"`{m}" not in whole]
    assert missing == []


def test_data_sets_are_counted_from_their_cards():
    cards = [yaml.safe_load(p.read_text(encoding="utf-8")) for p in (ROOT / "data" / "cards").glob("*.yaml")]
    own = [card["name"] for card in cards if card["license"].startswith("the user's own")]
    counts = {"public": len(cards) - len(own) - 1, "own": len(own)}  # `starter` is made here
    words = {20: "twenty", 22: "twenty-two", 23: "twenty-three", 10: "ten", 11: "eleven"}
    pages = ["README.md", "CHANGELOG.md", "nbs/index.ipynb"]
    told = {name: " ".join(" ".join(texts(ROOT / name)).split()).lower() for name in pages}
    for name, text in told.items():
        assert re.findall(r"\[?([\w-]+) public data sets\b", text) == [words[counts["public"]]], name
        assert re.findall(r"\byour own(?: data)? in ([\w-]+) layouts\b", text) == [words[counts["own"]]], name
