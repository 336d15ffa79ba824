"""README.md from nbs/index.ipynb, the only place where its text is written.

    python docs/readme.py            write README.md
    python docs/readme.py --check    exit with 1 if it is not current
"""
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Made from nbs/index.ipynb; edit that -->"


def relink(text: str) -> str:
    "Make addresses relative to nbs/ relative to the top level"
    def move(address: str) -> str:
        if re.match(r"[a-z][a-z+.-]*:|[#/]", address): return address
        return address[3:] if address.startswith("../") else f"nbs/{address}"
    text = re.sub(r"(\]\()([^)\s]+)", lambda m: m[1] + move(m[2]), text)
    return re.sub(r"(\b(?:src|srcset|href)=\")([^\"]+)", lambda m: m[1] + move(m[2]), text)


def code_block(cell: nbformat.NotebookNode) -> str:
    "A code cell, unless it says `echo: false`, and its text outputs as fenced blocks; Markdown as it is"
    source = "\n".join(line for line in cell.source.split("\n") if not re.match(r"\s*#\s*\|", line)).strip()
    shown = not re.match(r"\s*#\s*\|\s*echo:\s*false\b", cell.source)
    blocks = [f"```python\n{source}\n```"] if source and shown else []
    for output in cell.outputs:
        if told := output.get("data", {}).get("text/markdown"):
            blocks.append(outside_fences(told))
            continue
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        if text and not any(k.startswith("image/") for k in output.get("data", {})):
            blocks.append(f"```\n{text.rstrip()}\n```")
    return "\n\n".join(blocks)


def outside_fences(text: str) -> str:
    "Apply `relink` to markdown, leaving fenced code as it is"
    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else relink(part) for part in parts)


def readme(notebook: Path = ROOT / "nbs" / "index.ipynb") -> str:
    "The text of README.md"
    cells = [c for c in nbformat.read(notebook, 4).cells if not re.match(r"\s*#\s*\|\s*hide\b(?!_)", c.source)]
    parts = [outside_fences(c.source) if c.cell_type == "markdown" else code_block(c)
             for c in cells if c.cell_type != "raw"]
    parts[0] = re.sub(r"\n+(- [\w-]+: .*\n?)+\Z", "", parts[0])  # nbdev's front matter
    return "\n\n".join([NOTE, *(p.strip() for p in parts if p.strip())]) + "\n"


if __name__ == "__main__":
    target = ROOT / "README.md"
    if sys.argv[1:] not in ([], ["--check"]): sys.exit(__doc__)
    if not sys.argv[1:]: target.write_text(readme(), encoding="utf-8")
    elif not target.exists() or target.read_text(encoding="utf-8") != readme():
        sys.exit("README.md is not what nbs/index.ipynb says: run python docs/readme.py")
