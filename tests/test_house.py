"The house: wings import one way only, and the face of a wing hands on every public name of its modules"
import ast
import importlib
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "medclip_nb"
WINGS = ("images", "datasets", "models", "losses", "metrics", "embeddings", "evaluators", "trainers", "plots",
         "experiments",
         "explorers", "cli")
ORDER = ("core", "distributed", *WINGS)
SHORT = {"pooling": "models.pooling", "volumes": "models.volume_encoder"}  # Modules that hand on another one
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "_modidx.py")


def module_name(path: Path) -> str:
    "medclip_nb/models/clip.py -> models.clip"
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in FILES}


def imports(name: str) -> set[str]:
    "Modules of this package that a module imports, at the top or inside its functions"
    path, found = MODULES[name], set()
    package = ["medclip_nb", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            names = [f"{source}.{a.name}" for a in node.names]
        else: continue
        for target in (n.removeprefix("medclip_nb.") for n in names if n.startswith("medclip_nb.")):
            while target and target not in MODULES: target = target.rpartition(".")[0]
            if target: found.add(target)
    return found - {name}


def wing(module: str) -> str: return module.partition(".")[0]


def test_wings_are_known():
    assert {wing(m) for m in MODULES} - {""} == {*ORDER, *SHORT}


@pytest.mark.parametrize("name", [m for m in MODULES if wing(m) in ORDER])
def test_imports_run_one_way(name):
    later = ORDER[ORDER.index(wing(name)) + 1:]
    assert not {t for t in imports(name) if wing(t) in (*later, *SHORT)}, "a wing imports only from those before it"


def test_no_circle():
    TopologicalSorter({m: imports(m) for m in MODULES}).prepare()  # Raises CycleError, which names the circle


def public_names(path: Path) -> set[str]:
    "What nbdev lists in `__all__`"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


@pytest.mark.parametrize("name", [w for w in WINGS if w != "cli"])
def test_face_hands_on_every_public_name(name):
    face = importlib.import_module(f"medclip_nb.{name}")
    modules = {m: public_names(p) for m, p in MODULES.items() if m.startswith(f"{name}.") and m.count(".") == 1}
    assert set(face.__all__) == set().union(*modules.values())
    for module, names in modules.items():
        defined = importlib.import_module(f"medclip_nb.{module}")
        for n in names: assert getattr(face, n) is getattr(defined, n), f"{module}.{n}"
    assert not {m.rpartition(".")[2]
                for m in modules} & set(face.__all__), "a module must not bear the name of a function"


def test_public_name_means_one_thing():
    seen: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        if wing(module) in WINGS and wing(module) != "cli":
            for n in public_names(path): seen.setdefault(n, []).append(module)
    assert {n: m for n, m in seen.items() if len(m) > 1} == {}


@pytest.mark.parametrize("short", SHORT)
def test_short_module(short):
    full = importlib.import_module(f"medclip_nb.{SHORT[short]}")
    module = importlib.import_module(f"medclip_nb.{short}")
    assert set(module.__all__) == public_names(MODULES[SHORT[short]])
    for n in module.__all__: assert getattr(module, n) is getattr(full, n)


DESIGN = {"datasets": "load_manifest list_datasets validate", "models": "load_model ClipModel add_lora",
          "pooling": "TextConditionedPooling", "volumes": "VolumeEncoder",
          "losses": "clip_loss siglip_loss itemized_losses", "embeddings": "embed",
          "metrics": "retrieval_metrics bootstrap",
          "evaluators": "zero_shot_classifier zero_shot linear_probe retrieval rank_captions Result",
          "experiments": "run run_suite compare"}


@pytest.mark.parametrize("module", DESIGN)
def test_names_that_outside_code_relies_on(module):
    found = importlib.import_module(f"medclip_nb.{module}")
    for name in DESIGN[module].split(): assert callable(getattr(found, name)), name
    assert "medclip_nb" in sys.modules
