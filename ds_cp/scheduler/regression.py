"""Least squares with forgetting, for a handful of terms. No torch, no numpy."""

from __future__ import annotations

import statistics

OUTLIER = 3.0  # times its prediction: a sample is clipped to that
FIRST = 5  # samples before predictions are believed; of these the clip goes by their median
SMALL = 1e-4  # weight of the pull towards 0, in squared terms of one sample


class Regression:
    """``value(x) = weights . x`` by least squares, each sample counting ``memory`` times what the
    next one does. Directions that no sample has (all have one value of a term, say) stay near 0.
    Scale the terms so that usual values are of about one size.

    Clip a sample to ``OUTLIER`` times its prediction: a page fault or another process says nothing
    of the next step. The first ``FIRST`` samples are kept until there is a median to clip them by;
    until then a line through 0 is assumed, by the median of ``y`` over the last term.
    """

    def __init__(self, size: int, memory: float) -> None:
        self.weights = [0.0] * size
        self._first: list[tuple[tuple[float, ...], float]] | None = []
        self._memory = memory
        self._xx = [[SMALL * (i == j) for j in range(size)] for i in range(size)]
        self._xy = [0.0] * size

    @property
    def known(self) -> bool:
        """Whether there were ``FIRST`` samples."""
        return self._first is None

    def value(self, x: tuple[float, ...]) -> float:
        """The prediction at ``x``."""
        return sum(w * each for w, each in zip(self.weights, x, strict=True))

    def observe(self, x: tuple[float, ...], y: float) -> None:
        """Learn from one sample: ``y`` was measured at ``x``."""
        if self._first is None:
            expected = self.value(x)
            self._learn(x, min(y, OUTLIER * expected) if expected > 0.0 else y)
            return
        self._first.append((x, y))
        self.weights[-1] = statistics.median(y / x[-1] for x, y in self._first)
        if len(self._first) == FIRST:
            most = OUTLIER * statistics.median(y for _, y in self._first)
            for x, y in self._first:
                self._learn(x, min(y, most))
            self._first = None

    def _learn(self, x: tuple[float, ...], y: float) -> None:
        for i, row in enumerate(self._xx):
            self._xy[i] = self._memory * self._xy[i] + x[i] * y
            self._xx[i] = [self._memory * s + x[i] * each for s, each in zip(row, x, strict=True)]
            self._xx[i][i] += (1 - self._memory) * SMALL
        self.weights = _solved(self._xx, self._xy)


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """``x`` of ``matrix . x = right`` for a positive definite matrix: Gauss, without pivots."""
    rows = [[*row, y] for row, y in zip(matrix, right, strict=True)]
    for i, row in enumerate(rows):
        for other in rows[i + 1 :]:
            share = other[i] / row[i]
            other[i:] = [o - share * r for o, r in zip(other[i:], row[i:], strict=True)]
    for i in reversed(range(len(rows))):
        rest = sum(rows[i][j] * rows[j][-1] for j in range(i + 1, len(rows)))
        rows[i][-1] = (rows[i][-1] - rest) / rows[i][i]
    return [row[-1] for row in rows]
