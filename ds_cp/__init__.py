"""Exact long-context LLM inference that spreads one sequence over many ranks.

    engine = ds_cp.init_inference(model_or_path, config="configs/ring.json")
    outputs = engine.generate(prompts, ds_cp.SamplingParams(max_tokens=64, temperature=0.0))

The layers can be used alone: ``ds_cp.attention``, ``ds_cp.kv``, ``ds_cp.topology``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ds_cp.version import __version__

if TYPE_CHECKING:
    from ds_cp.config import load_config
    from ds_cp.engine.collect import PromptRequest, RequestFailure
    from ds_cp.engine.llm import LLMEngine, init_inference
    from ds_cp.outputs import RequestOutput
    from ds_cp.sampling_params import RequestOptions, SamplingParams

__all__ = [
    "LLMEngine",
    "PromptRequest",
    "RequestFailure",
    "RequestOptions",
    "RequestOutput",
    "SamplingParams",
    "__version__",
    "init_inference",
    "load_config",
]

_MODULE_OF = {
    "LLMEngine": "ds_cp.engine.llm",
    "PromptRequest": "ds_cp.engine.collect",
    "RequestFailure": "ds_cp.engine.collect",
    "RequestOptions": "ds_cp.sampling_params",
    "RequestOutput": "ds_cp.outputs",
    "SamplingParams": "ds_cp.sampling_params",
    "init_inference": "ds_cp.engine.llm",
    "load_config": "ds_cp.config",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line does not pay for torch before it must."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'ds_cp' has no attribute {name!r}")
    from importlib import import_module

    from ds_cp.process import importing

    with importing():
        return getattr(import_module(_MODULE_OF[name]), name)
