"The tutorials: ten of them, each a page to learn from, executed, with nothing left to be filled in"
import json
import re
import shlex
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient
from typer.main import get_command

from medclip_nb.cli.main import app
from medclip_nb.datasets import FEW, allowed_bad
from medclip_nb.experiments import read_template, templates

ROOT = Path(__file__).resolve().parent.parent
TEN = sorted((ROOT / "nbs" / "tutorials").glob("[01]?_*.ipynb"))
LARGEST = 300_000  # Bytes of figures in a notebook
named = pytest.mark.parametrize("path", TEN, ids=lambda p: p.stem)
BOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
NUMBERS = dict(zip("one two three four five six seven eight nine ten eleven twelve sixteen twenty thirty forty fifty "
                   "sixty".split(), [*range(1, 13), 16, 20, 30, 40, 50, 60]))
# What a cell reads that is committed: reports, suites, packs and cards
READS = (r"[\"'](\.\./)?reports/starter|load_suite\([\"']|list_suites\(|suite\.(runs|published)|load_pack\(|\bcard\(|"
         r"card_names\(|list_datasets\(")


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
    silent = [c["source"] for c in cells(path, "code") if not c["outputs"]]
    assert [source for source in silent if any(line.startswith("print(") for line in source)] == []
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


@pytest.mark.parametrize(("number", "used", "explained"), [
    *((1, name, f"`{name}`") for name in ("mcc", "kappa", "auroc_macro", "f1_weighted", "average_precision_macro",
                                          "mean_rank")),
    (2, "loss", r"\*loss\*"), (2, "epochs?", r"\*epochs\*"), (2, "lr", r"\*learning rate\*"),
    (2, "AUROC", r"\*AUROC\*"),
    (3, "learning rates?", r"\*learning rate\*"), (3, "hidden layer", r"\*hidden layer\*"),
    (3, "calibrated", r"\*calibrated\*")])
def test_a_term_is_explained_where_it_is_met(number, used, explained):
    "The first cell that uses it, in words, code or an output, is or follows that which explains it"
    book = json.loads(TEN[number - 1].read_text(encoding="utf-8"))["cells"]
    lines = lambda c: "".join(c["source"]) + "".join(
        "".join(o.get("text", o.get("data", {}).get("text/plain", []))) for o in c.get("outputs", []))
    first = next(i for i, c in enumerate(book) if re.search(rf"(?<![\w/_]){used}(?!\w)", lines(c)))
    assert any(re.search(explained, lines(c)) for c in book[:first + 1] if c["cell_type"] == "markdown")


def test_the_first_leads_to_the_glossary(): assert "](../../docs/pages/glossary.md)" in "".join(prose(TEN[0]))


def test_it_tells_how_many_rows_a_run_leaves_out():
    told = " ".join(" ".join(prose(TEN[0])).split())
    share, few, part = re.search(r"(\d+) % of the rows \(its parameter `max_bad`\), and of a small table up to (\w+), "
                                 r"if these are at most (\d+) %", told).groups()
    defaults = {p["max_bad"].default for p in (read_template(t).parameters for t in templates()) if "max_bad" in p}
    assert defaults == {int(share) / 100} and FEW == NUMBERS[few]
    least = 100 * FEW // int(part)  # The smallest table that may lack so many
    assert [allowed_bad(n, *defaults) for n in (least - 1, least)] == [FEW - 1, FEW]


def test_plans_show_all_that_a_run_waits_for():
    "A comparison waits for the runs that it compares"
    found = []
    for path in TEN:
        tables = ["".join(o.get("data", {}).get("text/html", "")) for c in cells(path, "code") for o in c["outputs"]]
        found += [re.findall(r"<td>(.*?)</td>", row) for table in tables if "waits for" in table
                  for row in re.findall(r"<tr>(.*?)</tr>", table, re.S) if "<td>compare</td>" in row]
    assert len(found) == 2 and [row for row in found if row[-1] == "–"] == []



def reading(path: Path) -> list[dict]:
    "Cells with outputs that come from committed files alone"
    wanted = READS if path.parent.name == "tutorials" else READS.split("|")[0]
    read = lambda code: re.search(wanted, code) and not re.search(r"\bfolder\b|\bplt\.", code)
    return [c for c in cells(path, "code") if c["outputs"] and read("".join(c["source"]))]


def shown(outputs: list[dict]) -> list:
    "Outputs in one form: the text of a stream, or what is displayed by kind, without addresses in memory"
    plain = lambda text: re.sub(r" at 0x\w+>", ">", "".join(text).strip())
    kinds = lambda data: data.keys() - ({"text/plain"} if len(data) > 1 else set())  # Its lines depend on a terminal
    return [plain(o["text"]) if o["output_type"] == "stream" else {k: plain(o["data"][k]) for k in kinds(o["data"])}
            for o in outputs]


@pytest.mark.parametrize("path", [p for p in BOOKS if reading(p)], ids=lambda p: p.stem)
def test_what_it_reads_is_what_is_committed(path):
    "Cells that only read committed files are executed again, and give what is stored"
    stored = reading(path)
    lines = [line.strip("\n") for c in cells(path, "code") for line in c["source"]]
    imports = "\n".join(line for line in lines if re.match(r"import |from |plots\.use_style\(|pd\.set_option\(", line))
    place = path.parent if path.stem == "index" else ROOT
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in (
        imports, *("".join(c["source"]) for c in stored))])
    NotebookClient(book, timeout=120, resources={"metadata": {"path": str(place)}}).execute()
    for cell, again in zip(stored, book.cells[1:]): assert shown(again.outputs) == shown(cell["outputs"])


def test_what_is_read_again():
    tried = {path.stem: len(reading(path)) for path in BOOKS if reading(path)}
    assert tried.keys() >= {"index", "05_attention_maps", "06_studies", "09_reproduce_a_paper", "90_datasets"}, tried
    assert sum(tried.values()) > 9


def test_epochs_that_are_told_are_those_of_the_suites():
    "What is said of the committed reports, in one sentence, agrees with the suites that they come from"
    suites = [yaml.safe_load((ROOT / "nbs" / "experiments" / "suites" / f"{name}.yaml").read_text())["runs"]
              for name in ("starter", "starter-more")]
    epochs = {r.get("params", {}).get("epochs") for runs in suites for r in runs}
    told = {p: prose(p) for p in BOOKS} | {p: [p.read_text(encoding="utf-8")] for p in
                                           [*(ROOT / "docs" / "pages").glob("*.md"), ROOT / "README.md"]}
    wrong = []
    for path, texts in told.items():
        for sentence in re.split(r"(?<=[.?])\s|\n\n", "\n\n".join(texts)):
            if not re.search(r"starter|committed", sentence) or "medclip-nb" in sentence: continue
            found = re.findall(r"\b([a-z]+|\d+)\s+(?:epochs|on findings)\b", sentence)
            numbers = [int(n) if n.isdigit() else NUMBERS[n] for n in found if n.isdigit() or n in NUMBERS]
            wrong += [(path.stem, n) for n in numbers if n not in epochs]
    assert wrong == []
