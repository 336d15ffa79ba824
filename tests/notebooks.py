"""Run the notebooks, each in a process of its own: `python tests/notebooks.py [--workers 2] [PATH ...]`

`nbdev_test` runs one notebook after another in the same process, so that a variable of the environment or a working
directory that one leaves behind is met by whichever comes next. Here each starts from the same state, at little cost:
the packages are imported once, before the processes are forked.
"""
import argparse
import gc
import multiprocessing
import os
import sys
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path

from forks import own_modules
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = ("matplotlib.pyplot", "open_clip", "pandas", "sklearn.linear_model", "torch")


def found(paths: list[str]) -> list[Path]:
    "The notebooks of files and folders; `nbs` if none is given"
    files = [file for path in paths or ["nbs"] for file in nbglob(path, as_path=True)]
    return sorted(file.absolute() for file in files)


def import_once() -> None:
    "Import what is shared by the processes that are forked from this one, and keep its memory shared"
    for name in (*IMPORTED, *own_modules()): import_module(name)
    gc.collect()
    gc.freeze()


def run(notebook: Path, answer: Connection) -> None:
    "Say whether the notebook ran to its end, and its seconds"
    answer.send(test_nb(notebook, skip_flags=get_config().tst_flags.split(), basepath=str(ROOT)))


def run_apart(files: list[Path], workers: int) -> list[tuple[Path, bool, float]]:
    "The notebooks, each run in a process of its own, a few at a time; whether it ran to its end, and its seconds"
    context = multiprocessing.get_context("fork")
    waiting, running, results = files[::-1], {}, []
    while waiting or running:
        while waiting and len(running) < workers:
            answers, answer = context.Pipe(duplex=False)
            process = context.Process(target=run, args=(waiting[-1], answer))
            process.start()
            answer.close() # So that the end of the process is the end of the answers
            running[answers] = waiting.pop(), process
        for answers in wait(running):
            notebook, process = running.pop(answers)
            try: passed, seconds = answers.recv()
            except EOFError: passed, seconds = False, 0.0
            process.join()
            results.append((notebook, passed, seconds))
            if process.exitcode:
                print(f"{notebook.relative_to(ROOT)}: its process ended with {process.exitcode}", file=sys.stderr)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--timing", action="store_true", help="tell the seconds of each")
    parser.add_argument("paths", nargs="*")
    options = parser.parse_args()
    files = found(options.paths)
    if not files: sys.exit(f"no notebooks in {', '.join(options.paths)}")
    os.environ["IN_TEST"] = "1" # nbdev.showdoc and others ask for it; nbdev_test sets it as well
    import_once()
    results = sorted(run_apart(files, options.workers), key=lambda one: one[2])
    if options.timing: print(*(f"{seconds:7.1f} s  {path.relative_to(ROOT)}" for path, _, seconds in results), sep="\n")
    failed = sorted(str(path.relative_to(ROOT)) for path, passed, _ in results if not passed)
    print(f"{len(files) - len(failed)} of {len(files)} notebooks passed")
    for name in failed: print(f"failed: {name}")
    return bool(failed)


if __name__ == "__main__": sys.exit(main())
