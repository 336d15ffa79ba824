"""Pages that no notebook is: home, overviews, templates with an example, results, data sets, prompt packs, commands"""
import json
import re
import runpy
import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from library import ROOT, Module, cells, directives, modules, symbols
from notebooks import (
    NBS,
    Page,
    cell_text,
    code_text,
    escape,
    front,
    images_of,
    pages,
    prose,
    repository,
    templates,
)

SHORT = {"start": "Start", "tutorials/index": "Tutorials", "howto": "How-to", "reference/index": "Reference",
         "experiments/index": "Experiments", "results": "Results", "datasets/index": "Datasets",
         "coming_from/index": "Coming from …", "scaling": "Scaling", "speed": "Speed",
         "glossary": "Glossary of metrics", "faq": "FAQ",
         "changelog": "Changelog", "cite": "Cite", "contributing": "Contributing"}
CARDS = [("start", "Start in five minutes", "Install, run one experiment on the embedded data, read its report."),
         ("tutorials/index", "Tutorials", "Step by step, executed, small enough for a laptop."),
         ("howto", "How-to", "A question, the command that answers it."),
         ("experiments/index", "Experiments", "Each template: what it asks, its parameters, a whole example."),
         ("results", "Results", "The committed reports and every headline number, with intervals."),
         ("datasets/index", "Datasets", "How to get them, their licence, their layout, their problems."),
         ("reference/index", "Reference", "The library: prose, examples, every function and parameter."),
         ("coming_from/index", "Coming from …", "Commands of five public systems beside ours."),
         ("scaling", "Scaling", "Several processes, Slurm, Dask, GPUs."),
         ("speed", "Speed", "Measured ratios to what one would use instead.")]


def write(out: Path, page: str, text: str) -> None:
    path = out / f"{page}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.rstrip() + "\n", encoding="utf-8")


def toctree(entries: Iterable[str], hidden: bool = True) -> str:
    options = ":hidden:\n" if hidden else ""
    return "```{toctree}\n" + options + "\n".join(entries) + "\n```"


def grid(cards: Iterable[tuple[str, str, str]], columns: str = "1 2 2 3") -> str:
    "Cards of (page, title, text)"
    card = ":::{{grid-item-card}} {1}\n:link: /{0}\n:link-type: doc\n\n{2}\n:::"
    return f"::::{{grid}} {columns}\n:gutter: 3\n\n" + "\n\n".join(card.format(*c) for c in cards) + "\n::::"


def button(page: str, text: str, look: str) -> str:
    options = "\n".join(filter(None, [":ref-type: doc", ":color: primary", look]))
    return f"```{{button-ref}} /{page}\n{options}\n\n{text}\n```"


def table(head: list[str], rows: list[list[str]], options: str = "") -> str:
    line = lambda row: "| " + " | ".join(row) + " |"
    return "\n".join([*([options] if options else []), line(head), line(["---"] * len(head)), *map(line, rows)])


def sortable(head: list[str], rows: list[list[str]], label: str) -> str:
    "A table in HTML whose columns can be sorted and whose rows can be filtered"
    cell = lambda text: f"<td>{text}</td>"
    body = "".join("<tr>" + "".join(map(cell, row)) + "</tr>\n" for row in rows)
    return ('<div class="pst-scrollable-table-container"><table class="table sortable" '
            f'aria-label="{escape(label)}"><thead><tr>' + "".join(f"<th>{h}</th>" for h in head)
            + f"</tr></thead><tbody>\n{body}</tbody></table></div>")


def told_in_html(text: str) -> str:
    "A line of markdown with code and nothing else in it, as HTML"
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def notebook_front(path: Path) -> tuple[str, str]:
    "Title and description of a notebook; a template's description is its first sentence"
    first = next(c.source for c in cells(path) if c.cell_type == "markdown")
    title, said, rest = front(first)
    return title, said or " ".join(re.split(r"(?<=[.?])\s", " ".join(rest.split()))[:1])


# ---- home, overviews

def home(out: Path) -> None:
    source = NBS / "index.ipynb"
    book = [c for c in cells(source) if c.cell_type != "raw"]
    title, said, rest = front(book[0].source)
    hero = f"""# {title}

:::::{{div}} hero-band
<p class="title" aria-hidden="true">{title}</p>

{{.hero}}
{said}.

::::{{div}} hero-buttons
{button("start", "Start in five minutes", "")}
{button("results", "See the results", ":outline:")}
::::
:::::

{grid(CARDS)}
"""
    home = Page(source, "index")
    home.markdown(hero)
    home.markdown(images_of(home.told(rest), source, out, "index"))
    for cell in book[1:]:
        if cell.cell_type == "markdown": home.markdown(images_of(home.told(cell.source), source, out, "index"))
        else:
            found, code = directives(cell.source)
            if found.get("echo") == "false":
                told = ["".join(output["data"]["text/markdown"]) for output in cell.outputs]
                for text in told: home.markdown(home.told(text), prose=False)
            elif "hide" not in found: home.code(code, cell.outputs, ["hide-input"])
    home.markdown(toctree(f"{name} <{page}>" for page, name in SHORT.items()))
    home.write(out)


APPENDICES = ("tutorials/datasets",)  # Pages that are listed below the others


def overviews(out: Path) -> None:
    for part, title, said in [
        ("tutorials", "Tutorials", "Ten notebooks to read here or to run in JupyterLab (`make lab`), each in under two "
         "minutes on two cores. The first four assume no knowledge of CLIP and are best read in order; the others "
         "stand by themselves."),
        ("coming_from", "Coming from five systems", "What these public systems do works here, on their data as "
         "downloaded. Each page has their commands and options beside ours and says which numbers will differ, and "
         "why."),
    ]:
        found = [(f"{part}/{p.stem[3:]}", *notebook_front(p)) for p in sorted((NBS / part).glob("*.ipynb"))]
        listed = [(page, name, prose(words, NBS / part / "x", f"{part}/index")) for page, name, words in found]
        main = [card for card in listed if card[0] not in APPENDICES]
        more = "".join(f"- [{name}](/{page}): {words}\n" for page, name, words in listed if page in APPENDICES)
        write(out, f"{part}/index", f"# {title}\n\n{said}\n\n{grid(main, '1 1 2 2')}\n\n{more}\n"
              + toctree(f"/{page}" for page, *_ in found))


def wings() -> dict[str, list[Module]]:
    "Wing to its modules, its face first; in the order in which they build on each other"
    order = ["core", "distributed", "images", "datasets", "models", "losses", "metrics", "embeddings", "evaluators",
             "trainers", "plots", "experiments", "explorers", "cli", "pooling", "volumes"]
    found = {}
    for module in modules(): found.setdefault(module.wing, []).append(module)
    return {w: found[w] for w in sorted(found, key=lambda w: order.index(w) if w in order else len(order))}


def children(module: Module) -> list[Module]:
    "The modules below the face of a wing"
    inside = [m for m in modules() if m.name.startswith(module.name + ".")]
    return [m for m in inside if m.name.count(".") == module.name.count(".") + 1]


def below(module: Module) -> str:
    "What stands below the face of a wing: its modules"
    found = children(module)
    if not found: return ""
    own = "".join(c.source for c in cells(module.notebook))
    rows = [[f"[{m.name.rsplit('.', 1)[-1]}](/{m.page})", cell_text(notebook_front(m.notebook)[1])] for m in found
            if m.notebook.name not in own]
    more = f"## Modules\n\n{table(['Module', 'Holds'], rows)}\n\n" if rows else ""
    return more + toctree(f"{m.name.rsplit('.', 1)[-1]} </{m.page}>" for m in found)


def reference(out: Path) -> None:
    own = {"commands": "the command line", "api": "every name by wing"}
    rows = [[f"[{wing}](/{found[0].page})", cell_text(notebook_front(found[0].notebook)[1])]
            for wing, found in wings().items()]
    write(out, "reference/index", f"""# Reference

The library has wings, each of which imports only from those above it. A page is a notebook: what the module is for,
examples with their outputs and tests, and for each function or class its parameters and the line where it is defined.
The code itself is folded away below each definition.

{table(["Wing", "Holds"], rows)}

- [API index](/reference/api): {own["api"]}
- [Command line](/reference/commands): every command of `medclip-nb` with its options

""" + toctree(["API index <api>", "Command line <commands>",
               *(f"{wing} </{found[0].page}>" for wing, found in wings().items())]))
    parts = ["# API index\n\nEvery public name by wing. `from medclip_nb.WING import NAME` works for the names that a "
             "wing hands on; all can be imported from their modules."]
    for wing, found in wings().items():
        named = sorted((s for s in symbols() if s.module in found), key=lambda s: (s.name.lower(), s.path))
        if not named: continue
        rows = [[f"{{py:obj}}`{s.name} <{s.path}>`", f"[{s.module.name}](/{s.module.page})",
                 prose(cell_text(s.summary), s.module.notebook, "reference/api")] for s in named]
        parts.append(f"## {wing}\n\n" + table(["Name", "Module", "What it is"], rows, "{.names}"))
    write(out, "reference/api", "\n\n".join(parts))
    write(out, "reference/commands", commands())


def commands() -> str:
    "The command line, from the program itself"
    from typer.main import get_command

    from medclip_nb.cli.main import app

    parts = ["# Command line\n\n`medclip-nb COMMAND --help` says the same in a terminal."]

    def add(command, name: str) -> None:
        subs = getattr(command, "commands", {})
        if not command.hidden:
            said = " ".join((command.help or "").split())
            parts.append(f"{'#' * (1 + len(name.split()[1:]))} {name}\n\n{markdown_safe(said)}" if name.count(" ") else
                         markdown_safe(said))
            rows = [[f"`{words(p)}`", markdown_safe(" ".join((getattr(p, "help", "") or "").split()))]
                    for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
            if rows and not subs: parts.append(table(["Argument or option", "Meaning"], rows, "{.fields}"))
        for sub in sorted(subs): add(subs[sub], f"{name} {sub}")

    def words(parameter) -> str:
        metavar = cell_text(str(parameter.metavar or (parameter.name or "").upper()))
        if parameter.param_type_name == "argument": return metavar
        flag = getattr(parameter, "is_flag", False)
        return ", ".join([*parameter.opts, *parameter.secondary_opts]) + ("" if flag else f" {metavar}")

    add(get_command(app), "medclip-nb")
    return "\n\n".join(parts)


def markdown_safe(text: str) -> str: return re.sub(r"([*_<>\[\]{}|$])", r"\\\1", text)


# ---- experiments and results

@cache
def suites() -> list[Path]:
    "Folders of the reports that are committed: those that .gitignore lets through"
    kept = re.findall(r"^!/reports/([\w.-]+)/$", (ROOT / ".gitignore").read_text(encoding="utf-8"), re.M)
    return [ROOT / "reports" / name for name in kept if (ROOT / "reports" / name / "suite.json").exists()]


def read(path: Path) -> dict: return json.loads(path.read_text(encoding="utf-8"))


def runs(suite: Path) -> list[dict]: return [r for r in read(suite / "suite.json")["runs"] if r["status"] == "done"]


def example(template: str) -> Path | None:
    "A report of a template: the last run of the first suite that has it, not of a model without training"
    for suite in suites():
        named = [r["name"] for r in runs(suite) if r["template"] == template and "untrained" not in r["name"]]
        if named: return suite / named[-1]
    return None


def parameters(template: str) -> str:
    from medclip_nb.experiments import template_parameters
    rows = [[f"`{name}`", code_text(p.type), code_text("required" if p.default is ... else repr(p.default)),
             markdown_safe(" ".join(p.help.split()))] for name, p in template_parameters(template).items()]
    return table(["Parameter", "Type", "Default", "Meaning"], rows, "{.fields}")


def set_values(cell_source: str) -> str:
    return "\n".join(line for line in cell_source.splitlines() if not line.startswith("# Parameters")).strip()


def at_report(outputs: list, report: Path | None) -> list:
    "Outputs whose links lead to the files beside the report"
    if not report: return outputs
    base = f"../{report.relative_to(ROOT).as_posix()}/"
    for data in (o["data"] for o in outputs if "data" in o):
        if "text/html" in data:
            data["text/html"] = re.sub(r'href="(?![a-z]+:|#|/)', f'href="{base}', "".join(data["text/html"]))
        if "text/markdown" in data:
            data["text/markdown"] = re.sub(r"\[([^\]]*)\]\((?![a-z]+:|#|/)([^)]*)\)", rf'<a href="{base}\2">\1</a>',
                                           "".join(data["text/markdown"]))
    return outputs


def experiment(path: Path, out: Path) -> None:
    "A template: what it asks, its parameters, and a report of it"
    name, found = path.stem, example(path.stem)
    page = Page(path, f"experiments/{name}")
    book = [c for c in cells(found / "report.ipynb" if found else path) if c.cell_type != "raw"]
    at = next(i for i, c in enumerate(book) if "parameters" in c.metadata.get("tags", []))
    title, said, rest = front(book[0].source)
    page.markdown(f"# {title}\n\n" + page.told("\n\n".join(t for t in (said, rest) if t)))
    for cell in book[1:at]:
        if cell.cell_type == "markdown": page.markdown(page.told(cell.source))
    page.markdown(f"## Run it\n\n```sh\nmedclip-nb run {name} -p NAME=VALUE --out reports/my_{name}\n```\n\n"
                  f"`medclip-nb params {name}` prints this table; the template is "
                  f"[{path.name}]({repository(path.relative_to(ROOT).as_posix())}).")
    page.markdown(f"## Parameters\n\n{parameters(name)}")
    if found:
        place = found.relative_to(ROOT).as_posix()
        page.markdown(f"## An example: {found.name}\n\nThe run *{found.name}* of suite *{found.parent.name}*, as it "
                      f'was executed: <a href="../{place}/report.html">the report by itself</a>.')
    else: page.markdown("## The notebook\n\nThe repository holds no report of this template; this is its code.")
    for cell in book[at + 1:]:
        if cell.cell_type == "markdown": page.markdown(re.sub(r"^(#+ )", r"#\1", page.told(cell.source), flags=re.M))
        elif "injected-parameters" in cell.metadata.get("tags", []):
            page.code(set_values(cell.source), tags=["hide-input"])
        elif found and not cell.outputs: continue
        else: page.code(cell.source, at_report(cell.outputs, found), ["hide-input"] if found else [])
    page.write(out)


def experiments(out: Path) -> None:
    for path in templates(): experiment(path, out)
    cards = [(f"experiments/{p.stem}", f"`{p.stem}`", notebook_front(p)[0]) for p in templates()]
    listed = sorted((NBS / "experiments" / "suites").glob("*.yaml"))
    rows = []
    for path in listed:
        head = re.search(r"^title: (.*)$", path.read_text(encoding="utf-8"), re.M)
        link = repository(path.relative_to(ROOT).as_posix())
        rows.append([f"[{path.stem}]({link})", cell_text(head[1]) if head else ""])
    presets = ", ".join(f"`{p.stem}`" for p in sorted((NBS / "experiments" / "params").glob("*.yaml")))
    write(out, "experiments/index", f"""# Experiments

An experiment is a notebook with parameters. `medclip-nb run TEMPLATE -p NAME=VALUE` executes it into a folder with the
report, its numbers and its predictions. A suite is a list of such runs that may build on each other.

{grid(cards)}

## Suites

`medclip-nb suite NAME` executes one of these, `--dry-run` says what it would cost, `--scale tiny` tries it on small
made-up data.

{table(["Suite", "What it does"], rows)}

## Published settings

`medclip-nb run itemized -f NAME` takes the settings of a published training run: {presets}.

""" + toctree(f"{p.stem} <{p.stem}>" for p in templates()))


def shown(metric: dict) -> str:
    number = lambda x: "" if x is None else f"{x:.0f}" if float(x).is_integer() and abs(x) > 1 else f"{x:.3f}"
    value, low, high = (number(metric.get(k)) for k in ("value", "low", "high"))
    return f"{value} ({low}–{high})" if low else value


def headline(folder: Path) -> list[tuple[str, dict]]:
    found = read(folder / "metrics.json")
    return [(name, found["metrics"][name]) for name in found["details"].get("headline", []) if name in found["metrics"]]


def results(out: Path) -> None:
    parts, numbers = ["""# Results

The reports that this repository holds, each executed by its commands. Intervals are 95 % bootstrap intervals over
groups (patients or studies). The embedded data are real anatomy with simulated findings: the numbers show that the path
works, and are worth nothing as evidence about patients.
"""], []
    for suite in suites():
        facts, rows = read(suite / "suite.json"), []
        for run in runs(suite):
            folder = suite / run["name"]
            if not (folder / "report.html").exists(): continue
            page, link = f"experiments/{run['template']}.html", f"reports/{suite.name}/{run['name']}/report.html"
            given = read(folder / "run.json").get("parameters", {})
            named = headline(folder)
            report = f'<a href="{link}">{escape(run["name"])}</a>'
            rows.append([report, f'<a href="{page}">{escape(run["template"])}</a>', escape(given.get("dataset", "")),
                         "<br>".join(f"{escape(n)} {shown(m)}" for n, m in named[:3])])
            cells_of = lambda m: ["" if m.get(k) is None else f"{m[k]:.4g}" for k in ("value", "low", "high", "n")]
            numbers += [[escape(suite.name), report, escape(n), *cells_of(m)] for n, m in named]
        made = sortable(["Report", "Template", "Data", "First headline numbers"], rows, f"Reports of {suite.name}")
        parts.append(f"## {suite.name}\n\n{facts['description']}\n\n"
                     f'<a href="reports/{suite.name}/index.html">The suite\'s own page</a>. Data: {facts["license"]}.'
                     f"\n\n{made}")
    parts.append("## Every headline number\n\nClick on a column to sort by it; type to filter.\n\n"
                 + sortable(["Suite", "Run", "Metric", "Value", "Low", "High", "n"], numbers, "Headline numbers"))
    write(out, "results", "\n\n".join(parts))


MEASURED = ROOT / "benchmarks" / "results.json"


def curves(results: list[dict]) -> dict[tuple[str, str], list[dict]]:
    "Results of one task in three sizes and more, by task and by what is counted, smallest first"
    found = {}
    for path in dict.fromkeys(r["path"] for r in results):
        own = [(re.split(r"(\d+)", r["size"]), r) for r in results if r["path"] == path]
        parts = [column for column in zip(*(words for words, _ in own)) if len(set(column)) > 2]
        if len(parts) != 1 or len({len(words) for words, _ in own}) > 1: continue
        at = [*zip(*(words for words, _ in own))].index(parts[0])
        what = own[0][0][at + 1].split(",")[0].strip()
        found[path, what] = sorted((r | {"n": int(words[at])} for words, r in own), key=lambda r: r["n"])
    return found


def growth(out: Path, results: list[dict]) -> str:
    "A figure of the time that each task takes by its size, and the words that show it; empty without such tasks"
    if not (tasks := curves(results)): return ""
    import matplotlib.pyplot as plt

    from medclip_nb import plots
    with plt.rc_context():
        plots.use_style()
        columns = min(3, len(tasks))
        rows = -(-len(tasks) // columns)
        figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.9 * rows), squeeze=False)
        for ax in axes.flat[len(tasks):]: ax.set_axis_off()
        for ax, ((path, what), own) in zip(axes.flat, tasks.items()):
            ours = {r["n"]: r["seconds"] for r in own}
            ax.plot(ours.keys(), ours.values(), "o-", color=plots.PALETTE[0], label="here")
            for rival, color in zip(dict.fromkeys(r["rival"] for r in own), plots.PALETTE[1:]):
                theirs = {r["n"]: r["rival_seconds"] for r in own if r["rival"] == rival}
                ax.plot(theirs.keys(), theirs.values(), "s--", color=color, label=rival)
            ax.set(xscale="log", yscale="log", title=plots.wrapped(path, 28), xlabel=what, ylabel="time, s")
            ax.set_xticks(list(ours), [f"{n:,}" for n in ours])
            ax.minorticks_off()
            ax.legend(fontsize=7)
        figure.savefig(out / "speed.png", dpi=150)
        plt.close(figure)
    told = "; ".join(f"{path} by {what}" for path, what in tasks)
    return f"""## How it grows

![Time by size, both axes logarithmic: {told}](speed.png)

Each task in several sizes, all else as in the table. Parallel lines mean that the ratio holds at any size."""


def speed(out: Path, measured: Path = MEASURED) -> None:
    "The figures that benchmarks/table.py has saved"
    parts = ["""# Speed

How long parts of this library take, beside what one would use instead."""]
    if measured.exists(): parts += [figures(found := read(measured)), growth(out, found["results"])]
    else: parts.append("No figures are kept here yet: `make bench` measures them, and the next `make docs` shows them.")
    write(out, "speed", "\n\n".join(parts))


def figures(found: dict) -> str:
    "What was measured, how, and on what machine"
    about = found["machine"]
    shown = runpy.run_path(str(ROOT / "benchmarks" / "table.py"))["as_table"](found["results"], about["bf16"])
    shown["ratio"] = [text.replace(" to ", "\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}") for text in shown["ratio"]]
    rows = [[escape(cell) for cell in row] for row in shown.itertuples(index=False)]
    lower = f"{'arithmetic' if about['bf16'] else 'no arithmetic'} in bfloat16"
    versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    return f"""A ratio is the time of the other way divided by ours, the median over rounds in which both were timed in
turn, with the least and the largest; above 1, ours takes less time. *bound* is the share of our time that no way can do
without, such as the matrix products alone. *memory* is the most that each way takes, ours first. Where a goal needs
instructions that the processor lacks, it stands in parentheses. The results of both ways are compared before anything
is timed.

Measured on {about["date"]} on {markdown_safe(about["processor"])} ({about["cores"]} cores, {about["instructions"]},
{lower}), Python {about["python"]}: {markdown_safe(versions)}. On another machine other ratios hold;
`make bench` measures them there.

""" + sortable(list(map(str, shown.columns)), rows, "Speed")


def copy_reports(site: Path) -> None:
    "The committed reports beside the pages that link to them"
    left_out = shutil.ignore_patterns("checkpoint", ".*", "*.failed", "*.partial")
    for suite in suites(): shutil.copytree(suite, site / "reports" / suite.name, ignore=left_out)


# ---- data

@cache
def packs() -> list:
    "Every prompt pack, in all versions"
    from medclip_nb.evaluators import load_pack
    return [load_pack(p.stem) for p in sorted((ROOT / "data" / "prompts").glob("*@*.yaml"))]


def class_count(pack) -> int: return len(pack.findings) or sum(map(len, pack.labels.values()))


def datasets(out: Path) -> None:
    from medclip_nb.datasets import card, card_names

    rows = []
    for name in card_names():
        c, own = card(name), [p for p in packs() if p.dataset == name]
        facts = (c["title"], c["modality"], ", ".join(c["tasks"]), c["license"])
        rows.append([f'<a href="{name}.html">{name}</a>', *map(told_in_html, facts), str(len(own) or "")])
        dataset_page(out, name, c, own)
    intro = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    intro = prose(intro, ROOT / "data" / "README.md", "datasets/index").replace("# data\n", "", 1)
    write(out, "datasets/index", f"""# Datasets and prompt packs

Most of these data sets have owners, licences and agreements to sign, so nothing is downloaded for you. Get the data
from their source, arrange them as the card says, and name the folder. A card that marks a fact as not verified says so.
The prompts for their classes are [prompt packs](/prompts/index).

{sortable(["Name", "Title", "Modality", "Tasks", "Licence", "Packs"], rows, "Datasets with a card")}

{intro.strip()}

""" + toctree(["Prompt packs </prompts/index>", *(f"{name} <{name}>" for name in card_names())]))


def dataset_page(out: Path, name: str, c: dict, own: list) -> None:
    from medclip_nb.datasets import card_markdown
    source, page = ROOT / "data" / "cards" / f"{name}.yaml", f"datasets/{name}"
    told = prose(card_markdown(name, 1), source, page).replace("# ", f"# {name}: ", 1)
    told = told.replace("| | |\n|---|", "{.facts}\n| | |\n|---|", 1)
    text = re.sub(r"(?<![<(\w])(https?://[^\s|,;)]+[\w/])", r"<\1>", told)
    commands = [f"medclip-nb data info {name}", f"medclip-nb data validate {name} --root data/{name}"]
    reader = next(m for m in modules() if f"medclip_nb.{m.name}" == c["module"])
    extra = ("## Commands\n\n```sh\n" + "\n".join(commands) + "\n```\n\n"
             f"Its reader is explained in [{reader.name}](/{reader.page}); the card is "
             f"[{source.name}]({repository(source.relative_to(ROOT).as_posix())}).\n")
    if own:
        extra += "\n## Prompt packs\n\n" + "\n".join(
            f"- [{p.id}](/prompts/{p.id.replace('@', '-')}): {class_count(p)} classes, {len(p.templates)} templates, "
            f"{p.origin}" for p in own)
    write(out, page, text + "\n" + extra)


def prompts(out: Path) -> None:
    from medclip_nb.datasets import card_names

    rows = []
    for pack in packs():
        page = pack.id.replace("@", "-")
        name, known = pack.dataset, pack.dataset in card_names()
        data = f"[{name}](/datasets/{name})" if known else code_text(name)
        link = f'<a href="../datasets/{name}.html">{name}</a>' if known else escape(name)
        rows.append([f'<a href="{page}.html">{pack.id}</a>', link, "findings" if pack.findings else "classes",
                     str(class_count(pack)), str(len(pack.templates)), pack.origin])
        facts = [["dataset", data], ["origin", pack.origin], ["source", markdown_safe(cell_text(pack.source))],
                 ["hash", f"`{pack.hash}`"]]
        if pack.options: facts.append(["options of the reader", code_text(json.dumps(pack.options))])
        parts = [f"# {pack.id}", table(["", ""], facts, "{.facts}"), "## Templates",
                 "\n".join(f"- `{t}`" for t in pack.templates)]
        if pack.negatives: parts += ["For absence:", "\n".join(f"- `{t}`" for t in pack.negatives)]
        quoted = lambda words: ", ".join(map(markdown_safe, [words] if isinstance(words, str) else words))
        for column, classes in pack.labels.items():
            parts += [f"## Classes of {column}", table(["Class", "Words"], [[markdown_safe(k), quoted(v)]
                                                                           for k, v in classes.items()])]
        if pack.findings:
            parts += ["## Findings", table(["Finding", "Present", "Absent"], [
                [markdown_safe(k), quoted(v.get("present", [])), quoted(v.get("absent", []))] if isinstance(v, dict)
                else [markdown_safe(k), quoted(v), ""] for k, v in pack.findings.items()])]
        file = f"data/prompts/{pack.id}.yaml"
        parts.append(f"```sh\nmedclip-nb packs {pack.id}\n```\n\nThe file: [{pack.id}.yaml]({repository(file)}).")
        write(out, f"prompts/{page}", "\n\n".join(parts))
    write(out, "prompts/index", f"""# Prompt packs

The prompts for the classes of a data set, named and versioned: a published version never changes. *Published* packs are
those of a paper or its code, *convention* those written for this package. `medclip-nb packs` lists them, and every
template takes one as the parameter `pack`.

{sortable(["Pack", "Dataset", "Kind", "Classes", "Templates", "Origin"], rows, "Prompt packs")}

""" + toctree(f"{p.id} <{p.id.replace('@', '-')}>" for p in packs()))


def plain_pages(out: Path) -> None:
    "Pages of docs/pages, the changelog and how to contribute"
    for path in sorted((ROOT / "docs" / "pages").glob("*.md")):
        write(out, path.stem, prose(path.read_text(encoding="utf-8"), path, path.stem))
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        path = ROOT / name
        write(out, pages()[name], prose(path.read_text(encoding="utf-8"), path, pages()[name]))


PAGES = (speed, datasets, reference, home, prompts, experiments, results, overviews, plain_pages)  # Slow ones first
