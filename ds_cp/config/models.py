"""The sections of the JSON config: frozen, strict models. Every number has bounds and a unit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ds_cp.config.fault_tolerance import FaultTolerance
from ds_cp.config.fields import (
    MAX_RANKS,
    MAX_TOKENS,
    Auto,
    Section,
    Tokens,
    unit_of,
)
from ds_cp.config.kv_cache import KvCache
from ds_cp.config.server import Server


class ContextParallel(Section):
    """How one sequence is split over ranks."""

    size: Auto | Annotated[int, Field(ge=1, le=MAX_RANKS)] = Field(
        default="auto",
        description="ranks that share a sequence; auto: all ranks of the job / tp_size",
        json_schema_extra=unit_of("ranks"),
    )
    mode: Literal["auto", "local", "ring", "tree"] = Field(
        default="auto",
        description="attention across ranks; auto chooses per request and step",
    )
    ring_pass: Literal["auto", "kv", "q"] = Field(
        default="auto", description="what travels around the ring: keys and values, or queries"
    )
    layout: Literal["zigzag", "contiguous"] = Field(
        default="zigzag",
        description="how a long prompt's new tokens are dealt to ranks; zigzag gives equal work",
    )
    local_threshold: Auto | Annotated[int, Field(ge=0, le=MAX_TOKENS)] = Field(
        default="auto",
        description="prompts up to this length stay on one rank when mode is auto; "
        "auto: all that fit on one rank",
        json_schema_extra=unit_of("tokens"),
    )


class TensorParallel(Section):
    """How the heads of each layer are split over ranks."""

    tp_size: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1,
        description="ranks that share a layer's heads; these are neighbouring ranks of one host",
        json_schema_extra=unit_of("ranks"),
    )


class Scheduler(Section):
    """How many requests run and wait."""

    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=64, description="requests that run at once", json_schema_extra=unit_of("requests")
    )
    max_num_batched_tokens: Auto | Annotated[int, Field(ge=2, le=MAX_TOKENS)] = Field(
        default="auto",
        description="most tokens that one rank computes in one step; a longer prompt is prefilled "
        "in chunks",
        json_schema_extra=unit_of("tokens"),
    )
    decode_slowdown: Annotated[float, Field(gt=1.0, le=1000.0)] = Field(
        default=2.0,
        description="how much longer a step of decoding requests may take because of a prompt that "
        "is prefilled beside them; its chunks are sized by measured step times",
        json_schema_extra=unit_of("times"),
    )
    max_queue: Annotated[int, Field(ge=1, le=1 << 20)] = Field(
        default=256,
        description="requests that may wait; more are refused with HTTP 429, but for clients that "
        "have less than an equal part of it, up to twice as many",
        json_schema_extra=unit_of("requests"),
    )
    max_queue_wait_s: Annotated[float, Field(gt=0, le=86400)] | None = Field(
        default=600.0,
        description="longest time that a request may have to wait until it begins, as predicted "
        "from what runs and waits before it; one that would wait longer is refused with HTTP 429 "
        "and the time after which to try again; null: no bound",
        json_schema_extra=unit_of("seconds"),
    )


class Attention(Section):
    """The kernel."""

    backend: Literal["auto", "cpu", "cuda", "triton", "flash_attn", "sdpa", "reference"] = Field(
        default="auto",
        description="kernel for attention over one rank's keys; cpu: the native one, for CPUs; "
        "cuda: triton, and for what is dense in a prompt the fastest of flash-attn, cuDNN and "
        "torch's flash operator; flash_attn: cuda with that package; triton: for CUDA devices; "
        "sdpa: torch's operators; reference: plain math; auto: the first of them that serves the "
        "model on every rank and passes a "
        "check at start",
    )
    deterministic: bool = Field(
        default=False,
        description="whether a token on CUDA must not depend on how its prompt was cut into "
        "chunks, and so on what else runs: kernel triton or reference, linear layers and RMS norms "
        "by Triton, no CUDA graphs; slower. CPU kernels do not depend on it in any case",
    )

    @model_validator(mode="after")
    def _not_both(self) -> Attention:
        if self.deterministic and self.backend in ("cuda", "flash_attn"):
            raise ValueError(
                f"attention.deterministic is true, but attention.backend {self.backend} cuts a "
                "prompt where its chunks end; set attention.backend to triton or to auto"
            )
        return self


class Comm(Section):
    """How ranks find and talk to each other."""

    backend: Literal["auto", "gloo", "nccl"] = Field(
        default="auto",
        description="what carries tensors between ranks; nccl wants one GPU for each rank, gloo "
        "copies a GPU's tensors through the host's memory; auto: nccl on CUDA devices that no two "
        "ranks share, gloo otherwise",
    )
    shared_memory: bool = Field(
        default=True,
        description="ranks of one host exchange through memory that they share, which nobody else "
        "can open, where the system lets them; gloo only carries what goes to other hosts",
    )
    timeout_s: Annotated[float, Field(ge=5, le=86400)] = Field(
        default=300.0,
        description="longest wait for another rank before the job ends with an error",
        json_schema_extra=unit_of("seconds"),
    )
    interface: Annotated[str, Field(min_length=1, max_length=64)] = Field(
        default="auto",
        description="network interface for traffic between ranks, by name; auto: loopback on one "
        "host, else the one that reaches rank 0",
    )
    hosts: Literal["auto", "mpi", "env"] = Field(
        default="auto",
        description="where host names come from; auto: MPI under mpirun, else the launcher's "
        "environment",
    )
    port: Annotated[int, Field(ge=1, le=65535)] | Literal["auto"] = Field(
        default="auto",
        description="port on rank 0's host on which the ranks of several hosts meet; auto: the "
        "launcher's MASTER_PORT, under torchrun, which has a store there, the next one, under "
        "mpirun any free one",
    )
    secret_file: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        default=None,
        description="file that only its owner may read, alike on all hosts, with the secret by "
        "which ranks of several hosts know each other; the environment variable DS_CP_JOB_SECRET "
        "comes before it; mpirun needs neither",
    )


class Trace(Section):
    """A record of what every rank did in every step, for Perfetto."""

    file: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        default=None,
        description="file on rank 0's host that gets the trace when the job ends, as Chrome's JSON "
        "(https://ui.perfetto.dev opens it); null: none is taken",
    )
    max_events: Annotated[int, Field(ge=10_000, le=10_000_000)] = Field(
        default=100_000,
        description="spans that each rank keeps, in 33 bytes each, of the first steps; a step of "
        "30 layers has about 300; later steps are left out, and counted; at the end rank 0 writes "
        "all ranks' spans, some 10 seconds a million, and ds-cp waits as long as the file grows",
        json_schema_extra=unit_of("spans"),
    )


class Config(Section):
    """Everything that one job needs to know. Frozen; see ``load_config``."""

    schema_: Annotated[str, Field(max_length=4096)] | None = Field(
        default=None, alias="$schema", description="JSON schema of this file, for editors; not used"
    )
    model: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="hub name, directory with safetensors, or GGUF file; a relative path is looked "
        "up from the working directory, then from this file's folder"
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="type of weights and KV; auto: the model's own"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="where ranks compute; several may share a GPU; auto: cuda where there is any",
    )
    max_model_len: Auto | Tokens = Field(
        default="auto",
        description="longest prompt plus answer; auto: the model's own limit",
        json_schema_extra=unit_of("tokens"),
    )
    threads_per_rank: Auto | Annotated[int, Field(ge=1, le=1024)] = Field(
        default="auto",
        description="CPU threads of one rank; auto: its cores / the ranks that may use them",
        json_schema_extra=unit_of("threads"),
    )
    linear_layers: Literal["auto", "packed", "torch"] = Field(
        default="auto",
        description="who computes linear layers on a CPU: packed (weights laid out once for the "
        "processor, a copy on every rank; a token's bits do not depend on the others of its step), "
        "torch, or auto: packed where there is a native library and memory for it, but for bf16 on "
        "a processor with AMX, which packed does not use: slower there for long prompts",
    )
    context_parallel: ContextParallel = Field(
        default_factory=ContextParallel, description="splitting sequences over ranks"
    )
    tensor_parallel: TensorParallel = Field(
        default_factory=TensorParallel, description="splitting heads over ranks"
    )
    kv_cache: KvCache = Field(default_factory=KvCache, description="room for keys and values")
    scheduler: Scheduler = Field(default_factory=Scheduler, description="requests at once")
    attention: Attention = Field(default_factory=Attention, description="attention kernel")
    comm: Comm = Field(default_factory=Comm, description="communication between ranks")
    fault_tolerance: FaultTolerance = Field(
        default_factory=FaultTolerance, description="going on after the death of a worker"
    )
    server: Server = Field(default_factory=Server, description="the HTTP server")
    trace: Trace = Field(default_factory=Trace, description="a record of every step")

    @model_validator(mode="after")
    def _deterministic_on_cuda(self) -> Config:
        attention = self.attention
        if self.device == "cuda" and attention.deterministic and attention.backend == "sdpa":
            raise ValueError(
                "attention.deterministic is true, but attention.backend sdpa cuts a prompt where "
                "its chunks end on device cuda; set attention.backend to triton or to auto"
            )
        return self

    @model_validator(mode="after")
    def _ranks_may_go(self) -> Config:
        tolerance, tp_size = self.fault_tolerance, self.tensor_parallel.tp_size
        if tolerance.min_ranks is not None and (tolerance.max_restarts == 0 or tp_size > 1):
            why = "max_restarts 0" if tolerance.max_restarts == 0 else f"tp_size {tp_size}"
            raise ValueError(
                f"fault_tolerance.min_ranks is {tolerance.min_ranks}, but with {why} the first "
                "loss ends the job; leave min_ranks out"
            )
        return self

    @model_validator(mode="after")
    def _one_budget_per_rank(self) -> Config:
        size = self.context_parallel.size
        for name in ("memory_per_rank", "tokens_per_rank", "host_memory_per_rank"):
            budget = getattr(self.kv_cache, name)
            if isinstance(budget, tuple) and isinstance(size, int) and len(budget) != size:
                raise ValueError(
                    f"kv_cache.{name} lists {len(budget)} ranks "
                    f"but context_parallel.size is {size}; "
                    f"give one number for all, or {size} of them"
                )
        return self
