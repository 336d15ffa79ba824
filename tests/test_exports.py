"Checkpoints in and out: formats, refusals, transformers and open_clip as judges, the card, the request to the hub"
import base64
import json
import pickle
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from medclip_nb.cli import main as cli
from medclip_nb.core import InputError
from medclip_nb.models import PASTED, exports, load_checkpoint, load_model, save_checkpoint, swap_towers

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["a lesion", "an axial slice of a normal brain"]


def hf_model(folder, act="quick_gelu", eos=49407, **text):
    from transformers import CLIPConfig, CLIPModel
    size = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 3,
            "hidden_act": act}
    torch.manual_seed(0)
    words = size | {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "eos_token_id": eos} | text
    model = CLIPModel(CLIPConfig(vision_config=size | {"image_size": 32, "patch_size": 16}, text_config=words,
                                 projection_dim=24)).eval()
    for p in model.parameters():
        if p.ndim > 1: torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    return model


def same(clip, theirs, eps=1e-5):
    images, tokens = torch.randn(3, 3, 32, 32), clip.tokenizer(TEXTS)
    with torch.no_grad():
        a, b = clip.forward_images(images), theirs.get_image_features(pixel_values=images).pooler_output
        c, d = clip.forward_texts(tokens), theirs.get_text_features(input_ids=tokens).pooler_output
    assert ((a - b).abs().max() < eps and (c - d).abs().max() < eps
            and abs(clip.logit_scale - theirs.logit_scale.exp().item()) < 1e-4)
    return max((a - b).abs().max().item(), (c - d).abs().max().item())


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [49407, 2])
def test_hugging_face_in_and_out(act, eos, tmp_path):
    from transformers import CLIPModel
    theirs = hf_model(tmp_path / "hf", act, eos)
    clip = load_model(str(tmp_path / "hf"))
    same(clip, theirs)
    assert clip.config["model_cfg"]["quick_gelu"] == (act == "quick_gelu")
    out = exports.export(tmp_path / "hf", "huggingface", tmp_path / "out")
    same(clip, CLIPModel.from_pretrained(out).eval())
    written = safetensors.torch.load_file(out / "model.safetensors")
    for name, tensor in theirs.state_dict().items():
        if "position_ids" not in name: assert torch.equal(tensor, written[name]), name
    back = exports.export(out, "open_clip", tmp_path / "back")
    plain, _ = open_clip.create_model_from_pretrained(f"local-dir:{back}")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert (plain.eval().encode_image(images, normalize=True) - clip.encode_images(images)).abs().max() < 1e-6


def test_pasted_texts_have_the_tokens_of_training(tmp_path):
    "Read by transformers' own classes; what differs is named in the card"
    from transformers import AutoTokenizer, CLIPModel, CLIPProcessor
    hf_model(tmp_path / "hf")
    clip = load_model(str(tmp_path / "hf"))
    out = exports.export(tmp_path / "hf", "huggingface", tmp_path / "out")
    tokenizer, processor = AutoTokenizer.from_pretrained(out), CLIPProcessor.from_pretrained(out)
    theirs, other = CLIPModel.from_pretrained(out).eval(), []
    for text in PASTED:
        words = tokenizer([text], return_tensors="pt", truncation=True)
        assert processor(text=[text], return_tensors="pt", truncation=True)["input_ids"].equal(words["input_ids"])
        with torch.no_grad(): features = theirs.get_text_features(**words).pooler_output
        same = torch.allclose(torch.nn.functional.normalize(features), clip.encode_texts([text]), atol=1e-5)
        if not same: other.append(text)
    card = (out / "README.md").read_text()
    assert other == list(PASTED[-2:]) and f"{len(PASTED) - 2} give the same tokens as in training" in card
    for text in other: assert text in card
    assert len(tokenizer(["a lesion " * 99], truncation=True).input_ids[0]) == 77


def test_pickled_and_sharded_hugging_face_weights(tmp_path):
    theirs = hf_model(tmp_path / "hf")
    state = {k: v for k, v in theirs.state_dict().items()} | {
        "text_model.embeddings.position_ids": torch.arange(77)[None]}
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    same(load_model(str(tmp_path / "hf")), theirs)
    (tmp_path / "hf" / "pytorch_model.bin").unlink()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="2MB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    same(load_model(str(tmp_path / "hf")), theirs)


def test_wrong_activation_is_refused(tmp_path):
    hf_model(tmp_path / "hf", "quick_gelu")
    clip = load_model(str(tmp_path / "hf"))
    folder = save_checkpoint(clip, tmp_path / "quick")
    config = deepcopy(clip.config)
    config["model_cfg"]["quick_gelu"] = False
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "open_clip_config.json").write_text(json.dumps(config))
    for weights in (tmp_path / "hf", folder):
        with pytest.raises(InputError, match="was trained with quick_gelu, and model .* computes gelu"):
            load_model(str(tmp_path / "plain"), checkpoint=weights)


def test_tag_decides_the_activation(monkeypatch, tmp_path):
    "open_clip only warns when OpenAI's weights meet the plain architecture"
    asked = {}
    def create(name, **options):
        asked.update(options)
        raise RuntimeError("no network")
    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    for spec, quick in (("ViT-B-32/openai", True), ("ViT-B-32/laion2b_s34b_b79k", False), ("ViT-B-32", False)):
        with pytest.raises(InputError, match="could not be loaded"): load_model(spec)
        assert asked["force_quick_gelu"] is quick


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "safetensors"])
def test_training_checkpoints(suffix, tmp_path):
    clip = load_model("starter")
    state = {f"module._orig_mod.{k}": v for k, v in clip.model.state_dict().items()}
    path = tmp_path / f"epoch_3.{suffix}"
    if suffix == "safetensors": safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save({"epoch": 3, "name": "run", "state_dict": state,
                    "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(1e-4)}]}}, path)
    assert load_model("starter", checkpoint=path).weights_hash() == clip.weights_hash()


def test_text_tower_in_the_model_or_beside_it(tmp_path):
    config = load_model("ViT-S-32-alt").config
    nested = deepcopy(config)
    nested["model_cfg"]["custom_text"] = True
    for name, c in (("flat", config), ("nested", nested)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "open_clip_config.json").write_text(json.dumps(c))
    flat = load_model(str(tmp_path / "flat"))
    save_checkpoint(flat, tmp_path / "saved")
    other = load_model(str(tmp_path / "nested"), checkpoint=tmp_path / "saved")
    assert torch.equal(other.encode_texts(TEXTS), flat.encode_texts(TEXTS))
    back = load_model(str(tmp_path / "flat"), checkpoint=save_checkpoint(other, tmp_path / "again"))
    assert back.weights_hash() == flat.weights_hash()


def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path):
    clip = load_model("starter")
    state = {k: v.clone() for k, v in clip.model.state_dict().items()}
    before = clip.weights_hash()
    short = {k: v for k, v in state.items() if k != "visual.trunk.position"}
    long = state | {"text.token_embedding.weight": torch.zeros(100, 64)}
    for wrong, message in ((short, "missing visual.trunk.position"),
                           (state | {"head.weight": torch.zeros(1)}, "unexpected head.weight"),
                           (long, r"wrong shape text.token_embedding.weight \(100, 64\) for \(49408, 64\)")):
        safetensors.torch.save_file(wrong, tmp_path / "w.safetensors")
        with pytest.raises(InputError, match=message): load_checkpoint(clip, tmp_path / "w.safetensors")
        assert clip.weights_hash() == before


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "pytorch_model.bin", "adapter"])
def test_nothing_in_a_pickle_runs(name, tmp_path):
    class Trap:
        def __reduce__(self): return Path.touch, (tmp_path / "it-ran",)
    clip = load_model("starter")
    if name == "adapter":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        torch.save({"x": Trap()}, tmp_path / "adapter_model.bin")
        path, message = tmp_path, "adapter_model.bin is not opened"
    else:
        path, message = tmp_path / name, "cannot be read as a checkpoint"
        if name == "w.pth": path.write_bytes(pickle.dumps({"state_dict": Trap()}))
        else: torch.save({"state_dict": {"logit_scale": torch.zeros(()), "x": Trap()}}, path)
    with pytest.raises(InputError, match=message): load_checkpoint(clip, path)
    assert not (tmp_path / "it-ran").exists()


def test_swapped_towers_save_and_load(tmp_path):
    saved = save_checkpoint(load_model("ViT-S-32-alt"), tmp_path / "vit")
    clip = swap_towers(str(saved), "scratch", dim=256)
    source = load_model(str(saved))
    assert torch.equal(clip.model.visual.transformer.resblocks[0].attn.in_proj_weight,
                       source.model.visual.transformer.resblocks[0].attn.in_proj_weight)
    again = load_model(str(save_checkpoint(clip, tmp_path / "swapped")))
    assert (again.weights_hash() == clip.weights_hash()
            and torch.equal(again.encode_texts(TEXTS), clip.encode_texts(TEXTS)))
    plain, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'swapped'}")
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert (plain.eval().encode_image(images, normalize=True) - clip.encode_images(images)).abs().max() < 1e-6


def test_towers_of_two_activations(tmp_path):
    for act in ("quick_gelu", "gelu"): hf_model(tmp_path / act, act)
    with pytest.raises(InputError, match="different activations"):
        swap_towers(str(tmp_path / "gelu"), str(tmp_path / "quick_gelu"))
    clip, source = swap_towers(str(tmp_path / "quick_gelu"), str(tmp_path / "quick_gelu"),
                               dim=24), load_model(str(tmp_path / "quick_gelu"))
    images = torch.randn(1, 3, 32, 32)
    assert ((clip.encode_images(images) - source.encode_images(images)).abs().max() < 1e-6
            and (clip.encode_texts(TEXTS) - source.encode_texts(TEXTS)).abs().max() < 1e-6)


def test_card_of_the_committed_run(tmp_path):
    run = ROOT / "reports" / "starter" / "finetune"
    if not (run / "metrics.json").is_file(): pytest.skip("the starter suite has not run")
    card = huggingface_hub.ModelCard.load(exports.export(run, "card", tmp_path / "card", name="starter") / "README.md")
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]
    assert {r.metric_type: r.metric_value
            for r in card.data.eval_results} == {k: m["value"] for k, m in metrics.items()}
    assert (all(f"| {name} |" in card.text for name in metrics) and "Not for clinical use" in card.text
            and str(ROOT) not in card.content)


def test_command(tmp_path):
    call = lambda *args: CliRunner().invoke(cli.app, ["export", *map(str, args)])
    hf_model(tmp_path / "hf")
    done = call(tmp_path / "hf", "--to", "open_clip", "--out", tmp_path / "out", "--name", "tiny", "--license", "mit")
    assert (done.exit_code, done.output) == (0, f"written: {tmp_path / 'out'}\n")
    assert {p.name for p in (tmp_path / "out").glob("[!.]*")} == {"README.md", "open_clip_config.json",
                                                              "open_clip_model.safetensors"}
    assert huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md").data.license == "mit"
    for args, message in (((tmp_path / "none", "--to", "open_clip"), "no such run"),
                          ((tmp_path / "hf", "--to", "onnx"), "Unknown layout 'onnx'"),
                          ((tmp_path / "hf", "--to", "card"), "to make a card from")):
        failed = call(*args, "--out", tmp_path / "x")
        assert failed.exit_code == 2 and message in failed.output and "Traceback" not in failed.output


def test_the_runs_there_are_are_named(tmp_path):
    "For a folder of several runs, and for one that does not exist"
    words = ["--to", "open_clip", "--out", str(tmp_path / "x")]
    call = lambda source: CliRunner().invoke(cli.app, ["export", str(source), *words])
    (tmp_path / "runs" / "untrained").mkdir(parents=True)
    said = call(tmp_path / "runs")
    assert said.exit_code == 2 and f"No run in {tmp_path / 'runs'} has a model" in said.output
    for name in ("a", "suite/b"): hf_model(tmp_path / "runs" / name / "checkpoint")
    named = f"Runs with a model: {tmp_path / 'runs' / 'a'}, {tmp_path / 'runs' / 'suite' / 'b'}."
    for source in ("runs", "runs/c", "runs/untrained"):
        said = call(tmp_path / source)
        assert said.exit_code == 2 and named in said.output, said.output


class Hub(BaseHTTPRequestHandler):
    "Answers huggingface_hub's own client as the hub does, and takes notes"
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.calls.append((self.path, body))
        answer = {"/api/validate-yaml": {"errors": [], "warnings": []},
                  "/api/repos/create": {"url": "https://huggingface.co/lab/tiny", "name": "lab/tiny"}}.get(self.path)
        if self.path.endswith("/preupload/main"):
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                                for f in json.loads(body)["files"]]}
        reply = json.dumps(answer
                           or {"success": True, "commitOid": "0" * 40,
                               "commitUrl": "https://huggingface.co/lab/tiny/commit/0"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args): pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls = []
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_request_to_the_hub(hub, tmp_path):
    "What huggingface_hub's own client sends, to a server on this machine"
    hf_model(tmp_path / "hf")
    out = exports.export(tmp_path / "hf", "open_clip", tmp_path / "out")
    for name in ("predictions.parquet", "training_args.bin"): (out / name).write_bytes(b"private")
    api = huggingface_hub.HfApi(endpoint=f"http://127.0.0.1:{hub.server_address[1]}", token="none")
    exports.push(out, "lab/tiny", message="First", api=api)
    created = json.loads(next(body for path, body in hub.calls if path == "/api/repos/create"))
    assert (created["name"], created.get("organization"),
            created.get("visibility", created.get("private"))) in (("tiny", "lab", True), ("tiny", "lab", "private"))
    card = json.loads(next(body for path, body in hub.calls if path == "/api/validate-yaml"))
    assert "Not for clinical use" in card["content"] and card["repoType"] == "model"
    (commit,) = [body for path, body in hub.calls if path == "/api/models/lab/tiny/commit/main"]
    header, *files = [json.loads(line) for line in commit.splitlines()]
    assert header["value"]["summary"] == "First"
    assert ({f["key"] for f in files} == {"file"}
            and sorted(f["value"]["path"] for f in files) == ["README.md", "open_clip_config.json",
                                                              "open_clip_model.safetensors"])
    for f in files: assert base64.b64decode(f["value"]["content"]) == (out / f["value"]["path"]).read_bytes()
