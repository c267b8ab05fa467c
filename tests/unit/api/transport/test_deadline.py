"""``within``: the result, the limit, and a cancellation that must not be lost."""

from __future__ import annotations

import asyncio

import pytest

from ds_cp.api.transport.deadline import within


def test_result_error_and_limit() -> None:
    async def main() -> None:
        assert await within(60, asyncio.sleep(0, "x")) == "x"
        with pytest.raises(asyncio.TimeoutError):
            await within(0.01, asyncio.sleep(600))

        async def fail() -> None:
            raise KeyError("k")

        with pytest.raises(KeyError):
            await within(60, fail())

    asyncio.run(main())


@pytest.mark.parametrize("turns", range(8))
def test_cancellation_is_never_lost(turns: int) -> None:
    """The caller is cancelled ``turns`` turns of the event loop after its work may go on."""

    async def main() -> None:
        gate = asyncio.Event()
        went_on = []

        async def caller() -> None:
            await within(60, gate.wait())
            went_on.append(turns)
            await asyncio.sleep(5)

        task = asyncio.create_task(caller())
        for _ in range(5):
            await asyncio.sleep(0)
        gate.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        resumed = bool(went_on)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(task), 1)
        assert task.cancelled()
        assert bool(went_on) == resumed

    asyncio.run(main())


def test_the_work_is_ended_before_within_returns() -> None:
    async def main() -> None:
        ended = []

        async def work() -> None:
            try:
                await asyncio.sleep(5)
            finally:
                await asyncio.sleep(0)
                ended.append(True)

        with pytest.raises(asyncio.TimeoutError):
            await within(0.01, work())
        assert ended == [True]

    asyncio.run(main())
