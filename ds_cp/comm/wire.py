"""The names that the rest of the package uses to exchange messages between ranks."""

from __future__ import annotations

from ds_cp.comm.group import Group, Prepared
from ds_cp.comm.join import Rendezvous, join
from ds_cp.comm.pending import Pending
from ds_cp.comm.process_group import import_libraries
from ds_cp.comm.transport import Message
from ds_cp.comm.world import World

__all__ = [
    "Group", "Message", "Pending", "Prepared", "Rendezvous", "World", "import_libraries", "join",
]  # fmt: skip
