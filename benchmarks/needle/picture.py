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
    """Write a PNG. ``rows`` are by ranks, length and depth; a cell that is missing stays empty."""
    plt = pyplot()
    lengths = sorted({cell.length for cell in grid})
    depths = sorted({cell.depth for cell in grid})
    pairs = [
        [rows[key]["tokens"] for size in ranks if (key := (size, cell.length, cell.depth)) in rows]
        for cell in grid
    ]
    both = [pair for pair in pairs if len(pair) == 2]
    same = sum(one == other for one, other in both)
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for panel, size in zip(panels, ranks, strict=True):
        cells = [[rows.get((size, length, depth)) for length in lengths] for depth in depths]
        values = [[cell["found"] if cell else float("nan") for cell in line] for line in cells]
        image = panel.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        panel.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
        panel.set_xlabel("tokens of prompt and answer")
        panel.set_title("one rank" if size == 1 else f"{size} ranks")
        for y, line in enumerate(cells):
            for x, cell in enumerate(line):
                said = "not run" if cell is None else cell["text"].strip()[:12].split("\n")[0]
                panel.text(x, y, said, ha="center", va="center", fontsize=7)
    panels[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=panels, label="part of the key found", shrink=0.9)
    figure.suptitle(f"SmolLM2-135M, fp32, greedy: the same tokens in {same} of {len(both)} cells")
    figure.savefig(out, dpi=110, format="png")
    plt.close(figure)
