"""While a model or tokenizer loads, no code of the model's runs and nothing goes to the network.

transformers reads pickles, fetches modules and kernels, and asks the hub, where a file of the model
tells it to. The files it gets from us do not (``steering``); this is the second wall behind them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ds_cp.errors import ModelError

WAIT_S = 3600.0  # seconds for another load of this process to end
# What is replaced belongs to the whole process, so loads take turns.
_TURN = threading.RLock()


@contextmanager
def data_only(where: str) -> Iterator[None]:
    """Within, in this thread and in threads that begin meanwhile: unpickling, ``torch.load`` and
    modules of the model raise ``ModelError``, kernels of the hub count as not installed, and the
    hub counts as out of reach. Threads that ran before do as they did. Everything is put back.

    ``where``: the model, for the message. Raises ``ModelError`` when another thread's load does not
    end within ``WAIT_S``.
    """
    if not _TURN.acquire(timeout=WAIT_S):
        raise ModelError(f"model {where}: another model loads in this process for {WAIT_S:.0f} s")
    try:
        here = threading.current_thread()
        others = {thread for thread in threading.enumerate() if thread is not here}

        ended = threading.Event()  # a module that is imported meanwhile may keep a stand-in

        def guarded() -> bool:
            return not ended.is_set() and threading.current_thread() not in others

        with ExitStack() as put_back:
            put_back.callback(ended.set)
            for owner, name, instead in _replacements(where, guarded):
                put_back.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, instead)
            yield
    finally:
        _TURN.release()


def _replacements(where: str, guarded: Callable[[], bool]) -> list[tuple[Any, str, Any]]:
    """Owner, name and stand-in of every function that is replaced."""
    import numpy
    import torch
    from huggingface_hub import constants
    from transformers import dynamic_module_utils
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
    unpickler = unpickles.Unpickler

    class Unpickler(unpickler):  # type: ignore[misc, valid-type]
        def load(self) -> Any:
            if guarded():
                raise _named(pickled, "pickle.Unpickler")
            return super().load()

    return [*found, (unpickles, "Unpickler", Unpickler)]


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
