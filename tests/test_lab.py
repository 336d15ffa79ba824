"JupyterLab: what notebooks show of data, models, errors and training, and the explorers in a real one"
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest
import tqdm.auto
from planted import plant

from medclip_nb import experiments
from medclip_nb.core import RUN_NAME, InputError, is_watched, seed_everything
from medclip_nb.datasets import load_manifest, make_squares, manifest
from medclip_nb.embeddings import embed, encoded_images
from medclip_nb.models import load_model
from medclip_nb.trainers import loop, train

ROOT = Path(__file__).resolve().parent.parent
plain = lambda lines: re.sub(r"\x1b\[[\d;]*m", "", "\n".join(lines))


@pytest.fixture(scope="module")
def squares(tmp_path_factory): return make_squares(tmp_path_factory.mktemp("lab") / "squares")


@pytest.fixture
def clip():
    seed_everything(0)
    return load_model("starter")


# ---- errors

def executed(folder, code, batch, monkeypatch):
    "The outputs of a notebook that papermill executes, and its error"
    monkeypatch.setenv("MEDCLIP_NB_BATCH", batch)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), folder / "in.ipynb")
    with pytest.raises(papermill.PapermillExecutionError) as failed:
        papermill.execute_notebook(folder / "in.ipynb", folder / "out.ipynb", kernel_name="python3", progress_bar=False,
                                   log_output=False, cwd=folder)
    cells = nbformat.read(folder / "out.ipynb", 4).cells
    return [o for c in cells for o in c.get("outputs", []) if o.output_type == "error"], failed.value


@pytest.mark.parametrize("batch", ["0", "1"])
def test_error_of_the_user_is_a_box_where_someone_looks(tmp_path, batch, monkeypatch):
    code = f"from medclip_nb.datasets import load_manifest\nload_manifest('csv', {str(tmp_path)!r}, table='none.csv')"
    (error,), failed = executed(tmp_path, code, batch, monkeypatch)
    assert failed.ename == error.ename == "InputError" and "none.csv" in failed.evalue
    shown = plain(error.traceback)
    assert ("Traceback" in shown) == (batch == "1") and "none.csv" in shown
    assert batch == "1" or len(shown.splitlines()) <= 5


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch):
    (error,), failed = executed(tmp_path, "1 / 0", "0", monkeypatch)
    assert failed.ename == "ZeroDivisionError" and "Traceback" in plain(error.traceback)


# ---- bars and curves

def test_bars_end_complete(squares, clip, tmp_path, monkeypatch):
    ended = []

    class Noted(tqdm.auto.tqdm):
        def close(self):
            if not self.disable: ended.append((self.desc, self.n, self.total))
            super().close()

    monkeypatch.setenv("MEDCLIP_NB_BATCH", "0")
    monkeypatch.setattr(tqdm.auto, "tqdm", Noted)
    embed(clip, squares, batch_size=10)
    list(encoded_images(clip, squares, tokens=True, batch_size=10))
    train(clip, squares.part("train"), squares.part("valid"), tmp_path, epochs=2, batch_size=8)
    assert {name for name, *_ in ended} >= {"encoding images", "encoding texts", "epoch 1/2", "epoch 2/2"}
    assert [one for one in ended if one[2] is not None and one[1] != one[2]] == []


def test_training_is_followed_in_a_notebook_only(squares, clip, tmp_path, monkeypatch, capsys):
    shown = []
    screen = SimpleNamespace(update=lambda page: shown.append(page.data))
    monkeypatch.setattr("IPython.display.display", lambda page, display_id: (shown.append(page.data), screen)[1])
    rows = squares.part("train"), squares.part("valid")
    run = lambda name: train(clip, *rows, tmp_path / name, epochs=2, batch_size=8)
    run("batch")
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"\d\.\d{3}", "0", line) for line in lines] == [
        f"epoch   {n}/2  loss 0  validation: MRR 0  R@1 0" for n in (1, 2)]
    assert shown == []
    monkeypatch.setenv("MEDCLIP_NB_BATCH", "0")
    monkeypatch.setattr(loop, "is_watched", lambda: True)
    done = run("watched")
    assert capsys.readouterr().out == "" and len(shown) == 4
    assert "epoch 0 of 2" in shown[0] and "epoch 1 of 2" in shown[1] and " left" in shown[1]
    assert "trained 2 epochs" in shown[-1] and f"kept: epoch {done.best_epoch}" in shown[-1]
    assert all(f"{loss:.3f}" in shown[-1] for loss in done.history["train_loss"])


def test_nobody_looks_at_a_batch_run_or_a_shell(monkeypatch):
    assert not is_watched()
    monkeypatch.setenv("MEDCLIP_NB_BATCH", "0")
    assert not is_watched()


# ---- a notebook beside the command line

def test_a_run_of_a_notebook_and_the_command_line_share_a_folder(tmp_path, monkeypatch):
    "What a notebook has begun is not replaced before it is done, and its end leaves no report of the run before"
    asked = {name: one.default for name, one in experiments.read_template("data_audit").parameters.items()}
    monkeypatch.delenv(RUN_NAME, raising=False)
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(user_ns=asked))
    out = tmp_path / "run"

    def begun(*files):
        experiments.note_parameters()
        for name in files: (out / name).write_text("{}")

    def replaced(text):
        with experiments.run_folder(out) as work:
            (work / "report.html").write_text(text)
            made = experiments.run_record(work, "data_audit")
            (work / "run.json").write_text(json.dumps(made))

    out.mkdir()
    begun("metrics.json")
    with pytest.raises(InputError, match="notebook has begun a run in it, execute that notebook to its end"):
        replaced("first")
    assert experiments.record_notebook(out) is None and sorted(os.listdir(out)) == ["metrics.json", "run.json"]
    replaced("first")
    assert (out / "report.html").read_text() == "first"
    begun("history.csv")
    with pytest.raises(InputError, match="holds history.csv, which does not belong to it. If a notebook has begun"):
        replaced("second")
    experiments.record_notebook(out)
    assert sorted(os.listdir(out)) == ["history.csv", "run.json"]
    replaced("second")
    assert (out / "report.html").read_text() == "second"


# ---- manifests

def test_manifest_shows_itself_where_someone_looks(tmp_path, monkeypatch):
    rows = load_manifest("starter", ROOT / "data" / "starter", view="slices")
    monkeypatch.setenv("MEDCLIP_NB_BATCH", "0")
    assert "<img" not in rows._repr_html_(), "a shell"
    monkeypatch.setattr(manifest, "is_watched", lambda: True)
    start = time.perf_counter()
    page = rows._repr_html_()
    assert page.count("<img ") == 12 and len(page) < 100_000 and time.perf_counter() - start < 10
    assert rows.fingerprint() in page and "licence:" in page and all(s in page for s in ("train", "valid", "test"))
    assert "<img" not in rows[["image", "caption"]]._repr_html_()
    studies = load_manifest("starter", tmp_path, view="studies", n_studies=(1, 1, 1), workers=1)
    assert studies._repr_html_().count("<img ") == 3


# ---- a real JupyterLab

def make_lab_words():
    "The words with which `make lab` starts JupyterLab"
    done = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if "/jupyter lab" in line)
    return line.split("/jupyter lab", 1)[1].split()


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    "JupyterLab on a copy of the start page, as `make lab` opens it, and a browser"
    root = tmp_path_factory.mktemp("jupyter")
    (root / "nbs").mkdir()
    shutil.copy(ROOT / "nbs" / "start.ipynb", root / "nbs")
    shutil.copy(ROOT / "settings.ini", root)
    for name in ("data", "reports"): (root / name).symlink_to(ROOT / name)
    own = root / "settings" / "@jupyterlab" / "notebook-extension"
    own.mkdir(parents=True)
    (own / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}') # All cells in the page at once
    (root / "config" / "labconfig").mkdir(parents=True)
    off = {"@jupyterlab/apputils-extension:announcements": True} # Asks for news from the network
    (root / "config" / "labconfig" / "page_config.json").write_text(json.dumps({"disabledExtensions": off}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "MEDCLIP_NB_BATCH"} | {
        "JUPYTER_CONFIG_DIR": str(root / "config"), "JUPYTER_RUNTIME_DIR": str(root / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(root / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(root / "workspaces"),
        "IPYTHONDIR": str(root / "ipython"), "PYTHONPATH": str(ROOT)}
    environment.pop("MPLBACKEND", None) # The kernel's own
    words = [sys.executable, "-m", "jupyterlab", *make_lab_words(), "--no-browser", "--ServerApp.ip=127.0.0.1",
             f"--ServerApp.port={port}", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True",
             "--LabApp.extension_manager=readonly"]
    with open(root / "log", "w") as log:
        server = subprocess.Popen(words, cwd=root, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(300):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api").read()
            except OSError: time.sleep(0.1)
            else: break
        else: pytest.fail((root / "log").read_text())
        yield browser, f"http://127.0.0.1:{port}", root
    finally:
        server.terminate()
        server.wait(20)


def run_all(lab, path=""):
    "Open a page of JupyterLab and run all cells of its notebook; the page, and what it complained of"
    browser, address, _ = lab
    heard, tab = [], browser.new_page(viewport={"width": 1280, "height": 900})
    tab.on("console", lambda m: heard.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda e: heard.append(str(e)))
    tab.set_default_timeout(60_000)
    tab.goto(address + path)
    tab.wait_for_selector(".jp-Notebook .jp-Cell")
    accept = tab.locator(".jp-Dialog .jp-mod-accept") # JupyterLab asks which kernel where it has not started one yet
    tab.add_locator_handler(accept, lambda: accept.click())
    tab.wait_for_function("() => document.body.innerText.includes('Python 3 | Idle')")
    tab.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    return tab, heard


def until_done(tab):
    "Wait for the last cell"
    tab.wait_for_function("() => document.querySelector('.jp-Notebook-ExecutionIndicator[data-status=idle]') &&"
                          " ![...document.querySelectorAll('.jp-InputPrompt')].some(one => one.innerText == '[*]:')")


def test_start_page_runs_and_answers_a_query(lab):
    tab, heard = run_all(lab) # Leads to the start page
    search = tab.locator(".widget-text:has(label:text-is('text')) input").first
    search.wait_for()
    page = tab.locator(".jp-OutputArea-output:has(.widget-upload)").first
    page.locator("img").first.wait_for()
    before = page.locator("img").evaluate_all("all => all.map(one => one.src)")
    assert len(before) == 12
    search.fill("a small bleed")
    search.press("Enter")
    tab.wait_for_function("([now, old]) => { const found = [...now.querySelectorAll('img')].map(one => one.src);"
                          " return found.length == 12 && found.join() != old }",
                          arg=[page.element_handle(), ",".join(before)])
    until_done(tab)
    shown = tab.locator(".jp-Notebook").inner_text()
    assert "Traceback" not in shown and "trained 3 epochs" in shown and "images by PCA" in shown
    assert tab.locator(".progress-bar-danger, .bg-danger").count() == 0
    assert tab.locator(".jp-OutputArea-output[data-mime-type$=stderr]").count() == 0, "text on a red ground"
    if folder := os.environ.get("MEDCLIP_NB_SCREENSHOTS"):
        for n, cell in enumerate(tab.locator(".jp-Notebook .jp-CodeCell").all()):
            cell.screenshot(path=f"{folder}/cell-{n}.png")
    assert heard == []


HOSTILE = """import json
from pathlib import Path
from IPython.display import HTML, display
from medclip_nb.datasets import load_manifest
from medclip_nb.experiments import run
from medclip_nb.explorers import AttentionExplorer, EmbeddingMap, ErrorGallery, SearchExplorer
from medclip_nb.models import load_model
folder = Path("planted")
rows = load_manifest("csv", folder/"data"/"table.csv", labels=["kind", "source"])
clip = load_model("starter")
display(rows)
---
params = dict(dataset="csv", data_root=str(folder/"data"/"table.csv"), model="starter", labels=["kind"], n_boot=20)
found = run("zero_shot", params, folder/"run", quiet=True).path
---
display(ErrorGallery(found, rows, task="kind"))
---
text = rows["caption"].iloc[1]
search = SearchExplorer(clip, rows, text=text)
display(search)
---
display(EmbeddingMap(clip, rows, search.found, color="kind"))
---
display(AttentionExplorer(clip, rows, text))
---
load_manifest("csv", folder/"data"/rows["caption"].iloc[1][:40].replace("/", ""))
---
display(HTML("<img src='data:,' onerror='window.trusted = 1'>"))
print("that was all")"""


def test_planted_script_does_not_run_in_jupyterlab(lab):
    "What a cell shows is trusted there, so that what is shown must be harmless"
    root = lab[2]
    (root / "nbs" / "planted").mkdir()
    plant(root / "nbs" / "planted" / "data")
    v4 = nbformat.v4
    cells = [v4.new_code_cell(code) for code in HOSTILE.split("\n---\n")]
    cells[-2].metadata["tags"] = ["raises-exception"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), root / "nbs" / "planted.ipynb")
    tab, heard = run_all(lab, "/lab/workspaces/planted/tree/nbs/planted.ipynb") # Without the other notebook
    tab.wait_for_function("() => document.querySelector('.jp-Notebook').innerText.includes('that was all')",
                          timeout=180_000)
    until_done(tab)
    shown = tab.locator(".jp-Notebook").inner_text()
    assert tab.locator(".widget-text, .widget-dropdown").count() > 3 and "window.ran" in shown and "no such" in shown
    assert tab.evaluate("() => window.trusted") == 1, "script of a cell does run there"
    assert tab.evaluate("() => window.ran") is None
    assert tab.locator(".jp-OutputArea-output #planted, .jp-OutputArea-output [src=x]").count() == 0
    assert heard == []
