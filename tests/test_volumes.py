"""Volume encoders against blocks run group by group, and published checkpoints by the exact names and shapes of their
files"""
import json
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medclip_nb.core import InputError
from medclip_nb.images import Study, pad_studies, study_preprocess
from medclip_nb.models import (
    ATTENTION_LEVELS,
    CHARACTERS,
    PUBLISHED,
    SeriesNameEncoder,
    VolumeEncoder,
    build,
    inflate,
    load_checkpoint,
    load_model,
    misfits,
    published_state,
    save_checkpoint,
    sincos,
    study_model,
)

WB = ("weight", "bias")


# Blocks run group by group

def by_hand(encoder, study, order):
    """One study (n, c, D, H, W): every group of every level as a sequence of its own, CLS tokens averaged and copied
    one by one"""
    patches = encoder.patch_embed(study) + encoder.spatial_posemb
    patches = patches + encoder.sequential_posemb[0, order][:, None, None, None]
    n, d, h, w, _ = patches.shape
    keys = {"slice": lambda s, z: (s, z), "scan": lambda s, z: (s,), "study": lambda s, z: ()}
    places = [(s, z) for s in range(n) for z in range(d)]
    slab = {place: patches[place].flatten(0, 1) for place in places}
    cls = {place: encoder.cls_token[0, 0] for place in places}
    for block, level in zip(encoder.blocks, encoder.levels):
        groups = defaultdict(list)
        for place in places: groups[keys[level](*place)].append(place)
        for members in groups.values():
            mean = torch.stack([cls[m] for m in members]).mean(0)
            out = block(torch.cat([mean[None], *(slab[m] for m in members)])[None])[0]
            for m, part in zip(members, out[1:].split(h * w)): slab[m], cls[m] = part, out[0]
    pooled = encoder.norm(torch.stack(list(cls.values())).mean(0))
    return pooled, encoder.norm(torch.cat(list(slab.values())))


@pytest.mark.parametrize("seed", range(12))
def test_encoder_is_its_blocks_group_by_group(seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    grid, depth, b, n = tuple(int(x)
                              for x in rng.integers(1, 5, 3)), int(rng.integers(1, 6)), int(rng.integers(1, 4)), int(
                                  rng.integers(1, 5))
    levels = [str(level) for level in rng.choice(ATTENTION_LEVELS, depth)]
    encoder = VolumeEncoder(24, depth, 2, (2, 4, 4), grid, levels, max_scans=6).double().eval()
    x = torch.randn(b, n, 1, *(k * p for k, p in zip(grid, (2, 4, 4))), dtype=torch.float64)
    mask = torch.from_numpy(rng.random((b, n)) < 0.6)
    mask[~mask.any(1), 0] = True
    full, padded = encoder(x), encoder(torch.where(mask[:, :, None, None, None, None], x, torch.nan), scan_mask=mask)
    area = math.prod(grid)
    for i in range(b):
        for (pooled, tokens), kept in ((full, torch.ones(n, dtype=torch.bool)), (padded, mask[i])):
            expected = by_hand(encoder, x[i, kept], range(int(kept.sum())))
            torch.testing.assert_close(pooled[i], expected[0])
            torch.testing.assert_close(tokens[i].unflatten(0, (n, area))[kept].flatten(0, 1), expected[1])
            assert not tokens[i].unflatten(0, (n, area))[~kept].any()


def test_gradients_do_not_see_padding():
    torch.manual_seed(0)
    encoder = VolumeEncoder(24, 3, 2, (2, 4, 4), (2, 3, 3), ATTENTION_LEVELS, max_scans=6).double().eval()
    x, mask = torch.randn(2, 3, 1, 4, 12, 12,
                          dtype=torch.float64), torch.tensor([[True, True, True], [True, True, False]])
    def gradients(*calls):
        encoder.zero_grad()
        sum(pooled.square().sum() + tokens.square().sum()
            for pooled, tokens in (encoder(*call) for call in calls)).backward()
        return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    together, apart = gradients((x, mask)), gradients((x[:1],), (x[1:, :2],))
    assert together.keys() == apart.keys() and not any(g.isnan().any() for g in together.values())
    for name in apart: torch.testing.assert_close(together[name], apart[name])


def test_mode_and_not_batch_size_decides_positions():
    torch.manual_seed(0)
    encoder = VolumeEncoder(24, 1, 2, (2, 4, 4), (1, 2, 2), ["study"], max_scans=8)
    x = torch.randn(3, 2, 1, 2, 8, 8)
    encoder.eval()
    torch.testing.assert_close(encoder(x)[0][:1], encoder(x[:1])[0])
    encoder.train()
    rows, plain = set(), (encoder.patch_embed(x.flatten(0, 1)) + encoder.spatial_posemb).flatten(1, 3)
    for _ in range(60):
        tokens, _ = encoder.embed(x, None, None)
        found = (tokens[:, 1:] - plain)[:, 0].unflatten(0, (3, 2))
        torch.testing.assert_close(found[0], found[2])
        drawn = torch.cdist(found[0], encoder.sequential_posemb[0]).argmin(1).tolist()
        assert len(set(drawn)) == 2
        rows |= set(drawn)
    assert rows == set(range(8))


def test_many_scans_are_stretched_study_by_study():
    torch.manual_seed(0)
    encoder = VolumeEncoder(24, 2, 2, (2, 4, 4), (1, 2, 2), ["scan", "study"], max_scans=4).eval()
    studies = [torch.randn(n, 1, 2, 8, 8) for n in (7, 5, 3)]
    batch = pad_studies(studies)
    pooled, _ = encoder(batch.volumes, batch.scan_mask)
    for i, study in enumerate(studies):
        torch.testing.assert_close(pooled[i], encoder(study[None])[0][0], atol=1e-5, rtol=1e-4)


def test_names_are_read_as_described():
    """A slow transformer over one name at a time: interleaved sines, queries, keys and values one after the other, the
    end mark's vector"""
    torch.manual_seed(0)
    encoder = SeriesNameEncoder().double()
    for name in ("AX_T2", "SAG FLAIR (post-contrast) * 1.5", "é", ""):
        ids = [CHARACTERS.index(c) + 1 if c in CHARACTERS else 45 for c in name.lower()] + [46]
        codes = torch.tensor([[f(p * 10000 ** (-2 * i / 10)) for i in range(5) for f in (math.sin, math.cos)]
                              for p in range(len(ids))], dtype=torch.float64)
        x = torch.cat([encoder.embed.weight[ids], codes], 1)
        for attention, mlp in encoder.transformer.layers:
            q, k, v = (attention.fn.to_qkv.weight @ attention.norm(x).T).T.chunk(3, 1)
            heads = [((q[:, s] @ k[:, s].T) * 64**-0.5).softmax(1) @ v[:, s]
                     for s in (slice(64 * i, 64 * i + 64) for i in range(4))]
            x = x + attention.fn.to_out[0](torch.cat(heads, 1))
            x = x + mlp.fn.net[3](F.gelu(mlp.fn.net[0](mlp.norm(x))))
        torch.testing.assert_close(encoder(["a longer name beside it", name])[1], x[-1], atol=1e-6, rtol=1e-6)


def test_inflation_from_a_file_with_a_decoder(tmp_path):
    import timm
    torch.manual_seed(0)
    plain = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=0)
    torch.nn.init.normal_(plain.pos_embed)
    torch.save({"model": plain.state_dict() | {"mask_token": torch.zeros(1), "decoder_blocks.0.x": torch.zeros(1)}},
               tmp_path / "mae.pth")
    encoder = VolumeEncoder(48, 2, 4, (4, 12, 12), (3, 5, 5), ["slice", "study"])
    order = encoder.sequential_posemb.clone()
    assert inflate(encoder, tmp_path / "mae.pth") == ["mask_token", "decoder_blocks.0.x"]
    weight = encoder.patch_embed.proj.weight
    torch.testing.assert_close(weight, weight[:, :, :1].expand_as(weight))
    torch.testing.assert_close(weight.sum(2)[:, 0],
                               F.interpolate(plain.patch_embed.proj.weight, (12, 12), mode="bicubic").sum(1))
    difference = encoder.spatial_posemb[0, 2] - encoder.spatial_posemb[0, 0]
    torch.testing.assert_close(difference, (sincos(3, 48)[2] - sincos(3, 48)[0]).expand(5, 5, -1), atol=1e-5, rtol=1e-5)
    assert (torch.equal(encoder.sequential_posemb, order)
            and torch.equal(encoder.blocks[1].mlp.fc1.weight, plain.blocks[1].mlp.fc1.weight))


# The names and shapes of published files

def linear(name, out, size): return {f"{name}.weight": (out, size), f"{name}.bias": (out,)}
def norm(name, size): return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def attention(name, size):
    return {f"{name}.in_proj_weight": (3 * size, size),
            f"{name}.in_proj_bias": (3 * size,)} | linear(f"{name}.out_proj", size, size)


def pooling(name):
    return attention(f"{name}.attn", 512) | norm(f"{name}.ln_q",
                                                 512) | norm(f"{name}.ln_k", 512) | norm(f"{name}.ln_v", 512)


def flat_keys(context):
    keys = {"logit_scale": (), "logit_bias": (), "visual.class_embedding": (768,),
            "visual.positional_embedding": (197, 768),
            "visual.conv1.weight": (768, 3, 16, 16), "image_post.proj": (768, 512),
            "token_embedding.weight": (49408, 512),
            "positional_embedding": (context, 512), "text_post.proj": (512, 512)}
    for name, size in (("visual.ln_pre", 768), ("visual.ln_post", 768), ("ln_final", 512)): keys |= norm(name, size)
    for stack, size in (("visual.transformer", 768), ("transformer", 512)):
        for i in range(12):
            block = f"{stack}.resblocks.{i}"
            keys |= norm(f"{block}.ln_1", size) | norm(f"{block}.ln_2", size) | attention(f"{block}.attn", size)
            keys |= linear(f"{block}.mlp.c_fc", 4 * size, size) | linear(f"{block}.mlp.c_proj", size, 4 * size)
    return keys | pooling("visual_proj")


def bert_keys():
    e = "text.transformer.embeddings"
    keys = {f"{e}.word_embeddings.weight": (30522, 768), f"{e}.position_embeddings.weight": (512, 768),
            f"{e}.token_type_embeddings.weight": (2, 768)}
    keys |= norm(f"{e}.LayerNorm", 768)
    for i in range(12):
        layer = f"text.transformer.encoder.layer.{i}"
        for part in ("query", "key", "value"): keys |= linear(f"{layer}.attention.self.{part}", 768, 768)
        keys |= linear(f"{layer}.attention.output.dense", 768, 768) | norm(f"{layer}.attention.output.LayerNorm", 768)
        keys |= linear(f"{layer}.intermediate.dense", 3072, 768) | linear(f"{layer}.output.dense", 768,
                                                                          3072) | norm(f"{layer}.output.LayerNorm", 768)
    return keys | {"text.proj.weight": (512, 768)}


def study_keys(patch, grid, sequential=False, itemized=False, named=False):
    t = "visual.trunk"
    keys = {"logit_scale": (), f"{t}.cls_token": (1, 1, 768), f"{t}.patch_embed.proj.weight": (768, 1, *patch),
            f"{t}.patch_embed.proj.bias": (768,),
            f"{t}.spatial_posemb": (1, *grid, 768), "visual.head.proj.weight": (512, 768)} | norm(f"{t}.norm", 768)
    for i in range(12):
        block = f"{t}.blocks.{i}"
        keys |= norm(f"{block}.norm1", 768) | norm(f"{block}.norm2",
                                                   768) | linear(f"{block}.attn.qkv", 2304,
                                                                 768) | linear(f"{block}.attn.proj", 768, 768)
        keys |= linear(f"{block}.mlp.fc1", 3072, 768) | linear(f"{block}.mlp.fc2", 768, 3072)
    if sequential: keys[f"{t}.sequential_posemb"] = (1, 40, 768)
    if itemized: keys |= {"logit_bias": ()} | pooling("visual_attn")
    if named:
        keys |= {f"{t}.serienameencoder.embed.weight": (47, 246)} | linear(f"{t}.sne_proj", 768, 256)
        for i in range(3):
            a, m = (f"{t}.serienameencoder.transformer.layers.{i}.{j}" for j in (0, 1))
            keys |= norm(f"{a}.norm", 256) | norm(f"{m}.norm",
                                                  256) | {f"{a}.fn.to_qkv.weight": (768, 256)} | linear(
                                                      f"{a}.fn.to_out.0", 256, 256)
            keys |= linear(f"{m}.fn.net.0", 300, 256) | linear(f"{m}.fn.net.3", 256, 300)
    return keys | bert_keys()


FILES = { # Name -> names and shapes in the file, their number, and the number of their values
    "flair": (flat_keys(77), 313, 150_674_434),
    "itemizedclip-rsicd": (flat_keys(100), 313, 150_686_210),
    "itemizedclip-cc0.3m": (flat_keys(100), 313, 150_686_210),
    "itemizedclip-mri": (study_keys((8, 16, 16), (6, 14, 14), itemized=True, named=True), 397, 199_727_024),
    "itemizedclip-head-ct": (study_keys((8, 16, 16), (6, 14, 14), itemized=True, named=True), 397, 199_727_024),
    "itemizedclip-ct-rate": (study_keys((8, 24, 24), (14, 14, 14), itemized=True), 361, 201_435_650),
    "hlip-multiscan-h2-token588": (study_keys((16, 16, 16), (3, 14, 14), sequential=True), 351, 198_363_649),
    "hlip-multiscan-h2-token1176": (study_keys((8, 16, 16), (6, 14, 14), sequential=True), 351, 197_242_369),
    "hlip-multiscan-h3-token1176": (study_keys((8, 16, 16), (6, 14, 14), sequential=True), 351, 197_242_369),
    "hlip-singlescan-h2-token2744": (study_keys((8, 24, 24), (14, 14, 14)), 350, 200_381_953),
}


def write_bert(folder, **config):
    "The configuration and the tokenizer of a BERT, without weights"
    import transformers
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "lesion", "no", "left", "right"]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    transformers.BertConfig(**config).save_pretrained(folder)
    return folder


def test_every_published_model_has_its_file(): assert FILES.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", FILES)
def test_model_has_the_names_and_shapes_of_the_file(name, tmp_path):
    keys, count, values = FILES[name]
    assert (len(keys), sum(math.prod(shape) for shape in keys.values())) == (count, values)
    with torch.device("meta"):
        clip = build(PUBLISHED[name], name, torch.device("meta"), "fp32", write_bert(tmp_path))
        file = published_state({key: torch.empty(shape) for key, shape in keys.items()})
    assert misfits(file, clip.model.state_dict()) == []


@pytest.mark.parametrize("name", ["flair", "itemizedclip-mri", "hlip-singlescan-h2-token2744"])
def test_full_size_file_loads(name, tmp_path):
    "All names and shapes as published, each tensor one repeated value, from a training run of several processes"
    keys, _, _ = FILES[name]
    state = {f"module.{key}": torch.full((), 0.001 * i).expand(shape) for i, (key, shape) in enumerate(keys.items())}
    if "hlip" in name: state["module.text.transformer.embeddings.position_ids"] = torch.arange(512)[None]
    write_bert(tmp_path)
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"lr": np.float64(0.1)}},
               tmp_path / "file.pt")
    clip = load_model(name, checkpoint=tmp_path / "file.pt", device="cpu", precision="fp32")
    found = clip.model.state_dict()
    values = {key: 0.001 * i for i, key in enumerate(keys)}
    for theirs, ours in (("logit_scale", "logit_scale"), ("visual_attn.ln_k.bias", "visual_proj.ln_k.bias"),
                         ("image_post.proj", "visual.proj"),
                         ("text_post.proj", "text_projection"),
                         ("visual.trunk.blocks.11.mlp.fc2.weight", "visual.trunk.blocks.11.mlp.fc2.weight"),
                         ("text.proj.weight", "text.proj.weight"),
                         ("visual.head.proj.weight", "visual.head.proj.weight")):
        if theirs in keys: assert found[ours].unique().tolist() == pytest.approx([values[theirs]]), theirs
    assert clip.spec == name and (clip.pooling is None) == ("hlip" in name)


# A small model in the same layout

SMALL = {"width": 48, "depth": 3, "heads": 4, "grid": [3, 4, 4], "patch_size": [4, 8, 8],
         "levels": list(ATTENTION_LEVELS)}


def small(name, folder):
    "A published model made small: every size, and nothing else"
    config = json.loads(json.dumps(PUBLISHED[name]))
    config["model_cfg"]["vision_cfg"]["volume_cfg"] |= SMALL
    config["model_cfg"] |= {"embed_dim": 32}
    config["preprocess_cfg"] = {"study": {"size": [12, 32, 32]}}
    write_bert(folder, vocab_size=10, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
               max_position_embeddings=512)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def test_small_published_models_round_trip(tmp_path):
    study = Study(torch.randn(2, 1, 12, 32, 32), ["AX_T1", "COR_T2"])
    for name in (n for n in PUBLISHED if "volume_cfg" in PUBLISHED[n]["model_cfg"]["vision_cfg"]):
        folder = small(name, tmp_path / name)
        torch.manual_seed(1)
        clip = load_model(str(folder), device="cpu")
        single = clip.model.visual.trunk.max_scans == 1
        images = [Study(study.volumes[:1], study.names[:1])] if single else [study]
        features, (_, tokens) = clip.encode_images(images), clip.encode_image_tokens(images)
        assert tokens.shape == (1, (1 if single else 2) * 48, 32)
        theirs = {f"module.{n.replace('visual_proj.', 'visual_attn.')}": t for n, t in clip.model.state_dict().items()}
        torch.save({"state_dict": theirs, "epoch": 1}, folder / "published.pt")
        torch.manual_seed(2)
        other = load_model(str(folder), checkpoint=folder / "published.pt", device="cpu")
        assert (torch.equal(other.encode_images(images), features)
                and torch.equal(other.encode_texts(["a lesion"]), clip.encode_texts(["a lesion"])))
        again = load_model(str(save_checkpoint(other, tmp_path / f"{name}-saved")), device="cpu")
        assert torch.equal(again.encode_images(images), features) and again.weights_hash() == clip.weights_hash()


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("visual_attn.ln_q.weight"), "missing visual_proj.ln_q.weight"),
    (lambda s: s.update({"visual.trunk.rope": torch.zeros(1)}), "unexpected visual.trunk.rope"),
    (lambda s: s.update({"visual.trunk.spatial_posemb": torch.zeros(1, 6, 14, 14, 48)}),
     r"wrong shape visual.trunk.spatial_posemb \(1, 6, 14, 14, 48\) for \(1, 3, 4, 4, 48\)"),
    (lambda s: s.pop("text.proj.weight"), "missing text.proj.weight")])
def test_misfits_are_named(change, message, tmp_path):
    clip = load_model(str(small("itemizedclip-mri", tmp_path / "m")), device="cpu")
    before = clip.weights_hash()
    state = {n.replace("visual_proj.", "visual_attn."): t for n, t in clip.model.state_dict().items()}
    change(state)
    torch.save(state, tmp_path / "file.pt")
    with pytest.raises(InputError, match=message): load_checkpoint(clip, tmp_path / "file.pt")
    assert clip.weights_hash() == before


def test_code_beside_a_text_encoder_is_not_run(tmp_path):
    "CXR-BERT comes with a configuration class of its own; it is a BERT, and read as one"
    import transformers
    folder = write_bert(tmp_path / "bert", vocab_size=10, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=48)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "cxr-bert",
                                                                 "auto_map": {"AutoConfig": "its_code.Config",
                                                                              "AutoModel": "its_code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    words = json.loads((folder / "tokenizer_config.json").read_text()) | {
        "auto_map": {"AutoTokenizer": ["its_code.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    (folder / "its_code.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig.from_pretrained(str(tmp_path / "bert")))
    torch.save({f"bert.{n}": t for n, t in bert.state_dict().items()}, folder / "pytorch_model.bin")
    clip = study_model(SMALL, f"hf:{folder}", dim=32, device="cpu")
    assert all(torch.equal(t, bert.state_dict()[n]) for n, t in clip.model.text.transformer.state_dict().items())
    assert clip.model.text.config.model_type == "bert" and clip.encode_texts(["a lesion"]).shape == (1, 32)
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision(precision, tmp_path):
    folder = small("itemizedclip-mri", tmp_path / "m")
    torch.manual_seed(0)
    full = load_model(str(folder), device="cpu", precision="fp32")
    save_checkpoint(full, tmp_path / "saved")
    half = load_model(str(tmp_path / "saved"), device="cpu", precision=precision)
    batch = pad_studies([Study(torch.randn(n, 1, 12, 32, 32), ["AX_T1", "COR_T2", "AX_T2"][:n]) for n in (3, 1)])
    for a, b in ((full.encode_images(batch), half.encode_images(batch)),
                 (full.encode_texts(["a lesion"]), half.encode_texts(["a lesion"]))):
        assert F.cosine_similarity(a, b).min() > 0.99
    assert {p.dtype for p in half.model.visual.parameters()} == {half.dtype} == {
        p.dtype for p in half.pooling.parameters()}


def test_any_text_tower_with_its_weights(tmp_path):
    text = load_model("starter", device="cpu")
    folder = save_checkpoint(text, tmp_path / "starter")
    clip = study_model(SMALL, str(folder), dim=text.dim, device="cpu")
    assert torch.equal(clip.encode_texts(["a lesion"]), text.encode_texts(["a lesion"]))


# Files of studies

def test_mri_files_are_turned_as_published(tmp_path):
    "Slices downwards, rows to the back, columns to the right; the thickest axis first"
    import nibabel as nib
    values = np.zeros((40, 50, 60), np.float32)
    values[30:, 5:10, 2:6] = 1000
    affine = np.diag([1., 1, 1, 1])
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "axial.nii.gz")
    nib.save(nib.Nifti1Image(values, np.diag([1., 4, 1, 1])), tmp_path / "coronal.nii.gz")
    steps = study_preprocess("mri-files")
    half = lambda volume: tuple(float(np.average(i, weights=volume.array)) / n
                                for i, n in zip(np.indices(volume.array.shape), volume.array.shape))
    d, h, w = half(steps.volume(tmp_path / "axial.nii.gz"))
    assert d > 0.8 and h > 0.7 and w > 0.6 # low, at the back, on the right
    d, h, w = half(steps.volume(tmp_path / "coronal.nii.gz"))
    assert d > 0.7 and h > 0.8 and w > 0.6 # slices to the back, rows downwards


def test_affine_follows_every_step(tmp_path):
    import nibabel as nib
    rng = np.random.default_rng(0)
    affine = np.array([[-0.9, 0, 0.1, 30], [0, 1.1, 0, -40], [0.05, 0, 3.0, -20], [0, 0, 0, 1]])
    blob = np.zeros((60, 50, 24), np.float32)
    blob[20:30, 12:20, 8:12] = rng.random((10, 8, 4)) + 1
    nib.save(nib.Nifti1Image(blob, affine), tmp_path / "v.nii.gz")
    centre = affine @ [*(np.average(i, weights=blob) for i in np.indices(blob.shape)), 1]
    steps = study_preprocess("mri-files", grid=(30, 80, 80), size=(28, 72, 76), percentiles=(0, 100))
    for volume in (steps.volume(tmp_path / "v.nii.gz"),
                   study_preprocess("mri-files", spacing=(2, 1, 1), grid=None, square=False,
                                    size=(40, 70, 60)).volume(tmp_path / "v.nii.gz")):
        there = volume.affine @ [*(np.average(i, weights=volume.array) for i in np.indices(volume.array.shape)), 1]
        assert np.abs(there - centre)[:3].max() < 1.6, there - centre
