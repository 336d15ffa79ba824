"The command line: exit codes, messages without tracebacks"
import json
import re
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from medclip_nb.cli import doctor as diagnosis
from medclip_nb.cli import main as cli
from medclip_nb.core import InputError
from medclip_nb.models import load_model

PARAMETERS = '''n: int = 5  # How many
name: str = "a"  # Kept as text
data_root: str  # Where the data are
out_dir: str = "out"'''
SAVE = '''import json, pathlib
if n > 5:
    from medclip_nb.core import InputError
    raise InputError("n is above 5")
1 / n
metrics = {"n": {"value": n, "low": None, "high": None, "n": 1}}
text = json.dumps({"schema": 1, "task": "stub", "metrics": metrics, "details": {"name": name}})
_ = pathlib.Path(out_dir, "metrics.json").write_text(text)'''


@pytest.fixture(scope="module")
def stub(make_template, tmp_path_factory):
    return str(make_template(tmp_path_factory.mktemp("templates") / "stub.ipynb", PARAMETERS, SAVE))


def call(*args, code=0):
    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def test_help_names_every_verb(command):
    done = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    for verb in ("run", "suite", "compare", "params", "doctor", "--version"): assert verb in done.stdout
    for verb in ("run", "suite", "compare", "params", "doctor"): assert "Usage" in call(verb, "--help")
    assert call("--version").startswith("medclip-nb 0.")


def test_run(stub, tmp_path):
    (tmp_path / "p.yaml").write_text("n: 2\ndata_root: here\n")
    out = tmp_path / "run"
    text = call("run", stub, "-f", tmp_path / "p.yaml", "-p", "n=3", "-p", "name=007", "--out", out)
    assert "n  3" in text and "report.html" in text
    found = json.loads((out / "metrics.json").read_text())
    assert found["metrics"]["n"]["value"] == 3 and found["details"]["name"] == "007"
    assert call("compare", tmp_path, "--csv",
                tmp_path / "t.csv").split()[:9] == "run task dataset model metric value low high n".split()
    assert (tmp_path / "t.csv").read_text().splitlines()[1] == "run,stub,,,n,3,,,1,,,,,n 1"


def test_run_that_fails(stub, tmp_path):
    out = tmp_path / "run"
    assert call("run", stub, "-p", "data_root=x", "-p", "n=6", "--out", out, code=2).endswith("error: n is above 5\n")
    assert "ZeroDivisionError" in call("run", stub, "-p", "data_root=x", "-p", "n=0", "--out", out, code=1)
    assert not out.exists()


@pytest.mark.parametrize("args, message", [
    (["-p", "m=1"], "unknown parameter 'm'"), (["-p", "n=x"], "'n' must be int, not str 'x'"),
    (["-p", "n"], "-p 'n' is not name=value"),
    ([], "'data_root' (str) has to be given: Where the data are"),
    (["-f", "nowhere.yaml"], "nowhere.yaml cannot be read"), (["--bad"], "--bad")])
def test_mistakes_end_with_2(stub, tmp_path, args, message):
    assert message in call("run", stub, *args, "--out", tmp_path / "run", code=2)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_there_is_no_name(tmp_path, monkeypatch):
    "Of a model: neither before a kernel starts nor where it is loaded are architectures listed"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports").mkdir()
    Image.new("L", (4, 4)).save("a.png")
    (tmp_path / "t.csv").write_text("image,split\na.png,test\n")
    said = "there is no such folder; reports holds no 'x'."
    assert f"model='reports/x/checkpoint': {said}" in call("run", "zero_shot", "-p", "model=reports/x/checkpoint",
                                                           code=2)
    embed = ("embed", "csv", "t.csv", "--out", "e.npz", "--check", "none", "--model")
    assert f"model='reports/x/checkpoint': {said}" in call(*embed, "reports/x/checkpoint", code=2)
    assert "there is no such folder; the current folder holds no 'runs'" in call(*embed, "./runs/mine", code=2)
    assert "model='ViT-B-33/openai': no such folder or name. Did you mean" in call(*embed, "ViT-B-33/openai", code=2)
    with pytest.raises(InputError, match=f"model 'reports/x/checkpoint': {said}"): load_model("reports/x/checkpoint")
    with pytest.raises(InputError, match="Unknown model 'ViT-B-33/openai'. Did you mean"): load_model("ViT-B-33/openai")


def test_a_folder_after_the_template_is_what_it_reads(stub, tmp_path):
    call("run", stub, "my data", "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["parameters"]["data_root"] == "my data"
    (tmp_path / "empty").mkdir()
    none = call("run", "compare", tmp_path / "empty", "--out", tmp_path / "compared", code=2)
    assert "no run with metrics" in none and str(tmp_path / "empty") in none
    both = call("run", stub, "here", "-p", "data_root=there", "--out", tmp_path / "both", code=2)
    assert "'here' after the template is its data_root, which -p gives too. Leave one out." in both


def test_other_mistakes_end_with_2(tmp_path):
    (tmp_path / "bad.yaml").write_text("runs: [{name: a, template: zero}]")
    assert "no template 'zero'" in call("suite", tmp_path / "bad.yaml", code=2)
    assert "no suite 'nothing'" in call("suite", "nothing", code=2)
    assert "no run with metrics" in call("compare", tmp_path, code=2)
    assert "no template" in call("params", "nothing", code=2)


@pytest.mark.parametrize(("words", "message"), [
    ("rank x.png --texts a --precision fp31", "Unknown precision 'fp31'. Did you mean 'fp32'"),
    ("attend x.png --texts a --device gpu", "Unknown device 'gpu'. Did you mean 'cpu'"),
    ("classify x.png --classes a b --model startr", "Did you mean 'starter'"),
    ("embed csv x.csv --model startr", "Did you mean 'starter'"),
    ("init project --model startr", "Did you mean 'starter'"),
    ("export run --to onnx --out made", "Unknown layout 'onnx'. There is: 'card', 'huggingface', 'open_clip'."),
    ("run finetune -p texts=captions --out made", "texts='captions'. Did you mean 'caption'?"),
    ("run zero_shot -p precision=fp31 --out made", "precision='fp31'. Did you mean 'fp32'"),
])
def test_a_wrong_word_is_told_at_once(words, message, tmp_path):
    "Without torch, whose import alone takes longer"
    code = "import sys; sys.modules['torch'] = None; from medclip_nb.cli import app; app()"
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and message in done.stderr, done.stderr


def test_layouts_of_an_export_are_those_of_the_library():
    from medclip_nb.models.exports import EXPORT_LAYOUTS
    for layout in EXPORT_LAYOUTS:
        assert "Unknown layout" not in call("export", "nowhere", "--to", layout, "--out", "x", code=2)


def test_parameters_are_listed(stub):
    lines = call("params", stub).splitlines()
    assert lines == call("run", stub, "--list").splitlines()
    assert [line.split()[:3] for line in lines] == [["n", "int", "5"], ["name", "str", "'a'"],
                                                    ["data_root", "str", "(required)"]]


def test_parameters_are_listed_as_they_are_set(stub, tmp_path):
    (tmp_path / "own.yaml").write_text("n: 3\nname: b\n")
    for verb in (("params", stub), ("run", stub, "--list")):
        lines = call(*verb, "-f", tmp_path / "own.yaml", "-p", "name=c").splitlines()
        assert [line.split()[2] for line in lines] == ["3", "'c'", "(required)"]
        assert lines[1].endswith("Kept as text (default: 'a')")
        assert "unknown parameter 'm'" in call(*verb, "-p", "m=1", code=2)
    assert "params TEMPLATE -f FILE" in call("params", "-f", tmp_path / "own.yaml", code=2)
    mri = {line.split()[0]: line.split()[2] for line in call("params", "itemized", "-f", "itemized-mri").splitlines()}
    assert mri["batch_size"] == "256" and float(mri["lr"]) == 1.75e-4


def test_suite(stub, tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(f"runs: [{{name: good, template: {stub}, params: {{data_root: x}}}}, "
                    f"{{name: bad, template: {stub}, params: {{data_root: x, n: 9}}}}]")
    plan = lambda: call("suite", file, "--out", tmp_path, "--dry-run").splitlines()
    unknown = "How long they take is not known: none of them has run here."
    assert [" ".join(line.split()) for line in plan()] == ["good to run", "bad to run", unknown]
    assert ("error: bad: n is above 5" in (text := call("suite", file, "--out", tmp_path, code=1))
            and "good  done" in text)
    assert "good  kept" in call("suite", file, "--out", tmp_path, "--only", "good")
    good, bad = plan()
    assert re.fullmatch("good +kept  .* s the last time", good) and bad.split() == ["bad", "to", "run"]


def test_doctor(monkeypatch):
    found = diagnosis.diagnose()
    assert {"python", "packages", "torch", "torchvision", "devices", "kernel", "free disk"} <= {r[1] for r in found}
    assert [r for r in found if r[0] == "fail" and r[1] not in ("templates",)] == []
    broken = [("fail", "torchvision", "operator torchvision::nms does not exist",
               "a CPU build next to a CUDA build does this")]
    monkeypatch.setattr(diagnosis, "diagnose", lambda: broken)
    assert "-> a CPU build next to a CUDA build" in call("doctor", code=1)
