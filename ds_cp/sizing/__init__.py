"""How large a job must be for a model and a context, and how fast it would be, from config.json
alone: no weights are read and no torch is imported.

``read_model`` (config.json -> shapes), ``read_device`` (rates, links and memory of a machine),
``memory_of`` (bytes per rank, largest context), ``predict`` (TTFT and TPOT of each mode by
``ds_cp.cost``), ``text_report`` and ``draw``.
"""

from __future__ import annotations

from ds_cp.sizing.device import Device, device_names, read_device
from ds_cp.sizing.job import Job
from ds_cp.sizing.memory import RankMemory, largest_context, memory_of
from ds_cp.sizing.model import ModelShape, read_model
from ds_cp.sizing.predict import Prediction, predict

__all__ = [
    "Device",
    "Job",
    "ModelShape",
    "Prediction",
    "RankMemory",
    "device_names",
    "largest_context",
    "memory_of",
    "predict",
    "read_device",
    "read_model",
]
