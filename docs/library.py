"""The library as its notebooks describe it, read without importing it: modules, what they export, and their docments.

A docment is nbdev's way to document a parameter: a comment beside it. nbdev's own parser reads them.
"""
import ast
import io
import json
import linecache
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from fastcore.docments import docments

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "medclip_nb"
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def directives(source: str) -> tuple[dict[str, str], str]:
    "The `#| key value` lines of a cell, and the code without them"
    found, body = {}, []
    for line in source.split("\n"):
        head, bar, rest = line.strip().partition("|")
        if bar and head.strip() == "#":
            key, _, value = rest.strip().partition(" ")
            found[key.rstrip(":")] = value.strip()
        else: body.append(line)
    return found, "\n".join(body).strip("\n")


@dataclass(frozen=True)
class Module:
    "A library notebook and the module that it exports"
    notebook: Path # Below nbs/
    name: str # Without the package, such as metrics.localization; metrics for the face of a wing
    face: bool # Whether it is the face of a wing

    @property
    def page(self) -> str: return "reference/" + self.name.replace(".", "/") + ("/index" if self.face else "")

    @property
    def wing(self) -> str: return self.name.split(".")[0]

    @property
    def file(self) -> str:
        "The module's file from the top of the repository"
        return f"{PACKAGE}/{self.name.replace('.', '/')}" + ("/__init__.py" if self.face else ".py")


@dataclass(frozen=True)
class Symbol:
    "A public function, class or constant"
    name: str
    module: Module
    summary: str # First line of its docstring, or the comment beside a constant

    @property
    def path(self) -> str: return f"{PACKAGE}.{self.module.name}.{self.name}"


@cache
def cells(notebook: Path) -> tuple[SimpleNamespace, ...]:
    "Cells of a notebook, their source as one text"
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return tuple(SimpleNamespace(**c | {"source": "".join(c["source"])}) for c in found)


def exported(notebook: Path) -> Iterator[str]:
    "The code of the cells with `#| export`"
    for cell in cells(notebook):
        found, code = directives(cell.source) if cell.cell_type == "code" else ({}, "")
        if "export" in found: yield code


@cache
def modules() -> tuple[Module, ...]:
    "Every library notebook, in the order of their folders and numbers"
    found = []
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        for cell in cells(path)[:4]:
            name = directives(cell.source)[0].get("default_exp") if cell.cell_type == "code" else None
            if name: found.append(Module(path, name.removesuffix(".__init__"), name.endswith(".__init__")))
    return tuple(found)


def comments(source: str) -> dict[int, str]:
    "Line number to the comment on it"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}


def constant(node: ast.stmt) -> str | None:
    "The name that a statement at the top of a module defines, if it is public"
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    target = targets[0] if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
    return target.id if isinstance(target, ast.Name) and not target.id.startswith("_") else None


@cache
def symbols() -> tuple[Symbol, ...]:
    "Everything public that the library exports"
    found = []
    for module in modules():
        for code in exported(module.notebook):
            beside = comments(code) if re.search(r"^\w.*#", code, re.M) else {}
            for node in ast.parse(code).body:
                if isinstance(node, (*FUNCTION, ast.ClassDef)) and not node.name.startswith("_"):
                    found.append(Symbol(node.name, module, (ast.get_docstring(node) or "").split("\n")[0]))
                elif name := constant(node): found.append(Symbol(name, module, beside.get(node.end_lineno, "")))
    return tuple(found)


@cache
def lines(module: Module) -> dict[str, int]:
    "Where names of an exported module are defined; methods as Class.method"
    found = {}
    for node in ast.parse((ROOT / module.file).read_text(encoding="utf-8")).body:
        if name := getattr(node, "name", None) or constant(node): found.setdefault(name, node.lineno)
        for inner in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(inner, FUNCTION): found.setdefault(f"{node.name}.{inner.name}", inner.lineno)
    return found


def parsed_docments(source: str) -> dict[str, str]:
    "Parameter to docment of a function, `return` included; nothing in it is executed"
    tree = ast.parse(source)
    function = tree.body[0]
    arguments = function.args
    function.decorator_list, function.body = [], [ast.Pass()]
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [d and ast.Constant(None) for d in arguments.kw_defaults]
    name = f"<docments of {function.name} {len(linecache.cache)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    future = ast.parse("from __future__ import annotations").body
    code = compile(ast.fix_missing_locations(ast.Module(future + [function], [])), name, "exec")
    exec(code, space := {})  # Defines a function that does nothing
    found = docments(space[function.name], args_kwargs=True)
    return {name: " ".join(text.split()) for name, text in found.items() if text}


@dataclass(frozen=True)
class Field:
    "A parameter as the reference shows it"
    name: str
    type: str
    default: str
    meaning: str


def text_of(node: ast.AST | None) -> str: return ast.unparse(node).strip("'\"") if node is not None else ""


def annotation(node: ast.AST | None) -> tuple[str, str]:
    "A type, and the help of an option of the command line that stands in it"
    if not (isinstance(node, ast.Subscript) and text_of(node.value) == "Annotated"): return text_of(node), ""
    kind, *options = node.slice.elts
    keywords = [k for option in options if isinstance(option, ast.Call) for k in option.keywords]
    return text_of(kind), " ".join(k.value.value for k in keywords if k.arg == "help")


def function_fields(node: ast.FunctionDef, source: str) -> tuple[list[Field], Field]:
    "Parameters of a function, and what it returns"
    head = source.split("\n")[node.lineno - 1 : node.body[0].lineno]
    head[-1] = head[-1][:node.body[0].col_offset] + "pass"
    said = parsed_docments(_dedented("\n".join(head))) if any("#" in line for line in head) else {}
    args, a = [], node.args
    plain = a.posonlyargs + a.args
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    for arg, default in [*zip(plain, defaults), *zip(a.kwonlyargs, a.kw_defaults)]:
        given, (kind, helped) = "" if default is None else ast.unparse(default), annotation(arg.annotation)
        args.append(Field(arg.arg, kind, given, said.get(arg.arg, helped)))
    for arg, stars in ((a.vararg, "*"), (a.kwarg, "**")):
        if arg: args.append(Field(stars + arg.arg, text_of(arg.annotation), "", said.get(arg.arg, "")))
    return args, Field("returns", text_of(node.returns), "", said.get("return", ""))


def _dedented(source: str) -> str:
    "A function without the indentation of its class"
    indent = len(source) - len(source.lstrip(" "))
    return "\n".join(line[indent:] if not line[:indent].strip() else line for line in source.split("\n"))


def class_fields(node: ast.ClassDef, source: str) -> list[Field]:
    "Fields of a data class or a named tuple, with the comments beside them"
    beside = comments(source)
    factory = lambda text: re.sub(r"^field\(default_factory=(\w+)\)$", r"\1()", text)
    return [Field(item.target.id, text_of(item.annotation), factory(ast.unparse(item.value)) if item.value else "",
                  beside.get(item.end_lineno, ""))
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id[0] != "_"]


def signature(node: ast.FunctionDef) -> str:
    "Names and defaults, as one would call it; types stand in the table"
    a, bare = node.args, lambda arg: arg and ast.arg(arg.arg)
    args = ast.arguments(*([*map(bare, x)] for x in (a.posonlyargs, a.args)), bare(a.vararg),
                         [*map(bare, a.kwonlyargs)], a.kw_defaults, bare(a.kwarg), a.defaults)
    if args.args and args.args[0].arg in ("self", "cls"): args.args.pop(0)
    return f"({ast.unparse(args)})"
