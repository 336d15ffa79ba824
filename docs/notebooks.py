"""Notebooks as pages: links that lead to pages of the site, doclinks, and a reference from docments"""
import ast
import html
import json
import os
import re
from collections import defaultdict
from configparser import ConfigParser
from functools import cache
from pathlib import Path
from urllib.parse import quote

from library import (
    FUNCTION,
    ROOT,
    Field,
    Module,
    Symbol,
    cells,
    class_fields,
    comments,
    constant,
    directives,
    function_fields,
    lines,
    modules,
    signature,
    symbols,
)

NBS = ROOT / "nbs"
# Words that are more often something else in the prose: templates, commands, parameters, columns
NOT_LINKED = {"data", "run", "suite", "compare", "params", "export", "embed", "cache", "classify", "rank", "attend",
              "packs", "doctor", "slurm", "retrieval", "evaluate", "finetune", "itemized", "few_shot", "robustness",
              "linear_probe", "zero_shot", "attention_maps", "data_audit", "app", "checkpoint", "split", "label"}


@cache
def settings() -> dict[str, str]:
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(ini["DEFAULT"])


def repository(path: str, line: int = 0) -> str:
    "The address of a file or folder in the repository"
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    at = f"{settings()['git_url']}/{kind}/{settings()['branch']}/{quote(path)}"
    return at + (f"#L{line}" if line else "")


@cache
def pages() -> dict[str, str]:
    "File in the repository to the page that shows it, without suffix"
    found = {m.notebook.relative_to(ROOT).as_posix(): m.page for m in modules()}
    found |= {f"nbs/{part}/{p.name}": f"{part}/{p.stem[3:]}" for part in ("tutorials", "coming_from")
              for p in sorted((NBS / part).glob("*.ipynb"))}
    found |= {f"nbs/experiments/{p.name}": f"experiments/{p.stem}" for p in templates()}
    found |= {f"data/cards/{p.name}": f"datasets/{p.stem}" for p in sorted((ROOT / "data" / "cards").glob("*.yaml"))}
    found |= {f"data/prompts/{p.name}": f"prompts/{p.stem.replace('@', '-')}"
              for p in sorted((ROOT / "data" / "prompts").glob("*.yaml"))}
    found |= {f"docs/pages/{p.name}": p.stem for p in sorted((ROOT / "docs" / "pages").glob("*.md"))}
    return found | {"nbs/index.ipynb": "index", "README.md": "index", "CHANGELOG.md": "changelog",
                    "CONTRIBUTING.md": "contributing", "data/README.md": "datasets/index"}


def templates() -> list[Path]: return sorted((NBS / "experiments").glob("[a-z]*.ipynb"))


class DeadLink(Exception): pass


def address(target: str, source: Path, page: str) -> tuple[str, bool]:
    "Where a link of a file leads on its page; and whether that is a page that Sphinx knows"
    place, mark, fragment = target.partition("#")
    if re.match(r"[a-z][a-z+.-]*:", target) or not place: return target, True
    path = os.path.normpath(os.path.join(source.parent, place))
    name = os.path.relpath(path, ROOT)
    if name in pages():
        suffix = ".ipynb" if name.endswith(".ipynb") or pages()[name] == "index" else ".md"
        return f"/{pages()[name]}{suffix}{mark}{fragment}", True
    if not os.path.exists(path) or name.startswith(".."): raise DeadLink(f"{source.relative_to(ROOT)}: {target}")
    if name.startswith("reports"):
        inside = next((f"{name}{end}" for end in ("", "/index.html", "/report.html") if os.path.isfile(path + end)), "")
        if inside.endswith(".html"): return os.path.relpath(inside, os.path.dirname(page) or "."), False
        if name == "reports": return "/results", True
    return repository(name), True


def relink(text: str, source: Path, page: str) -> str:
    "The links of a piece of prose"
    def move(found: re.Match) -> str:
        where, known = address(found[2], source, page)
        return f"[{found[1]}]({where})" if known else f'<a href="{where}">{found[1]}</a>'
    return re.sub(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\(([^)\s]+)\)", move, text)


@cache
def by_name() -> dict[str, list[Symbol]]:
    found = defaultdict(list)
    for symbol in symbols():
        if not symbol.module.name.startswith("cli"): found[symbol.name].append(symbol)
    return dict(found)


def doclink(code: str, module: Module | None = None) -> str | None:
    "A name of the library in backticks as a reference to its definition, if there is just one"
    word = re.fullmatch(r"((?:[a-z_]+\.)*)([A-Za-z_]\w*)(?:\(\))?", code)
    if not word or word[2] in NOT_LINKED: return None
    before, name = word[1].split(".")[:-1], word[2]
    known = [s for s in by_name().get(name, []) if {*before} <= {settings()["lib_name"], *s.module.name.split(".")}]
    known = [s for s in known if s.module == module] or known
    if len(known) != 1: return None
    plain = name.islower() and "_" not in name and not before  # A word that may well be no name of the library
    if plain and known[0].module != module: return None
    return f"{{py:obj}}`{code} <{known[0].path}>`"


def prose(text: str, source: Path, page: str, module: Module | None = None) -> str:
    "Markdown of the repository as markdown of the site"
    out = []
    for part in re.split(r"(^ *```.*?^ *```$|``.+?``|`[^`\n]+`)", relink_outside_code(text, source, page),
                         flags=re.M | re.S):
        code = re.fullmatch(r"`([^`\n]+)`", part)
        inside = out and (re.search(r"(\[|^#+ [^\n]*|<a [^>]*>|\}|\w)\Z", out[-1], re.M))
        out.append(part if not code or inside else doclink(code[1], module) or part)
    return "".join(out)


def relink_outside_code(text: str, source: Path, page: str) -> str:
    parts = re.split(r"(^ *```.*?^ *```$)", text, flags=re.M | re.S)
    return "".join(part if part.lstrip().startswith("```") else relink(part, source, page) for part in parts)


def front(text: str) -> tuple[str, str, str]:
    "Title and description of a notebook's first cell, and what follows them"
    title = re.match(r"\s*# (.+)", text)
    rest = text[title.end():] if title else text
    said = re.match(r"\s*((?:>.*\n?)+)", rest)
    rest = rest[said.end():] if said else rest
    rest = re.sub(r"\A\s*(- [\w-]+: .*\n?)+", "", rest).strip()
    words = " ".join(line.lstrip("> ") for line in said[1].splitlines()) if said else ""
    return title[1].strip() if title else "", words, rest


# ---- the reference of a symbol

def cell_text(text: str) -> str: return " ".join(text.split()).replace("|", "\\|")


def code_text(text: str) -> str:
    ticks = "``" if "`" in text else "`"
    return f"{ticks}{cell_text(text)}{ticks}" if text else ""


def field_table(fields: list[Field], back: Field | None, told: callable) -> str:
    "Parameters, and last what is returned"
    rows = [f for f in fields if f.name not in ("self", "cls")]
    if not any(f.type or f.meaning for f in rows) and not (back and back.meaning): return ""
    default = any(f.default for f in rows)
    head = ["Parameter", "Type", *(["Default"] if default else []), "Meaning"]
    body = [[code_text(f.name), code_text(f.type), *([code_text(f.default)] if default else []),
             told(cell_text(f.meaning))] for f in rows]
    if back and back.type not in ("", "None"):
        body.append(["*returns*", code_text(back.type), *([""] if default else []), told(cell_text(back.meaning))])
    if not body: return ""
    line = lambda row: "| " + " | ".join(row) + " |"
    return "\n".join(["{.fields}", line(head), line(["---"] * len(head)), *map(line, body)])


def quoted(text: str) -> str: return "'" + text.replace("'", "''") + "'"


def directive(kind: str, head: str, module: Module, parts: list[str], colons: int = 4, value: str = "") -> str:
    fence, body = ":" * colons, "\n\n".join(p for p in parts if p)
    options = f":module: {settings()['lib_name']}.{module.name}" + (f"\n:value: {quoted(value)}" if value else "")
    return f"{fence}{{py:{kind}}} {head}\n{options}\n\n{body}\n{fence}"


def function_entry(node: ast.FunctionDef, code: str, module: Module, told: callable, owner: str = "") -> str:
    fields, back = function_fields(node, code)
    decorators = {ast.unparse(d) for d in node.decorator_list}
    is_property = bool(decorators & {"property", "cached_property"})
    kind = "function" if not owner else "property" if is_property else "method"
    head = (f"{owner}." if owner else "") + node.name + ("" if is_property else signature(node))
    docs = told(ast.get_docstring(node) or "")
    return directive(kind, head, module, [docs, field_table(fields, back, told)], 4 if not owner else 3)


def class_entry(node: ast.ClassDef, code: str, module: Module, told: callable) -> str:
    inner = [n for n in node.body if isinstance(n, FUNCTION)]
    start = next((n for n in inner if n.name == "__init__"), None)
    fields = function_fields(start, code)[0] if start else class_fields(node, code)
    head = node.name + (signature(start) if start else "")
    bases = [ast.unparse(b) for b in node.bases if not ast.unparse(b).startswith("_")]
    known = lambda base: doclink(base, module) or f"`{base}`"
    said = f"Based on {', '.join(map(known, bases))}." if bases else ""
    methods = {n.name: function_entry(n, code, module, told, node.name) for n in reversed(inner)
               if not n.name.startswith("_") and ast.get_docstring(n)}
    parts = [told(ast.get_docstring(node) or ""), said, field_table(fields, None, told), *reversed(methods.values())]
    return directive("class", head, module, parts, 5)


def constant_entry(node: ast.stmt, beside: dict[int, str], module: Module, told: callable) -> str:
    value = ast.unparse(node.value) if node.value else ""
    shown = value if len(value) <= 100 else ""
    return directive("data", constant(node), module, [told(beside.get(node.end_lineno, ""))], value=shown)


def entries(code: str, module: Module, told: callable) -> list[str]:
    "What a cell exports that is public, each as an entry of the reference"
    found, constants = [], [n for n in ast.parse(code).body if constant(n)]
    beside = comments(code) if constants else {}
    for node in ast.parse(code).body:
        if isinstance(node, FUNCTION) and not node.name.startswith("_"):
            found.append(function_entry(node, code, module, told))
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found.append(class_entry(node, code, module, told))
        elif constant(node): found.append(constant_entry(node, beside, module, told))
    return found


# ---- pages

def only_imports(code: str) -> bool:
    body = ast.parse(code).body
    return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)


def sentence(text: str) -> str:
    "The last words of a piece of prose, to describe the figure below it"
    plain = re.sub(r"```.*?```|\|.*|^#+ .*|\$\$.*?\$\$", " ", text, flags=re.M | re.S)
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|\{[\w:]+\}`([^`<]+?)(?: <[^>]*>)?`|[*_`$]", r"\1\2", plain)
    plain = re.sub(r"</?[a-z][^>]*>", "", plain)
    found = [s for s in re.split(r"(?<=[.:?])\s+", " ".join(plain.split())) if s]
    return found[-1].rstrip(":") if found else ""


def describe(cell: dict, heading: str, before: str, alt: str = "") -> None:
    "Give the images among the outputs of a cell a text: the cell's own (`#| fig-alt: ...`), or the words before it"
    if not any(k.startswith("image/") for o in cell["outputs"] for k in o.get("data", {})): return
    cell["metadata"]["mystnb"] = {"image": {"alt": alt or f"Figure, {heading}: {sentence(before)}".strip(": ")}}


def clean_outputs(outputs: list) -> list:
    "Outputs that a page can show; images in HTML get a text where they have none"
    kept = []
    for output in outputs:
        data = output.get("data", {})
        data.pop("application/vnd.jupyter.widget-view+json", None)
        if "text/html" in data:
            text = "".join(data["text/html"])
            data["text/html"] = re.sub(r"<img(?![^>]*\balt=)", '<img alt="Image in the table"', text)
        if not data and output["output_type"] not in ("stream", "error"): continue
        kept.append(output)
    return kept


class Page:
    "Cells of a page, written one after the other"
    def __init__(self, source: Path, page: str, module: Module | None = None):
        self.source, self.page, self.module = source, page, module
        self.cells, self.heading, self.before = [], "", ""

    def told(self, text: str) -> str: return prose(text, self.source, self.page, self.module)

    def markdown(self, text: str, prose: bool = True) -> None:
        if not text.strip(): return
        for title in re.findall(r"^#+ (.+)$", text, re.M): self.heading = sentence(title + ".").rstrip(".")
        if prose: self.before = text
        self.cells.append({"cell_type": "markdown", "metadata": {}, "source": text})

    def code(self, code: str, outputs: list = (), tags: list[str] = (), alt: str = "") -> None:
        cell = {"cell_type": "code", "metadata": {"tags": list(tags)}, "source": code, "execution_count": None,
                "outputs": clean_outputs(outputs)}
        describe(cell, self.heading, self.before, alt)
        self.cells.append(cell)

    def write(self, out: Path) -> None:
        cells = [cell | {"id": f"cell-{i}"} for i, cell in enumerate(self.cells)]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
                  "language_info": {"name": "python"}}
        path = out / f"{self.page}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        book = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
        path.write_text(json.dumps(book, ensure_ascii=False), encoding="utf-8")


def images_of(text: str, source: Path, out: Path, page: str) -> str:
    "Copy the images of a piece of prose beside its page"
    def move(found: re.Match) -> str:
        if re.match(r"[a-z]+:", found[2]): return found[0]
        path = (source.parent / found[2]).resolve()
        if not path.is_file(): raise DeadLink(f"{source.relative_to(ROOT)}: image {found[2]}")
        target = out / "images" / path.relative_to(ROOT).as_posix().replace("/", "-")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        return f"![{found[1]}](/images/{target.name})"
    return re.sub(r"!\[([^\]]*)\]\(([^)\s]+)\)", move, text)


def reference_head(module: Module) -> str:
    "The line below the title of a page of the reference"
    name = settings()["lib_name"]
    importing = f"{name}.{module.wing}"
    book = repository(module.notebook.relative_to(ROOT).as_posix())
    return (f'<p class="module-line"><code>from {importing} import …</code>'
            f'<a href="{repository(module.file)}">module</a><a href="{book}">notebook</a></p>')


def write_notebook(source: Path, page: str, out: Path, module: Module | None = None, below: str = "") -> None:
    "A notebook of nbs/ as a page; with a module, as a page of the reference"
    shown, first = Page(source, page, module), True
    for cell in cells(source):
        if cell.cell_type == "raw": continue
        if cell.cell_type == "markdown":
            text = cell.source
            if first:
                title, said, rest = front(text)
                name = module.name if module and not module.face else title
                above = f"# {name}" + (f"\n\n{{.lead}}\n{shown.told(said)}" if said else "")
                if module: above += "\n\n" + reference_head(module)
                shown.markdown(above)
                text, first = rest, False
            shown.markdown(images_of(shown.told(text), source, out, page))
            continue
        found, code = directives(cell.source)
        if "hide" in found or "default_exp" in found or not (code or cell.outputs): continue
        if "export" in found and module:
            for entry in entries(code, module, shown.told): shown.markdown(entry, prose=False)
            if not only_imports(code): shown.code(code, cell.outputs, ["hide-input"])
            continue
        tags = list(cell.metadata.get("tags", []))
        if found.get("echo") == "false": tags.append("remove-input")
        if found.get("output") == "false": tags.append("remove-output")
        if "code-fold" in found: tags.append("hide-input")
        shown.code(code, cell.outputs, tags, found.get("fig-alt", ""))
    shown.markdown(below)
    shown.write(out)


def escape(text: object) -> str: return html.escape(str(text), quote=True)


def source_link(module: str, name: str) -> str | None:
    "The line in the repository that defines a name of a module"
    found = next((m for m in modules() if f"{settings()['lib_name']}.{m.name}" == module), None)
    return repository(found.file, lines(found)[name]) if found and name in lines(found) else None
