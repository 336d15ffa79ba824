"Itemized losses: many random cases against plain loops, published weights, and several processes against one"
import itertools
from datetime import timedelta

import forks
import pytest
import torch
import torch.distributed as dist
from torch import nn

from medclip_nb.core import InputError
from medclip_nb.distributed import average_gradients
from medclip_nb.losses import (
    ITEM_WEIGHTS,
    draw_token_mask,
    global_itemized_losses,
    item_weights,
    itemized_losses,
    sample_negatives,
    siglip_loss,
)
from medclip_nb.models import POOLING_PREFIXES, TextConditionedPooling, pooling_from
from medclip_nb.trainers import item_batch

close = lambda a, b, atol=1e-7: torch.testing.assert_close(a, b, atol=atol, rtol=1e-7)


def pooling_of(d, heads, seed=0):
    torch.manual_seed(seed)
    pooling = TextConditionedPooling(d, heads).double()
    for p in pooling.parameters(): nn.init.normal_(p, std=0.4)
    return pooling


def by_heads(pooling, text, tokens, keep):
    """One text (d,), one image (l, d), tokens kept by head (heads, l): what is found, and the mean attention (l,), head
    by head"""
    d, heads = pooling.dim, pooling.heads
    e = d // heads
    w, b = pooling.attn.in_proj_weight, pooling.attn.in_proj_bias
    q = w[:d] @ pooling.ln_q(text) + b[:d]
    k = [w[d:2 * d] @ pooling.ln_k(x) + b[d:2 * d] for x in tokens]
    v = [w[2 * d:] @ pooling.ln_v(x) + b[2 * d:] for x in tokens]
    found, mean = [], torch.zeros(len(tokens), dtype=text.dtype)
    for h in range(heads):
        part = slice(h * e, (h + 1) * e)
        exps = [torch.exp(q[part] @ k[n][part] / e**0.5) if keep[h][n] else torch.zeros((), dtype=text.dtype)
                for n in range(len(tokens))]
        total = sum(exps) + 1
        found.append(sum((x / total * v[n][part] for n, x in enumerate(exps)), torch.zeros(e, dtype=text.dtype)))
        mean = mean + torch.stack(exps).detach() / total.detach() / heads
    return pooling.attn.out_proj.weight @ torch.cat(found) + pooling.attn.out_proj.bias, mean


def loops(pooling, v, tokens, t, s, bias, mask, neg, normal, ids, factor, ratio, token_mask, divisor):
    "The four losses, one question at a time"
    (n, k), (_, l, _) = mask.shape, tokens.shape
    cosine = lambda x, y: (x @ y) / (x.norm() * y.norm())
    ask = lambda found, text, y: torch.nn.functional.softplus(-y * (s * cosine(found, text) + bias))
    everything = torch.ones(pooling.heads, l, dtype=torch.bool)

    def same_as_own(i, j, slot):
        return any(mask[i, m] and ids[i, m] == ids[j, slot] != -1 for m in range(k)) if ids is not None else False
    def negative(i, j, slot):
        return (bool(mask[j, slot]) and not (normal is not None and normal[i] and normal[j])
                and not same_as_own(i, j, slot))
    zero = (v.sum() + tokens.sum() + t.sum() + s + bias) * 0
    ila, mps, iis, kta = (zero for _ in range(4))
    for i in range(n):
        asked = ([(j, int(neg[i, j]), -1) for j in range(i)] + [(i, m, 1) for m in range(k)]
                 + [(j, int(neg[i, j]), -1) for j in range(i + 1, n)])
        found, focused = [], []
        for p, (j, slot, _y) in enumerate(asked):
            keep = everything if token_mask is None else token_mask[i, :, p]
            pooled, attention = by_heads(pooling, t[j, slot], tokens[i], keep)
            found.append(pooled)
            top = attention.topk(max(1, int(ratio * l))).indices
            top = top[attention[top] > 0] # what is masked everywhere is no key token
            focused.append(by_heads(pooling, t[j, slot], tokens[i], everything & torch.isin(torch.arange(l), top))[0])
        own = [p for p, (_, slot, y) in enumerate(asked) if y == 1 and mask[i, slot]]
        worst = min(own, key=lambda p: cosine(found[p], t[i, asked[p][1]]).item(), default=None)
        for p, (j, slot, y) in enumerate(asked):
            weight = (bool(mask[i, slot]) if y == 1 else negative(i, j, slot)) * (factor if p == worst else 1)
            ila = ila + weight * ask(found[p], t[j, slot], y) / divisor
            kta = kta + weight * ask(focused[p], t[j, slot], y) / divisor
        for a, b in itertools.product(range(k), range(k)):
            twice = ids is not None and a != b and ids[i, a] == ids[i, b] != -1
            if mask[i, a] and mask[i, b] and not twice:
                iis = iis + ask(found[i + a], t[i, b], 1 if a == b else -1) / (n * k)
        for j, slot in itertools.product(range(n), range(k)):
            if (mask[i, slot] if i == j else negative(i, j, slot)):
                mps = mps + ask(v[i], t[j, slot], 1 if i == j else -1) / (n * k)
    return {"ila": ila, "mps": mps, "iis": iis, "kta": kta}


def case(seed):
    "A random case: sizes from 1 up, any mask, ids, normals, scales that spread logits wide"
    make = torch.Generator().manual_seed(seed)
    pick = lambda *options: options[int(torch.randint(len(options), (1,), generator=make))]
    n, k, l, heads = pick(1, 2, 3, 4), pick(1, 2, 3), pick(1, 2, 5, 8), pick(1, 2)
    d = heads * pick(4, 6)
    rand = lambda *shape: torch.rand(*shape, generator=make)
    mask = rand(n, k) < pick(0.0, 0.5, 0.8, 1.0, 1.0)
    pooling = pooling_of(d, heads, seed)
    features = [torch.randn(*shape, d, generator=make).double() for shape in ((n,), (n, l), (n, k))]
    numbers = [torch.tensor(x).double() for x in (pick(1.0, 14.3, 30.0, 100.0), pick(-10.0, 0.0))]
    token_mask = pick(None, draw_token_mask((n, heads, n + k - 1, l), 0.6, n, generator=make))
    how = dict(neg_index=sample_negatives(mask, make), normal=pick(None, rand(n) < 0.5),
               text_ids=pick(None, torch.randint(-1, 4, (n, k), generator=make)),
               worst_positive_factor=pick(1.0, 1.5, 3.0), key_token_ratio=pick(0.0, 0.1, 0.5, 1.0),
               token_mask=token_mask, divisor=pick("images", "items"))
    return pooling, [*features, *numbers], mask, how


def gradients(value, pooling, inputs):
    return torch.autograd.grad(value, [*inputs, *pooling.parameters()], materialize_grads=True, retain_graph=True)


@pytest.mark.parametrize("seed", range(60))
def test_values_and_gradients_are_the_formulas(seed):
    pooling, inputs, mask, how = case(seed)
    inputs = [x.requires_grad_() for x in inputs]
    (n, k), h = mask.shape, how
    expected = loops(pooling, *inputs, mask, h["neg_index"], h["normal"], h["text_ids"], h["worst_positive_factor"],
                     h["key_token_ratio"],
                     h["token_mask"], n if h["divisor"] == "images" else n + k - 1)
    weights = {"ila": 1.0, "mps": 0.1, "iis": 0.7, "kta": 1.5}
    found = itemized_losses(*inputs[:3], mask, pooling, *inputs[3:], weights=weights, **how)
    for name in ITEM_WEIGHTS: close(found[name], expected[name])
    total = sum(weights[name] * expected[name] for name in ITEM_WEIGHTS)
    close(found["loss"], total)
    assert torch.equal(found["loss"], sum(weights[name] * found[name] for name in ITEM_WEIGHTS))
    for a, b in zip(gradients(found["loss"], pooling, inputs), gradients(total, pooling, inputs)): close(a, b)
    chunked = itemized_losses(*inputs[:3], mask, pooling, *inputs[3:], weights=weights, chunk=2, **how)["loss"]
    for a, b in zip(gradients(chunked, pooling, inputs), gradients(found["loss"], pooling, inputs)): close(a, b, 1e-10)


@pytest.mark.parametrize("seed", range(60, 80))
def test_each_term_alone(seed):
    pooling, inputs, mask, how = case(seed)
    together = itemized_losses(*inputs[:3], mask, pooling, *inputs[3:], **how)
    for name in ITEM_WEIGHTS:
        alone = itemized_losses(*inputs[:3], mask, pooling, *inputs[3:], weights={name: 0.5}, **how)
        close(alone[name], together[name])
        close(alone["loss"], 0.5 * together[name])
        assert all(alone[other] == 0 for other in ITEM_WEIGHTS if other != name)


def test_what_has_no_weight_is_not_computed(monkeypatch):
    pooling, inputs, mask, how = case(3)
    monkeypatch.setattr(TextConditionedPooling, "project_tokens", lambda *_: pytest.fail("attended"))
    itemized_losses(*inputs[:3], mask, pooling, *inputs[3:], weights={"mps": 1.0, "ila": 0.0}, **how)


@pytest.mark.parametrize("seed", range(10))
def test_padding_takes_no_part(seed):
    "What stands in padded slots changes nothing, and more slots change divisors only"
    pooling, inputs, mask, how = case(seed)
    how |= {"token_mask": None, "divisor": "images"}
    n, k = mask.shape
    other = [x.clone() for x in inputs]
    other[2][~mask] = 100 * torch.randn_like(other[2][~mask])
    expected = itemized_losses(*inputs[:3], mask, pooling, *inputs[3:], **how)
    for name, value in itemized_losses(*other[:3], mask, pooling, *other[3:], **how).items():
        close(value, expected[name], 1e-12)
    wide = [x.clone() for x in inputs]
    wide[2] = torch.cat([wide[2], torch.randn(n, 2, wide[2].shape[2]).double()], 1)
    if how["text_ids"] is not None: how["text_ids"] = torch.cat([how["text_ids"], torch.full((n, 2), -1)], 1)
    found = itemized_losses(*wide[:3], torch.cat([mask, torch.zeros(n, 2, dtype=torch.bool)], 1), pooling, *wide[3:],
                            **how)
    for name, ratio in (("ila", 1), ("kta", 1), ("mps", k / (k + 2)), ("iis", k / (k + 2))):
        close(found[name], ratio * expected[name], 1e-10)


@pytest.mark.parametrize("scale", [14.3, 30.0, 100.0])
def test_the_worst_positive_is_the_lowest_of_the_own(scale):
    "However far the logits spread: raising the factor by 1 adds that item's loss, and nothing else"
    torch.manual_seed(0)
    pooling = pooling_of(16, 2)
    v, tokens, t = (torch.randn(*shape, 16).double() for shape in ((6,), (6, 9), (6, 4)))
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]],
                        dtype=torch.bool)
    ila = lambda factor: itemized_losses(v, tokens, t, mask, pooling, scale, -10.0, neg, worst_positive_factor=factor,
                                         weights={"ila": 1})["loss"]
    neg = sample_negatives(mask)
    z = scale * nn.functional.cosine_similarity(pooling(t, tokens), t, dim=-1) - 10
    lowest = torch.where(mask, z, torch.inf).amin(1)
    close(ila(2.0) - ila(1.0), nn.functional.softplus(-lowest[lowest.isfinite()]).sum() / 6)


def test_identities():
    torch.manual_seed(0)
    pooling = pooling_of(16, 2)
    n, k, l = 5, 3, 9
    v, tokens, t = (torch.randn(*shape, 16).double() for shape in ((n,), (n, l), (n, k)))
    full = torch.ones(n, k, dtype=torch.bool)
    run = lambda mask=full, text=t, **how: itemized_losses(v, tokens, text, mask, pooling, 9.0, -4.0,
                                                           **({"neg_index": sample_negatives(
                                                               full, torch.Generator().manual_seed(1))} | how))
    expected = run()
    for name, value in run(mask=None).items(): close(value, expected[name])
    close(expected["ila"], run(divisor="items")["ila"] * (n + k - 1) / n)
    close(run(key_token_ratio=1.0)["kta"], expected["ila"])
    one = t[:, :1]
    close(run(full[:, :1], one, neg_index=torch.zeros(n, n, dtype=torch.long))["mps"],
          siglip_loss(v, one[:, 0], 9.0, -4.0))
    for name, value in run(normal=torch.zeros(n)).items(): close(value, expected[name])
    lengths = run(text=t)["mps"]
    close(itemized_losses(5 * v, tokens, 3 * t, full, pooling, 9.0, -4.0)["mps"], lengths)
    flair = run(weights={"ila": 0.5, "mps": 0.5}, divisor="items")
    close(flair["loss"], 0.5 * (expected["ila"] * n / (n + k - 1) + expected["mps"]))


def test_a_batch_of_normals_has_no_negatives():
    counts = item_weights(torch.ones(3, 2, dtype=torch.bool), 3, normal=torch.ones(3))
    assert torch.equal(counts.sum(2), 2 * torch.eye(3, dtype=torch.long))


@pytest.mark.parametrize("wrong, says", [
    (dict(weights={"iia": 1}), "unknown loss 'iia'. Did you mean 'ila' or 'iis'"),
    (dict(weights={"ila": 0}), "weight of 0"),
    (dict(divisor="texts"), "divisor='texts'"), (dict(offset=1), "4 images from offset 1"),
    (dict(token_keep_prob=2), "token_keep_prob must be in [0, 1], got 2"),
    (dict(key_token_ratio=-1), "key_token_ratio must be in [0, 1], got -1"),
    (dict(normal=torch.ones(3)), "normal must be (4,), got (3,)"),
    (dict(neg_index=torch.zeros(4, 3)), "neg_index must be (4, 4), got (4, 3)"),
    (dict(text_ids=torch.zeros(4, 3)), "text_ids must be (4, 2)"),
    (dict(token_mask=torch.ones(4, dtype=torch.bool)), "token_mask must be")])
def test_what_cannot_be(wrong, says):
    v, tokens, t = (torch.randn(*shape, 8) for shape in ((4,), (4, 5), (4, 2)))
    with pytest.raises(InputError) as error:
        itemized_losses(v, tokens, t, None, TextConditionedPooling(8, 2), 9.0, -4.0, **wrong)
    assert says in str(error.value)


def test_low_precision_stays_near():
    torch.manual_seed(0)
    pooling = TextConditionedPooling(64, 8)
    inputs = [torch.randn(*shape, 64) for shape in ((6,), (6, 20), (6, 3))]
    neg = sample_negatives(torch.ones(6, 3, dtype=torch.bool))
    loss = lambda pooling, v, tokens, t: itemized_losses(v, tokens, t, None, pooling, 10.0, -10.0, neg,
                                                         key_token_ratio=1.0)
    exact, low = loss(pooling, *inputs), loss(pooling.bfloat16(), *(x.bfloat16() for x in inputs))
    assert low["loss"].dtype == torch.float32
    for name in exact: torch.testing.assert_close(low[name], exact[name], rtol=0.03, atol=0.01)
    with torch.autocast("cpu", torch.bfloat16): auto = loss(pooling.float(), *inputs)
    auto["loss"].backward()
    for name in exact: torch.testing.assert_close(auto[name].float(), exact[name], rtol=0.03, atol=0.01)
    assert all(p.grad.isfinite().all() for p in pooling.parameters())


@pytest.mark.parametrize("prefix", [f"{start}{name}" for start in ("", "module.") for name in POOLING_PREFIXES])
def test_a_published_pooling_loads_strictly(prefix, tmp_path):
    "A file as upstream writes it, with the other tensors of a model around"
    shapes = {"attn.in_proj_weight": (1536, 512), "attn.in_proj_bias": (1536,), "attn.out_proj.weight": (512, 512),
              "attn.out_proj.bias": (512,),
              **{f"ln_{x}.{p}": (512,) for x in "qkv" for p in ("weight", "bias")}}
    state = {prefix + name: torch.randn(shape) for name, shape in shapes.items()}
    torch.save({"epoch": 3, "name": "x",
                "state_dict": state | {"logit_scale": torch.tensor(2.66),
                                       "visual.conv1.weight": torch.zeros(8, 3, 2, 2)}}, tmp_path / "epoch.pt")
    read = torch.load(tmp_path / "epoch.pt", weights_only=True)["state_dict"]
    pooling = pooling_from({name.removeprefix("module."): tensor for name, tensor in read.items()})
    assert {name: tuple(x.shape) for name, x in pooling.state_dict().items()} == shapes
    for name, x in pooling.state_dict().items(): assert torch.equal(x, state[prefix + name])


# Several processes

TOTAL, SLOTS = 7, 3
PARTS = {"equal": {2: (4, 3), 3: (3, 2, 2)}, "uneven": {2: (6, 1), 3: (1, 5, 1)}, "empty": {2: (0, 7), 3: (4, 3, 0)}}
WAYS = {"given": {}, "drawn": {"token_keep_prob": 0.7}, "ila": {"weights": {"ila": 1}}, "mps": {"weights": {"mps": 1}},
        "iis": {"weights": {"iis": 1}}, "kta": {"weights": {"kta": 1}},
        "flair": {"weights": {"ila": 0.5, "mps": 0.5}, "divisor": "items"}}


class Towers(nn.Module):
    "Global features, tokens and item features, by linear maps; pooling, scale and bias"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.token, self.text = (nn.Linear(6, 8) for _ in range(3))
        self.pooling = TextConditionedPooling(8, 2)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.6)), nn.Parameter(torch.tensor(-3.0))


def batch():
    make = torch.Generator().manual_seed(1)
    images, items = torch.randn(TOTAL, 10, 6, generator=make), torch.randn(TOTAL, SLOTS, 6, generator=make)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 1, 1]], dtype=torch.bool)
    neg = sample_negatives(mask, make)
    return images, items, mask, neg, torch.tensor([0, 1, 0, 1, 0, 0, 1]).bool(), torch.randint(
        9, (TOTAL, SLOTS), generator=make)


def step(way, part=slice(None)):
    "Loss and gradients of a part of the batch, after averaging over the processes"
    model = Towers().double()
    images, items, mask, neg, normal, ids = (x[part] for x in batch())
    images, items = images.double(), items.double()
    found = global_itemized_losses(model.image(images.mean(1)), model.token(images), model.text(items), mask,
                                   model.pooling, model.logit_scale.exp(),
                                   model.logit_bias, None if way == "drawn" else neg, normal, ids,
                                   worst_positive_factor=1.5, key_token_ratio=0.3,
                                   generator=torch.Generator().manual_seed(5), **WAYS[way])
    found["loss"].backward()
    average_gradients(model.parameters())
    return {name: value.detach() for name, value in found.items()}, {name: p.grad
                                                                     for name, p in model.named_parameters()}


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
                            timeout=timedelta(seconds=60))
    found = {}
    for kind, parts in PARTS.items():
        start = sum(parts[world][:rank])
        for way in WAYS: found[kind, way] = step(way, slice(start, start + parts[world][rank]))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def answers(request, tmp_path_factory):
    "What each process found"
    folder = tmp_path_factory.mktemp("processes")
    forks.run_together(worker, request.param, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", PARTS)
def test_processes_have_the_loss_and_gradients_of_one(answers, kind, way):
    "The mean of the losses and of the gradients, token masks and drawn negatives included"
    losses, expected = step(way)
    for name, value in losses.items():
        close(sum(answer[kind, way][0][name] for answer in answers) / len(answers), value)
    for name, gradient in expected.items():
        for answer in answers:
            found = answer[kind, way][1][name]
            assert (found is None) == (gradient is None) or not (found if gradient is None else gradient).any()
            if found is not None and gradient is not None: close(found, gradient)
    assert losses["loss"] > 0.01 and expected["logit_scale"].abs() > 1e-3


def test_items_are_drawn_alike_by_any_worker(tmp_path):
    "Rows in any order, in loaders with workers and without"
    reports = [[f"finding {n}-{m}" for m in range(n % 6)] for n in range(40)]
    whole = item_batch(reports, range(40), 3, "diverse", seed=4, epoch=1)

    class Reports(torch.utils.data.Dataset):
        def __len__(self): return len(reports)
        def __getitem__(self, row): return row, item_batch([reports[row]], [row], 3, "diverse", seed=4, epoch=1).texts
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(Reports(), batch_size=7, shuffle=True, num_workers=workers,
                                             collate_fn=list)
        found = dict(pair for part in loader for pair in part)
        assert [text for row in range(40) for text in found[row]] == whole.texts
