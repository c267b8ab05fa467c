"""The chunk pacer on a simulated machine with fixed seconds a step, decode, chunk and token."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass, field

import pytest

from ds_cp.cost import LayerWindows
from ds_cp.scheduler.pacing import ChunkPacer, Tuning

T = Tuning()


@dataclass
class Machine:
    """Adds up a step's seconds and reports them to the pacer, two steps late as in the engine."""

    pacer: ChunkPacer
    step: float = 0.1
    decode: float = 0.0
    chunk: float = 0.0
    token: float = 0.001
    noise: float = 0.0  # standard deviation of the logarithm
    late_by: float = 0.0  # seconds added to the steps below
    late_chunks: frozenset[int] = frozenset()
    late_quiet: frozenset[int] = frozenset()
    chunks: int = 0
    quiets: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(2))
    late: list[tuple[float, int, float]] = field(default_factory=list)

    def quiet(self, decodes: int) -> float:
        return self.step + self.decode * decodes

    def run(self, decodes: int, work: float) -> float:
        """One step; its seconds without the noise."""
        self.pacer.plan(decodes, work)
        seconds = self.quiet(decodes) + (self.chunk + self.token * work if work else 0.0)
        shown = seconds * self.rng.lognormvariate(0, self.noise)
        shown += self.late_by * (work > 0 and self.chunks in self.late_chunks)
        shown += self.late_by * (work == 0 and self.quiets in self.late_quiet)
        self.chunks += work > 0
        self.quiets += work == 0
        self.late.append((shown, decodes, work))
        if len(self.late) > 2:
            self.pacer.observe(*self.late.pop(0))
        return seconds

    def warm(self, decodes: int = 4, steps: int = 20) -> None:
        for _ in range(steps):
            self.run(decodes, 0.0)

    def prompt(self, steps: int, decodes: int = 4) -> list[tuple[float, float]]:
        """(work, seconds) of steps in which a prompt without an end takes what it may."""
        found = []
        for _ in range(steps):
            work = float(int(self.pacer.allowance(decodes)))
            found.append((work, self.run(decodes, work)))
        return found


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("slowdown", [1.2, 2.0, 5.0])
@pytest.mark.parametrize(("step", "token"), [(0.02, 0.0005), (0.5, 0.001), (0.002, 0.00001)])
def test_a_step_with_a_chunk_is_slowed_by_at_most_slowdown(
    step: float, token: float, slowdown: float, noise: float
) -> None:
    machine = Machine(ChunkPacer(slowdown), step=step, token=token, noise=noise)
    machine.warm()
    found = machine.prompt(200)
    assert found[0][0] == T.first_chunk_work
    settled = found[40:]
    for work, seconds in settled:
        assert seconds <= (1 + 0.15 * (noise > 0)) * slowdown * step or work == T.least_chunk_tokens
    # and the allowance is used, as far as whole tokens and the least chunk allow
    allowed = T.margin_share * (slowdown - 1) * step / token
    usual = statistics.median(work for work, _ in settled)
    assert usual >= max(T.least_chunk_tokens, 0.75 * allowed - 1)


@pytest.mark.parametrize("seed", range(5))
def test_a_long_prompt_whose_tokens_grow_dearer(seed: int) -> None:
    """Decodes that stay the same, no quiet step that the pacer does not ask for, and a prompt whose
    chunks cost more the deeper it is, in part whatever their length."""
    pacer, rng = ChunkPacer(2.0, attention=2.6e-4), random.Random(seed)
    machine = Machine(pacer, step=0.055, noise=0.08, rng=rng)
    machine.warm()
    past, ratios = 0, []
    while past < 7000:
        machine.chunk, machine.token = 0.012 + past * 4.2e-6, 0.0013
        allowed = pacer.allowance(4)
        tokens = max(pacer.tokens(allowed, past), T.least_chunk_tokens) if allowed else 0
        seconds = machine.run(4, pacer.work(tokens, tokens, past))
        past += tokens
        ratios.append(seconds / 0.055)
    assert statistics.mean(ratios) <= 2.0
    assert statistics.median(ratios) <= 2.0
    assert len(ratios) <= 1200, "and the prompt gets on"


def test_where_any_chunk_costs_more_than_allowed_chunks_are_rare_and_long() -> None:
    """Ranks that exchange: 0.3 s a chunk beside steps of 0.1 s. On average the bound holds, most
    steps are quiet ones, and most of what a chunk takes is its tokens' own."""
    machine = Machine(ChunkPacer(2.0), chunk=0.3, token=0.002, noise=0.05)
    machine.warm()
    settled = machine.prompt(600)[200:]
    seconds = [s for _, s in settled]
    chunks = [work for work, _ in settled if work]
    assert statistics.mean(seconds) <= 2.1 * 0.1
    assert statistics.median(seconds) == 0.1
    assert 0.002 * statistics.median(chunks) >= 0.3 / 3


def test_it_grows_to_a_large_chunk_by_doubling_at_most() -> None:
    machine = Machine(ChunkPacer(2.0), token=0.0001)
    machine.warm()
    largest = float(T.first_chunk_work)
    for work, _ in machine.prompt(100):
        assert work <= T.growth_share * largest
        largest = max(largest, work)
    assert largest > 10 * T.first_chunk_work


def test_a_long_prompt_always_gets_on() -> None:
    machine = Machine(ChunkPacer(1.01), step=0.001, token=1.0)
    machine.warm()
    found = [work for work, _ in machine.prompt(2000)][100:]
    assert {work for work in found if work} == {T.least_chunk_tokens}
    assert (
        max(map(len, "".join("x" if work else "." for work in found).split("x")))
        <= T.patience_steps
    )


@pytest.mark.parametrize("token", [0.004, 0.0005, 0.001])
def test_it_follows_a_machine_that_becomes_slower_or_faster(token: float) -> None:
    machine = Machine(ChunkPacer(2.0))
    machine.warm()

    def usual(steps: int) -> float:
        return statistics.median(work for work, _ in machine.prompt(steps)[-40:])

    first, want = T.margin_share * 0.1 / 0.001, T.margin_share * 0.1 / token
    assert abs(usual(100) - first) <= 2
    machine.token = token
    assert abs(usual(250) - want) <= 0.1 * want
    machine.token = 0.001
    assert abs(usual(250) - first) <= 0.1 * first


def test_steps_that_become_slower_are_noticed_in_the_midst_of_a_prompt() -> None:
    """Now and then a step has no chunk, and shows what quiet is: here three times what it was."""
    machine = Machine(ChunkPacer(2.0))
    machine.warm()
    found = machine.prompt(100)
    rows = "".join("x" if work else "." for work, _ in found).split(".")
    assert max(map(len, rows)) <= T.probe_chunks
    machine.step = 0.3
    machine.prompt(50 * T.probe_chunks)
    assert machine.pacer.quiet(4) == pytest.approx(0.3, rel=0.3)


def test_a_step_of_more_decodes_may_have_a_longer_chunk() -> None:
    """10 ms, 1 ms a decode, half a millisecond a prompt token; the allowance is of the step."""
    pacer, rng = ChunkPacer(2.0), random.Random(1)
    machine = Machine(pacer, step=0.01, decode=0.001, token=0.0005)
    for _ in range(300):
        decodes = rng.randint(1, 32)
        machine.run(decodes, 0.0)
        machine.prompt(1, decodes)
    for decodes in (1, 8, 32, 64):
        quiet = machine.quiet(decodes)
        assert pacer.quiet(decodes) == pytest.approx(quiet, rel=0.01)
        machine.run(decodes, 0.0)
        machine.run(decodes, 0.0)
        want = T.margin_share * quiet / 0.0005  # or half, of a chunk to learn from
        assert pacer.allowance(decodes) / want in (pytest.approx(1, 0.02), pytest.approx(0.5, 0.02))


def test_one_slow_step_changes_little() -> None:
    """A page fault, another process: a step of a hundred times the time counts as one of three."""
    machine = Machine(ChunkPacer(2.0))
    machine.warm()
    before = statistics.median(work for work, _ in machine.prompt(100)[-40:])
    machine.pacer.observe(10.0, 4, before)
    machine.pacer.observe(10.0, 4, 0.0)
    after = statistics.median(work for work, _ in machine.prompt(20))
    assert 0.5 * before <= after <= 2.0 * before


STARTS = [frozenset({i}) for i in range(8)] + [frozenset({0, 1}), frozenset({1, 3})]


@pytest.mark.parametrize("late", STARTS, ids=lambda late: "+".join(map(str, sorted(late))))
@pytest.mark.parametrize("what", ["late_chunks", "late_quiet"])
@pytest.mark.parametrize(("step", "chunk", "token"), [(0.055, 0.012, 0.0013), (0.02, 0.0, 0.0005)])
def test_slow_steps_at_the_very_start(
    step: float, chunk: float, token: float, what: str, late: frozenset[int]
) -> None:
    """Another process delays a step by five seconds before the pacer knows what to expect: decodes
    hardly feel it, and the prompt gets on."""
    pacer, by = ChunkPacer(2.0), {what: late}
    machine = Machine(pacer, step, 0.0, chunk, token, 0.08, late_by=5.0, **by)  # type: ignore[arg-type]
    machine.warm(steps=3)
    found = machine.prompt(600)
    assert max(seconds for _, seconds in found) <= 5 * step
    assert statistics.mean(seconds for _, seconds in found) <= 2 * step
    assert sum(work for work, _ in found) * token >= 0.3 * 600 * step


def test_no_client_waits_for_a_token_of_a_batch() -> None:
    machine = Machine(ChunkPacer(None))
    machine.warm()
    machine.prompt(20)
    assert machine.pacer.allowance(4) == machine.pacer.allowance(0) == T.first_alone_work


def test_free_tokens_do_not_divide_by_zero() -> None:
    """A step with a chunk that is as long as a quiet one, or shorter."""
    for token in (0.0, -0.0001):
        machine = Machine(ChunkPacer(2.0), token=token)
        machine.warm()
        largest = float(T.first_chunk_work)
        for work, _ in machine.prompt(20):
            assert work <= T.growth_share * largest
            largest = max(largest, work)
        assert largest > T.first_chunk_work
    machine = Machine(ChunkPacer(2.0), step=0.0, token=0.0)
    machine.warm()
    assert max(work for work, _ in machine.prompt(40)) >= T.least_chunk_tokens


def test_chunks_without_decodes_last_about_a_second() -> None:
    machine = Machine(ChunkPacer(2.0), step=0.0, token=0.0001)
    assert machine.pacer.allowance(0) == T.first_alone_work
    machine.prompt(50, decodes=0)
    assert machine.pacer.allowance(0) * 0.0001 == pytest.approx(T.alone_step_s, abs=0.01)
    machine.token = 1.0
    machine.prompt(50, decodes=0)
    assert machine.pacer.allowance(0) == T.first_alone_work, (
        "never less than can be afforded anyway"
    )


def test_what_is_not_comparable_is_not_learnt_from() -> None:
    pacer = ChunkPacer(2.0)
    pacer.observe(9.0, 0, 3)  # a short prompt alone says nothing of long ones
    assert pacer.pace is None and pacer.allowance(0) == T.first_alone_work
    pacer.observe(0.1, 0, 1000)
    assert pacer.allowance(0) == T.alone_growth_share * 1000 == 4000
    pacer.observe(0.4, 0, 4000)
    assert abs(pacer.allowance(0) - 10_000) <= 1
    pacer.observe(9.0, 4, 16)  # one step beside decodes, and nothing to compare it with
    assert pacer.allowance(4) == T.first_chunk_work


@pytest.mark.parametrize("attention", [0.0, 2.6e-4, 0.1])
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("past", [0, 1, 7000])
def test_tokens_are_as_many_as_the_work_allows(attention: float, ranks: int, past: int) -> None:
    pacer = ChunkPacer(2.0, attention)
    assert pacer.tokens(-50_000.0, past, ranks) == 0, "a rank that has done more than its share"
    for work in (0.0, 0.5, 16.0, 45.0, 5000.0):
        tokens = pacer.tokens(work, past, ranks)

        def of(tokens: int) -> float:
            return pacer.work(1, tokens, past) * tokens / ranks

        assert of(tokens) <= work + 1e-4 < of(tokens + 1) + 2e-4


@pytest.mark.parametrize("slowdown", [1.0, 0.5, -1.0])
def test_a_slowdown_of_one_leaves_no_room(slowdown: float) -> None:
    with pytest.raises(ValueError, match="slowdown must be above 1"):
        ChunkPacer(slowdown)


# --- growth goes by what was measured


@pytest.mark.parametrize("late", [1, 2, 3])
@pytest.mark.parametrize("slower", [20.0, 100.0])
def test_late_chunks_are_halved_before_the_prediction_has_learnt(slower: float, late: int) -> None:
    """A machine that becomes much slower in the midst of a prompt, which the pacer sees ``late``
    steps afterwards. Only chunks that were planned before that are longer than half of what they
    were; a clipped measurement teaches the regression so little that there were nine, and then
    longer ones than ever."""
    machine = Machine(ChunkPacer(2.0), token=0.0005)
    machine.warm()
    before = machine.prompt(150)[-1][0]
    shown: list[tuple[float, int, float]] = []
    works = []
    for _ in range(60):
        work = float(int(machine.pacer.allowance(4)))
        machine.pacer.plan(4, work)
        works.append(work)
        shown.append((0.1 + slower * 0.0005 * work, 4, work))
        if len(shown) > late:
            machine.pacer.observe(*shown.pop(0))
    assert max(works[: late + 1]) >= before > 100
    assert max(works[late + 1 : 25]) <= max(works[: late + 1]) / T.growth_share
    assert len([work for work in works if work]) >= 9, "and the prompt gets on"


@pytest.mark.parametrize("factor", [0.0, 0.001, 0.1])
def test_one_measurement_that_is_far_too_short_does_not_make_a_chunk_long(factor: float) -> None:
    """Without decodes: a first chunk that seemed to take no time made the next one 8,192 tokens,
    of 32 seconds."""
    machine = Machine(ChunkPacer(2.0), step=0.0, token=0.004)
    pacer = machine.pacer
    pacer.observe(factor * 0.004 * T.first_alone_work, 0, T.first_alone_work)
    assert pacer.allowance(0) <= T.alone_growth_share * T.first_alone_work
    found = machine.prompt(30, decodes=0)
    assert max(seconds for _, seconds in found) <= 0.004 * 4 * T.first_alone_work
    assert all(seconds <= 2.1 * T.alone_step_s for _, seconds in found[6:])


@pytest.mark.parametrize(("slowdown", "decodes"), [(None, 64), (2.0, 0)])
def test_slow_steps_without_a_chunk_do_not_shorten_the_next(
    slowdown: float | None, decodes: int
) -> None:
    """Many decodes of a batch, or blocks that move, may take longer than a step should."""
    pacer = ChunkPacer(slowdown)
    for _ in range(4):
        pacer.observe(0.1, 0, pacer.allowance(0))
    before = pacer.allowance(0)
    assert before > T.first_alone_work
    pacer.observe(5.0, decodes, 0.0)
    assert pacer.allowance(0) == before


def test_a_batch_grows_its_chunks_beside_decodes_too() -> None:
    pacer = ChunkPacer(None)
    pacer.observe(0.05, 0, 512.0)
    for _ in range(4):
        pacer.observe(0.2, 64, pacer.allowance(64))
    assert pacer.allowance(64) == pytest.approx(T.alone_step_s / (0.05 / 512))


@pytest.mark.parametrize("past", [0, 40, 5000])
@pytest.mark.parametrize("ranks", [1, 3])
def test_chunks_of_windowed_layers_are_as_long_as_what_they_see_allows(
    past: int, ranks: int
) -> None:
    """The longest chunk whose work, counted token by token, is not above the limit."""
    pacer = ChunkPacer(2.0, 0.01, layers=LayerWindows(4, ((32, 1), (100, 2))))

    def work(tokens: int) -> float:
        seen = sum(
            (min(p + 1, 32) + 2 * min(p + 1, 100) + p + 1) / 4 for p in range(past, past + tokens)
        )
        return (tokens + 0.01 * seen) / ranks

    for limit in (0.5, 7.0, 300.0):
        found = pacer.tokens(limit, past, ranks)
        assert work(found) <= limit + 1e-6 and work(found + 1) > limit
        if found:
            assert pacer.work(found, found, past) == pytest.approx(work(found) * ranks)
