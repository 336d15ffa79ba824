"""Several processes: the loss and every gradient of the global batch, as one process computes them, and runs of
templates through the command"""
import json
import os
import re
import signal
import socket
import subprocess
import time
from datetime import timedelta

import forks
import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from test_training import tiny
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from medclip_nb.core import InputError, pick_device
from medclip_nb.distributed import average_gradients, gather, gather_ids, global_loss
from medclip_nb.experiments import environment
from medclip_nb.losses import clip_loss, positives_of, prompt_loss, siglip_loss, soft_clip_loss
from medclip_nb.trainers import cached_step, in_chunks

TOTAL = 12
PARTS = {"equal": {2: (6, 6), 3: (4, 4, 4)}, "uneven": {2: (7, 5), 3: (6, 1, 5)}, "empty": {2: (0, 12), 3: (5, 7, 0)}}
LOSSES = ("clip", "clip_ids", "siglip", "soft", "prompts")
WAYS = ("ddp", "ddp_chunks", "average", "average_chunks")


class Towers(nn.Module):
    "A CLIP model as small as they get: convolution, embedding, layer norms, scale and bias"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Flatten(), nn.LayerNorm(32), nn.Linear(32, 6))
        self.text = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 6))
        self.image.to(memory_format=torch.channels_last)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.6)), nn.Parameter(torch.tensor(-3.0))

    def forward(self, images, tokens, chunk):
        return in_chunks(self.image, images, chunk), in_chunks(self.text, tokens,
                                                               chunk), self.logit_scale.exp(), self.logit_bias


def batch():
    make = torch.Generator().manual_seed(1)
    images = torch.randn(TOTAL, 3, 8, 8, generator=make).to(memory_format=torch.channels_last)
    return images, torch.randint(20, (TOTAL, 4), generator=make), torch.tensor([0, 1, 1, 2, 0, 3, 4, 5, 1, 3, 6, 7])


def loss_of(name, model, scale, bias):
    "A loss of global features and ids"
    prompts = torch.arange(32).view(8, 4) % 20
    return {"clip": lambda v, t, ids: clip_loss(v, t, scale) + 0 * bias,
            "clip_ids": lambda v, t, ids: clip_loss(v, t, scale, 0.7, ids) + 0 * bias,
            "siglip": lambda v, t, ids: siglip_loss(v, t, scale, bias, ids),
            "soft": lambda v, t, ids: soft_clip_loss(v, t, scale, positives_of(labels=ids, soft=0.3), 0.6) + 0 * bias,
            "prompts": lambda v, t, ids: prompt_loss(v, model.text(prompts), ids, scale, torch.arange(1.0, 9))
            + 0 * (bias + t.sum())}[name]


def step(name, way, part=slice(None)):
    "Loss and gradients of this process's part of the batch"
    model, (images, tokens, ids) = Towers(), (x[part] for x in batch())
    chunk = 2 if way.endswith("chunks") else 0
    if way.startswith("ddp"):
        wrapped = DistributedDataParallel(model)
        v, t, scale, bias = wrapped(images, tokens, chunk)
        loss = global_loss(loss_of(name, model, scale, bias), v, t, ids=ids)
        loss.backward()
    else:
        loss_fn = loss_of(name, model, model.logit_scale.exp(), model.logit_bias)
        loss = cached_step(model.image, model.text, images, tokens, lambda v, t: global_loss(loss_fn, v, t, ids=ids),
                           chunk, model=model)
        average_gradients(model.parameters())
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def gathering():
    "Rows in the order of the ranks, and no deadlock where one process has nothing that needs a gradient"
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = torch.full((rank, 2), float(rank), requires_grad=rank == 1)
    everyone = gather(rows)
    (everyone.sum() * (rank + 1)).backward()
    assert everyone[:, 0].tolist() == [r for r in range(world) for _ in range(r)]
    if rank == 1: assert torch.equal(rows.grad, torch.full((1, 2), world * (world + 1) / 2))
    assert gather_ids(torch.tensor([rank] * (world - rank))).tolist() == [r for r in range(world)
                                                                          for _ in range(world - r)]
    with torch.no_grad(): assert not gather(rows).requires_grad
    unused, half = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    if rank == 0: half.grad = torch.ones(2)
    average_gradients([unused, half])
    assert unused.grad is None and torch.allclose(half.grad, torch.full((2,), 1 / world))


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
                            timeout=timedelta(seconds=60))
    gathering()
    found = {}
    for kind, parts in PARTS.items():
        start = sum(parts[world][:rank])
        part = slice(start, start + parts[world][rank])
        for name in LOSSES:
            for way in WAYS: found[kind, name, way] = step(name, way, part)
        if kind == "uneven":
            model, (images, tokens, _) = Towers(), (x[part] for x in batch())
            found["local"] = clip_loss(model.image(images), model.text(tokens), model.logit_scale.exp()).item()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def answers(request, tmp_path_factory):
    "What each process found"
    folder = tmp_path_factory.mktemp("processes")
    forks.run_together(worker, request.param, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("way", WAYS)
def test_the_gradients_are_those_of_one_process(answers, name, way):
    loss, gradients = step(name, "average")
    assert gradients["logit_scale"].abs() > 1e-3
    for kind in PARTS:
        for found_loss, found in (answer[kind, name, way] for answer in answers):
            assert found_loss == pytest.approx(loss, abs=1e-5)
            assert found.keys() == gradients.keys()
            for key in gradients:
                torch.testing.assert_close(found[key], gradients[key], atol=1e-5, rtol=0,
                                           msg=lambda m: f"{kind}, {key}: {m}")


def test_local_negatives_are_another_loss(answers):
    "What the above is not: each process contrasting its own pairs only"
    loss, _ = step("clip", "average")
    assert all(answer["local"] < loss - 0.1 for answer in answers)


# Runs of templates

RESULTS = ("report.ipynb", "report.html", "metrics.json", "history.jsonl")
TRAINING = {"dataset": "json-pairs", "device": "cpu", "epochs": 2, "batch_size": 7, "lr": 1e-3, "n_boot": 20,
            "save_every": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pictures with captions and items, of which validation has one, fewer than processes; and a model whose results
    do not depend on how a batch is divided"""
    folder, rng, rows = tmp_path_factory.mktemp("made"), np.random.default_rng(0), []
    for i in range(32):
        Image.fromarray(rng.integers(0, 255, (32, 32), np.uint8)).save(folder / f"{i}.png")
        items = [f"Finding {i % 4}.", f"Place {i % 3}."][:1 + i % 2]
        rows.append({"image": f"{i}.png", "caption": " ".join(items), "items": items, "group": f"g{i}",
                     "split": ["train", "train", "valid", "test"][i % 4]})
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "model").mkdir()
    tiny(folder / "model")
    return folder


def words(template, made, out, *more, **params):
    "The arguments of a run"
    given = {**TRAINING, "data_root": made / "rows.json", "model": made / "model", **params}
    return ["run", template, *(x for k, v in given.items() for x in ("-p", f"{k}={v}")), "--out", str(out), *more]


def finished(arguments, code=0, **options):
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def results(folder): return {name: (folder / name).read_bytes() for name in RESULTS}


@pytest.fixture(scope="module")
def two(command, made, tmp_path_factory):
    "A run of two processes, and what it said"
    out = tmp_path_factory.mktemp("two") / "finetune"
    return out, finished([command, *words("finetune", made, out, "--processes", "2")])


def agrees(command, made, template, out, done, tmp_path):
    "One report, whose numbers are those of one process, and one that prints"
    finished([command, *words(template, made, tmp_path / "alone" / template)])
    assert done.stdout.count("report: ") == 1 and done.stderr.count(f"{template}: done in") == 1
    assert sorted(p.name for p in out.parent.iterdir()) == [template]
    record = json.loads((out / "run.json").read_text())
    assert (record["processes"], record["threads"]) == (2, 1)
    found, expected = results(out), results(tmp_path / "alone" / template)
    history = lambda files: [json.loads(line) for line in files["history.jsonl"].splitlines()]
    assert history(found) == [pytest.approx(row, rel=1e-4) for row in history(expected)]
    metrics, others = (json.loads(files["metrics.json"])["metrics"] for files in (found, expected))
    assert metrics.keys() == others.keys()
    for name, value in metrics.items(): assert value == pytest.approx(others[name], rel=1e-4, nan_ok=True), name


def test_two_processes_are_asked_for(command, made, two, tmp_path):
    agrees(command, made, "finetune", *two, tmp_path)


def test_accelerate_launches_the_command(command, made, tmp_path):
    out = tmp_path / "two" / "itemized"
    done = finished([forks.forked(), "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu",
                     "--num_processes", "2", "--main_process_port", "0", "-m", "medclip_nb.cli",
                     *words("itemized", made, out)])
    agrees(command, made, "itemized", out, done, tmp_path)


def test_two_machines(made, two, tmp_path):
    "The second machine knows neither the folder of the run nor that of its state, and writes nothing"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    machine = [forks.forked(), "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
               "--master_addr", "127.0.0.1", "--master_port", str(port), "--node_rank"]
    rest = ["-m", "medclip_nb.cli", *words("finetune", made, tmp_path / "out")]
    second = subprocess.Popen([*machine, "1", *map(str, rest)], stdout=subprocess.PIPE, text=True)
    done = finished([*machine, "0", *rest])
    assert second.wait(60) == 0 and second.stdout.read() == "" and "report: " in done.stdout
    assert json.loads((tmp_path / "out" / "run.json").read_text())["processes"] == 2
    assert (tmp_path / "out" / "history.jsonl").read_bytes() == (two[0] / "history.jsonl").read_bytes()


@pytest.fixture(scope="module")
def stub(make_template, tmp_path_factory):
    "A template that fails, dies or waits on one rank while the other waits for it"
    body = """import os, pathlib, signal, time
rank = int(os.environ["RANK"])
pathlib.Path(where, f"started-{rank}").write_text(str(os.getpid()))
while len(list(pathlib.Path(where).glob("started-*"))) < 2: time.sleep(0.05)
if rank == on or on == 2:
    if mode == "error": raise ValueError("no such thing")
    if mode == "input":
        from medclip_nb.core import InputError
        raise InputError("a.csv, row 3: no image. Remove the row.")
    if mode == "die": os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60 if mode else 0)"""
    parameters = 'mode: str = ""\non: int = 1\nepochs: int = 1\nwhere: str = ""\nout_dir: str = "out"'
    return make_template(tmp_path_factory.mktemp("templates") / "stub.ipynb", parameters, body)


def started(command, stub, folder, **params):
    "A run of two processes in a folder, which also holds what it leaves behind for a moment"
    given = [x for k, v in {"where": folder, **params}.items() for x in ("-p", f"{k}={v}")]
    return subprocess.Popen([command, "run", str(stub), *given, "--out", str(folder / "run"), "--processes", "2"],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "TMPDIR": str(folder)})


def gone(folder):
    "Whether both processes of a run are over, and those who stand for them"
    numbers = [int(p.read_text()) for p in folder.glob("started-*")]
    end = time.monotonic() + 20
    while time.monotonic() < end:
        left = [n for n in numbers if psutil.pid_exists(n) and psutil.Process(n).status() != "zombie"]
        if not left: return len(numbers) == 2
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("mode, on, code, said", [
    ("error", 1, 1, "error: ValueError: no such thing (process 1 of 2)\nin this cell:\n    import os"),
    ("error", 0, 1, "error: ValueError: no such thing\nin this cell:\n    import os"),
    ("die", 1, 1, "error: Process 1 of 2 died; most likely it ran out of memory"),
    ("input", 2, 2, "error: a.csv, row 3: no image. Remove the row.\n")])
def test_the_end_of_one_is_the_end_of_all(command, stub, tmp_path, mode, on, code, said):
    begun = time.monotonic()
    process = started(command, stub, tmp_path, mode=mode, on=on)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == code and said in errors and errors.count("error: ") == 1 and "Traceback" not in errors
    assert gone(tmp_path) and time.monotonic() - begun < 50
    left = {p.name for p in tmp_path.iterdir()} - {"started-0", "started-1"}
    assert left == ({"run.failed"} if code == 1 else set())


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGKILL, -9)],
                         ids=["Ctrl-C", "kill", "kill -9"])
def test_no_process_is_left(command, stub, tmp_path, number, code):
    process = started(command, stub, tmp_path, mode="wait")
    end = time.monotonic() + 60
    while len(list(tmp_path.glob("started-*"))) < 2 and time.monotonic() < end: time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (code, 128 + number), errors
    assert gone(tmp_path) and not (tmp_path / "run").exists()
    if number == signal.SIGINT: assert errors.count("interrupted") == 1 and "Traceback" not in errors


def test_killed_and_resumed(command, made, two, tmp_path):
    "Two processes, killed in their training and called again, write what two write that nobody stopped"
    out = tmp_path / "finetune"
    call = [str(w) for w in [command, *words("finetune", made, out, "--processes", "2")]]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while not list(out.parent.glob(".partial/finetune.state.*/*/state.pt")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    owner = int(next(out.parent.glob(".partial/finetune.state.*")).name.rpartition(".")[2])
    while psutil.pid_exists(owner) and psutil.Process(owner).status() != "zombie" and time.monotonic() < end:
        time.sleep(0.05) # What stands for the command dies a moment later
    one = finished([*call[:-2], "--resume"], code=2)
    assert "differs in the number of processes, so it cannot be continued" in one.stderr
    finished([*call, "--resume"])
    assert results(out) == results(two[0])


def test_a_suite_trains_with_several_processes(command, made, tmp_path):
    "What trains takes them all, what evaluates takes one, and another number makes what was trained out of date"
    params = {"device": "cpu", "model": str(made / "model"), "n_boot": 20, "dataset": "json-pairs",
              "data_root": str(made / "rows.json")}
    suite = {"defaults": params, "runs": [
        {"name": "train", "template": "finetune", "params": {"epochs": 1, "batch_size": 7}},
        {"name": "look", "template": "retrieval"}]}
    (tmp_path / "two.yaml").write_text(json.dumps(suite))
    call = [command, "suite", tmp_path / "two.yaml", "--out", tmp_path]
    finished([*call, "--processes", "2"])
    used = {name: json.loads((tmp_path / "two" / name / "run.json").read_text())["processes"]
            for name in ("train", "look")}
    assert used == {"train": 2, "look": 1}
    lines = lambda *more: finished([*call, "--dry-run", *more]).stdout.splitlines()
    planned = lambda *more: [re.split("  +", line)[1] for line in lines(*more)]
    assert planned("--processes", "2") == ["kept", "kept"] and planned() == ["to run", "kept"]


def test_wrong_numbers_of_processes(command, made, tmp_path):
    alone = finished([command, "run", "data_audit", "--processes", "2"], code=2, cwd=tmp_path)
    assert "data_audit trains nothing, so one process runs it: leave out --processes" in alone.stderr
    many = finished([command, *words("finetune", made, tmp_path / "out", "--processes", "2", batch_size=1)], code=2)
    assert "A batch of 1 cannot be shared by 2 processes" in many.stderr
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    twice = finished([command, *words("finetune", made, tmp_path / "out", "--processes", "3")], code=2,
                     env={**os.environ, **ranks})
    assert "A launcher has started 2 processes already: leave out --processes" in twice.stderr
    silent = finished([command, *words("finetune", made, tmp_path / "out")],
                      env={**os.environ, **ranks, "RANK": "1", "LOCAL_RANK": "1"})
    assert silent.stdout + silent.stderr == "" and list(tmp_path.iterdir()) == []
    far = {**ranks, "LOCAL_WORLD_SIZE": "1"}
    suite = finished([command, "suite", "starter", "--out", tmp_path], code=2, env={**os.environ, **far})
    assert "A suite runs on one machine" in suite.stderr


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert pick_device("auto") == torch.device("cuda")
    with environment({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}):
        assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 1) and taken == [1, 1]
        assert pick_device("cpu") == torch.device("cpu")
    with (environment({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}),
          pytest.raises(InputError, match="3 processes need a GPU each, and this machine has 2")): pick_device("auto")
