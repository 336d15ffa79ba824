"""A manifest of a million rows: time and memory of `load_manifest`, beside pandas reading the same file.

    python benchmarks/manifest_scale.py [--rows 1000000] [--rounds 3]

The tables have the columns image, caption, label, group and split (five images a patient); one lacks the split, so that
it is made by patient, and one lacks the patient as well. Every reading is a process of its own. Memory is the growth of
the peak of resident memory (getrusage) over what it was when everything had been imported. The aim is 5 s and 1 GB.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile

MAKE = """
import sys
import numpy as np, pandas as pd
folder, n = sys.argv[1], int(sys.argv[2])
rng, patients = np.random.default_rng(0), -(-n // 5)
group = [f"p{i // 5:07d}" for i in range(n)]
table = pd.DataFrame({"image": [f"images/{g}/{i:08d}.jpg" for i, g in enumerate(group)],
                      "caption": [f"Chest radiograph {i}: no acute cardiopulmonary abnormality." for i in range(n)],
                      "label": rng.choice([f"class {k}" for k in range(14)], n), "group": group,
                      "split": rng.choice(["train", "valid", "test"], patients, p=[.7, .15, .15]).repeat(5)[:n]})
table.to_parquet(f"{folder}/given.parquet", index=False)
table.to_csv(f"{folder}/given.csv", index=False)
table.drop(columns="split").to_csv(f"{folder}/grouped.csv", index=False)
table.drop(columns=["split", "group"]).to_csv(f"{folder}/single.csv", index=False)
"""

READ = """
import json, resource, sys, time
import pandas as pd, pyarrow.parquet
from medclip_nb.datasets import _find_reader, load_manifest
path, way, name = sys.argv[1:]
if way == "manifest": _find_reader(name)
unit = 2**20 if sys.platform == "darwin" else 2**10
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
before, start = peak(), time.perf_counter()
table = load_manifest(name, path) if way == "manifest" else getattr(pd, f"read_{name}")(path)
seconds, grown, extra = time.perf_counter() - start, peak() - before, {}
if way == "manifest":
    start = time.perf_counter()
    table.fingerprint()
    extra = dict(fingerprint=time.perf_counter() - start, source=table.split_source)
print(json.dumps(dict(seconds=seconds, mb=grown, rows=len(table)) | extra))
"""


def measure(path, way, name):
    done = subprocess.run([sys.executable, "-c", READ, path, way, name], capture_output=True, text=True)
    if done.returncode: sys.exit(f"{path} by {way}: {done.stderr}")
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in dict(rows=1_000_000, rounds=3).items(): parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    print(f"rows={args.rows} rounds={args.rounds}")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", MAKE, folder, str(args.rows)], check=True)
        for file in ("given.csv", "grouped.csv", "single.csv", "given.parquet"):
            kind, found = file.split(".")[1], {"manifest": [], "pandas": []}
            for _ in range(args.rounds):
                for way, results in found.items(): results.append(measure(f"{folder}/{file}", way, kind))
            assert all(r["rows"] == args.rows for results in found.values() for r in results)
            middle = {way: {k: statistics.median(r[k] for r in results) for k in ("seconds", "mb")}
                      for way, results in found.items()}
            ours, plain, prints = middle["manifest"], middle["pandas"], statistics.median(
                r["fingerprint"] for r in found["manifest"])
            print(f"{file:14s} load_manifest {ours['seconds']:5.2f} s {ours['mb']:5.0f} MB   pandas "
                  f"{plain['seconds']:5.2f} s {plain['mb']:5.0f} MB"
                  f"   ratio: time {ours['seconds'] / plain['seconds']:4.2f}  memory {ours['mb'] / plain['mb']:4.2f}"
                  f"   fingerprint {prints:4.2f} s   splits {found['manifest'][0]['source']}", flush=True)


if __name__ == "__main__": main()
