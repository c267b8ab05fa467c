"""The job that is sized: ranks, hosts, and how they share the work."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ds_cp.config.fields import MAX_MEMORY, MAX_RANKS
from ds_cp.errors import ConfigError
from ds_cp.sizing.model import ELEMENT, ModelShape
from ds_cp.text import parse_size

MAX_CONTEXT = 1 << 28  # tokens of a context that is sized
# Tokens of one rank in one step, where the config says auto: that of ``ds_cp.scheduler.build``.
CHUNK = 8192
BLOCK = 64  # tokens of a block of KV, the config's default


@dataclass(frozen=True)
class Job:
    """``hosts`` x ``ranks_per_host`` ranks, ``tp`` of which share each layer's heads and lie on one
    host; the others share the context. ``context``: tokens of one request, answer included;
    ``dtype``: of weights and KV; ``host_memory``: bytes of a rank's host that keep KV.
    ``ConfigError`` when the numbers do not fit together."""

    hosts: int
    ranks_per_host: int
    context: int
    dtype: str
    tp: int = 1
    host_memory: int = 0

    def __post_init__(self) -> None:
        for name, value, most in (
            ("--hosts", self.hosts, MAX_RANKS),
            ("--ranks-per-host", self.ranks_per_host, MAX_RANKS),
            ("--tp", self.tp, MAX_RANKS),
            ("--context", self.context, MAX_CONTEXT),
        ):
            if not 1 <= value <= most:
                raise ConfigError(f"{name} is {value}; it must be from 1 to {most}")
        if not 0 <= self.host_memory <= MAX_MEMORY:
            raise ConfigError(
                f"--host-memory is {self.host_memory} bytes; it must be from 0 to {MAX_MEMORY}"
            )
        if self.hosts * self.ranks_per_host > MAX_RANKS:
            raise ConfigError(
                f"--hosts {self.hosts} x --ranks-per-host {self.ranks_per_host} are "
                f"{self.hosts * self.ranks_per_host} ranks; a job has at most {MAX_RANKS}"
            )
        if self.ranks_per_host % self.tp:
            raise ConfigError(
                f"--tp {self.tp} does not divide --ranks-per-host {self.ranks_per_host}: "
                "the ranks that share a layer lie on one host"
            )
        if self.dtype not in ELEMENT:
            raise ConfigError(f"--dtype is {self.dtype}; it must be one of {', '.join(ELEMENT)}")

    @property
    def cp(self) -> int:
        """Groups of ``tp`` ranks that share the context."""
        return self.hosts * self.ranks_per_host // self.tp

    @property
    def cp_per_host(self) -> int:
        """Those of one host."""
        return self.ranks_per_host // self.tp

    @property
    def element(self) -> int:
        """Bytes of one element."""
        return ELEMENT[self.dtype]

    def check(self, model: ModelShape) -> None:
        """``ConfigError`` when the model's heads cannot be shared by ``tp`` ranks."""
        if self.tp == 1:
            return
        if not model.splits:
            raise ConfigError(
                f"--tp {self.tp}: {model.model_type} states no split of its attention by rows and "
                "columns, so the server takes tp_size 1 only; leave --tp out"
            )
        for layer in model.layers:
            for what, heads in (("query", layer.num_q_heads), ("KV", layer.num_kv_heads)):
                if heads % self.tp:
                    raise ConfigError(
                        f"--tp {self.tp} does not divide the model's {heads} {what} heads; "
                        "leave it out, any number of ranks can share the context"
                    )


def parse_context(text: str) -> int:
    """Tokens of ``"1M"``, ``"128K"``, ``"5000"``: K is 1024, M 1024 x 1024. ``ConfigError`` for
    anything else."""
    match = re.fullmatch(r"([0-9]{1,9})([kKmM]?)", text.strip())
    if match is None:
        raise ConfigError(
            f"--context is {text[:40]!r}; give a number of tokens such as 5000, 128K or 1M"
        )
    return int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()]


def parse_memory(text: str) -> int:
    """Bytes of ``"64GiB"``, ``"1.5GB"``, or of a plain number. ``ConfigError`` for anything
    else."""
    try:
        return int(text) if re.fullmatch("[0-9]{1,16}", text) else parse_size(text)
    except ValueError:
        raise ConfigError(
            f"--host-memory is {text[:40]!r}; give a size such as 64GiB, 512MiB or 0"
        ) from None


def counts(most: int) -> list[int]:
    """1, 2, 4, ... and ``most``."""
    found, n = [], 1
    while n < most:
        found.append(n)
        n *= 2
    return [*found, most]
