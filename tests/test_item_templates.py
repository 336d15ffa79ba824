"The published settings of the template that trains on items, and its path for studies without a model of slices"
import pytest

from medclip_nb.core import InputError
from medclip_nb.datasets import list_datasets
from medclip_nb.evaluators import Result, list_protocols
from medclip_nb.experiments import (
    check_parameters,
    parameter_files,
    read_parameters,
    run,
    template_folder,
    template_parameters,
)
from medclip_nb.models import PUBLISHED

# ItemizedCLIP, arXiv 2512.11141, and its published training scripts: batch, lr, weight decay, warm-up (steps), epochs,
# eps, K, (ILA, MPS, IIS, KTA), keep, gamma, rho
PUBLISHED_SETTINGS = {
    "itemized-mri": (256, 1.75e-4, 0.2, 2000, 24, 1e-6, 7, (1, 0.01, 1, 1), 0.9, 1.5, 0.05),
    "itemized-head-ct": (256, 1.75e-4, 0.2, 2000, 24, 1e-6, 7, (1, 0.01, 1, 1), 0.9, 1.5, 0.05),
    "itemized-chest-ct": (512, 1e-4, 0.5, 100, 80, 1e-6, 10, (1, 0.1, 1, 1), 0.95, 1.0, 0.05),
    "itemized-cc0.3m": (1024, 5e-4, 0.8, 2000, 100, 1e-8, 7, (1, 0.1, 0.1, 1), 0.8, 1.5, 0.2),
    "itemized-rsicd": (1024, 3e-4, 1.5, 100, 100, 1e-8, 6, (1, 2, 1, 1.5), 0.6, 1.5, 0.2),
}


def settings(name):
    "All parameters of a run with a file of settings, defaults included"
    defaults = {n: p.default for n, p in template_parameters("itemized").items()}
    return defaults | check_parameters("itemized", read_parameters(name))


@pytest.mark.parametrize("name", PUBLISHED_SETTINGS)
def test_published_settings(name):
    p = settings(name)
    found = (p["batch_size"], p["lr"], p["weight_decay"], p["warmup"], p["epochs"], p["eps"], p["items_per_image"],
             (p["ila"], p["mps"], p["iis"], p["kta"]),
             p["token_keep_prob"], p["worst_positive_factor"], p["key_token_ratio"])
    assert found == PUBLISHED_SETTINGS[name]
    assert p["betas"] == [0.9, 0.98] and p["objective"] == "itemized" and p["model"] in PUBLISHED
    assert p["dataset"] in set(list_datasets()["name"]) and set(p["protocols"]) <= set(list_protocols()["name"])
    assert p["sampling"] == ("diverse" if name in ("itemized-cc0.3m", "itemized-rsicd") else "random")
    assert (p["lock_text"], p["num_series"], p["checkpointing"]) == (name == "itemized-chest-ct",
                                                                     10 * (name in ("itemized-mri",
                                                                                    "itemized-head-ct")),
                                                                     "t" in name[-2:] or name == "itemized-mri")


def test_files_of_parameters_are_found_by_name():
    assert set(PUBLISHED_SETTINGS) <= set(parameter_files())
    for name in parameter_files():
        check_parameters("finetune" if name == "demo" else "itemized", read_parameters(name))
    with pytest.raises(InputError, match="itemized-mri"): read_parameters("itemized-mrt")
    assert read_parameters(template_folder()/"params"/"itemized-mri.yaml") == read_parameters("itemized-mri")


def test_studies_without_a_model_of_slices(tmp_path):
    about = dict(data_root="data/starter", data_options={"view": "studies"}, tolerance_mm=8.0, n_boot=20)
    training = dict(epochs=1, batch_size=4, lr=1e-3, limit=8, findings=["haemorrhage", "infarct"])
    run("itemized", about | training | {"model": "starter-studies"}, tmp_path/"studies")
    result = Result.load(tmp_path/"studies")
    wanted = {"findings/auroc_macro", "places/attention_pointing_within", "items/image_to_text_R@10"}
    assert wanted <= set(result.metrics["name"])
    maps = dict(model=str(tmp_path/"studies"/"checkpoint"), limit=4, methods=["attention"], n_examples=1)
    run("attention_maps", about | maps, tmp_path/"maps")
    assert "attention_pointing" in set(Result.load(tmp_path/"maps").metrics["name"])
