"What notebooks show of data and training where someone looks on, and what batch runs show instead"
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tqdm.auto

from medclip_nb.core import seed_everything
from medclip_nb.datasets import load_manifest, make_squares
from medclip_nb.embeddings import embed, encoded_images
from medclip_nb.models import load_model
from medclip_nb.trainers import live, loop, train

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def squares(tmp_path_factory): return make_squares(tmp_path_factory.mktemp("lab") / "squares")


@pytest.fixture
def clip():
    seed_everything(0)
    return load_model("starter")


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
    assert not live.is_watched()
    monkeypatch.setenv("MEDCLIP_NB_BATCH", "0")
    assert not live.is_watched()


# ---- manifests

def test_manifest_shows_itself_where_someone_looks(tmp_path, monkeypatch):
    rows = load_manifest("starter", ROOT / "data" / "starter", view="slices")
    assert "<img" not in rows._repr_html_()
    monkeypatch.setenv("MEDCLIP_NB_BATCH", "0")
    start = time.perf_counter()
    page = rows._repr_html_()
    assert page.count("<img ") == 12 and len(page) < 100_000 and time.perf_counter() - start < 10
    assert rows.fingerprint() in page and "licence:" in page and all(s in page for s in ("train", "valid", "test"))
    assert "<img" not in rows[["image", "caption"]]._repr_html_()
    studies = load_manifest("starter", tmp_path, view="studies", n_studies=(1, 1, 1), workers=1)
    assert studies._repr_html_().count("<img ") == 3
