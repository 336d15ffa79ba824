"The published settings, and the templates that train on items and show where a model looks"
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

# ItemizedCLIP, arXiv 2512.11141, and its published training scripts: batch, lr, weight decay, warm-up (steps), epochs, eps, K, (ILA, MPS, IIS, KTA), keep, gamma, rho
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
    found = (p["batch_size"], p["lr"], p["weight_decay"], p["warmup"], p["epochs"], p["eps"], p["items_per_image"], (p["ila"], p["mps"], p["iis"], p["kta"]),
             p["token_keep_prob"], p["worst_positive_factor"], p["key_token_ratio"])
    assert found == PUBLISHED_SETTINGS[name]
    assert p["betas"] == [0.9, 0.98] and p["objective"] == "itemized" and p["model"] in PUBLISHED
    assert p["dataset"] in set(list_datasets()["name"]) and set(p["protocols"]) <= set(list_protocols()["name"])
    assert p["sampling"] == ("diverse" if name in ("itemized-cc0.3m", "itemized-rsicd") else "random")
    assert (p["lock_text"], p["num_series"], p["checkpointing"]) == (name == "itemized-chest-ct", 10 * (name in ("itemized-mri", "itemized-head-ct")), "t" in name[-2:] or name == "itemized-mri")


def test_files_of_parameters_are_found_by_name():
    assert set(PUBLISHED_SETTINGS) <= set(parameter_files())
    for name in parameter_files(): check_parameters("itemized", read_parameters(name))
    with pytest.raises(InputError, match="itemized-mri"): read_parameters("itemized-mrt")
    assert read_parameters(template_folder()/"params"/"itemized-mri.yaml") == read_parameters("itemized-mri")


SMALL = {"n_studies": [14, 6, 8], "n_slices": 4, "seed": 171} # With every finding in each split
TINY = dict(data_options=SMALL, limit=48, epochs=1, batch_size=16, lr=1e-3, labels=["finding"], tolerance_mm=4.8, pixel_mm=1.0, n_boot=50, strip_pattern=r", \d+ mm")


@pytest.fixture(scope="module")
def root(tmp_path_factory): return str(tmp_path_factory.mktemp("data")/"starter")


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    "An itemized and a plain model of a few steps"
    out = tmp_path_factory.mktemp("trained")
    for name, objective in (("itemized", "itemized"), ("plain", "clip")): run("itemized", TINY | {"data_root": root, "objective": objective}, out/name)
    return out


def test_itemized_template(trained):
    for name, maps in (("itemized", "attention"), ("plain", "relevance")):
        result = Result.load(trained/name)
        assert result.details["objective"] == {"itemized": "itemized", "plain": "clip"}[name]
        for metric in ("items/image_to_text_R@1", "items/image_to_text_COMPLETE@10", "finding/balanced_accuracy", f"places/{maps}_pointing_within", f"places/{maps}_iou"):
            low, value, high = result.metrics.set_index("name").loc[metric, ["low", "value", "high"]]
            assert 0 <= low <= value <= high <= 1, metric
        assert (trained/name/"checkpoint").is_dir()
    assert set(Result.load(trained/"itemized").predictions["task_label"]) == {"items", "finding", "places"}


def test_maps_of_one_model_against_another(root, trained, tmp_path):
    params = dict(data_root=root, data_options=SMALL, limit=24, model=str(trained/"itemized"/"checkpoint"), against=str(trained/"plain"/"checkpoint"), methods=["attention"], strip_pattern=r", \d+ mm",
                  tolerance_mm=4.8, pixel_mm=1.0, n_boot=50, n_examples=1)
    run("attention_maps", params, tmp_path/"maps")
    names = set(Result.load(tmp_path/"maps").metrics["name"])
    assert {"attention_pointing", "plain-relevance_pointing", "plain-similarity_pointing"} <= names


def test_studies(root, tmp_path):
    params = TINY | dict(model="starter-studies", data_root=root, data_options=SMALL | {"view": "studies"}, limit=10, batch_size=4, labels=[], findings=["haemorrhage", "infarct"], pixel_mm=0.0, tolerance_mm=8.0)
    run("itemized", params, tmp_path/"studies")
    result = Result.load(tmp_path/"studies")
    assert {"findings/auroc_macro", "places/attention_pointing_within", "items/image_to_text_R@10"} <= set(result.metrics["name"])
    run("attention_maps", dict(data_root=root, data_options=SMALL | {"view": "studies"}, model=str(tmp_path/"studies"/"checkpoint"), limit=4, methods=["attention"], n_boot=50, n_examples=1,
                               tolerance_mm=8.0), tmp_path/"maps")
    assert "attention_pointing" in set(Result.load(tmp_path/"maps").metrics["name"])
