"""Draw the PNG pictures of docs/choosing.md from synthetic queries and keys."""

import argparse
from pathlib import Path

from flexmoba import moba_block_mask, moba_select
from flexmoba.plot import plot_block_mask, plot_choices, plot_heads, plot_report
from flexmoba.tune import synthetic, tune


def main() -> None:
    """Draws the pictures into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("docs/pictures"))
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)

    q, k = synthetic(8192)
    selection = moba_select(q, k, 128, 4)
    report = tune([(q, k)], timed=False)
    figures = {
        "selection": plot_heads(selection, 128),
        "choices": plot_choices(selection, 128).figure,
        "block-mask": plot_block_mask(moba_block_mask(q, k, 128, 4)).figure,
        "frontier": plot_report(report, report.recommend(sparsity=0.75)),
    }
    for name, figure in figures.items():
        file = folder / f"{name}.png"
        figure.savefig(file)
        print(file)


if __name__ == "__main__":
    main()
