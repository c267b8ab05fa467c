"""Decode steps with requests that span ranks, replayed as CUDA graphs with their messages.

Such a step on one rank has the same operations and exchanges as the last one while the same ranks
own and hold its requests. What layers read of a step is one vector of integers; padded, it has the
same places in each step of a kind. The first such step stays: its vector, the buffers of its
exchanges, its routes. A later one is copied into it and replayed.

All ranks do the same in each step, since all decide from what the plan tells every one of them:
the kind of the step, how often it was seen, which kinds are kept. The messages would be the same,
in the same order, if one rank replayed while its peer ran eagerly; but NCCL does not promise that
these meet (it may register the buffers of captured exchanges with the peer), so it is not relied
on. A recording does nothing, so whatever fails in it, each rank has run as many rounds as its
peers. Then all ranks tell each other whether it worked, and all of them replay or none does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ds_cp.attention.batch import Room
from ds_cp.comm.ledger import Entry
from ds_cp.comm.wire import World
from ds_cp.worker.decode_graph import MOST_ENTRIES, Forward, Graph, padded_keys, padded_sizes
from ds_cp.worker.state import StepWork
from ds_cp.worker.step_context import Layers, Padding, StepContext

SEEN = 2  # eager steps of a kind before one is kept; requests that come and go cost nothing
MOST_KINDS = 16  # that are kept; each has its buffers and a graph
MOST_COUNTED = 256  # kinds of which it is known how often they were seen
SCHEME = "graph_agreement"  # name in the ledger


@dataclass(frozen=True)
class Kind:
    """What steps that are one graph on each rank have in common: of the requests that span, sorted,
    owner and holders; per rank, rows of requests that are whole there, padded; most keys of a batch
    on any rank, padded."""

    spans: tuple[tuple[int, tuple[int, ...]], ...]
    rows: tuple[int, ...]
    keys: int


class SpanGraphs:
    """Steps that stay, by kind; the ``MOST_KINDS`` used last. ``dtype``: the model's; ``forward``,
    ``make_graph``, ``note`` as in ``DecodeGraphs``. Every rank of the group has one, and gives it
    every plan."""

    def __init__(
        self,
        forward: Forward,
        layers: Layers,
        world: World,
        dtype: torch.dtype,
        max_rows: int,
        make_graph: Callable[[], Graph],
        note: Callable[[str], None],
    ) -> None:
        self._forward = forward
        self._layers = layers
        self._world = world
        self._dtype = dtype
        self._sizes = padded_sizes(max_rows)
        self._make_graph = make_graph
        self._note = note
        self._seen: OrderedDict[Kind, int] = OrderedDict()
        self._kept: OrderedDict[Kind, _Kept] = OrderedDict()
        # Layers with windows ask ranks by what they see, which changes from step to step.
        windows = any(spec.window is not None for spec in layers.specs)
        self._off = windows or not getattr(layers.kernel, "capturable", False)
        world.before_leaving(self.release)

    @property
    def captured(self) -> list[Kind]:
        """The kinds that are replayed."""
        return [kind for kind, kept in self._kept.items() if kept.recorded]

    def release(self) -> None:
        """Drop all graphs. NCCL ends a communicator only after the graphs with its messages."""
        self._off = True
        for kept in self._kept.values():
            if kept.recorded:
                kept.graph.release()
        self._kept.clear()

    def kind(self, work: StepWork) -> Kind | None:
        """The kind of a step that can be kept: one new token each, some of requests that span in
        mode tree, nothing else. It counts as seen; None until it was seen ``SEEN`` times. The same
        on all ranks."""
        kind = None if self._off else self._kind_of(work)
        if kind is None:
            return None
        seen = self._seen.get(kind, 0)
        self._seen[kind] = seen + 1
        self._seen.move_to_end(kind)
        if len(self._seen) > MOST_COUNTED:
            self._seen.popitem(last=False)
        return kind if seen >= SEEN else None

    def _kind_of(self, work: StepWork) -> Kind | None:
        if not work.only_decodes or work.scored or not work.items:
            return None
        size = self._layers.group.size
        rows = [work.whole.get(rank, (0, 0))[0] for rank in range(size)]
        local = [work.whole.get(rank, (0, 0))[1] for rank in range(size)]
        spanning = [0] * size
        spans = []
        for item in work.items:
            if item.mode != "tree" or item.count != 1 or item.ships:
                return None
            for rank in item.routing[1]:
                spanning[rank] += item.start + 1
            spans.append(item.routing)
        most = padded_keys(max(*local, *spanning))
        if most // self._layers.pool.block_size > MOST_ENTRIES or max(rows) > self._sizes[-1]:
            return None
        padded = tuple(next(s for s in (0, *self._sizes) if s >= count) for count in rows)
        return Kind(tuple(sorted(spans)), padded, most)

    def padding(self, kind: Kind) -> Padding:
        """How this rank's vectors of such a step are made alike."""
        me, size = self._layers.group.rank, self._layers.pool.block_size
        return Padding(kind.rows[me], Room(kind.keys, size))

    def run(self, kind: Kind, step: StepContext) -> torch.Tensor | None:
        """Logits ``[rows, V]`` of ``step``, which has the padding of ``kind``, valid until the next
        one; None where no row is this rank's. The first step of a kind runs eagerly and stays; the
        second one is recorded. Where that fails on some rank, all run eagerly from then on."""
        kept = self._kept.get(kind)
        if kept is None:
            kept = self._kept[kind] = _Kept(step, self._make_graph())
            if len(self._kept) > MOST_KINDS:
                gone, _ = self._kept.popitem(last=False)  # its graph ends with it
                self._seen.pop(gone, None)
            self._once(kept)
            return kept.logits
        self._kept.move_to_end(kind)
        assert kept.step.num_fixed == step.num_fixed, "steps of a kind have vectors alike"
        kept.step.upload.take(step.upload, step.num_fixed)
        if kept.sent is None and not self._record(kept):
            self._once(kept)
            return kept.logits
        for scheme, entry in (kept.sent or {}).items():
            self._world.ledger.add(
                scheme, entry.bytes, entry.inter_host_bytes, entry.exchanges
            )  # fmt: skip
        kept.graph.replay()
        return kept.logits

    def _record(self, kept: _Kept) -> bool:
        """Whether it worked, on all ranks."""
        ledger, group = self._world.ledger, self._layers.group
        self._world.wait_for_device()  # with a deadline; recording waits without one
        before, why = ledger.schemes(), ""
        try:
            kept.graph.record(lambda: self._once(kept))
        except Exception as err:  # whatever the model, a kernel or NCCL does in it
            why = (str(err).strip() or type(err).__name__).splitlines()[0]
        kept.sent = {}
        for scheme, after in ledger.schemes().items():  # counted, and not sent
            was = before.get(scheme, Entry())
            sent = Entry(
                after.bytes - was.bytes,
                after.inter_host_bytes - was.inter_host_bytes,
                after.exchanges - was.exchanges,
            )
            ledger.add(scheme, -sent.bytes, -sent.inter_host_bytes, -sent.exchanges)
            kept.sent[scheme] = sent
        failed = torch.tensor([int(bool(why))])
        group.all_reduce(failed, SCHEME)
        if not int(failed):
            kept.recorded = True
            return True
        if not why:
            kept.graph.release()
        self.release()
        what = "decode steps of requests that span ranks are not captured in CUDA graphs"
        self._note(f"{what}: {why or 'it failed on another rank'}")
        return False

    def _once(self, kept: _Kept) -> None:
        """The step over its own vector: what is recorded."""
        step = kept.step
        # What kernels keep in ``derived`` is computed from the numbers, so it is among what runs.
        step.upload.forget()
        if not step.num_rows:
            step.attend_without_tokens(self._dtype, self._layers.group.device)
            return
        logits = self._forward(step.ids, step.positions, step)
        if kept.logits is None:
            kept.logits = torch.empty_like(logits)
        kept.logits.copy_(logits)


@dataclass
class _Kept:
    """``sent``: what a replay adds to the ledger; None before it was tried to record."""

    step: StepContext
    graph: Graph
    logits: torch.Tensor | None = None
    sent: dict[str, Entry] | None = None
    recorded: bool = False
