"First contact: the demo, a project for one's own data, completion and the pages of help; from the wheel too"
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from medclip_nb.cli import completion
from medclip_nb.cli import demo as demonstration
from medclip_nb.cli.help import HEADINGS, WITHIN
from medclip_nb.cli.main import app
from medclip_nb.core import InputError
from medclip_nb.datasets import list_datasets, load_manifest, make_squares
from medclip_nb.evaluators.prompts import list_packs
from medclip_nb.experiments import (
    check_parameters,
    list_suites,
    look_at,
    make_project,
    parameter_files,
    template_parameters,
    templates,
)
from medclip_nb.models import open_clip_tags

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"data_root": "data/demo", "data_options": {"n_studies": [6, 3, 6], "n_slices": 4}, "epochs": 1,
         "batch_size": 8, "n_boot": 20}


def call(*words, code=0):
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == code, done.output
    return done.output


def test_demo(tmp_path, monkeypatch):
    "One report with three numbers; kept where it is there; nothing of the user's is replaced"
    monkeypatch.chdir(tmp_path)
    assert check_parameters("finetune", demonstration.demo_parameters())["data_root"] == "data/demo"
    monkeypatch.setattr(demonstration, "demo_parameters", lambda: SMALL)
    said = call("demo")
    numbers = re.findall(r"first(?: 10)? +(\d\.\d{3}) +(\d\.\d{3}) \[(\d\.\d{3}), (\d\.\d{3})\] +(\d\.\d{3})", said)
    found = json.loads(Path("reports/demo/metrics.json").read_text())["metrics"]
    assert [float(n[1]) for n in numbers] == [round(found[name]["value"], 3) for name in demonstration.SHOWN]
    assert [float(n[2]) for n in numbers] == [round(found[name]["low"], 3) for name in demonstration.SHOWN]
    last = said.splitlines()[-1]
    assert last.startswith("report: reports/demo/report.html") and Path("reports/demo/report.html").is_file()
    assert sorted(p.name for p in Path("reports").iterdir()) == ["demo"]
    again = call("demo")
    assert "it was there" in again and again.splitlines()[-2:] != said.splitlines()[-2:]
    for line in re.findall(r"^  (medclip-nb .+?)(?:   .*)?$", said, re.M): parsed(line)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "mine" in call("demo", "--out", "mine", code=2) and (tmp_path / "mine" / "notes.txt").exists()


def parsed(line):
    "What the program makes of a command line; fails for an option or argument that there is not"
    words, command = shlex.split(line)[1:], get_command(app)
    while words and words[0] in getattr(command, "commands", {}): command = command.commands[words.pop(0)]
    return command.make_context(command.name, list(words)).params


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "Tables as people have them: other names, no splits"
    root = tmp_path_factory.mktemp("own")
    rows = pd.DataFrame(make_squares(root / "images")).drop(columns="split")
    rows["image"] = "images/" + rows["image"]
    other = {"image": "Path", "caption": "Report", "label": "tone", "group": "Patient ID"}
    rows.rename(columns=other).assign(sex="f").to_csv(root / "export.csv", index=False)
    items = rows.assign(items=[f"{c} | a plain background" for c in rows["caption"]]).drop(columns=["caption", "label"])
    items.to_csv(root / "items.csv", index=False)
    numbers = rows[["image"]].assign(label=(rows["label"] == "bright").astype(int))
    numbers.to_csv(root / "numbers.csv", index=False)
    for row in rows[:24].itertuples():
        (root / "classes" / row.label).mkdir(parents=True, exist_ok=True)
        shutil.copy(root / row.image, root / "classes" / row.label)
    return root


@pytest.mark.parametrize(("given", "runs", "labels"), [
    (["--table", "export.csv"], ["audit", "zero-shot", "probe", "retrieval", "finetune", "probe-tuned", "compare"],
     ["tone"]),
    (["--table", "items.csv"], ["audit", "items", "compare"], []),
    (["--table", "numbers.csv"], ["audit", "probe", "compare"], ["label"]),
    (["--images", "classes"], ["audit", "zero-shot", "probe", "compare"], ["label"]),
    (["--images", "images"], ["audit"], []),
    ([], ["audit", "zero-shot", "probe", "retrieval", "finetune", "probe-tuned", "items", "compare"], ["label"])])
def test_project_fits_the_data(own, tmp_path, monkeypatch, given, runs, labels):
    "What is there decides about the suite, whose data are read as they were looked at; each printed command is valid"
    monkeypatch.chdir(own)
    said = call("init", tmp_path / "p", *given, "--model", "starter")
    assert "checked: 0 errors" in said and said.splitlines()[-2] == f"  cd {tmp_path / 'p'}"
    suite = yaml.safe_load((tmp_path / "p" / "suite.yaml").read_text())
    assert [r["name"] for r in suite["runs"]] == runs
    assert suite["runs"][0].get("params", {}).get("labels", []) == labels
    monkeypatch.chdir(tmp_path / "p")
    commands = re.findall(r"^(medclip-nb .*?)\s+# ", Path("README.md").read_text(), re.M)
    assert len(commands) == 4 and said.splitlines()[-1].strip() == commands[1]
    for line in commands: parsed(line)
    assert "0 errors" in call(*shlex.split(commands[0])[1:])
    planned = call(*shlex.split(commands[1])[1:], "--dry-run")
    assert [line.split()[0] for line in planned.splitlines() if line.endswith("to run")] == runs


def test_project_end_to_end(own, tmp_path, command):
    "init, validate, dry run and the scale tiny, as they are printed"
    made = subprocess.run([command, "init", tmp_path / "p", "--table", "export.csv"], cwd=own, capture_output=True,
                          text=True)
    assert made.returncode == 0, made.stderr
    for line in re.findall(r"^(medclip-nb .*?)\s+# ", (tmp_path / "p" / "README.md").read_text(), re.M)[:2]:
        done = subprocess.run([command, *shlex.split(line)[1:]], cwd=tmp_path / "p", capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "p" / "reports" / "p-tiny" / "index.html").is_file()
    told = json.loads((tmp_path / "p" / "reports" / "p-tiny" / "probe" / "run.json").read_text())["parameters"]
    assert told["data_options"]["columns"] == {"caption": "Report", "group": "Patient ID", "image": "Path"}


def test_project_refuses(own, tmp_path, monkeypatch):
    "What is there stays, and what cannot be read leaves nothing"
    monkeypatch.chdir(own)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "README.md").write_text("# Mine")
    assert "README.md: is there already, and stays" in call("init", tmp_path / "p", code=2)
    assert [p.name for p in (tmp_path / "p").iterdir()] == ["README.md"]
    assert "not both" in call("init", tmp_path / "q", "--table", "export.csv", "--images", "images", code=2)
    assert "no such file" in call("init", tmp_path / "q", "--table", "none.csv", code=2)
    (own / "bare.csv").write_text("a,b\n1,2\n3,4\n")
    assert "no column 'image'" in call("init", tmp_path / "q", "--table", "bare.csv", code=2)
    (own / "nothing").mkdir()
    assert "no image in it or below it" in call("init", tmp_path / "q", "--images", "nothing", code=2)
    assert not (tmp_path / "q").exists()
    assert look_at("csv", "export.csv", {"columns": {"image": "Path", "label": "tone"}}).labels == ["label"]
    with pytest.raises(InputError, match="is a file"): make_project(own / "export.csv")


def test_examples_of_the_help_are_valid(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    lines = [line for part in (*HEADINGS.values(), *WITHIN.values()) for line in part.values()]
    for line in lines: parsed(line)
    for name, line in [pair for part in HEADINGS.values() for pair in part.items()]:
        assert shlex.split(line)[:2] == ["medclip-nb", name]
    commands = get_command(app).commands
    assert {*commands} == {name for part in HEADINGS.values() for name in part}, "the help lists every command"
    for group, part in WITHIN.items(): assert {*commands[group].commands} == {*part}
    page = call("--help")
    places = [page.index(f"\n{heading}:\n") for heading in HEADINGS]
    assert places == sorted(places) and "\x1b" not in page and max(map(len, page.splitlines())) <= 80


def test_names_that_are_completed():
    "The same as the library lists"
    from medclip_nb.models import PUBLISHED, STAND_INS
    from medclip_nb.models.starter import STARTERS
    assert completion.dataset_names() == sorted(list_datasets()["name"])
    assert {name.partition("@")[0] for name in completion.pack_names()} == set(list_packs()["name"])
    assert completion.template_names() == templates() and completion.suite_names() == sorted(list_suites())
    assert completion.setting_names() == parameter_files()
    assert completion.OWN_MODELS == (*STARTERS, *PUBLISHED, *STAND_INS)
    import open_clip
    for name in ("ViT-B-32", "RN50", "coca_ViT-L-14"):
        assert open_clip_tags(name) == open_clip.list_pretrained_tags_by_model(name)
    assert set(open_clip.list_models()) <= {*completion.model_names()}


def complete(program, line, cwd):
    "What bash is given for a line that is typed"
    words = line.split(" ")
    env = {**os.environ, "_MEDCLIP_NB_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    return subprocess.run([program], cwd=cwd, env=env, capture_output=True, text=True).stdout


def test_completion(installed, tmp_path):
    "Of an installed command, in a shell, without PyTorch"
    (tmp_path / "reports" / "mine" / "checkpoint").mkdir(parents=True)
    (tmp_path / "reports" / "mine" / "run.json").touch()
    for line, expected in [("medclip-nb run lin", ["linear_probe"]), ("medclip-nb data info kath", ["kather"]),
                           ("medclip-nb packs kather@", ["kather@1"]), ("medclip-nb suite starter-", ["starter-more"]),
                           ("medclip-nb compare rep", ["reports", "reports/mine"]),
                           ("medclip-nb rank a.png --model reports/", ["reports/mine/checkpoint"]),
                           ("medclip-nb run finetune -p epo", ["epochs="]), ("medclip-nb de", ["demo"])]:
        assert complete(installed, line, tmp_path).split() == expected, line
    code = ("import sys, os; os.environ['_MEDCLIP_NB_COMPLETE'] = 'complete_bash'; os.environ['COMP_CWORD'] = '4'\n"
            "os.environ['COMP_WORDS'] = 'medclip-nb rank a.png --model ViT-B-32/op'\n"
            "from medclip_nb.cli.main import app\n"
            "try: app(prog_name='medclip-nb')\n"
            "except SystemExit: pass\n"
            "print({'torch', 'pandas', 'numpy', 'open_clip'} & set(sys.modules) or 'light')")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["ViT-B-32/openai", "light"], done.stdout + done.stderr


@pytest.mark.parametrize("shell, more, shown", [
    ("zsh", {}, """_arguments '*: :(("{}"))'"""), ("fish", {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}, "{}")])
def test_completion_in_other_shells(installed, tmp_path, shell, more, shown):
    for line, expected in [("medclip-nb run lin", "linear_probe"), ("medclip-nb suite starter-", "starter-more")]:
        env = {**os.environ, "_MEDCLIP_NB_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": line, **more}
        done = subprocess.run([installed], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.stdout.strip() == shown.format(expected), done.stdout + done.stderr


def test_the_wheel_away_from_the_repository(tmp_path):
    "Built, unpacked and called elsewhere: completion, a project with its dry run, and the demo's settings"
    source = tmp_path / "source"
    for name in ("medclip_nb", "nbs/experiments", "data/cards", "data/prompts"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.py", "settings.ini", "pyproject.toml"): shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-lib", tmp_path / "installed"], cwd=source,
                   check=True, capture_output=True)
    shutil.rmtree(source)
    (place := tmp_path / "place").mkdir()
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "COLUMNS": "80"}
    code = f"""import sys
import medclip_nb, medclip_nb.cli.demo as demo
from medclip_nb.cli.main import app
assert medclip_nb.__file__.startswith({str(tmp_path)!r})
demo.demo_parameters = lambda own=demo.demo_parameters: own() | {SMALL!r}
app(sys.argv[1:], prog_name="medclip-nb")"""
    for words in (["init", "mine"], ["demo"], ["params", "finetune", "-f", "demo"]):
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=place, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run([sys.executable, "-c", code, "suite", "suite.yaml", "--scale", "tiny", "--dry-run"],
                          cwd=place / "mine", env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "compare" in done.stdout, done.stderr
    assert (place / "reports" / "demo" / "report.html").is_file()
    assert len(load_manifest("csv", place / "mine" / "example" / "table.csv")) == 48
    assert set(template_parameters("finetune")) > set(demonstration.demo_parameters())


def test_warnings_are_shown_as_before_when_a_command_has_ended():
    import warnings

    from typer.testing import CliRunner

    from medclip_nb.cli.main import app
    before = warnings.showwarning
    assert CliRunner().invoke(app, ["data", "info", "starter"]).exit_code == 0
    assert warnings.showwarning is before


@pytest.mark.parametrize("words, says", [
    (["data_root=t.csv"], "data_root='t.csv' holds data of your own, and no dataset is named"),
    (["dataset=starter", "data_root=t.csv"], "dataset is 'starter', the embedded data"),
    (["dataset=t.csv"], "It is a path: give how to read it as the dataset, such as csv"),
    (["dataset=csv", "data_root=kather"], "give -p dataset=kather -p data_root=FOLDER"),
    (["dataset=csv", "data_root=t.csv"], "Columns with few different values: 'diagnosis'"),
    (["dataset=csv", "data_root=.", "data_options={table: t.csv}"], "Columns with few different values: 'diagnosis'"),
    (["dataset=csv", "data_root=.", "labels=[diagnose]"], "Did you mean 'diagnosis'"),
    (["dataset=csv", "data_root=.", "data_options={train: t.csv}", "labels=[diagnose]"], "Did you mean 'diagnosis'"),
    (["model=ViT-B-32/opneai"], "ViT-B-32 has no weights 'opneai'. Did you mean 'openai'"),
    (["model=vit-b-32/openai"], "did you mean 'ViT-B-32/openai'?"),
    (["model=openai/clip-vit-base-patch32"], "is named 'hf-hub:openai/clip-vit-base-patch32'"),
    (["model=reports/starter/finetune/checkpoint"], "its weights are not; medclip-nb suite starter makes them"),
    (["dataset=" + "x" * 300], "Unknown dataset 'xxx"),
    (["dataset=csv", "data_root=" + "x" * 300], "no such file or folder"),
    (["checkpoint=" + "x" * 300], "no such file or folder"),
    (["checkpoint=reports/mine/a/checkpoint"], "its weights are not; executing it again makes them")])
def test_mistakes_of_a_first_hour_are_told_before_anything_starts(tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    rows = pd.DataFrame({"image": [f"{i}.png" for i in range(6)], "diagnosis": list("aabbab"), "split": "train"})
    rows.to_csv("t.csv", index=False)
    for run in ("starter/finetune", "mine/a"):
        (tmp_path / "reports" / run).mkdir(parents=True)
        (tmp_path / "reports" / run / "run.json").write_text("{}")
    monkeypatch.setattr("medclip_nb.experiments.runs._execute", lambda *_, **__: pytest.fail("a kernel was started"))
    given = [word for one in ["model=starter", *words] for word in ("-p", one)]
    assert says in call("run", "linear_probe", *given, "--out", "out", code=2)
    assert not (tmp_path / "out").exists()


def test_a_data_set_stands_where_its_folder_would(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = call("run", "linear_probe", "kather", "-p", "model=starter", code=2)
    assert "kather is a data set and no folder here" in said
    assert list(tmp_path.iterdir()) == []
