"""The section ``kv_cache`` of the JSON config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ds_cp.config.fields import MemoryBudget, Section, SpareBudget, TokenBudget, unit_of


class KvCache(Section):
    """Room for keys and values. Give bytes or tokens, not both."""

    block_size: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=64,
        description="tokens of one request in one block",
        json_schema_extra=unit_of("tokens"),
    )
    memory_per_rank: MemoryBudget = Field(
        default="auto",
        description='KV memory of a rank: "512MiB", "1.5GB" or bytes, or a list with one for each '
        "context-parallel rank; auto: from tokens_per_rank, else 85 % of the free memory of a CUDA "
        "device, or on CPU 40 % of the host's free memory shared by its ranks, but no more than "
        "max_num_seqs requests of max_model_len tokens can use",
        json_schema_extra=unit_of("bytes"),
    )
    tokens_per_rank: TokenBudget = Field(
        default="auto",
        description="tokens whose KV a rank holds, or a list with one number for each "
        "context-parallel rank; auto: from memory_per_rank",
        json_schema_extra=unit_of("tokens"),
    )
    placement: Literal["fill_then_spill", "round_robin", "balanced"] = Field(
        default="fill_then_spill", description="which rank a request's next block is placed on"
    )
    prefix_caching: bool = Field(
        default=True,
        description="keep the KV of finished requests, while there is room, for prompts that begin "
        "the same way",
    )
    host_memory_per_rank: SpareBudget = Field(
        default=0,
        description="host memory of a rank, a budget of its own, for KV that its device has no "
        "room to keep: beginnings of prompts and preempted requests come back from there where "
        'that is quicker than computing them: "8GiB" or bytes, or a list with one for each '
        "context-parallel rank; page-locked for a CUDA device; 0: none",
        json_schema_extra=unit_of("bytes"),
    )
    host_folder: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        default=None,
        description="folder in which each rank on CPU has that room as a file without a name, on a "
        "disk instead of in memory; what comes back from it other than it was written is not used; "
        "null: in memory",
    )

    @model_validator(mode="after")
    def _one_budget(self) -> KvCache:
        if self.memory_per_rank != "auto" and self.tokens_per_rank != "auto":
            raise ValueError(
                "kv_cache.memory_per_rank and kv_cache.tokens_per_rank are both set; "
                "keep one and leave the other out"
            )
        spare = self.host_memory_per_rank
        if max(spare) if isinstance(spare, tuple) else spare:
            if not self.prefix_caching:
                raise ValueError(
                    "kv_cache.host_memory_per_rank keeps what prefix_caching finds again, but "
                    "kv_cache.prefix_caching is false; set it to true or leave "
                    "kv_cache.host_memory_per_rank out"
                )
        elif self.host_folder is not None:
            raise ValueError(
                "kv_cache.host_folder is set, but kv_cache.host_memory_per_rank is 0; "
                "say how much the folder may hold, or leave it out"
            )
        budget = self.tokens_per_rank
        least: Any = min(budget) if isinstance(budget, tuple) else budget
        if isinstance(least, int) and least < self.block_size:
            raise ValueError(
                f"kv_cache.tokens_per_rank is {least}, "
                f"less than one block of {self.block_size} tokens; "
                "raise it or lower kv_cache.block_size"
            )
        return self
