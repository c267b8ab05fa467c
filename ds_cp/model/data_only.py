"""While a model or tokenizer loads, no code of the model's runs and nothing goes to the network.

transformers reads pickles, fetches modules and kernels, and asks the hub, where a file of the model
tells it to. The files it gets from us do not (``steering``); this is the second wall behind them.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from ds_cp.errors import ModelError

WAIT_S = 3600.0  # seconds for another load of this process to end


class _Turn:
    """What is replaced belongs to the whole process, so loads take turns. A forked child, in which
    the thread that loads is gone, begins anew."""

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self.lock = threading.RLock()


_TURN = _Turn()


class _Guard(threading.local):
    """Whether this thread works for a load: its own state is its own, so others do as they did."""

    on = False


@contextmanager
def data_only(where: str) -> Iterator[None]:
    """Within, in this thread and in those of transformers' pool of loaders: unpickling,
    ``torch.load`` and modules of the model raise ``ModelError``, kernels of the hub count as not
    installed, and the hub counts as out of reach. Other threads do as they did, those that begin
    meanwhile too. Everything is put back.

    ``where``: the model, for the message. Raises ``ModelError`` when another thread's load does not
    end within ``WAIT_S``.
    """
    lock = _TURN.lock
    if not lock.acquire(timeout=WAIT_S):
        raise ModelError(f"model {where}: another model loads in this process for {WAIT_S:.0f} s")
    try:
        guard = _Guard()  # a module that is imported meanwhile may keep a stand-in, which sees it
        guard.on = True
        with ExitStack() as put_back:
            put_back.callback(setattr, guard, "on", False)
            for owner, name, instead in _replacements(where, guard):
                put_back.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, instead)
            yield
    finally:
        lock.release()


def _replacements(where: str, guard: _Guard) -> list[tuple[Any, str, Any]]:
    """Owner, name and stand-in of every function that is replaced."""
    import numpy
    import torch
    from huggingface_hub import constants
    from transformers import core_model_loading, dynamic_module_utils
    from transformers.integrations import hub_kernels

    unpickles: Any = torch.serialization.pickle  # type: ignore[attr-defined]
    pickles = [
        (torch, "load"), (torch.serialization, "load"), (torch.jit, "load"), (torch.hub, "load"),
        (torch.hub, "load_state_dict_from_url"), (numpy, "load"),
        (unpickles, "load"), (unpickles, "loads"),
    ]  # fmt: skip
    code = [
        (dynamic_module_utils, "get_class_in_module"),
        (dynamic_module_utils, "get_cached_module_file"),
    ]

    def guarded() -> bool:
        return guard.on

    pickled = ModelError(
        f"model {where} wants {{}} to read a pickle, which can run code: "
        "serve a copy whose files are safetensors or GGUF"
    )
    coded = ModelError(
        f"model {where} wants to run code of its own ({{}}), which ds_cp never does: "
        "choose a model that transformers knows"
    )
    absent = ImportError("kernels of the hub are not used")
    found = [(owner, name, _raising(owner, name, pickled, guarded)) for owner, name in pickles]
    found += [(owner, name, _raising(owner, name, coded, guarded)) for owner, name in code]
    found.append((hub_kernels, "get_kernel", _raising(hub_kernels, "get_kernel", absent, guarded)))
    offline = constants.is_offline_mode
    found.append((constants, "is_offline_mode", lambda: guarded() or offline()))
    # Whoever finds kernels installed would fetch one rather than do without.
    installed: Any = vars(hub_kernels)["is_kernels_available"]

    def is_kernels_available(*args: Any, **more: Any) -> Any:
        return False if guarded() else installed(*args, **more)

    found += [  # by whatever module has taken the function
        (module, "is_kernels_available", is_kernels_available)
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.")
        and vars(module).get("is_kernels_available") is installed
    ]
    unpickler = unpickles.Unpickler

    class Unpickler(unpickler):  # type: ignore[misc, valid-type]
        def load(self) -> Any:
            if guarded():
                raise _named(pickled, "pickle.Unpickler")
            return super().load()

    class LoadersPool(ThreadPoolExecutor):
        def submit(self, work: Any, /, *args: Any, **more: Any) -> Future[Any]:
            return super().submit(_guarding(guard, work) if guarded() else work, *args, **more)

    return [
        *found,
        (unpickles, "Unpickler", Unpickler),
        (core_model_loading, "ThreadPoolExecutor", LoadersPool),
    ]


def _guarding(guard: _Guard, work: Callable[..., Any]) -> Callable[..., Any]:
    """``work`` for another thread, which it guards as long as it runs."""

    def guarding(*args: Any, **more: Any) -> Any:
        guard.on = True
        try:
            return work(*args, **more)
        finally:
            guard.on = False

    return guarding


def _raising(
    owner: Any, name: str, error: Exception, guarded: Callable[[], bool]
) -> Callable[..., Any]:
    real = getattr(owner, name)

    def instead(*args: Any, **more: Any) -> Any:
        if guarded():
            raise _named(error, f"{owner.__name__}.{name}")
        return real(*args, **more)

    return instead


def _named(error: Exception, caller: str) -> Exception:
    return type(error)(str(error).replace("{}", caller))
