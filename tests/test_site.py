"The documentation site: built once, read as HTML, and looked at in a headless browser where there is one"
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from typer.main import get_command

from medclip_nb.cli.main import app
from medclip_nb.datasets import make_miniature, make_squares
from medclip_nb.experiments import (
    check_names,
    check_parameters,
    load_suite,
    make_project,
    report_html,
    template_parameters,
    with_defaults,
)
from medclip_nb.metrics import (
    auroc,
    average_precision,
    calibration_metrics,
    classification_metrics,
    localize,
    retrieval_metrics,
)

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = min((ROOT / "nbs" / "tutorials").glob("*.ipynb")).stem[3:]
TYPES = ["index", "start", "howto", f"tutorials/{TUTORIAL}", "reference/index", "reference/api", "reference/commands",
         "reference/metrics/localization", "reference/plots/grids", "experiments/zero_shot", "results", "speed",
         "datasets/index", "datasets/kather", "prompts/chexpert-1", "coming_from/ipclip", "glossary", "search"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The folder of the site and what the build printed; CI builds it anew"
    out = tmp_path_factory.mktemp("site") / "site"
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "make_site.py"), str(out)], cwd=out.parent,
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    yield out, done.stdout + done.stderr
    shutil.rmtree(out.parent, ignore_errors=True)


class Links(HTMLParser):
    "Ids, links and images of a page"
    def __init__(self):
        super().__init__()
        self.ids, self.links, self.loads, self.images = set(), [], [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if given.get("id"): self.ids.add(given["id"])
        if given.get("name") and tag == "a": self.ids.add(given["name"])
        if tag == "a" and given.get("href"): self.links.append(given["href"])
        if tag == "img": self.images.append((given.get("src", ""), given.get("alt")))
        if tag in ("script", "img", "iframe", "source"): self.loads.append(given.get("src", ""))
        if tag == "link" and "stylesheet" in given.get("rel", ""): self.loads.append(given.get("href", ""))


@pytest.fixture(scope="module")
def parsed(built):
    "Every page of the site itself, read; reports have tests of their own, but must be there"
    found = {}
    for path in sorted(built[0].rglob("*.html")):
        reader = Links()
        text = path.read_text(encoding="utf-8")
        reader.feed(text if "reports" not in path.relative_to(built[0]).parts else "")
        found[path] = reader, text
    return found


def pages(parsed, site): return {p: v for p, v in parsed.items() if "reports" not in p.relative_to(site).parts}


def test_it_is_built_without_a_warning(built):
    assert re.search(r"index.html: \d+ pages in \d+ s", built[1]) and "WARNING" not in built[1]
    assert not (ROOT / "jupyter_execute").exists()


def test_home_shows_its_numbers_as_a_table(built):
    home = (built[0] / "index.html").read_text(encoding="utf-8")
    assert "<td><p>Which side? Linear probe, accuracy</p></td>" in home and "|---|" not in home


def test_every_notebook_card_and_pack_has_a_page(built):
    site = built[0]
    numbered = lambda p: re.sub(r"^\d+_", "", p.stem)
    expected = [f"{part}/{numbered(p)}" for part in ("tutorials", "coming_from")
                for p in (ROOT / "nbs" / part).glob("*.ipynb")]
    expected += [f"experiments/{p.stem}" for p in (ROOT / "nbs" / "experiments").glob("[a-z]*.ipynb")]
    expected += [f"datasets/{p.stem}" for p in (ROOT / "data" / "cards").glob("*.yaml")]
    expected += [f"prompts/{p.stem.replace('@', '-')}" for p in (ROOT / "data" / "prompts").glob("*.yaml")]
    for path in (ROOT / "medclip_nb").rglob("*.py"):
        name = path.relative_to(ROOT / "medclip_nb").with_suffix("").as_posix()
        if name in ("_modidx", "__init__", "cli/__main__"): continue
        expected.append("reference/" + name.replace("__init__", "index"))
    assert len(expected) > 200 and [name for name in expected if not (site / f"{name}.html").exists()] == []
    assert sorted(TYPES) == sorted(name for name in TYPES if (site / f"{name}.html").exists())


def test_no_link_is_dead(built, parsed):
    site, dead = built[0], []
    for path, (reader, _) in pages(parsed, site).items():
        for link in reader.links:
            at = urlparse(link)
            if at.scheme: continue
            target = path if not at.path else (path.parent / unquote(at.path)).resolve()
            if not target.is_file(): dead.append(f"{path.relative_to(site)}: {link}")
            elif at.fragment and target in parsed and "reports" not in target.relative_to(site).parts:
                if unquote(at.fragment) not in parsed[target][0].ids: dead.append(f"{path.relative_to(site)}: {link}")
    assert dead == []


def test_links_into_the_repository_lead_to_files(parsed, built):
    "What the site says of the repository is there, down to the line that defines a name"
    found = {link for reader, _ in pages(parsed, built[0]).values() for link in reader.links
             if re.search(r"medclip-nb/medclip_nb/(blob|tree)/main/", link)}
    assert len(found) > 1000
    for link in found:
        path, _, line = unquote(link.split("/main/", 1)[1]).partition("#L")
        assert (ROOT / path).exists(), link
        if line: assert int(line) <= (ROOT / path).read_text(encoding="utf-8").count("\n") + 1, link
    module = (ROOT / "medclip_nb" / "metrics" / "localization.py").read_text(encoding="utf-8").split("\n")
    page = parsed[built[0] / "reference" / "metrics" / "localization.html"][1]
    for name in ("localize", "pointing"):
        line = re.search(rf'id="medclip_nb\.metrics\.localization\.{name}".*?localization\.py#L(\d+)', page, re.S)[1]
        assert module[int(line) - 1].startswith(f"def {name}(")


def test_nothing_is_loaded_from_elsewhere(parsed, built):
    assert [(str(p), load) for p, (reader, _) in pages(parsed, built[0]).items() for load in reader.loads
            if re.match(r"(https?:)?//", load)] == []


def test_every_image_has_a_text(parsed, built):
    site = built[0]
    silent = [(str(p.relative_to(site)), src[:60]) for p, (reader, _) in pages(parsed, site).items()
              for src, alt in reader.images if not alt and not src.endswith("mark.svg")]
    assert silent == []
    reader = parsed[site / "reference" / "metrics" / "localization.html"][0]
    assert any("threshold" in (alt or "") for _, alt in reader.images)
    told = [alt for _, alt in parsed[site / "tutorials" / "attention_maps.html"][0].images if alt]
    assert "A slice with the outlines of its two findings" in told, "a cell's own text"
    assert [alt for reader, _ in pages(parsed, site).values() for _, alt in reader.images if alt and "<a " in alt] == []


def test_directives_are_not_shown(parsed, built):
    code = lambda text: re.sub(r"</?span[^>]*>", "", "".join(re.findall(r"<pre>.*?</pre>", text, re.S)))
    assert [str(p) for p, (_, text) in pages(parsed, built[0]).items()
            if "reference" in p.parts and re.search(r"^#\s*\|\s*(export|hide|default_exp)\b", code(text), re.M)] == []


def test_parameters_come_from_docments(parsed, built):
    page = parsed[built[0] / "reference" / "metrics" / "localization.html"][1]
    entry = re.search(r'id="medclip_nb\.metrics\.localization\.localize".*?</dd>', page, re.S)[0]
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", entry))
    for words in ("threshold", "float | None", "None", "Share of the maximum, from", "returns",
                  "One row per example: pointing, mass, mask_share, pixel_auroc, iou"): assert words in text, words
    assert "#medclip_nb.metrics.localization.choose_map_threshold" in entry
    command = parsed[built[0] / "reference" / "commands.html"][1]
    assert "medclip-nb data validate" in command and "Check files, texts, labels and splits" in command


def test_an_experiment_shows_its_parameters_and_a_report(parsed, built):
    page = parsed[built[0] / "experiments" / "zero_shot.html"]
    for name in template_parameters("zero_shot"): assert f">{name}</span>" in page[1], name
    assert any(link.endswith("/report.html") for link in page[0].links) and len(page[0].images) > 5


def test_every_public_name_has_a_place(parsed, built):
    "What a module defines and does not hide stands on its page, and the index leads there"
    missing, index = [], parsed[built[0] / "reference" / "api.html"][0].links
    listed = {link.partition("#")[2] for link in index}
    for path in sorted((ROOT / "medclip_nb").rglob("*.py")):
        name = path.relative_to(ROOT / "medclip_nb").with_suffix("").as_posix()
        page = built[0] / "reference" / f"{name.replace('__init__', 'index')}.html"
        if page not in parsed: continue
        module = "medclip_nb." + name.replace("/__init__", "").replace("/", ".")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"): continue
            at = f"{module}.{node.name}"
            if at not in parsed[page][0].ids or at not in listed: missing.append(at)
    assert missing == [] and len(listed) > 1000


def test_results_list_every_committed_report(parsed, built):
    page, listed = parsed[built[0] / "results.html"][1], 0
    for suite in sorted((ROOT / "reports").glob("*/suite.json")):
        if f"!/reports/{suite.parent.name}/" not in (ROOT / ".gitignore").read_text(): continue
        for run in json.loads(suite.read_text())["runs"]:
            at = f"reports/{suite.parent.name}/{run['name']}/report.html"
            if run["status"] != "done" or not (ROOT / at).exists(): continue
            assert at in page and (built[0] / at).exists()
            listed += 1
    assert listed > 10


def test_speed_shows_what_was_measured_or_how_to_measure(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from generated import curves, speed
    speed(tmp_path, tmp_path / "none.json")
    assert "`make bench` measures" in (tmp_path / "speed.md").read_text(encoding="utf-8")
    one = {"path": "a < b", "rival": "scikit-learn", "size": "n=7", "seconds": 2.0, "rival_seconds": 5.0, "ratio": 2.5,
           "low": 2.0, "high": 3.0, "goal": 3.0, "needs": "bf16", "bound_seconds": 1.0, "memory_mb": None}
    about = {"processor": "A_1 <CPU>", "cores": 2, "instructions": "AVX2", "bf16": False, "python": "3.11.1",
             "packages": {"torch": "2.0"}, "date": "2026-01-02"}
    (tmp_path / "found.json").write_text(json.dumps({"machine": about, "results": [one]}), encoding="utf-8")
    speed(tmp_path, tmp_path / "found.json")
    page = (tmp_path / "speed.md").read_text(encoding="utf-8")
    ratio = "2.50 (2.00\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}3.00)"
    row = ["a &lt; b", "n=7", "scikit-learn", "2", "5", ratio, "(3, needs bf16)", "50%", ""]
    assert "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" in page
    assert r"A\_1 \<CPU\> (2 cores, AVX2" in page and "no arithmetic in bfloat16" in page.replace("\n", " ")
    assert "How it grows" not in page and not (tmp_path / "speed.png").exists()
    sizes = [one | {"size": f"4 rows, {n} classes", "rival": rival, "seconds": n / 9, "rival_seconds": n * n / 9}
             for n in (30, 2, 9) for rival in ("scikit-learn", "warm")]
    (tmp_path / "found.json").write_text(json.dumps({"machine": about, "results": sizes}), encoding="utf-8")
    speed(tmp_path, tmp_path / "found.json")
    assert "a < b by classes](speed.png)" in (tmp_path / "speed.md").read_text(encoding="utf-8")
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    [((path, what), own)] = curves(sizes).items()
    assert (path, what, [r["n"] for r in own]) == ("a < b", "classes", [2, 2, 9, 9, 30, 30])


def test_a_dead_link_stops_the_build(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from notebooks import DeadLink, address, prose
    source = ROOT / "nbs" / "metrics" / "07_localization.ipynb"
    with pytest.raises(DeadLink, match="nbs/metrics/07_localization.ipynb: ../datasets/99_none.ipynb"):
        address("../datasets/99_none.ipynb", source, "reference/metrics/localization")
    assert address("../datasets/15_starter.ipynb", source, "x") == ("/reference/datasets/starter.ipynb", True)
    assert prose("see `localize_nothing` and `retrieval_metrics`", source, "x") == (
        "see `localize_nothing` and {py:obj}`retrieval_metrics <medclip_nb.metrics.retrieval.retrieval_metrics>`")
    code = "```sh\n[a](b.md) `retrieval_metrics`\n```"
    assert prose(code, source, "x") == code


# ---- what its own pages say

PAGES = sorted((ROOT / "docs" / "pages").glob("*.md"))
COMMANDS = [(path.stem, line) for path in PAGES
            for block in re.findall(r"```sh\n(.*?)```", path.read_text(encoding="utf-8"), re.S)
            for line in block.splitlines() if line.strip()]


def test_commands_of_the_pages_are_known():
    others = {line for _, line in COMMANDS if not line.startswith("medclip-nb")}
    known = {"make setup", "source .venv/bin/activate", "cd my_project"}
    assert others == known | {o for o in others if "-m medclip_nb.cli" in o}
    assert len(COMMANDS) > 40


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    "A folder with the data that the pages speak of"
    root = tmp_path_factory.mktemp("reader")
    rows = pd.DataFrame(make_squares(root / "my_data"))
    rows["items"] = [f"{caption} | a plain background" for caption in rows["caption"]]
    for name in ("labels", "captions", "items"): rows.to_csv(root / "my_data" / f"{name}.csv", index=False)
    other = {"image": "file", "label": "diagnosis", "group": "patient_id"}
    rows.rename(columns=other).to_csv(root / "my_data" / "export.csv", index=False)
    make_miniature("pub-brain-5", root / "my_data" / "pub_brain_5")
    for name in ("my_finetune", "my_items"): (root / "reports" / name / "checkpoint").mkdir(parents=True)
    make_project(root / "my_project", root / "my_data" / "captions.csv")
    (root / "data").mkdir()
    (root / "data" / "starter").symlink_to(ROOT / "data" / "starter")
    return root


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda x: x[:50])
def test_command(page, line, reader, monkeypatch):
    "Each command is parsed by the program itself, and the values of parameters are checked as before a run"
    words = shlex.split(line.split("-m medclip_nb.cli ")[-1].removeprefix("medclip-nb "))
    if "medclip" not in line: return
    monkeypatch.chdir(reader)
    command = get_command(app)
    while words and words[0] in getattr(command, "commands", {}): command = command.commands[words.pop(0)]
    given = command.make_context(command.name, list(words)).params  # Raises for an unknown option or argument
    if command.name == "run":
        values = {name: yaml.safe_load(value) for name, value in (p.split("=", 1) for p in given["param"])}
        template = given["template"]
        check_names(template, check_parameters(template, with_defaults(template, values, {})))
    suite = given.get("file") if command.name == "suite" else given.get("suite")
    if suite: load_suite(Path("my_project", suite) if suite == "suite.yaml" else suite)


def test_formulas_of_the_glossary():
    "Each formula, written out, gives the number that the library gives"
    rng = np.random.default_rng(0)
    text = (ROOT / "docs" / "pages" / "glossary.md").read_text(encoding="utf-8")
    n, names = 90, ["a", "b", "c"]
    y, p = rng.integers(0, 3, n), rng.dirichlet([1, 1, 1], n)
    found, predicted = classification_metrics([names[i] for i in y], p, names), p.argmax(1)
    have, called = (np.bincount(x, minlength=3) for x in (y, predicted))
    right = np.bincount(y[y == predicted], minlength=3)
    f1, by_chance = 2 * right / (have + called), (have * called).sum()
    expected = {
        "accuracy": right.sum() / n, "balanced_accuracy": (right / have).mean(), "f1_macro": f1.mean(),
        "f1_weighted": (have * f1).sum() / n, "kappa": (n * right.sum() - by_chance) / (n**2 - by_chance),
        "mcc": (n * right.sum() - by_chance) / np.sqrt((n**2 - (have**2).sum()) * (n**2 - (called**2).sum())),
        "mean_rank": (1 + (p > p[np.arange(n), y][:, None]).sum(1)).mean()}
    assert found == pytest.approx(found | expected)
    pos, s = rng.random(n) < 0.4, rng.integers(0, 12, n)
    pairs = s[pos][:, None] - s[~pos][None]
    assert auroc(pos, s) == pytest.approx(((pairs > 0) + (pairs == 0) / 2).mean())
    above = s[pos][:, None] <= s[None]
    assert average_precision(pos, s) == pytest.approx((above[:, pos].sum(1) / above.sum(1)).mean())
    told, confidence = calibration_metrics([names[i] for i in y], p, names), p.max(1)
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs(((predicted == y) - confidence)[bins == b].sum()) for b in range(15)]
    expected = {"ece": sum(gaps) / n, "brier": ((p - np.eye(3)[y])**2).sum(1).mean(),
                "nll": -np.log(p[np.arange(n), y]).mean()}
    assert told == pytest.approx(told | expected)
    two = calibration_metrics(list("ab") * 20, np.full((40, 2), 0.5), ["a", "b"])
    assert two["brier"] == pytest.approx(0.25)
    images, texts, ids = rng.normal(size=(30, 5)), rng.normal(size=(60, 5)), np.repeat(np.arange(30), 2)
    cosine = (images / np.linalg.norm(images, axis=1)[:, None]) @ (texts / np.linalg.norm(texts, axis=1)[:, None]).T
    ranks = np.sort(np.argsort(np.argsort(-cosine, 1), 1)[np.arange(30)[:, None], np.arange(60).reshape(30, 2)] + 1, 1)
    found = retrieval_metrics(images, texts, np.arange(30), ids, ks=(5,))
    expected = {"R@5": (ranks[:, 0] <= 5).mean(), "hit@5": (ranks[:, 0] <= 5).mean(),
                "recall@5": (ranks <= 5).sum(1).mean() / 2, "precision@5": (ranks <= 5).sum(1).mean() / 5,
                "MRR": (1 / ranks[:, 0]).mean(), "mAP": (np.array([1, 2]) / ranks).mean(),
                "mean_rank": ranks[:, 0].mean(), "median_rank": np.median(ranks[:, 0])}
    assert found == pytest.approx(found | {f"image_to_text_{k}": v for k, v in expected.items()})
    maps, masks = rng.random((4, 9, 9)), rng.random((4, 9, 9)) < 0.3
    table = localize(maps, masks, threshold=0.5)
    assert table["mass"].tolist() == pytest.approx([m[k].sum() / m.sum() for m, k in zip(maps, masks)])
    high = [m >= m.max() / 2 for m in maps]
    assert table["iou"].tolist() == pytest.approx([(h & k).sum() / (h | k).sum() for h, k in zip(high, masks)])
    named = ["accuracy", "balanced_accuracy", "f1_macro", "f1_weighted", "kappa", "mcc", "auroc", "average_precision",
             "mean_rank", "ece", "brier", "nll", "R@k", "hit@k", "recall@k", "precision@k", "MRR", "mAP", "median_rank",
             "COMPLETE@k", "pointing", "mass", "mask_share", "pixel_auroc", "iou"]
    assert [name for name in named if name not in text] == []


# ---- in a browser

@pytest.fixture
def tab(browser, built):
    "A page of the browser that notes complaints, and every request that leaves the disk"
    def opened(width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: heard.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: heard.append(str(e)))
        page.on("request", lambda r: heard.append(r.url) if re.match("(http|ws)s?:", r.url) else None)
        return page, lambda name: page.goto(f"file://{built[0]}/{name}")
    contexts, heard = [], []
    opened.heard = heard
    yield opened
    for context in contexts: context.close()


def test_no_page_type_complains_or_asks_the_network(tab):
    page, show = tab()
    for name in TYPES:
        show(f"{name}.html")
        assert page.locator("h1").count() >= 1 and tab.heard == [], (name, tab.heard)


def test_no_page_type_is_wider_than_a_phone(tab):
    page, show = tab(width=390)
    for name in TYPES:
        show(f"{name}.html")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, f"{name} is {width} px wide"
    show("results.html")
    box = page.evaluate("""() => { const t = [...document.querySelectorAll('table.sortable')].at(-1).parentElement;
                           return [t.clientWidth, t.scrollWidth, getComputedStyle(t).overflowX] }""")
    assert box[0] <= 390 < box[1] and box[2] == "auto"


def test_tables_of_a_comparison_fit_a_laptop_and_scroll_on_a_phone(browser):
    report = nbformat.read(ROOT / "reports" / "starter" / "compare" / "report.ipynb", 4)
    for width, fits in ((1200, True), (390, False)):
        page = browser.new_page(viewport={"width": width, "height": 844})
        page.set_content(report_html(report), wait_until="domcontentloaded")
        wide = page.evaluate("""() => [...document.querySelectorAll('.scroll')]
                                .filter(t => t.scrollWidth > t.clientWidth).length""")
        assert (wide == 0) == fits and page.evaluate("document.documentElement.scrollWidth") <= width
        page.close()


@pytest.mark.parametrize(("words", "target"), [
    ("retrieval_metrics", "reference/metrics/retrieval.html#medclip_nb.metrics.retrieval.retrieval_metrics"),
    ("pointing game", "reference/metrics/localization.html#pointing-game"),
    ("kather", "datasets/kather.html"),
])
def test_search_finds(tab, words, target):
    page, show = tab()
    show("search.html?q=" + words.replace(" ", "+"))
    done = "/finished|found/i.test(document.querySelector('#search-results .search-summary')?.innerText)"
    page.wait_for_function(done)
    links = page.eval_on_selector_all("#search-results a", "all => all.map(a => a.href)")
    assert any(target in link for link in links), links[:10]
    assert tab.heard == []


def test_tables_are_sorted_and_filtered(tab):
    page, show = tab()
    show("results.html")
    table = page.locator("table.sortable").last
    values = lambda: [float(t) for t in table.locator("tbody tr:not([hidden]) td:nth-child(4)").all_inner_texts() if t]
    table.locator("th button", has_text="Value").click()
    assert values() == sorted(values()) and len(values()) > 20
    table.locator("th button", has_text="Value").click()
    assert values() == sorted(values(), reverse=True)
    page.locator("input.table-filter").last.fill("zero-shot-trained auroc")
    rows = table.locator("tbody tr:not([hidden])").all_inner_texts()
    assert rows and all("zero-shot-trained" in row and "auroc" in row for row in rows)


def test_figures_are_legible_in_the_dark(tab):
    page, show = tab(scheme="dark")
    show("reference/metrics/localization.html")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    look = page.evaluate("""() => { const s = getComputedStyle(document.querySelector('.cell_output img'));
                            return [s.backgroundColor, s.filter] }""")
    assert look == ["rgb(255, 255, 255)", "none"]


def test_formulas_are_drawn(tab):
    page, show = tab()
    show("glossary.html")
    boxes = page.evaluate("[...document.querySelectorAll('.equation math')].map(m => m.getBoundingClientRect().height)")
    assert len(boxes) > 10 and min(boxes) > 15 and "$$" not in page.inner_text("article")
