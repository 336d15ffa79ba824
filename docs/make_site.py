"""The documentation site: `python docs/make_site.py` writes _site/ (open _site/index.html).

Pages come from the notebooks, cards, prompt packs and reports as committed; nothing is executed and no network is
needed. A warning or a dead link is an error.
"""
import gc
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import generated
from library import ROOT, modules, symbols
from notebooks import NBS, DeadLink, by_name, pages, write_notebook
from sphinx.cmd.build import build_main

from medclip_nb.experiments import without

PROCESSES = min(len(os.sched_getaffinity(0)), 4) if hasattr(os, "sched_getaffinity") else 2


def write_sources(out: Path) -> None:
    "All pages as Sphinx reads them"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ROOT / "docs" / "theme", out / "_theme")
    jobs = [(write, out) for write in generated.PAGES]
    jobs += [(write_notebook, m.notebook, m.page, out, m, generated.below(m)) for m in modules()]
    jobs += [(write_notebook, path, f"{part}/{path.stem[3:]}", out)
             for part in ("tutorials", "coming_from") for path in sorted((NBS / part).glob("*.ipynb"))]
    symbols(), pages(), by_name()  # Known before the processes part
    with ProcessPoolExecutor(PROCESSES, get_context("fork")) as pool:
        for done in [pool.submit(*job) for job in jobs]: done.result()


def build(sources: Path, site: Path) -> int:
    "Pages of the sources; an earlier site gives way only to one without faults"
    made = sources / "_build" / "html"
    jobs = PROCESSES + 1  # Sphinx counts the process that hands out the pages
    failed = build_main(["-q", "-W", "--keep-going", "-j", str(jobs), "-b", "html", "-c", str(sources / "_theme"),
                         "-d", str(sources / "_build" / "trees"), str(sources), str(made)])
    if failed: return failed
    generated.copy_reports(made)
    shutil.rmtree(site, ignore_errors=True)
    made.rename(site)
    return 0


def main(site: Path = ROOT / "_site") -> None:
    began, sources = time.time(), site.with_name(site.name + "_src")
    gc.set_threshold(200_000, 50, 1_000)  # The trees of pages are large and live long
    try: write_sources(sources)
    except DeadLink as e: sys.exit(f"dead link: {e}")
    with without("rfc3987_syntax"): failed = build(sources, site)  # A grammar of web addresses takes seconds to build
    if failed: sys.exit(failed)
    pages = len(list(site.rglob("*.html")))
    print(f"{site / 'index.html'}: {pages} pages in {time.time() - began:.0f} s")
    gc.freeze()  # What the end of the process frees at once needs no sorting first


if __name__ == "__main__": main(*map(Path, sys.argv[1:]))
