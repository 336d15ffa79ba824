"Models from strangers: whatever their files ask for, none of their code runs, and one line says what to mend"
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from PIL import Image
from typer.testing import CliRunner

from medclip_nb.cli import main as cli
from medclip_nb.core import InputError
from medclip_nb.models import add_lora, load_adapter, load_model, save_adapter, study_model, swap_towers

VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 32, "patch_size": 16}
TEXT = {"hf_tokenizer_name": "words", "width": 32, "heads": 2, "layers": 1}
BERT = {"hf_model_name": "words", "hf_tokenizer_name": "words", "hf_proj_type": "linear",
        "hf_pooler_type": "mean_pooler"}
FORMS = {
    "options": ({"model_cfg": {"text_cfg": TEXT | {"tokenizer_kwargs": {"trust_remote_code": True}}}},
                "tokenizer_kwargs may not set 'trust_remote_code' to True"),
    "classes": ({"model_cfg": {"text_cfg": TEXT | {"tokenizer_kwargs": {"use_fast": False}}}},
                "tokenizer_kwargs may not set 'use_fast'"),
    "tokenizer": ({"model_cfg": {"text_cfg": TEXT}}, "tokenizer_config.json: 'auto_map' asks for code"),
    "encoder": ({"model_cfg": {"text_cfg": BERT}}, "config.json: 'auto_map' asks for code"),
    "timm": ({"model_cfg": {"text_cfg": {}, "vision_cfg": {"timm_model_name": "local-dir:{folder}"}}},
             "timm_model_name 'local-dir:"),
    "hugging face": (None, "config.json: 'auto_map' asks for code"),
}


def hostile(folder, form, marker):
    "A model folder whose code writes the marker"
    folder.mkdir()
    said = json.loads(json.dumps(FORMS[form][0]).replace("{folder}", str(folder)))
    if said:
        said["model_cfg"] = {"embed_dim": 32, "vision_cfg": VISION} | said["model_cfg"]
        (folder / "open_clip_config.json").write_text(json.dumps(said | {"preprocess_cfg": {}}))
    (folder / "words.py").write_text(
        f"open({str(marker)!r}, 'w')\nfrom transformers import *\n"
        "class Words(BertTokenizer): pass\nclass Config(BertConfig): pass\nclass Model(BertModel): pass\n")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "lesion"]))
    maps = {"AutoTokenizer": ["words.Words", None], "AutoConfig": "words.Config", "AutoModel": "words.Model"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": maps}))
    kind = "bert" if said else "clip"
    config = {"model_type": kind, "vocab_size": 7} | ({} if form == "tokenizer" else {"auto_map": maps})
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"logit_scale": torch.zeros(())}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_a_hostile_folder_is_refused_in_one_line(form, tmp_path):
    folder = hostile(tmp_path / "m", form, tmp_path / "it-ran")
    with pytest.raises(InputError) as said: load_model(str(folder), device="cpu")
    assert FORMS[form][1] in str(said.value) and "\n" not in str(said.value)
    assert not (tmp_path / "it-ran").exists()


def test_no_command_runs_the_code_of_a_model(command, tmp_path):
    marker = tmp_path / "it-ran"
    folder = hostile(tmp_path / "m", "options", marker)
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (40, 40), "gray").save(data / "a.png")
    (data / "data.csv").write_text("image,label,split\na.png,lesion,test\na.png,normal,test\n")
    picture = str(data / "a.png")
    verbs = [
        ["classify", picture, "--classes", "lesion", "normal", "--model", folder],
        ["rank", picture, "--texts", "lesion", "normal", "--model", folder],
        ["attend", picture, "--texts", "lesion", "--model", folder, "--out", tmp_path / "maps.png"],
        ["embed", "csv", data, "--model", folder, "--out", tmp_path / "f.npz"],
        ["export", folder, "--to", "huggingface", "--out", tmp_path / "out"],
        ["export", folder, "--model", folder, "--to", "open_clip", "--out", tmp_path / "out"],
    ]
    for verb in verbs:
        done = CliRunner().invoke(cli.app, [*map(str, verb)])
        assert done.exit_code == 2 and FORMS["options"][1] in done.output, (verb, done.output)
    ran = [command, "run", "zero_shot", "-p", "dataset=csv", "-p", f"data_root={data}", "-p", f"model={folder}", "-p",
           "device=cpu", "--out", tmp_path / "run"]
    done = subprocess.run([*map(str, ran)], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode in (1, 2) and FORMS["options"][1] in done.stdout + done.stderr
    assert not marker.exists()


HUB = """
import json, os, sys
from pathlib import Path
import open_clip
from medclip_nb.core import InputError
from medclip_nb.models import load_model, study_model, swap_towers

home, marker = Path(sys.argv[1]), Path(sys.argv[2])
def refused(build):
    try: build()
    except InputError as error: return str(error)
    raise AssertionError("built")
said = [refused(lambda: load_model('hf-hub:org/' + name, device="cpu")) for name in ("options", "tokenizer", "encoder")]
assert "may not set 'trust_remote_code'" in said[0], said
for one in said[1:]: assert "never run here" in one and "trust_remote_code" not in one and "\\n" not in one, said
for build in (lambda: swap_towers("starter", "hf:org/encoder", device="cpu"),
              lambda: study_model("multiscan_h2_token588", "hf:org/encoder", device="cpu")):
    one = refused(build)
    assert "never run here" in one and "trust_remote_code" not in one, one
assert not marker.exists()
try: open_clip.get_tokenizer("hf-hub:org/options")
except Exception as error: print(error)
assert marker.exists(), "the trap works where the code is allowed"
"""


def test_a_hostile_name_on_the_hub(tmp_path):
    "From a filled cache; someone at the terminal would answer every question with yes"
    marker = tmp_path / "it-ran"
    for form in ("options", "tokenizer", "encoder"):
        repo = tmp_path / "hub" / f"models--org--{form}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("a" * 40)
        (repo / "snapshots").mkdir()
        folder = hostile(repo / "snapshots" / ("a" * 40), form, marker)
        config = json.loads((folder / "config.json").read_text()) | {"model_type": "strange"}
        if form == "encoder": (folder / "config.json").write_text(json.dumps(config))
        text = (folder / "open_clip_config.json").read_text().replace('"words"', f'"org/{form}"')
        (folder / "open_clip_config.json").write_text(text)
    done = subprocess.run([sys.executable, "-c", HUB, str(tmp_path), str(marker)], capture_output=True, text=True,
                          input="y\n" * 20, env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


def test_text_encoders_from_folders(tmp_path):
    marker = tmp_path / "it-ran"
    folder = hostile(tmp_path / "m", "encoder", marker)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "strange"}))
    for build in (lambda: swap_towers("starter", f"hf:{folder}", device="cpu"),
                  lambda: study_model("multiscan_h2_token588", f"hf:{folder}", device="cpu"),
                  lambda: load_model("hlip-multiscan-h2-token588", checkpoint=folder, device="cpu")):
        with pytest.raises(InputError, match="auto_map") as said: build()
        assert "trust_remote_code" not in str(said.value) and not marker.exists()


def test_an_adapter_imports_no_module(tmp_path, monkeypatch):
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = save_adapter(add_lora(load_model("starter", device="cpu"), towers=("text",)), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    more = {"megatron_config": {"hidden": 1}, "megatron_core": "megatron.core"}
    (folder / "adapter_config.json").write_text(json.dumps(config | more))
    with pytest.raises(InputError, match="sets megatron_config"): load_adapter(load_model("starter"), folder)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("config, says", [
    ("[]", "must hold an object"),
    ("{}", "needs open_clip_config.json"),
    ('{"model_cfg": 3}', "model_cfg must be an object"),
    ('{"model_cfg": {"embed_dim": 32, "vision_cfg": {}}}', "text_cfg must be an object"),
    ('{"model_cfg": {"embed_dim": "x", "vision_cfg": {}, "text_cfg": {}}}', "could not be loaded"),
    ('{"model_cfg": {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"tokenizer_kwargs": {"clean": "x"}}}}',
     "could not be loaded"),
    ("{", "is not JSON"),
])
def test_odd_configurations(config, says, tmp_path):
    (tmp_path / "open_clip_config.json").write_text(config)
    with pytest.raises(InputError, match=says) as said: load_model(str(tmp_path), device="cpu")
    assert "\n" not in str(said.value)


def test_every_architecture_of_open_clip_is_known():
    import open_clip

    from medclip_nb.models import check_configuration
    for name in open_clip.list_models(): check_configuration(open_clip.get_model_config(name), name)
    assert transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE > 0
