"""The tree exchange, level by level: rows go from their owner to every holder, answers come back.

A *row block* (item, owner) is the rows of one item that one rank owns (queries, in attention). A
rank *holds* an item when it can answer its rows (it has keys of the item). Over several hosts each
row block crosses to another host once, to a carrier there (the rank with the owner's own place on
its host), which spreads it inside; answers are folded inside the host first and cross back once. So
the bytes between hosts do not grow with the ranks per host. On one host there is one level and no
carrier.

All routes follow from counts that every rank knows, before any layer runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ds_cp.comm.wire import Group

Key = tuple[int, int]  # (item, owner as group index)


class TreeExchange:
    """Routes of one step, used once per layer and direction.

    ``rows[i][r]``: rows of item i owned by rank r; ``holds[i][r]``: whether r holds item i.
    """

    def __init__(
        self, group: Group, rows: Sequence[Sequence[int]], holds: Sequence[Sequence[bool]]
    ) -> None:
        self._group = group
        self._rows = rows
        me, hosts = group.rank, group.hosts
        self.keys = [
            (item, owner)
            for owner in range(group.size)
            for item in range(len(rows))
            if rows[item][owner]
        ]
        self.held = [key for key in self.keys if holds[key[0]][me]]
        self._levels = [
            level
            for level in (self._between_hosts(holds, hosts, me), self._inside(holds, hosts, me))
            if level[0] or level[1]
        ]

    def _carrier(self, host: int, owner: int) -> int:
        """The rank on ``host`` that answers for ``owner``: the owner itself when it lives there."""
        hosts = self._group.hosts
        if hosts[owner] == host:
            return owner
        there = [r for r, h in enumerate(hosts) if h == host]
        place = sum(1 for r in range(owner) if hosts[r] == hosts[owner])
        return there[place % len(there)]

    def _between_hosts(
        self, holds: Sequence[Sequence[bool]], hosts: Sequence[int], me: int
    ) -> tuple[dict[int, list[Key]], dict[int, list[Key]]]:
        out: dict[int, list[Key]] = {}
        into: dict[int, list[Key]] = {}
        for item, owner in self.keys:
            for host in sorted(set(hosts) - {hosts[owner]}):
                if not any(holds[item][r] for r, h in enumerate(hosts) if h == host):
                    continue
                carrier = self._carrier(host, owner)
                if owner == me:
                    out.setdefault(carrier, []).append((item, owner))
                elif carrier == me:
                    into.setdefault(owner, []).append((item, owner))
        return out, into

    def _inside(
        self, holds: Sequence[Sequence[bool]], hosts: Sequence[int], me: int
    ) -> tuple[dict[int, list[Key]], dict[int, list[Key]]]:
        out: dict[int, list[Key]] = {}
        into: dict[int, list[Key]] = {}
        for item, owner in self.keys:
            source = self._carrier(hosts[me], owner)
            if source != me:
                if holds[item][me]:
                    into.setdefault(source, []).append((item, owner))
                continue
            for peer, host in enumerate(hosts):
                if peer != me and host == hosts[me] and holds[item][peer]:
                    out.setdefault(peer, []).append((item, owner))
        return out, into

    def share(
        self, rows: Mapping[Key, torch.Tensor], like: torch.Tensor, scheme: str
    ) -> dict[Key, torch.Tensor]:
        """Send the owners' rows ``[T, W]`` to the holders; returns the blocks that this rank holds.

        ``like``: an empty tensor with the width and dtype of a row.
        """
        have = dict(rows)
        for out, into in self._levels:
            sends = {peer: [have[key] for key in keys] for peer, keys in out.items()}
            for peer, arrived in self._move(sends, into, like, scheme).items():
                have.update(zip(into[peer], arrived, strict=True))
        return {key: have[key] for key in self.held}

    def levels_up(self) -> int:
        """Rounds that the answers need: one on one host, two over several."""
        return len(self._levels)

    def answer(
        self, level: int, answers: Mapping[Key, torch.Tensor], like: torch.Tensor, scheme: str
    ) -> dict[Key, list[tuple[int, torch.Tensor]]]:
        """Send answers ``[T, W]`` back where their rows came from, round ``level`` of
        ``levels_up``.

        ``like``: an empty tensor with the width and dtype of an answer. Returns, for every block
        that I gave out in that round, the peers' answers with the peer's index, in rank order.
        """
        gave, got = self._levels[len(self._levels) - 1 - level]
        sends = {peer: [answers[key] for key in keys] for peer, keys in got.items()}
        back: dict[Key, list[tuple[int, torch.Tensor]]] = {}
        for peer, arrived in self._move(sends, gave, like, scheme).items():
            for key, tensor in zip(gave[peer], arrived, strict=True):
                back.setdefault(key, []).append((peer, tensor))
        return {key: sorted(parts, key=lambda part: part[0]) for key, parts in back.items()}

    def _move(
        self,
        sends: Mapping[int, list[torch.Tensor]],
        recvs: Mapping[int, list[Key]],
        like: torch.Tensor,
        scheme: str,
    ) -> dict[int, list[torch.Tensor]]:
        outgoing = [
            (peer, parts[0].contiguous() if len(parts) == 1 else torch.cat(parts))
            for peer, parts in sends.items()
        ]
        counts = {
            peer: [self._rows[item][owner] for item, owner in keys] for peer, keys in recvs.items()
        }
        incoming = {peer: like.new_empty(sum(n), like.shape[1]) for peer, n in counts.items()}
        self._group.exchange(outgoing, list(incoming.items()), scheme).wait()
        return {peer: list(torch.split(incoming[peer], counts[peer])) for peer in incoming}
