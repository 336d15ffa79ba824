"Adapters and locks: every kind of tower, both precisions, PEFT's own loader, models that others adapted"
import json
from copy import deepcopy
from dataclasses import replace

import peft
import pytest
import torch
import torch.nn.functional as F

from medclip_nb.core import InputError
from medclip_nb.models import (
    SplitAttention,
    adapter_facts,
    add_lora,
    join_attention,
    layer_groups,
    load_adapter,
    load_checkpoint,
    load_model,
    lock,
    merge_lora,
    save_adapter,
    save_checkpoint,
    split_attention,
    tower_of,
    trainable,
)

VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
VISION = {"open_clip": VIT, "nested": VIT, "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
          "timm": {"image_size": 224, "timm_model_name": "test_vit", "timm_model_pretrained": False,
                   "timm_pool": "token", "timm_proj": "linear"}}
PIXELS = {"open_clip": 32, "nested": 32, "resnet": 64, "timm": 160}
TEXTS = ["a lesion", "an axial slice of a normal brain", "no lesion on the left"]


def build(kind, folder, precision="fp32"):
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    config = {"model_cfg": {"embed_dim": 32, "vision_cfg": VISION[kind], "text_cfg": text,
                            "custom_text": kind in ("nested", "timm")},
              "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    clip = load_model(str(folder), precision=precision, device="cpu")
    clip.spec = kind
    return clip


def train(clip, n=3, lr=0.1):
    "Gradients of the adapters at the last step, and what has moved"
    before = {name: t.clone() for name, t in clip.model.state_dict().items()}
    size = PIXELS.get(clip.spec, 32)
    images, tokens = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1)), clip.tokenizer(TEXTS)
    optimizer = torch.optim.SGD([p for p in clip.model.parameters() if p.requires_grad], lr=lr)
    clip.model.train()
    for _ in range(n):
        optimizer.zero_grad()
        a, b = (F.normalize(f.float(), dim=-1) for f in (clip.forward_images(images), clip.forward_texts(tokens)))
        (10 * F.cross_entropy(10 * a @ b.T, torch.arange(3))).backward()
        optimizer.step()
    clip.model.eval()
    gradients = {name: p.grad.norm().item() for name, p in clip.model.named_parameters() if p.grad is not None}
    return gradients, {name for name, t in clip.model.state_dict().items() if not torch.equal(t, before[name])}


@pytest.mark.parametrize("kind", VISION)
@pytest.mark.parametrize("targets", [("q",), ("k", "v"), ("out",), ("mlp",), ("q", "k", "v", "out", "mlp")],
                         ids="-".join)
def test_every_adapter_trains_and_merges(kind, targets, tmp_path):
    if kind == "resnet" and targets == ("mlp",):
        with pytest.raises(InputError, match="image tower of 'resnet' has no layers"):
            add_lora(build(kind, tmp_path / "m"), targets=targets)
        return
    plain = build(kind, tmp_path / "m")
    clip = add_lora(replace(plain, model=deepcopy(plain.model)), rank=2, alpha=16, targets=targets)
    gradients, moved = train(clip)
    adapters = {name for name, p in clip.model.named_parameters() if ".lora_" in name}
    assert adapters and {name for name, norm in gradients.items() if norm > 0} == adapters == moved
    merged, size = merge_lora(clip), PIXELS[kind]
    images = torch.randn(2, 3, size, size)
    for encode, batch in (("encode_images", images), ("encode_texts", TEXTS)):
        was, adapted, now = (getattr(m, encode)(batch) for m in (plain, clip, merged))
        assert (now - adapted).abs().max() < 1e-5
        assert (now - was).abs().max() > (1e-4 if kind != "resnet" else 0)
    plain.model.load_state_dict(merged.model.state_dict(), strict=True)
    assert (type(merged.model.visual) is type(plain.model.visual)
            and all(p.requires_grad for p in merged.model.parameters()))


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower_alone(tower, tmp_path):
    clip = add_lora(build("open_clip", tmp_path / "m"), towers=[tower])
    assert {tower_of(name) for name, p in clip.model.named_parameters() if p.requires_grad} == {tower}
    table = trainable(clip).set_index("tower")
    assert table.loc["all", "trained"] == table.loc[tower,
                                                    "trained"] == adapter_facts(clip.model)["layers"] * 2 * 8 * (
                                                        64 if tower == "image" else 32)
    assert trainable(clip)["parameters"].iloc[:3].sum() == table.loc["all",
                                                                     "parameters"] == sum(
                                                                         p.numel() for p in clip.model.parameters())


def test_bf16_weights_under_float32_adapters(tmp_path):
    clip = add_lora(build("open_clip", tmp_path / "m", "bf16"), rank=2, alpha=16)
    assert {p.dtype for p in clip.model.parameters() if p.requires_grad} == {torch.float32}
    gradients, moved = train(clip, lr=0.1)
    assert (all(norm > 0 for norm in gradients.values())
            and moved == {n for n, p in clip.model.named_parameters() if p.requires_grad})
    images = torch.randn(2, 3, 32, 32)
    assert (merge_lora(clip).encode_images(images) - clip.encode_images(images)).abs().max() < 0.02


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("different", [False, True], ids=["self", "cross"])
def test_split_attention_gradients(batch_first, different):
    torch.manual_seed(0)
    widths = {"kdim": 24, "vdim": 20} if different else {}
    fused = torch.nn.MultiheadAttention(32, 4, batch_first=batch_first, **widths)
    split = SplitAttention(deepcopy(fused))
    query, key, value = torch.randn(3, 7, 32), torch.randn(3, 7,
                                                           widths.get("kdim", 32)), torch.randn(
                                                               3, 7, widths.get("vdim", 32))
    mask = torch.full((7, 7), float("-inf")).triu_(1) if batch_first else None
    for module in (fused, split):
        module(query, key, value, attn_mask=mask, need_weights=False)[0].square().sum().backward()
    joined = join_attention(torch.nn.ModuleDict({"a": split}))["a"]
    assert all(torch.equal(a, b) for a, b in zip(fused.state_dict().values(), joined.state_dict().values()))
    weight = torch.cat([m.weight.grad for m in (split.q_proj, split.k_proj, split.v_proj)]) if not different else None
    if not different: assert (weight - fused.in_proj_weight.grad).abs().max() < 1e-5
    assert (torch.cat([m.bias.grad
                       for m in (split.q_proj, split.k_proj,
                                 split.v_proj)]) - fused.in_proj_bias.grad).abs().max() < 1e-5
    with pytest.raises(InputError, match="extra key"):
        SplitAttention(torch.nn.MultiheadAttention(8, 2, add_bias_kv=True))


@pytest.mark.parametrize("kind", VISION)
def test_saved_adapter_is_a_peft_folder(kind, tmp_path):
    base = build(kind, tmp_path / "m")
    copy = lambda: replace(base, model=deepcopy(base.model))
    clip = add_lora(copy(), rank=2, alpha=6, dropout=0.1)
    train(clip)
    folder = save_adapter(clip, tmp_path / "adapter")
    files = {p.name for p in folder.glob("[!.]*")}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    size = PIXELS[kind]
    images = torch.randn(2, 3, size, size)
    theirs = peft.PeftModel.from_pretrained(split_attention(copy().model), str(folder)).eval().base_model.model
    with torch.no_grad():
        assert (F.normalize(theirs.encode_image(images), dim=-1) - clip.encode_images(images)).abs().max() < 1e-6
        assert (F.normalize(theirs.encode_text(clip.tokenizer(TEXTS)),
                            dim=-1) - clip.encode_texts(TEXTS)).abs().max() < 1e-6
    again = load_adapter(copy(), folder)
    assert (again.weights_hash() == clip.weights_hash() and adapter_facts(again.model) == adapter_facts(clip.model)
            and adapter_facts(clip.model)["scale"] == 3)
    assert [n for n, p in again.model.named_parameters()
            if p.requires_grad] == [n for n, p in clip.model.named_parameters() if p.requires_grad]
    named = load_model(str(save_checkpoint(base, tmp_path / "base")), checkpoint=folder)
    assert torch.equal(named.encode_images(images), again.encode_images(images))


def test_training_goes_on_from_a_checkpoint_with_adapters(tmp_path):
    base = build("open_clip", tmp_path / "m")
    clip = add_lora(replace(base, model=deepcopy(base.model)), rank=2, alpha=16)
    clip.model.logit_scale.requires_grad_(True)
    train(clip)
    with torch.no_grad(): clip.model.logit_scale.fill_(3.3)
    folder = save_checkpoint(clip, tmp_path / "saved", epoch=1)
    saved = clip.weights_hash()
    train(clip)
    assert clip.weights_hash() != saved
    load_checkpoint(clip, folder)
    assert clip.weights_hash() == saved


def test_adapter_of_a_hugging_face_model(tmp_path):
    "Trained with transformers and PEFT, loaded here, the same features"
    from transformers import CLIPConfig, CLIPModel
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "hidden_act": "quick_gelu"}
    torch.manual_seed(0)
    theirs = CLIPModel(CLIPConfig(vision_config=size | {"image_size": 32, "patch_size": 16}, text_config=size,
                                  projection_dim=24)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    wrapped = peft.get_peft_model(theirs,
                                  peft.LoraConfig(r=4, lora_alpha=1,
                                                  target_modules=["q_proj", "k_proj", "v_proj", "fc1"])).eval()
    for name, p in wrapped.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p, std=0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    clip = load_model(str(tmp_path / "hf"), checkpoint=tmp_path / "adapter")
    assert clip.describe()["adapters"]["scale"] == 0.25 and clip.describe()["adapters"]["layers"] == 16
    images, tokens = torch.randn(2, 3, 32, 32), clip.tokenizer(TEXTS)
    with torch.no_grad():
        assert (clip.forward_images(images) - wrapped.get_image_features(
            pixel_values=images).pooler_output).abs().max() < 1e-5
        assert (clip.forward_texts(tokens) - wrapped.get_text_features(
            input_ids=tokens).pooler_output).abs().max() < 1e-5


def test_adapter_that_does_not_fit_changes_nothing(tmp_path):
    base = build("open_clip", tmp_path / "m")
    clip = add_lora(replace(base, model=deepcopy(base.model)), rank=2)
    folder = save_adapter(clip, tmp_path / "adapter")
    import safetensors.torch
    state = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    before = base.weights_hash()
    name = sorted(state)[0]
    for wrong, message in (({k: v for k, v in state.items() if k != name}, "is missing"),
                           ({**state, name: torch.zeros(3, 64)}, "has shape"),
                           ({**state, "base_model.model.logit_scale": torch.zeros(())}, "has no layers")):
        safetensors.torch.save_file(wrong, folder / "adapter_model.safetensors")
        with pytest.raises(InputError, match=message): load_adapter(base, folder)
        assert base.weights_hash() == before
    config = json.loads((folder / "adapter_config.json").read_text())
    for text, message in (("{", "cannot be read"),
                          (json.dumps(config | {"peft_type": "IA3", "feedforward_modules": []}), "IA3|cannot be read")):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(InputError, match=message): load_adapter(base, folder)


@pytest.mark.parametrize("kind", [*VISION, "starter"])
def test_locked_tower_stays(kind, tmp_path):
    make = lambda: load_model("starter") if kind == "starter" else build(kind, tmp_path / "m")
    PIXELS["starter"] = 80
    for tower in ("image", "text"):
        clip = lock(make(), towers=[tower])
        assert trainable(clip).set_index("tower").loc[tower, "trained"] == 0
        _, moved = train(clip)
        assert moved and not [name for name in moved if tower_of(name) == tower]


@pytest.mark.parametrize("kind", ["resnet", "open_clip", "timm"])
def test_locked_layers_stay_and_later_ones_move(kind, tmp_path):
    clip = lock(build(kind, tmp_path / "m"), image_layers=1, text_layers=1)
    _, moved = train(clip)
    for tower in ("image", "text"):
        groups = layer_groups(clip.model, tower)
        assert not moved & {name for group in groups[:2] for name in group}
        assert moved & {name for group in groups[2:] for name in group}
    if kind == "resnet":
        statistics = {name for name in clip.model.state_dict() if "running" in name}
        assert (moved & statistics
                and not {n for n in moved & statistics if n.startswith(("visual.bn", "visual.layer1."))})


def test_a_copy_keeps_its_locks(tmp_path):
    clip = lock(build("resnet", tmp_path / "m"), towers=["image"])
    copied = replace(clip, model=deepcopy(clip.model))
    assert not [name for name in train(copied)[1] if name.startswith("visual.")]


def test_adapters_beside_batch_norm_leave_its_statistics(tmp_path):
    clip = add_lora(build("resnet", tmp_path / "m"), rank=2)
    assert not [name for name in train(clip)[1] if "running" in name or "num_batches" in name]
