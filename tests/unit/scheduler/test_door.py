"""Who is refused, and when it is asked to come again, in simulated time: steps take what a small
machine's would, and the requests that wait are the scheduler's own."""

from __future__ import annotations

import heapq
import statistics
from dataclasses import dataclass, field

import pytest

from ds_cp.cost import CostModel
from ds_cp.errors import LongWaitError, QueueFullError
from ds_cp.sampling_params import RequestOptions, SamplingParams
from ds_cp.scheduler import prefill, scheduler
from ds_cp.scheduler.admission import Limits
from ds_cp.scheduler.door import MAX_RETRY_S
from ds_cp.scheduler.forecast import Forecast, Rates
from ds_cp.scheduler.mode_policy import ModePolicy
from ds_cp.scheduler.pacing import ChunkPacer
from ds_cp.scheduler.request import Request
from ds_cp.scheduler.scheduler import Scheduler

STEP_S, DECODE_S, PROMPT_S = 0.01, 0.002, 0.0005  # of a step, each decode, each prompt token
PROMPT, ANSWER = 40, 20  # tokens
POLICY = ModePolicy("local", "auto", None, 1, 2, 1, None)


class Machine:
    """One rank in simulated time."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, bound_s: float | None = None, *, seats: int = 8,
        max_queue: int = 64, blocks: int = 2000,
    ) -> None:  # fmt: skip
        self.now = 1000.0
        for module in (prefill, scheduler):
            monkeypatch.setattr(module, "steady_time", lambda: self.now)
        limits = Limits(4096, seats, 512, max_queue, 100, (), bound_s)
        self.scheduler = Scheduler(
            limits, [blocks], 16, "fill_then_spill", "zigzag", POLICY, [0],
            pacer=ChunkPacer(2.0), prefix_caching=False, rates=Rates(PROMPT_S, STEP_S),
        )  # fmt: skip
        self.scheduler.door._clock = lambda: self.now
        self.live: dict[int, Request] = {}
        self.waits: dict[int, float] = {}  # that were predicted
        self.done = 0

    def ask(
        self, client: str = "", tokens: int = ANSWER, priority: int = 0, prompt: int = PROMPT
    ) -> Request:
        options = RequestOptions(client=client, priority=priority)
        wait_s = self.scheduler.door.wait_s(options)
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        request = self.scheduler.admit("x", [1] * prompt, params, 1, options)
        request.arrival_time = self.now
        self.waits[request.number] = wait_s
        self.live[request.number] = request
        return request

    def step(self) -> None:
        plan = self.scheduler.schedule()
        if plan is None:
            self.now += STEP_S
            return
        decoding = [number for decodes in plan.decodes for number in decodes.requests]
        drawing = decoding + [chunk.request for chunk in plan.chunks if chunk.samples]
        owned = [runs for chunk in plan.chunks for _, runs in chunk.owners]
        computed = sum(length for runs in owned for _, length in runs)
        seconds = STEP_S + DECODE_S * len(decoding) + PROMPT_S * computed
        self.now += seconds
        self.scheduler.observe_step(plan.step, seconds)
        for number in drawing:
            if self.scheduler.record_token(self.live[number], 2) is not None:
                del self.live[number]
                self.done += 1

    def warm(self) -> None:
        """Until the pacer knows what steps take."""
        for _ in range(12):
            self.ask("warm")
        while self.scheduler.has_work:
            self.step()


@dataclass(order=True)
class Client:
    at: float
    number: int
    asked: int = field(default=0, compare=False)
    promised: list[float] = field(default_factory=list, compare=False)


@pytest.mark.parametrize("bound_s", [None, 2.0])
def test_a_burst_comes_back_when_it_was_told(
    monkeypatch: pytest.MonkeyPatch, bound_s: float | None
) -> None:
    """Some 400 at once, of which a few dozen fit: nearly all that were refused are taken when they
    first come again, and the machine is never idle meanwhile."""
    machine = Machine(monkeypatch, bound_s, max_queue=40 if bound_s is None else 1000)
    machine.warm()
    began, before = machine.now, machine.done
    coming = [Client(machine.now, number) for number in range(400)]
    heapq.heapify(coming)
    finished: list[Client] = []
    idle = 0
    while coming or machine.scheduler.has_work:
        while coming and coming[0].at <= machine.now:
            client = heapq.heappop(coming)
            client.asked += 1
            try:
                machine.ask("all")
                finished.append(client)
            except QueueFullError as err:
                assert isinstance(err, LongWaitError) == (bound_s is not None)
                assert 1 <= err.retry_after_s <= MAX_RETRY_S
                client.promised.append(err.retry_after_s)
                client.at = machine.now + err.retry_after_s
                heapq.heappush(coming, client)
        idle += not machine.scheduler.has_work
        machine.step()
    asked = [client.asked for client in finished]
    again = [n for n in asked if n > 1]
    rate = (machine.done - before) / (machine.now - began)
    print(statistics.mean(asked), max(asked), len(again), rate, idle)
    assert len(again) > 300 and statistics.mean(again) < 2.5
    assert idle * STEP_S < 0.1 * (machine.now - began)


def test_predicted_waits_are_those_that_come(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    machine.warm()
    asked = [machine.ask("one") for _ in range(60)]
    while machine.scheduler.has_work:
        machine.step()
    ratios = []
    for request in asked:
        assert request.first_scheduled_time is not None
        waited = request.first_scheduled_time - request.arrival_time
        if waited > 0.5:
            ratios.append(machine.waits[request.number] / waited)
    print([round(ratio, 2) for ratio in ratios])
    assert len(ratios) > 30 and 0.5 < statistics.median(ratios) < 2.0
    assert all(1 / 4 < ratio < 4 for ratio in ratios)


def test_the_correction_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model does not know, such as blocks for two requests where there are seats for
    eight."""
    forecast = Forecast(8, 1, [])
    for _ in range(60):
        forecast.began(1.0, 3.0)
    assert 2.5 < forecast.correction < 3.5
    for _ in range(60):
        forecast.began(1.0, 1.0)
    assert 0.9 < forecast.correction < 1.2
    forecast.began(0.0, 0.0)
    for _ in range(1000):
        forecast.began(0.001, 1e9)
    assert forecast.correction <= 16.01


def test_who_waits_longer_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 0.5)
    machine.warm()
    with pytest.raises(LongWaitError) as caught:
        for _ in range(60):
            machine.ask("one", 200)
    assert (
        "until this request begins, above the limit scheduler.max_queue_wait_s of 0.5 s; try"
        in (str(caught.value))
    )
    assert machine.scheduler.door.is_overloaded and machine.scheduler.door.num_refused == 1
    machine.now += 11.0
    assert not machine.scheduler.door.is_overloaded


def test_an_idle_engine_refuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long its own prompt takes: coming again would not help."""
    machine = Machine(monkeypatch, 0.001)
    machine.ask("one", 500, prompt=2000)


def test_a_heavy_client_does_not_refuse_a_light_one(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 2.0, max_queue=16)
    machine.warm()
    for _ in range(100):
        try:
            machine.ask("heavy")
        except QueueFullError:
            break
    for _ in range(4):  # its turn comes next
        machine.ask("light")
    assert machine.waits[max(machine.waits)] < 2.0
    with pytest.raises(QueueFullError):
        machine.ask("heavy")


def test_a_long_prompt_of_another_client_is_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients share each step; those of one client go one after the other."""
    machine = Machine(monkeypatch, 5.0, blocks=8000)
    machine.warm()
    machine.ask("one", prompt=60_000)
    machine.step()
    with pytest.raises(LongWaitError):
        machine.ask("one")
    request = machine.ask("two")
    machine.step()
    assert request.first_scheduled_time is not None
    with pytest.raises(LongWaitError):
        machine.ask("one")


def test_the_queue_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has less than an equal part of a full queue is let in, up to twice its length."""
    machine = Machine(monkeypatch, max_queue=8)
    for _ in range(8):
        machine.ask("heavy")
    with pytest.raises(QueueFullError, match="8 requests are waiting, the limit of"):
        machine.ask("heavy")
    for _ in range(4):
        machine.ask("light")
    with pytest.raises(QueueFullError, match="12 requests are waiting"):
        machine.ask("light")
    for number in range(4):
        machine.ask(f"c{number}")
    with pytest.raises(QueueFullError, match="16 requests are waiting"):
        machine.ask("another")


def test_a_better_priority_waits_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 1.0)
    machine.warm()
    with pytest.raises(LongWaitError):
        for _ in range(60):
            machine.ask("one", 100)
    with pytest.raises(LongWaitError):
        machine.ask("two", 100, priority=1)
    machine.ask("one", 100, priority=-1)


def test_the_first_rates_are_the_cost_models() -> None:
    cost = CostModel(1e9, 1e9, 1e-5, 2, 4, 2, 16, 1_000_000, 4)
    rates = Rates.of(cost)
    assert rates.token_s == pytest.approx(2e6 / 1e9, rel=0.5)
    assert 0 < rates.step_s < 0.1
    assert Rates.of(None) == Rates()
