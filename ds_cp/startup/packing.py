"""Whether the linear layers of the model are packed on this rank, and what start-up says of it."""

from __future__ import annotations

from collections.abc import Callable

from ds_cp.comm.wire import World
from ds_cp.errors import ConfigError
from ds_cp.model.invariant import make_invariant
from ds_cp.model.linear import candidates, pack_linears, packing_ops, torch_uses_amx
from ds_cp.model.native_norm import replace_norms
from ds_cp.model.wiring import Decoder, probe_layers
from ds_cp.startup.kv_budget import free_bytes

MEMORY_SHARE = 0.6  # of the memory that is free for a rank, which packed weights may take
Packing = Callable[[], str]  # does it, or nothing, and returns a line for the start


def plan_packing(
    how: str, model: Decoder, world: World, kept: bool, deterministic: bool = False
) -> Packing:
    """Look which layers can be packed and whether their copy has room; ``how``: ``linear_layers``
    of the config; ``kept``: the originals stay. Runs the model on one token, but on CUDA, where
    nothing is packed; with ``deterministic`` the layers there go by a product whose rows do not
    depend on how many there are.

    Raises ``ConfigError`` when ``how`` is ``packed`` and it cannot be done.
    """
    if world.device.type == "cuda" and deterministic:
        return lambda: make_invariant(model)
    if how == "torch" or world.device.type != "cpu":
        return lambda: ""

    def refused(why: str) -> Packing:
        if how == "packed":
            raise ConfigError(f"linear_layers is packed, but {why}; set it to auto or torch")
        return lambda: f"linear layers: torch's operators ({why})"

    ops = packing_ops()
    if isinstance(ops, str):
        return refused(ops)
    amx = torch_uses_amx(model.dtype)
    if amx and how == "auto":
        return refused("with AMX, which packed ones do not use")
    found = candidates(model, lambda: probe_layers(model))
    if not found:
        return refused(f"{type(model).__name__} in {model.dtype} has none that can be packed")
    need = sum(ops.bytes_of(one.module.weight) for one in found)
    free, _ = free_bytes(world)
    if need > MEMORY_SHARE * free and how == "auto":
        return refused(
            f"packed ones take {need / 2**30:.1f} GiB a rank, "
            f"more than {MEMORY_SHARE:.0%} of {free / 2**30:.1f} GiB free"
        )

    def pack() -> str:
        try:
            line = pack_linears(found, ops, kept)
        except OSError as err:  # before anything was replaced
            return refused(f"the system gives no {need / 2**30:.1f} GiB: {err.strerror}")()
        if amx:
            line += "; torch's would use AMX, faster for long prompts"
        norms = replace_norms(model)
        return line + (f"; {norms} RMS norms are native" if norms else "")

    return pack
