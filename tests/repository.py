"""What must be true of the repository before any test of its code: `python tests/repository.py` says what isn't.
With first words of the checks as arguments (modules, notebooks, README) it tries these only.

Everything is tried on a copy, so that neither the files nor git's state matter.
"""
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("settings.ini", "pyproject.toml", "setup.py", "nbs", "medclip_nb")


def _copy(to: Path) -> Path:
    "The sources of the package in another folder"
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in SOURCES:
        if (ROOT / name).is_dir(): shutil.copytree(ROOT / name, to / name, ignore=skip)
        else: shutil.copy(ROOT / name, to / name)
    return to


def _nbdev(command: str, folder: Path) -> None:
    done = subprocess.run([Path(sys.executable).with_name(command)], cwd=folder, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{command} failed:\n{done.stderr}")


def _differences(a: Path, b: Path, pattern: str) -> list[str]:
    "Files that are not the same in both folders"
    names = {p.relative_to(x).as_posix() for x in (a, b) for p in x.rglob(pattern)
             if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)}
    same = lambda n: (a / n).is_file() and (b / n).is_file() and (a / n).read_bytes() == (b / n).read_bytes()
    return sorted(n for n in names if not same(n))


def stale_modules() -> list[str]:
    "Modules that are not what their notebooks export"
    with TemporaryDirectory() as folder:
        copy = _copy(Path(folder))
        for p in (copy / "medclip_nb").rglob("*.py"):
            if p != copy / "medclip_nb" / "__init__.py": p.unlink()
        _nbdev("nbdev_export", copy)
        return _differences(ROOT / "medclip_nb", copy / "medclip_nb", "*.py")


def unclean_notebooks() -> list[str]:
    "Notebooks that nbdev_clean would change"
    with TemporaryDirectory() as folder:
        copy = _copy(Path(folder))
        _nbdev("nbdev_clean", copy)
        return _differences(ROOT / "nbs", copy / "nbs", "*.ipynb")


def stale_readme() -> list[str]:
    "README.md, if it is not what its notebook says"
    spec = importlib.util.spec_from_file_location("readme", ROOT / "docs" / "readme.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    path = ROOT / "README.md"
    return [] if path.exists() and path.read_text(encoding="utf-8") == module.readme() else ["README.md"]


CHECKS = {"modules in step with the notebooks": (stale_modules, "run nbdev_export"),
          "notebooks clean": (unclean_notebooks, "run nbdev_clean"),
          "README current": (stale_readme, "run python docs/readme.py")}

if __name__ == "__main__":
    wrong = 0
    for title, (check, remedy) in CHECKS.items():
        if sys.argv[1:] and title.split()[0] not in sys.argv[1:]: continue
        found = check()
        wrong += bool(found)
        print(f"{title}: " + ("yes" if not found else f"no ({remedy}): {', '.join(found)}"), flush=True)
    sys.exit(wrong > 0)
