"""The tokens of one request as penalties count them, kept on the device from draw to draw."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.worker.uploads import on_device


class History:
    """The distinct ids of the prompt; of the output the same, and how many times each came."""

    def __init__(self, prompt: Sequence[int], output: Sequence[int] = ()) -> None:
        self._prompt = prompt
        self._prompt_ids: torch.Tensor | None = None
        self._places: dict[int, int] = {}  # output id -> its place in the two tensors
        self._ids = torch.empty(0, dtype=torch.int64)
        self._counts = torch.empty(0)
        self._coming: list[int] = []  # output that the tensors do not have yet
        self.num_output = 0
        self.append(output)

    def append(self, tokens: Sequence[int]) -> None:
        """More output, in its order."""
        self._coming += tokens
        self.num_output += len(tokens)

    def prompt_ids(self, device: torch.device) -> torch.Tensor:
        """Distinct ids of the prompt, int64 ``[P]``."""
        if self._prompt_ids is None:
            self._prompt_ids = on_device(sorted(set(self._prompt)), torch.int64, device)
        return self._prompt_ids

    def output(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Distinct ids of the output, int64 ``[O]``, and the count of each, fp32 ``[O]``."""
        update([self], device)
        size = len(self._places)
        return self._ids[:size], self._counts[:size]

    def _take(self) -> tuple[list[int], list[int]]:
        """The tokens that the tensors do not have yet, and the places of these."""
        coming, self._coming = self._coming, []
        return coming, [self._places.setdefault(token, len(self._places)) for token in coming]

    def _make_room(self, device: torch.device) -> None:
        self._ids, self._counts = self._ids.to(device), self._counts.to(device)
        size = len(self._places)
        if size > self._ids.numel():  # room for twice as many
            room = torch.zeros(max(2 * size, 64) - self._ids.numel(), device=device)
            self._ids = torch.cat((self._ids, room.long()))
            self._counts = torch.cat((self._counts, room))

    def _count(self, tokens: torch.Tensor, places: torch.Tensor, ones: torch.Tensor) -> None:
        self._ids[places] = tokens
        self._counts.index_add_(0, places, ones)


def update(histories: Sequence[History], device: torch.device) -> None:
    """Bring the tensors of all ``histories`` up to date, with one copy to the device."""
    lots = [(history, *history._take()) for history in histories]
    flat = [token for _, tokens, _ in lots for token in tokens]
    if flat:
        flat += [place for _, _, places in lots for place in places]
        vector = on_device(flat, torch.int64, device)
        ones = torch.ones(len(flat) // 2, device=device)
    at, half = 0, len(flat) // 2
    for history, tokens, _ in lots:
        history._make_room(device)
        if tokens:
            end = at + len(tokens)
            history._count(vector[at:end], vector[half + at : half + end], ones[at:end])
            at = end
