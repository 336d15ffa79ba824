"Weights in the forms that people have: loaded with a note of what was changed, or refused with one line that helps"
import argparse
import json

import open_clip
import peft
import pytest
import safetensors.torch
import torch

from medclip_nb.core import InputError
from medclip_nb.models import (
    add_lora,
    load_checkpoint,
    load_model,
    save_adapter,
    save_checkpoint,
    split_attention,
    start_from_slices,
    study_model,
    swap_towers,
    weights_license,
)

VISION = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
TEXTS = ["a lesion", "no lesion on the left"]


def build(folder, seed=0, vision=None, text=None, **model):
    parts = {"vision_cfg": VISION | (vision or {}), "text_cfg": TEXT | (text or {})}
    config = {"model_cfg": {"embed_dim": 64} | parts | model,
              "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    return load_model(str(folder), device="cpu", precision="fp32")


@pytest.fixture
def trained(tmp_path): return build(tmp_path / "trained", 1)


@pytest.fixture
def model(tmp_path): return build(tmp_path / "m")


def numbers(state):
    return state | {n: torch.tensor(7) for n in ("input_resolution", "context_length", "vocab_size")}


def under(prefix, state): return {prefix + name: t for name, t in state.items()}


FORMS = {
    "ddp": lambda s: {"epoch": 1, "state_dict": under("module.", s)},
    "compiled": lambda s: under("_orig_mod.module.", s),
    "compiled tower": lambda s: {n.replace("visual.", "visual._orig_mod."): t for n, t in s.items()},
    "clip_model": lambda s: under("clip_model.", s),
    "deep": lambda s: {"model": under("module.model.clip.", s)},
    "half": lambda s: {n: t.half().float().half() for n, t in s.items()},
    "lightning": lambda s: {"state_dict": under("model.", s) | {"loss.queue": torch.zeros(3)}, "epoch": 1,
                            "hyper_parameters": argparse.Namespace(lr=1), "optimizer_states": [{"state": {}}],
                            "callbacks": {"best": {"score": torch.tensor(1.0)}}},
    "averaged too": lambda s: {"state_dict": s, "state_dict_ema": under("module.", {n: t + 1 for n, t in s.items()})},
    "averaged beside": lambda s: under("model.", s) | under("ema_model.", {n: t + 1 for n, t in s.items()}),
}
NOTES = {"lightning": "1 tensors outside of 'model.' were left out: 'loss.queue'",
         "averaged too": "averaged weights in 'state_dict_ema' were not read",
         "averaged beside": "the weights under 'ema_model.' were not read"}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, trained, model, tmp_path):
    torch.save(FORMS[form](trained.model.state_dict()), tmp_path / "c.pt")
    load_checkpoint(model, tmp_path / "c.pt")
    eps = 1e-2 if form == "half" else 0
    for name, tensor in trained.model.state_dict().items():
        assert (model.model.state_dict()[name] - tensor).abs().max() <= eps, name
    assert [n for n in model.notes if "activation" not in n] == ([NOTES[form]] if form in NOTES else [])
    assert model.describe()["notes"] == "; ".join(model.notes)


@pytest.mark.parametrize("kind", ["scripted", "pickled whole", "scripted, half"])
def test_archives_of_programs(kind, trained, model, tmp_path):
    if "scripted" in kind:
        state = trained.model.half() if "half" in kind else trained.model
        state.eval().requires_grad_(False)
        images = torch.zeros(1, 3, 32, 32, dtype=state.logit_scale.dtype)
        torch.jit.save(torch.jit.trace_module(state, {"encode_image": images}), tmp_path / "c.pt")
        assert set(torch.jit.load(tmp_path / "c.pt").state_dict()) >= set(state.state_dict())
    else: torch.save(trained.model, tmp_path / "c.pt")
    load_checkpoint(model, tmp_path / "c.pt")
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name].to(tensor.dtype), tensor), name


def test_shards(trained, model, tmp_path):
    state = {n: t.contiguous().clone() for n, t in trained.model.state_dict().items()}
    for kind, save in (("safetensors", safetensors.torch.save_file), ("bin", torch.save)):
        folder = tmp_path / kind
        folder.mkdir()
        names = [sorted(state)[::2], sorted(state)[1::2]]
        for i, own in enumerate(names): save({n: state[n] for n in own}, folder / f"part-{i}.{kind}")
        index = {"weight_map": {n: f"part-{i}.{kind}" for i, own in enumerate(names) for n in own}}
        (folder / f"open_clip_model.{kind}.index.json").write_text(json.dumps(index))
        load_checkpoint(build(tmp_path / "m"), folder)
        load_checkpoint(model, folder)
        assert model.weights_hash() == trained.weights_hash()
        (folder / f"part-1.{kind}").unlink()
        with pytest.raises(InputError, match="cannot be read as a checkpoint"): load_checkpoint(model, folder)


def test_openai_numbers_mean_quick_gelu(trained, model, tmp_path):
    torch.save(numbers(trained.model.state_dict()), tmp_path / "c.pt")
    with pytest.raises(InputError, match="needs quick_gelu, and model .* computes gelu. Name an architecture"):
        load_checkpoint(model, tmp_path / "c.pt")
    quick = build(tmp_path / "q", quick_gelu=True)
    load_checkpoint(quick, tmp_path / "c.pt")
    assert quick.weights_hash() == trained.weights_hash() and not quick.notes


def test_bare_weights_say_nothing_of_the_activation(trained, tmp_path):
    torch.save(trained.model.state_dict(), tmp_path / "c.pt")
    for quick, says in ((False, "computed with gelu, though"), (True, "computed with quick_gelu")):
        clip = build(tmp_path / f"{quick}", quick_gelu=quick)
        load_checkpoint(clip, tmp_path / "c.pt")
        assert says in clip.describe()["notes"]
    assert not load_model(str(save_checkpoint(trained, tmp_path / "saved"))).notes
    starter = load_model("starter")
    torch.save(starter.model.state_dict(), tmp_path / "s.pt")
    assert "notes" not in load_model("starter", checkpoint=tmp_path / "s.pt").describe()


def test_another_grid_of_positions(model, tmp_path):
    larger = build(tmp_path / "larger", 1, {"image_size": 64})
    torch.save(larger.model.state_dict(), tmp_path / "c.pt")
    load_checkpoint(model, tmp_path / "c.pt")
    assert "the positions of 4 x 4 image patches were interpolated to 2 x 2" in model.notes
    reference, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'm'}", load_weights=False)
    open_clip.load_checkpoint(reference, str(tmp_path / "c.pt"))
    assert torch.allclose(model.model.visual.positional_embedding, reference.visual.positional_embedding, atol=1e-6)
    odd = larger.model.state_dict() | {"visual.positional_embedding": torch.zeros(19, 64)}
    torch.save(odd, tmp_path / "c.pt")
    with pytest.raises(InputError, match=r"wrong shape visual.positional_embedding \(19, 64\)"):
        load_checkpoint(model, tmp_path / "c.pt")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("length", [248, 40])
def test_another_context(nested, length, tmp_path):
    longer = build(tmp_path / "longer", 1, text={"context_length": length}, custom_text=nested)
    clip = build(tmp_path / "m", custom_text=nested)
    torch.save(longer.model.state_dict(), tmp_path / "c.pt")
    load_checkpoint(clip, tmp_path / "c.pt")
    texts = [*TEXTS, " ".join(["lesion"] * 200)]
    assert clip.context_length == length and torch.equal(clip.encode_texts(texts), longer.encode_texts(texts))
    assert f"the model reads texts of {length} tokens, as the weights were trained" in clip.notes
    again = load_model(str(save_checkpoint(clip, tmp_path / "saved")))
    assert again.context_length == length and torch.equal(again.encode_texts(texts), longer.encode_texts(texts))


def test_long_clip(tmp_path):
    longer = build(tmp_path / "longer", 1, text={"context_length": 248}, quick_gelu=True)
    state = dict(longer.model.state_dict())
    table, noise = state["positional_embedding"], torch.randn(248, 64)
    first = (torch.arange(248) < 20)[:, None]
    state |= {"positional_embedding": table * first + noise * ~first,
              "positional_embedding_res": table * ~first + noise * first}
    torch.save(state, tmp_path / "c.pt")
    clip = build(tmp_path / "m", quick_gelu=True)
    load_checkpoint(clip, tmp_path / "c.pt")
    texts = [" ".join(["lesion"] * n) for n in (5, 60, 300)]
    assert torch.equal(clip.encode_texts(texts), longer.encode_texts(texts))


def test_a_logit_bias_comes_and_is_missing(model, tmp_path):
    biased = build(tmp_path / "biased", 1, init_logit_bias=-3.0)
    torch.save(biased.model.state_dict(), tmp_path / "c.pt")
    load_checkpoint(model, tmp_path / "c.pt")
    assert model.model.logit_bias.item() == -3 and model.config["model_cfg"]["init_logit_bias"] == -3
    assert load_model(str(save_checkpoint(model, tmp_path / "saved"))).model.logit_bias.item() == -3
    torch.save(build(tmp_path / "plain", 2).model.state_dict(), tmp_path / "p.pt")
    load_checkpoint(biased, tmp_path / "p.pt")
    assert biased.model.logit_bias.item() == 0 and "the weights have no logit bias; it is 0" in biased.notes


def test_what_is_refused_says_what_to_do(trained, model, tmp_path):
    state, before = trained.model.state_dict(), model.weights_hash()
    for wrong, says in ((state | {"head.weight": torch.zeros(1)}, "unexpected head.weight.* save the file without"),
                        (under("a.", state) | under("b.", state), "it holds 2 models, under 'a.' and 'b.'; save one"),
                        (state | {"x": argparse.Namespace()}, "'x' is an object of a class that is never built here")):
        torch.save(wrong, tmp_path / "c.pt")
        with pytest.raises(InputError, match=says) as said: load_checkpoint(model, tmp_path / "c.pt")
        assert "\n" not in str(said.value) and "weights_only" not in str(said.value)
    assert model.weights_hash() == before and model.notes == ["the weights are random"]


def test_the_adapter_folder_says_what_peft_needs(model, tmp_path):
    adapted = add_lora(build(tmp_path / "m"), rank=2)
    with torch.no_grad():
        for name, p in adapted.model.named_parameters():
            if "lora_B" in name: p.normal_(std=0.1)
    folder = save_adapter(adapted, tmp_path / "adapter")
    card = (folder / "README.md").read_text()
    assert "peft.PeftModel.from_pretrained(split_attention(model)" in card and str(tmp_path) not in card
    fresh = lambda: build(tmp_path / "m").model
    with pytest.raises(ValueError, match="[Tt]arget modules"): peft.PeftModel.from_pretrained(fresh(), str(folder))
    theirs = peft.PeftModel.from_pretrained(split_attention(fresh()), str(folder)).base_model.model.eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(theirs.encode_image(images), adapted.model.eval().encode_image(images), atol=1e-6)


def test_only_random_weights_are_called_random(trained, model, tmp_path):
    folder = str(save_checkpoint(trained, tmp_path / "saved"))
    both = swap_towers(folder, folder, 0, device="cpu")
    assert (both.untrained, both.parts) == (False, [f"image tower of {folder}", f"text tower of {folder}"])
    assert weights_license(both) == f"that of the image tower of {folder}, the text tower of {folder}; " \
                                    "see who published them"
    assert both.notes == [f"the weights are random, but for those of the {', the '.join(both.parts)}"]
    assert swap_towers("starter", "starter", device="cpu").untrained
    small = {"layout": "multiscan_h3_token1176", "width": 48, "depth": 1, "heads": 2, "levels": ["study"]}
    study = study_model(small, device="cpu")
    assert (study.untrained, study.notes) == (True, ["the weights are random"])
    assert study_model(small, folder, 64, device="cpu").parts == [f"text tower of {folder}"]
    pictures, sliced = (load_model(name, device="cpu") for name in ("starter", "starter-studies"))
    load_checkpoint(pictures, save_checkpoint(pictures, tmp_path / "pictures"))
    start_from_slices(sliced, pictures)
    assert (sliced.untrained, sliced.parts) == (False, ["image tower of starter", "text tower of starter"])
    load_checkpoint(model, save_adapter(add_lora(build(tmp_path / "m"), rank=2), tmp_path / "adapter"))
    assert (model.untrained, model.parts) == (False, ["adapter adapter"])
    load_checkpoint(both, save_checkpoint(both, tmp_path / "both"))
    assert (both.untrained, both.parts, both.notes) == (False, [], [])
