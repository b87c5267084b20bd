"""Draws how_it_works.png from a real plan: one causal document, zigzag, four ranks."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from hf_context_parallel.planning.layout import zigzag
from hf_context_parallel.planning.mask import Mask, whole_rows
from hf_context_parallel.planning.plan import build_plan

RANKS = 4
CHUNKS = 2 * RANKS
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44")


def draw_mask(axes: plt.Axes) -> None:
    """Draw the mask by chunks: a colour for the rank of the queries, a number for the step that computes the tile."""
    layout = zigzag(CHUNKS, RANKS)
    for query in range(CHUNKS):
        rank = layout.chunk_owners[query]
        for key in range(query + 1):
            step = (layout.chunk_owners[key] - rank) % RANKS
            corner = (key, query)
            axes.add_patch(Rectangle(corner, 1, 1, color=COLOURS[rank], alpha=0.9 - 0.2 * step, linewidth=0))
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="white", linewidth=1.5))
            axes.text(key + 0.5, query + 0.5, step, ha="center", va="center", color="black", fontsize=9)
    axes.set(xlim=(0, CHUNKS), ylim=(CHUNKS, -0.0), aspect="equal", xlabel="keys", ylabel="queries")
    ticks = [chunk + 0.5 for chunk in range(CHUNKS)]
    names = [f"{chunk}\nrank {owner}" for chunk, owner in enumerate(layout.chunk_owners)]
    axes.set_xticks(ticks, names, fontsize=8)
    axes.set_yticks(ticks, [name.replace("\n", ", ") for name in names], fontsize=8)
    axes.tick_params(length=0)
    axes.set_title(
        "Zigzag: every rank has the same share of the mask\n(number: the step that computes it)", fontsize=10
    )
    axes.spines[:].set_visible(False)


def draw_steps(axes: plt.Axes) -> None:
    """Draw the keys that each rank computes with and receives at each step."""
    layout, mask = zigzag(CHUNKS, RANKS), Mask(CHUNKS, whole_rows(1, CHUNKS))
    plans = [build_plan(layout, mask, rank) for rank in range(RANKS)]
    for rank, plan in enumerate(plans):
        for number, step in enumerate(plan.steps):
            owner = (rank + number) % RANKS
            held = step.tokens
            axes.add_patch(Rectangle((number + 0.06, rank + 0.12), 0.66, 0.76, color=COLOURS[owner], alpha=0.85))
            what = "own keys" if number == 0 else f"{held} chunk{'s' * (held > 1)} of rank {owner}"
            axes.text(number + 0.39, rank + 0.5, what, ha="center", va="center", fontsize=8)
            for transfer in plan.steps[number + 1].receives if number + 1 < RANKS else ():
                start, end = (number + 0.74, transfer.peer + 0.5), (number + 1.04, rank + 0.5)
                size = transfer.tokens
                style = {"arrowstyle": "->", "color": "#333333", "linewidth": size, "shrinkA": 0, "shrinkB": 0}
                axes.annotate("", end, start, arrowprops=style)
    axes.set(xlim=(0, RANKS), ylim=(RANKS, 0))
    axes.set_xticks([number + 0.39 for number in range(RANKS)], [f"step {number}" for number in range(RANKS)])
    axes.set_yticks([rank + 0.5 for rank in range(RANKS)], [f"rank {rank}" for rank in range(RANKS)])
    axes.tick_params(length=0)
    sent = sum(plan.sent_keys for plan in plans)
    whole = 2 * RANKS * (RANKS - 1)
    counts = f"({sent} chunks sent, {whole} in a plain ring)"
    title = f"Keys travel while attention is computed; what nobody reads stays\n{counts}"
    axes.set_title(title, fontsize=10)
    axes.spines[:].set_visible(False)


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), gridspec_kw={"width_ratios": (1, 1.3)})
    draw_mask(left)
    draw_steps(right)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
