"Runs in a real local store of MLflow, read back with its own client"
import json
import os
import sys

import pytest
from typer.testing import CliRunner

from medclip_nb.cli.main import app

pytest.importorskip("mlflow")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def call(*words):
    "Exit code and output of the command; a traceback fails the test"
    done = CliRunner().invoke(app, [str(w) for w in words])
    if done.exception and not isinstance(done.exception, SystemExit): raise done.exception
    return done.exit_code, done.output


def write_run(folder, value, template, builds_on=(), history=()):
    folder.mkdir(parents=True, exist_ok=True)
    metric = {"value": value, "low": value - 0.1, "high": None, "n": 50}
    details = {"manifest": "0123456789abcdef", "split": ["test"], "weights": "77"}
    (folder / "metrics.json").write_text(json.dumps({"schema": 1, "task": template, "details": details,
                                                     "metrics": {"items/image_to_text_R@10": metric}}))
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    (folder / "report.html").write_text(f"<p>{value}</p>")
    record = {"template": f"{template}.ipynb", "started": "2026-01-02T03:04:05+00:00", "seconds": 12.5, "code": "c0de",
              "commit": "abc", "parameters": {"dataset": "d", "model": "m", "ks": [1, 10], "long": "x" * 7000},
              "builds_on": dict.fromkeys(builds_on, "1"), "costs": {"memory": 5, "device": "cpu"}}
    (folder / "run.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "A folder with two runs in a store, and what the command said"
    runs = tmp_path_factory.mktemp("runs") / "study"
    write_run(runs / "a-test", 0.5, "retrieval", builds_on=["train"])
    write_run(runs / "train", 0.4, "finetune", history=[{"epoch": e, "train_loss": 3 - e, "valid_R@10": e / 10}
                                                        for e in (1, 2)])
    code, said = call("compare", runs, "--mlflow")
    assert code == 0, said
    return runs, said


def client_of(runs):
    from mlflow import MlflowClient
    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("study").experiment_id])
    return client, {run.info.run_name: run for run in found}


def test_a_store_holds_what_the_runs_hold(store):
    runs, said = store
    assert "2 run(s) logged, 0 already there: sqlite:///" in said
    client, found = client_of(runs)
    assert set(found) == {"a-test", "train"}
    test, train = found["a-test"], found["train"]
    assert {k: v for k, v in test.data.metrics.items() if k.startswith("items")} == {
        "items/image_to_text_R_at_10": 0.5, "items/image_to_text_R_at_10.low": 0.4}
    assert test.data.metrics["cost/memory"] == 5 and test.data.metrics["cost/seconds"] == 12.5
    assert test.data.params["ks"] == "[1, 10]" and test.data.params["long"].endswith("(see run.json)")
    tags = {"dataset": "d", "fingerprint": "0123456789abcdef", "split": "test", "model": "m", "code": "c0de",
            "commit": "abc", "builds_on": "train", "mlflow.parentRunId": train.info.run_id}
    assert tags.items() <= test.data.tags.items()
    assert test.info.status == "FINISHED" and test.info.end_time - test.info.start_time == 12500
    steps = client.get_metric_history(train.info.run_id, "epoch/valid_R_at_10")
    assert [(m.step, m.value) for m in steps] == [(1, 0.1), (2, 0.2)]
    files = {f.path for f in client.list_artifacts(test.info.run_id)}
    assert files == {"report.html", "metrics.json", "history.jsonl", "run.json"}
    copy = client.download_artifacts(test.info.run_id, "report.html")
    assert open(copy).read() == "<p>0.5</p>"


def test_the_same_command_logs_nothing_twice(store):
    runs, _ = store
    code, said = call("compare", runs, "--mlflow")
    assert code == 0 and "0 run(s) logged, 2 already there" in said
    write_run(runs / "a-test", 0.7, "retrieval", builds_on=["train"])
    code, said = call("compare", runs, "--mlflow", runs / "mlflow.db")
    assert code == 0 and "1 run(s) logged, 1 already there" in said, "a run that was executed anew is another"
    client, _ = client_of(runs)
    found = client.search_runs([client.get_experiment_by_name("study").experiment_id])
    assert sorted(run.info.run_name for run in found) == ["a-test", "a-test", "train"]
    assert len({run.data.tags["medclip_nb.identity"] for run in found}) == 3


def test_without_mlflow_the_message_has_the_remedy(tmp_path, monkeypatch):
    write_run(tmp_path / "runs" / "one", 0.5, "retrieval")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    code, said = call("compare", tmp_path / "runs", "--mlflow")
    assert code == 2 and "pip install 'medclip_nb[mlflow]'" in said and not (tmp_path / "runs" / "mlflow.db").exists()


def test_a_store_that_cannot_be_used_is_one_message(tmp_path):
    write_run(tmp_path / "runs" / "one", 0.5, "retrieval")
    (tmp_path / "text.db").write_text("no database")
    code, said = call("compare", tmp_path / "runs", "--mlflow", tmp_path / "text.db")
    assert code == 2 and "MLflow cannot write there" in said and (tmp_path / "text.db").read_text() == "no database"
