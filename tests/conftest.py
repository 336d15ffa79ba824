import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import forks
import nbformat
import pytest

os.environ |= {"MEDCLIP_NB_BATCH": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
# Ignored in what a shell runs in the background, and in what that starts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    "One parent of forks for all processes of this session of tests"
    if "PYTEST_XDIST_WORKER" in os.environ: return
    folder = os.environ["MEDCLIP_NB_FORKS"] = tempfile.mkdtemp(prefix="forks-")
    forks.offer(folder)
    os.environ["PYTHON_EXEC"] = forks.forked() # What torchrun starts
    os.environ["JUPYTER_PATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("JUPYTER_PATH")])])
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(items):
    "The files that take longest come first, so that two processes end together"
    first = ["test_site", "test_reports", "test_finetune", "test_suites", "test_coming_from", "test_templates",
             "test_item_training", "test_clusters", "test_evaluate", "test_workers", "test_processes", "test_readme",
             "test_presets", "test_search", "test_kernels", "test_shards", "test_training"]
    items.sort(key=lambda item: first.index(item.path.stem) if item.path.stem in first else len(first))


@pytest.fixture(scope="session")
def make_template():
    "Write a template: its parameters cell, then the rest"
    def make(path, parameters, *cells):
        v4 = nbformat.v4
        head = [v4.new_markdown_cell("# A stub\n\n> For tests"),
                v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
        nbformat.write(v4.new_notebook(cells=[*head, *map(v4.new_code_cell, cells)]), path)
        return Path(path)
    return make


@pytest.fixture(scope="session")
def command():
    "The command `medclip-nb`, as a fork (see forks.py)"
    return forks.forked("medclip-nb")


@pytest.fixture(scope="session")
def installed():
    "The installed command `medclip-nb`"
    return str(Path(sys.executable).with_name("medclip-nb"))


@pytest.fixture(scope="module")
def browser():
    "Headless Chromium, where there is one: `make browser` installs it, and CHROMIUM names another one"
    names = [os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    if not (path := next(filter(None, map(shutil.which, filter(None, names))), None)):
        pytest.skip("no browser: pages were not looked at in one. `make browser` installs Chromium (Debian, Ubuntu)")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        opened = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield opened
        opened.close()
