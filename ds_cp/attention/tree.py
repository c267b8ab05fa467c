"""Mode ``tree``: queries are shared, keys stay where they are, partials fold up to the owners.

After "Tree Attention" (arXiv 2408.04093): the merge of partials is associative, so it may follow
the machine. Here it goes straight to the owner of each query, inside each host first and once
between hosts: one exchange to share the queries and one to bring partials back on one host, two
each over several. Nothing is reduced to ranks that do not need it, and nobody is asked who holds no
key that the query sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.attention.asking import Asking
from ds_cp.attention.batch import IndexUpload, Shards
from ds_cp.attention.kernels import PagedKernel
from ds_cp.attention.pages import Pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial
from ds_cp.attention.visible import by_window
from ds_cp.comm.tree import TreeRoutes
from ds_cp.comm.wire import Group

__all__ = ["TreeAttention", "TreeRoutes"]

# Names in the ledger.
SCHEME_Q = "tree_q"
SCHEME_PARTIALS = "tree_partials"


class TreeAttention:
    """One step's items; called once per layer.

    My rows of the items follow one another from ``first_row`` on in the step's queries;
    ``windows``: the distinct ones of the model's layers; ``routes``: kept by the worker from step
    to step.
    """

    def __init__(
        self,
        items: Sequence[Shards],
        group: Group,
        first_row: int,
        windows: Sequence[int | None],
        upload: IndexUpload,
        routes: TreeRoutes,
    ) -> None:
        self._plans = by_window(
            windows,
            items,
            lambda some, window: Asking(
                some, group, first_row, window, upload, routes, (SCHEME_Q, SCHEME_PARTIALS)
            ),
        )

    def __call__(
        self,
        q_THD: torch.Tensor,
        q_positions: torch.Tensor,
        pages: Pages,
        kernel: PagedKernel,
        spec: LayerSpec,
        into: Partial,
    ) -> None:
        """As in ``Mode``."""
        for plan in self._plans[spec.window]:
            plan(q_THD, q_positions, pages, kernel, spec, into)
