"`benchmarks/gpu.py`: its sections on a CPU, in tiny sizes, and what it says where there is no card"
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def call():
    "Run the script in this process; returns its exit status"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        script = runpy.run_path(str(SCRIPT), run_name="gpu")

        def run(*words):
            threads, exact = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
            patch.setattr(sys, "argv", ["gpu.py", *map(str, words)])
            try: return script["main"]()
            except SystemExit as e: return e.code
            finally:
                torch.set_num_threads(threads)
                torch.backends.cudnn.allow_tf32 = exact
        run.sections = script["SECTIONS"]
        yield run


def test_rehearsal(call, tmp_path, capsys):
    names = ["losses", "kernels", "gradients", "retrieval", "itemized", "adapters"]
    file = tmp_path / "deep" / "cpu.json"
    assert call("--device", "cpu", "--quick", "--only", ",".join(names), "--minutes", 100, "--out", file) == 0
    found = json.loads(file.read_text())
    assert [*found["sections"]] == names and not found["left_out"]
    assert found["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]
    checks = [c for s in found["sections"].values() for c in s["checks"]]
    assert len(checks) > 15 and all(c["holds"] and c["found"] <= c["limit"] for c in checks)
    rows = {(row["path"], row["rival"]): row for s in found["sections"].values() for row in s["speed"]}
    row = rows["itemized losses", "all texts, copied"]
    assert row["lowest"] <= row["ratio"] <= row["highest"] and row["rounds"] == 3 and row["ours_mb"] is None
    printed = capsys.readouterr().out
    assert f"{len(checks)} checks, 0 failed" in printed and "FAILS" not in printed
    assert call("--table", file) is None
    assert capsys.readouterr().out in printed


def test_failures(call, tmp_path, capsys, monkeypatch):
    def wrong(b):
        b.check("a number", float("nan"), 1.0)
        raise ValueError("in the middle")
    monkeypatch.setitem(call.sections, "losses", wrong)
    file = tmp_path / "cpu.json"
    assert call("--device", "cpu", "--quick", "--only", "losses,retrieval", "--minutes", 100, "--out", file) == 1
    found = json.loads(file.read_text())["sections"]
    assert "ValueError: in the middle" in found["losses"]["error"] and not found["losses"]["checks"][0]["holds"]
    assert found["retrieval"]["checks"] and "error" not in found["retrieval"]
    printed = capsys.readouterr().out
    assert "FAILS" in printed and "losses broke: ValueError: in the middle" in printed


def test_left_out(call, tmp_path, capsys):
    file = tmp_path / "cpu.json"
    assert call("--device", "cpu", "--quick", "--minutes", 0, "--out", file) == 0
    found = json.loads(file.read_text())
    assert found["left_out"] == [*call.sections] and not found["sections"]
    assert "left out after 0 minutes: losses, kernels" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_no_card(tmp_path, call, capsys):
    assert call("--out", tmp_path / "none.json") is None
    assert capsys.readouterr().out.startswith("No CUDA card here") and not [*tmp_path.iterdir()]
