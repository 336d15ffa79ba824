"Several processes: the loss and every gradient of the global batch, as one process computes them"
from datetime import timedelta

import forks
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from medclip_nb.distributed import average_gradients, gather, gather_ids, global_loss
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
