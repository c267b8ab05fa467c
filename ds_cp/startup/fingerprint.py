"""Ranks hold the same model: each describes what it loaded, and they compare."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from ds_cp.comm.wire import World
from ds_cp.errors import ModelError
from ds_cp.model.private_folder import tokenizer_files
from ds_cp.model.source import ModelSource
from ds_cp.model.wiring import Decoder
from ds_cp.startup.agreement import Report, agreed, exchange_reports

SAMPLES = 64  # elements of a tensor that are compared, evenly spaced, first and last included
HEAD = 4 * 2**20  # bytes of a GGUF file that hold its tokenizer
PARTS = ("config", "tensor shapes", "weights", "tokenizer")
Fingerprint = tuple[str, ...]  # a digest for each of PARTS; "": this rank has no such part


def fingerprint(model: Decoder, source: ModelSource | None) -> Fingerprint:
    """Digests of what this rank loaded, before it is sharded: config, names, shapes and dtypes of
    all tensors, ``SAMPLES`` elements of each, tokenizer files. Takes milliseconds.

    Buffers that are computed rather than loaded (rotary frequencies) count in bf16: processors of
    other kinds compute them with other last bits.
    """
    names, samples = hashlib.sha256(), []
    loaded = model.state_dict().keys()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        names.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        exact = name in loaded or not tensor.is_floating_point()
        samples.append(_sample(tensor.detach() if exact else tensor.detach().bfloat16()))
    content = torch.cat(samples).cpu().numpy().tobytes() if samples else b""
    return (
        _short(hashlib.sha256(_config(model))), _short(names),
        _short(hashlib.sha256(content)), _tokenizer(source),
    )  # fmt: skip


def agree_on_model(world: World, mine: Fingerprint) -> None:
    """Compare all ranks' fingerprints. ``ModelError`` on every rank, naming the ranks and hosts
    that differ from the majority, when they are not the same. Collective."""
    reports = exchange_reports(world, Report(0, "", digests=mine))
    everybody = [report.digests or ("",) * len(PARTS) for report in reports]
    if odd := describe_difference(everybody, world.topology.hosts):
        raise agreed(world, ModelError(odd))


def describe_difference(found: Sequence[Fingerprint], hosts: Sequence[str]) -> str | None:
    """What is wrong, in one line, or None when all ranks that have a part have the same one."""
    for index, part in enumerate(PARTS):
        digests = [digests[index] for digests in found]
        counts = Counter(digest for digest in digests if digest).most_common()
        if len(counts) < 2:
            continue
        usual, most = counts[0]
        way_out = "copy the same model to every host"
        if most == counts[1][1]:  # no majority: name all sides
            sides = [[r for r, d in enumerate(digests) if d == digest] for digest, _ in counts]
            listed = " and ".join(_places(side, hosts) for side in sides[:4])
            return f"{listed} loaded models that differ in their {part}: {way_out}"
        odd = [r for r, digest in enumerate(digests) if digest and digest != usual]
        return (
            f"{_places(odd, hosts)} loaded another model than the other {most} ranks "
            f"({part} differ{'s' * (part in ('config', 'tokenizer'))}): {way_out}"
        )
    return None


def _places(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    named = [f"rank {rank} on {hosts[rank]}" for rank in ranks[:4]]
    return ", ".join(named) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes of a few elements, whatever the strides, on the tensor's device."""
    count = min(SAMPLES, tensor.numel())
    if tensor.is_meta:  # packed by an earlier engine, which compared it
        return torch.empty(0, dtype=torch.uint8)
    if not count:
        return torch.empty(0, dtype=torch.uint8, device=tensor.device)
    last = tensor.numel() - 1
    flat = torch.tensor([last * n // max(count - 1, 1) for n in range(count)])
    index = torch.unravel_index(flat.to(tensor.device), tensor.shape) if tensor.dim() else ()
    return tensor[index].reshape(-1).contiguous().view(torch.uint8)


def _config(model: Decoder) -> bytes:
    """The config and generation config without the path that they were read from."""
    both = []
    for config in (model.config, getattr(model, "generation_config", None)):
        values = {} if config is None else config.to_dict()
        for key in ("_name_or_path", "transformers_version"):
            values.pop(key, None)
        both.append(values)
    return json.dumps(both, sort_keys=True, default=str).encode()


def _tokenizer(source: ModelSource | None) -> str:
    """Of a hub's model nothing: ranks other than 0 need not have its tokenizer."""
    digest, path = hashlib.sha256(), Path(source.where if source else "")
    if source is None or source.kind == "hub":
        return ""
    if source.kind == "gguf":
        with path.open("rb") as gguf:
            digest.update(f"{path.stat().st_size}\n".encode() + gguf.read(HEAD))
        return _short(digest)
    present = [file for file in tokenizer_files(path) if file.is_file()]
    for file in present:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return _short(digest) if present else ""


def _short(digest: hashlib._Hash) -> str:
    """128 bits, so that all parts fit a report."""
    return digest.hexdigest()[:32]
