"""The section ``fault_tolerance``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ds_cp.config.fields import MAX_RANKS, ByteSize, Section, unit_of


class FaultTolerance(Section):
    """What happens when the worker of a rank dies, or a step fails on one."""

    max_restarts: Annotated[int, Field(ge=0, le=1000)] = Field(
        default=3,
        description="interruptions in a row, without a step done between them, that the job "
        "outlives: a worker that dies is replaced, the ranks meet again, and requests go on; from "
        "3 on, a request whose steps end workers is found and ended before the job; 0: the first "
        "death ends the job, as it does with tp_size above 1",
        json_schema_extra=unit_of("interruptions"),
    )
    min_ranks: Annotated[int, Field(ge=1, le=MAX_RANKS)] | None = Field(
        default=None,
        description="as many ranks have to be left for the job to go on when the supervisor of "
        "one is gone, with the room of those that are left, until it is started again with the "
        "same rank and config; rank 0's is the server itself; null: such a loss ends the job",
        json_schema_extra=unit_of("ranks"),
    )
    hang_s: Annotated[float, Field(ge=1, le=86400)] | None = Field(
        default=30.0,
        description="time without a sign of life, which a thread of a worker gives whatever that "
        "does, after which the worker is taken for dead, ended and replaced; null: for ever",
        json_schema_extra=unit_of("seconds"),
    )
    host_timeout_s: Annotated[float, Field(ge=0.5, le=86400)] = Field(
        default=1.2,
        description="time in which the system of another host has to answer, else that host, or "
        "the network to it, is taken for lost; a busy or stopped process does not count, its "
        "system answers",
        json_schema_extra=unit_of("seconds"),
    )
    spare_after_s: Annotated[float, Field(ge=0, le=86400)] | None = Field(
        default=None,
        description="where none can be forked, as one is on CPU under Linux: time after which a "
        "process with its libraries loaded, and no model, waits beside each worker to take its "
        "place; it takes some 300 MiB, and a death costs the loading of the model alone; null: "
        "none waits, and a death costs the start of a process too, some seconds",
        json_schema_extra=unit_of("seconds"),
    )
    spare_model: bool = Field(
        default=False,
        description="whether the process that waits has its model loaded too, on CPU: a death "
        "costs a fraction of a second then, and weights take their memory twice",
    )
    journal_dir: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        default=None,
        description="directory on rank 0's host, made if need be and for this user alone, with the "
        "journal of what a restart with the same model and config goes on with: stored answers of "
        "/v1/responses, those that run in the background, and the lines of ds-cp batch that were "
        "in the middle; other requests end with their connection; null: none is written",
    )
    journal_max_bytes: ByteSize = Field(
        default=1 << 30,
        description="what the journal may hold; its file may take twice as much until it is "
        "rewritten; requests beyond are served, and not in it",
        json_schema_extra=unit_of("bytes"),
    )
