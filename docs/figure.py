"""The figure of README.md, from the committed reports and the embedded data: python docs/figure.py

Three slices of the test split, what the trained model ranked first, and where the right caption stood.
"""
from pathlib import Path

import matplotlib
import pandas as pd

from medclip_nb import plots
from medclip_nb.datasets import load_manifest
from medclip_nb.images import read_image

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plots.use_style()
    rows = load_manifest("starter", ROOT / "data" / "starter", split="test")
    found = pd.read_parquet(ROOT / "reports" / "starter" / "retrieval-trained" / "predictions.parquet").set_index("row")
    chosen = rows[(rows["lesion"] == "present") & (rows["plane"] == "axial")].drop_duplicates("finding").head(3).index
    figure, axes = plt.subplots(1, 3, figsize=(10, 4.6))
    for ax, row in zip(axes, chosen):
        best = found.loc[row, "best_texts"][0]
        ax.imshow(read_image(rows.loc[[row]].paths()[0]))
        ax.set_axis_off()
        for line, (title, text,
                   colour) in enumerate([("says the report", rows.loc[row, "caption"], "black"),
                                         ("ranked first", rows.loc[best, "caption"], plots.PALETTE[0])]):
            ax.text(0, -0.04 - 0.25 * line, f"{title}:\n" + plots.wrapped(text, 48, 4), transform=ax.transAxes,
                    va="top", fontsize=8, color=colour)
        ax.set_title(f"right caption at rank {found.loc[row, 'image_to_text_rank']:.0f} of {rows['caption'].nunique()}",
                     fontsize=9)
    target = ROOT / "nbs" / "images" / "overview.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=100, bbox_inches="tight")


if __name__ == "__main__": main()
