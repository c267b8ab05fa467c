"""The grid as two heat maps, one for each number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import pyplot
from benchmarks.needle.cells import Cell


def draw(
    rows: Mapping[tuple[int, int, int], Mapping[str, Any]],
    grid: Sequence[Cell],
    ranks: Sequence[int],
    out: Path,
) -> None:
    """Write a PNG. ``rows`` by ranks, length and depth has every cell of ``grid``."""
    plt = pyplot()
    lengths = sorted({cell.length for cell in grid})
    depths = sorted({cell.depth for cell in grid})

    def tokens(size: int, length: int, depth: int) -> Any:
        return rows[size, length, depth]["tokens"]

    same = sum(
        tokens(ranks[0], length, depth) == tokens(ranks[1], length, depth)
        for length in lengths
        for depth in depths
    )
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for panel, size in zip(panels, ranks, strict=True):
        values = [[rows[size, length, depth]["found"] for length in lengths] for depth in depths]
        image = panel.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        panel.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
        panel.set_xlabel("tokens of prompt and answer")
        panel.set_title("one rank" if size == 1 else f"{size} ranks")
        for y, depth in enumerate(depths):
            for x, length in enumerate(lengths):
                text = rows[size, length, depth]["text"].split()
                panel.text(x, y, (text or [""])[0][:8], ha="center", va="center", fontsize=7)
    panels[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=panels, label="part of the key found", shrink=0.9)
    figure.suptitle(f"SmolLM2-135M, fp32, greedy: the same tokens in {same} of {len(grid)} cells")
    figure.savefig(out, dpi=110, format="png")
    plt.close(figure)
