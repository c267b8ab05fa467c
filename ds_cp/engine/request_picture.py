"""One request for the live picture."""

from __future__ import annotations

from ds_cp.engine.picture import MAX_RANKS, EndedPicture, RequestPicture
from ds_cp.scheduler.request import Request


def request_picture(
    request: Request, step: tuple[str, str, tuple[int, ...]] | None, busy: bool, now: float
) -> RequestPicture:
    """A request at ``now`` (epoch). ``step``: (mode, ring pass, ranks that compute) in the newest
    step, if it is in it; ``busy``: that step has not ended."""
    table = request.table
    mode, ring_pass, computing = step or (None, None, ())
    if mode is None and request.decode_key is not None:
        mode, ring_pass = request.decode_key
    if table is None:
        phase = "waiting"
    else:
        phase = "prefill" if request.prefilling else "decode"
    span = () if table is None else table.span
    why = [w.text for w in (request.why_span, request.why_mode) if w is not None and table]
    return RequestPicture(
        number=request.number,
        id=request.request_id[:64],
        index=request.index,
        phase=phase,
        mode=mode if table else None,
        ring_pass=ring_pass if table and mode == "ring" else None,
        mode_reason=request.why_mode.value if request.why_mode and table else None,
        span_reason=request.why_span.value if request.why_span and table else None,
        why="; ".join(why),
        ranks=tuple(sorted({*span, *computing}))[:MAX_RANKS],
        owner=table.last_rank if table and not request.prefilling and span else None,
        working=busy and step is not None,
        prompt_tokens=len(request.prompt),
        cached_tokens=request.cached_tokens or 0,
        computed=request.num_computed,
        to_compute=request.num_tokens,
        new_tokens=len(request.output),
        max_tokens=request.max_tokens,
        blocks=0 if table is None else len(table.homes),
        preemptions=request.num_preemptions,
        age_s=round(max(0.0, now - request.arrival_time), 3),
        ttft_s=_ttft(request),
        tpot_s=_tpot(request),
    )


def ended_picture(request: Request) -> EndedPicture:
    """A request that has ended."""
    end = request.finished_time or request.arrival_time
    return EndedPicture(
        request.request_id[:64], request.index, request.finish_reason or "error",
        tuple(request.modes), len(request.prompt), len(request.output), _ttft(request),
        _tpot(request), round(max(0.0, end - request.arrival_time), 3),
    )  # fmt: skip


def _ttft(request: Request) -> float | None:
    first = request.first_token_time
    return None if first is None else round(max(0.0, first - request.arrival_time), 4)


def _tpot(request: Request) -> float | None:
    first, last, count = request.first_token_time, request.last_token_time, len(request.output)
    if first is None or last is None or count < 2:
        return None
    return round(max(0.0, last - first) / (count - 1), 5)
