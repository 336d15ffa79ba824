"""What a benchmark found, kept for the table of `benchmarks/table.py`: one line of JSON for each comparison, in the
file that the environment variable MEDCLIP_NB_BENCH names. Without it nothing is kept, and a benchmark only prints."""
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path


def bf16_is_computed() -> bool:
    "Whether this processor multiplies numbers in bfloat16 by instructions of its own"
    try: flags = Path("/proc/cpuinfo").read_text()
    except OSError: return platform.machine() == "arm64"
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def note(
    path: str, # What was done, in the words of a user
    rival: str, # What a user would take instead
    ours: Sequence[float], # Seconds of each round
    theirs: Sequence[float], # Seconds of the rival in the same rounds
    goal: float | None = None, # The ratio to be reached, rival over ours
    bound: Sequence[float] = (), # Seconds of what no way can go below, such as the matrix products alone
    memory: tuple[float, float] | None = None, # Peak of ours and of the rival, MB
    size: str = "", # Of the task
    needs: str = "", # What a processor must have for the goal, such as bf16
) -> None:
    "Keep one comparison; its ratio is the median over rounds that were timed in turn, with the least and the largest"
    if not (file := os.environ.get("MEDCLIP_NB_BENCH")): return
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    found = {
        "path": path, "rival": rival, "size": size, "goal": goal, "needs": needs, "rounds": len(ratios),
        "seconds": statistics.median(ours), "rival_seconds": statistics.median(theirs),
        "ratio": statistics.median(ratios), "low": ratios[0], "high": ratios[-1],
        "bound_seconds": statistics.median(bound) if bound else None,
        "memory_mb": memory and list(memory)}
    with open(file, "a", encoding="utf-8") as f: f.write(json.dumps(found) + "\n")
