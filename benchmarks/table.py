"""Every comparison of speed in one table, saved with the machine that it was measured on.

    python benchmarks/table.py [--only retrieval_metrics] [--scaling] [--out benchmarks/results.json]

Each benchmark runs in a process of its own, one after the other, and times its ways in turn. A ratio is the time of the
rival over ours: the median over the rounds, with the least and the largest. "bound" is the share of our time that no
way can do without, such as the matrix products alone. A goal that needs instructions which this processor lacks is
shown in parentheses. `--scaling` adds other sizes of the same tasks. An idle machine is needed: the load before each
benchmark is kept with its figures. `--only` measures some benchmarks again and keeps the figures of the others, if they
are of the same machine and packages.
"""
import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
STANDARD = {
    "zero_shot_classifier": ["--rounds", "3"],
    "retrieval_metrics": ["--rounds", "5"],
    "probe": ["--rounds", "3", "--n", "5000"],
    "lora_step": ["--rounds", "3"],
    "itemized_loss": ["--rounds", "3"],
    "item_similarity": ["--rounds", "3"],
    "bootstrap": ["--rounds", "3"],
    "embedding_cache": ["--rounds", "3", "--rows", "10000"],
    "training_step": ["--rounds", "3", "--batch", "8"],
    "image_features": ["--rounds", "3", "--batch", "8", "--per_class", "2"],
}  # Benchmark -> its options
SCALING = {
    "retrieval_metrics": ["--n", ("1000", "2500", "10000")],
    "item_similarity": ["--texts", ("250", "500", "1000")],
    "itemized_loss": ["--items", ("2", "4", "12")],
    "bootstrap": ["--rows", ("1000", "100000")],
    "probe": ["--classes", ("3", "30")],
}  # Benchmark -> an option, and its other values


def machine() -> dict[str, object]:
    "What the figures were measured on"
    import torch
    from noted import bf16_is_computed  # Beside this file; the documentation takes other functions from elsewhere
    try: cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration): cpu = platform.processor()
    packages = ("medclip_nb", "torch", "open_clip_torch", "scikit-learn", "peft", "numpy")
    return {
        "processor": cpu,
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16": bf16_is_computed(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "date": datetime.now(timezone.utc).date().isoformat()}


def measure(name: str, options: list[str]) -> list[dict]:
    "Run one benchmark; its comparisons"
    load = os.getloadavg()[0]
    print(f"{name} {' '.join(options)} (load {load:.1f})", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "notes")
        environment = {**os.environ, "MEDCLIP_NB_BENCH": str(file)}
        done = subprocess.run([sys.executable, HERE/f"{name}.py", *options], env=environment, capture_output=True,
                              text=True)
        if done.returncode: print(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}", file=sys.stderr)
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return [json.loads(line) | {"benchmark": name, "load": round(load, 2)} for line in lines]


def kept(file: Path, about: dict[str, object], anew: set[str]) -> list[dict]:
    "Earlier results of the same machine, but for the benchmarks that are measured anew"
    if not file.exists(): return []
    earlier = json.loads(file.read_text(encoding="utf-8"))
    if any(earlier["machine"][name] != value for name, value in about.items() if name != "date"): return []
    return [found for found in earlier["results"] if found["benchmark"] not in anew]


def as_table(results: list[dict], bf16: bool) -> pd.DataFrame:
    "Results as they are shown"
    def goal(found: dict) -> str:
        if not found["goal"]: return ""
        text = f"{found['goal']:g}"
        if found["needs"] == "bf16" and not bf16: return f"({text}, needs bf16)"
        return f"{text} {'reached' if found['ratio'] >= found['goal'] else 'missed'}"
    rows = [{
        "path": found["path"],
        "size": found["size"],
        "against": found["rival"],
        "ours (s)": f"{found['seconds']:.3g}",
        "rival (s)": f"{found['rival_seconds']:.3g}",
        "ratio": f"{found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f})",
        "goal": goal(found),
        "bound": f"{found['bound_seconds'] / found['seconds']:.0%}" if found["bound_seconds"] else "",
        "memory (MB)": " / ".join(f"{m:.0f}" for m in found["memory_mb"]) if found["memory_mb"] else "",
    } for found in results]
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=sorted(STANDARD), help="these benchmarks alone")
    parser.add_argument("--scaling", action="store_true", help="other sizes as well")
    parser.add_argument("--out", type=Path, default=HERE/"results.json")
    options = parser.parse_args()
    wanted = [(name, words) for name, words in STANDARD.items() if not options.only or name in options.only]
    scaled = [(name, [*words, SCALING[name][0], value]) for name, words in wanted if name in SCALING
              for value in SCALING[name][1]] if options.scaling else []
    about, order = machine(), list(STANDARD)
    results = kept(options.out, about, {name for name, _ in wanted}) if options.only else []
    for name, words in wanted: results += measure(name, words)
    for name, words in scaled: results += [found | {"goal": None} for found in measure(name, words)] # Of one size
    results.sort(key=lambda found: order.index(found["benchmark"]))
    with pd.option_context("display.width", 250, "display.max_colwidth", 50, "display.max_columns", 20):
        print(as_table(results, about["bf16"]).to_string(index=False))
    text = json.dumps({"machine": about, "results": results}, indent=1, ensure_ascii=False)
    options.out.write_text(text + "\n", encoding="utf-8")
    print(f"saved: {options.out}")


if __name__ == "__main__": main()
