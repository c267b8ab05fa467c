"""Requests while ranks come and go: drained, made level, grown over, found again, ended in flight.

Each scene plays on real ranks, step by step; ``Driver`` compares states after every step.
Tokens are what transformers says. Bytes on the wire are counted on every rank and added up here.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ds_cp.comm.wire import World
from ds_cp.worker.state import WorkerState
from ds_cp.scheduler.migration import MOVES_PER_STEP
from ds_cp.sampling_params import RequestOptions, SamplingParams
from ds_cp.layout import Home
from ds_cp.plan import StepPlan, Transfer
from ds_cp.errors import CapacityError, RequestError
from ds_cp.model.wiring import Decoder
from tests.dist.test_engine_company import VOCAB, Case, Ids, settle, the_model
from tests.dist.test_engine_lifecycles import Driver
from tests.helpers.engines import engine_on
from tests.helpers.ranks import run_ranks

SIZE = 4  # tokens of a block
PREFIX = 40  # tokens that some prompts share
EOS = 5
TOKENS = range(6, 120)  # of prompts; one of the others is made to give NaN
GREEDY: Mapping[str, Any] = {"temperature": 0.0}
SAMPLED: Mapping[str, Any] = {"temperature": 0.9, "top_p": 0.95}
Cases = dict[str, Case]


# --- the requests


def tokens(length: int, seed: int) -> Ids:
    rng = random.Random(1000 * seed + length)
    return tuple(rng.choice(TOKENS) for _ in range(length))


def drafts(begin: Ids, length: int, new: int, seed: int, **how: Any) -> Iterator[Case]:
    """Prompts of ``length`` that begin with ``begin``."""
    for attempt in itertools.count():
        rest = tokens(length - len(begin), seed + 100 * attempt)
        params = SamplingParams(max_tokens=new, seed=seed + 10**6 * attempt, **how)
        yield Case((*begin, *rest), params)


def settled(length: int, new: int, seed: int, begin: Ids = (), **how: Any) -> Case:
    return settle(the_model(), drafts(begin, length, new, seed, **how))


@pytest.fixture(scope="module")
def cases() -> Cases:
    """By name; see the scenes for what each is for."""
    shared, chat = tokens(PREFIX, 77), settled(61, 12, 9, **SAMPLED)
    heard = (*chat.prompt, *chat.want[0][0])
    model = the_model(eos_token_id=EOS)
    ends = {
        f"ends {n}": settle(
            model, drafts((), 7 + 13 * n, 20, n, logit_bias={EOS: 100.0}, min_tokens=3 + n, **how)
        )
        for n, how in enumerate((GREEDY, SAMPLED, GREEDY, {**SAMPLED, "n": 2}))
    }
    return {
        **{f"short {n}": settled(10, 28, n, **(GREEDY, SAMPLED)[n % 2]) for n in range(3)},
        **{f"long {n}": settled(41, 28, n, **(SAMPLED, GREEDY)[n % 2]) for n in range(2)},
        **{f"shared {n}": settled(PREFIX + 6, 24, n, shared, **GREEDY) for n in range(2)},
        "twins": settled(38, 28, 5, n=2, **SAMPLED),
        "outgrows": settled(18, 50, 3, **GREEDY),
        "large": settled(80, 14, 4, **GREEDY),
        "turn 1": chat,
        "turn 2": settled(len(heard) + 15, 10, 10, heard, **SAMPLED),
        **ends,
    }


# --- scenes


@dataclass(frozen=True)
class Seen:
    """What one rank counted in one scene; ``moved_bytes`` and ``problems`` on rank 0 only."""

    scene: str
    move_kv: int
    next_token: int
    moved_bytes: int = 0
    problems: tuple[str, ...] = ()


Scene = Callable[..., Sequence[str]]  # driver, cases, more -> names of requests played to the end


def play(
    world: World,
    scene: Scene,
    cases: Cases,
    config: Mapping[str, Mapping[str, Any]],
    *more: Any,
    model: Decoder | None = None,
    broken: int | None = None,
) -> Seen:
    """One engine for one scene. ``broken``: a token that gives NaN."""
    model = the_model() if model is None else model
    kv = {"block_size": SIZE, **config.get("kv_cache", {})}
    engine = engine_on(world, model, {**config, "kv_cache": kv})
    if broken is not None:
        model.get_input_embeddings().weight.data[broken] = torch.nan
    world.ledger.clear()
    name = f"{scene.__name__} {config.get('context_parallel', {})} {kv['tokens_per_rank']}"
    moved, problems = 0, []
    if engine.is_driver:
        driver = Driver(engine)
        for request in scene(driver, cases, *more):
            case = cases[request.partition("/")[0]]  # "name/again" is asked once more
            if driver.said(request) != case.want:
                problems.append(f"{name}: {request}: {driver.said(request)}, not {case.want}")
        driver.close()
        far = [t for p in driver.plans for t in p.transfers if t.source[0] != t.target[0]]
        # the others are copies of cached blocks, for requests that begin with the step
        assert sum(bool(t.requests) for t in far) == driver.scheduler.migration.num_moved
        moved = len(far) * SIZE * engine.facts.bytes_per_token * engine.facts.tp_size
    else:
        engine._worker.follow()
    sent = world.ledger
    return Seen(name, sent["move_kv"].bytes, sent["next_token"].bytes, moved, tuple(problems))


def check(results: Sequence[Sequence[Seen]]) -> None:
    """Of all ranks: no problem, and what was sent is what was moved, block for block."""
    for scenes in zip(*results, strict=True):
        first = scenes[0]
        assert not first.problems, first.problems
        assert sum(seen.move_kv for seen in scenes) == first.moved_bytes, first.scene


def modes_of(driver: Driver, number: int) -> list[str]:
    """How each decode step of a request was run, neighbours of a kind as one."""
    modes = [d.mode for plan in driver.plans for d in plan.decodes if number in d.requests]
    return [mode for mode, _ in itertools.groupby(modes)]


def transfers(plans: Sequence[StepPlan]) -> list[int]:
    """How many blocks each plan moves."""
    return [len(plan.transfers) for plan in plans]


def start(driver: Driver, cases: Cases, names: Sequence[str]) -> int:
    """Add requests and step until all of them decode; the number of plans before that step."""
    for name in names:
        driver.add(name, cases[name.partition("/")[0]])
    numbers = {r.number for name in names for r in driver.answers[name]}
    for _ in range(200):
        driver.step()
        decoding = {n for d in driver.plans[-1].decodes for n in d.requests}
        if decoding >= numbers:
            return len(driver.plans) - 1
    raise AssertionError(f"{numbers - decoding} do not decode")


def assert_unbroken(driver: Driver, since: int) -> None:
    """From plan ``since`` on, a request with tokens to draw draws one in every step."""
    running = {n for d in driver.plans[since].decodes for n in d.requests}
    left = {
        request.number: request.max_tokens - driver.num_planned(request.number, since)
        for answers in driver.answers.values()
        for request in answers
        if request.number in running
    }
    for plan in driver.plans[since:]:
        due = {number for number, count in left.items() if count > 0}
        drawn = {n for d in plan.decodes for n in d.requests}
        assert due <= drawn, f"step {plan.step}: no token for {due - drawn}"
        for number in due:
            left[number] -= 1
    assert driver.scheduler.num_preemptions == 0


DECODING = ("short 0", "long 0", "shared 0", "short 1", "long 1", "twins")


def drain_under_decodes(driver: Driver, cases: Cases) -> Sequence[str]:
    """A rank is emptied while six requests decode, local and spanning ones and twins that share
    blocks, all in the same steps; then another one."""
    since = start(driver, cases, DECODING)
    mixed = [{d.mode for d in plan.decodes} for plan in driver.plans]
    assert {"local", "tree"} in mixed, mixed
    assert all(driver.used)
    for rank in (1, 0):
        blocks, at = driver.used[rank], len(driver.plans)
        driver.scheduler.drain(rank)
        driver.scheduler.drain(rank)  # again: nothing more
        driver.steps(-(-blocks // MOVES_PER_STEP) + 2)
        assert driver.scheduler.is_drained(rank) and driver.used[rank] == 0
        assert len(driver.live) == len(DECODING), "while all of them decode"
        moved = transfers(driver.plans[at:])
        assert sum(moved) >= blocks > MOVES_PER_STEP >= max(moved)
        driver.steps(2)
        assert driver.used[rank] == 0
        if rank == 1:
            driver.scheduler.reopen(rank)
    (late,) = driver.add("shared 1", cases["shared 1"])
    driver.finish()
    assert_unbroken(driver, since)
    assert late.cached_tokens == PREFIX, "what moved is found where it is now"
    assert driver.used[0] == driver.allocator.num_cached(0) == 0
    driver.scheduler.reopen(0)
    driver.add("short 2", cases["short 2"])  # a rank that was reopened is used again
    driver.steps(3)
    assert driver.states[-1][driver.answers["short 2"][0].number][0][0][0] == 0
    driver.finish()
    return [*DECODING, "shared 1", "short 2"]


def drain_under_prefill(driver: Driver, cases: Cases) -> Sequence[str]:
    """A rank is drained while long prompts come in by small chunks: what they have there moves,
    and what they were to get there they get elsewhere."""
    names = ("short 0", "large", "long 0", "twins")
    for name in names:
        driver.add(name, cases[name])
    driver.steps(4)
    large = driver.answers["large"][0]
    assert large.prefilling and large.table is not None and large.table.width == 3
    assert 1 in large.reserved
    at = len(driver.plans)
    driver.scheduler.drain(1)
    driver.steps(4)
    assert driver.used[1] == 0
    driver.finish()
    chunks = [chunk for plan in driver.plans[at:] for chunk in plan.chunks]
    assert large.number in [chunk.request for chunk in chunks]
    for chunk in chunks:
        assert all(rank != 1 for rank, _ in (*chunk.homes, *chunk.owners)), chunk
    return names


def rebalance_under_decodes(driver: Driver, cases: Cases) -> Sequence[str]:
    """All is on one rank, then others are opened, and the ranks become level while all decode."""
    names = ("short 0", "shared 0", "short 1", "shared 1", "twins")
    for rank in (1, 2):
        driver.scheduler.drain(rank)
    since = start(driver, cases, names)
    assert driver.used[1:] == [0, 0]
    for rank in (1, 2):
        driver.scheduler.reopen(rank)
    at, promised = len(driver.plans), driver.scheduler.rebalance()
    assert promised > 0
    while len(driver.plans) < at + 2 + -(-promised // MOVES_PER_STEP):
        driver.step()
    assert all(driver.used), driver.used
    assert max(driver.used) - min(driver.used) <= 14, driver.used  # of 40; a request moves whole
    assert 0 < sum(transfers(driver.plans[at:])) and driver.scheduler.migration.num_moved > 0
    assert len(driver.live) == len(names)
    driver.finish()
    assert_unbroken(driver, since)
    return names


def spans_in_place(driver: Driver, cases: Cases) -> Sequence[str]:
    """A local request outgrows its rank, beside other decodes: no KV moves."""
    names = ("short 0", "short 1", "outgrows")
    since = start(driver, cases, names)
    driver.finish()
    assert_unbroken(driver, since)
    number = driver.answers["outgrows"][0].number
    assert modes_of(driver, number) == ["local", "tree"]
    assert not any(transfers(driver.plans))
    assert {"local", "tree"} in [{d.mode for d in plan.decodes} for plan in driver.plans]
    return names


def spans_no_more(driver: Driver, cases: Cases, how: str) -> Sequence[str]:
    """A request on two ranks is local again: one of them is drained, or rebalance finds room."""
    names = ("short 0", "short 1", "outgrows")
    since = start(driver, cases, names)
    (request,) = driver.answers["outgrows"]
    while request.table is None or request.table.width < 2:
        driver.step()
    source, other = dict.fromkeys(rank for rank, _ in request.table.homes)
    driver.steps(3)
    if how == "drain":
        driver.scheduler.drain(source)
    else:
        assert driver.scheduler.rebalance() >= request.table.num_blocks(source) > 0
    driver.steps(4)
    assert request.table.span == (other,), "all on the rank that it was on already"
    driver.finish()
    assert_unbroken(driver, since)
    assert modes_of(driver, request.number) == ["local", "tree", "local"]
    return names


def local_drain(driver: Driver, cases: Cases) -> Sequence[str]:
    """Where all must be local a request moves whole, in one step, with a prefix that others share
    as well as with a twin."""
    for rank in (1, 2):
        driver.scheduler.drain(rank)
    start(driver, cases, ["shared 0", "twins"])
    since = start(driver, cases, ["shared 1"])
    assert driver.answers["shared 1"][0].cached_tokens == PREFIX
    shared = [driver.answers[name][0].number for name in ("shared 0", "shared 1")]
    first = {driver.states[-1][number][0][0] for number in shared}
    assert len(first) == 1 and driver.allocator.references(first.pop()) == 2
    for rank in (1, 2):
        driver.scheduler.reopen(rank)
    at = len(driver.plans)
    driver.scheduler.drain(0)
    driver.steps(6)
    assert driver.scheduler.is_drained(0) and len(driver.live) == 3
    for number in (r.number for name in driver.live for r in driver.answers[name]):
        steps = {p.step for p in driver.plans[at:] for t in p.transfers if number in t.requests}
        assert len(steps) == 1, f"request {number} moved in steps {steps}"
    assert max(transfers(driver.plans[at:])) > MOVES_PER_STEP
    driver.scheduler.reopen(0)
    driver.steps(2)
    assert driver.scheduler.rebalance() > MOVES_PER_STEP, "of one request, which moves whole"
    driver.steps(4)
    assert driver.used[0] > MOVES_PER_STEP
    driver.add("short 0", cases["short 0"])
    driver.finish()
    assert_unbroken(driver, since)
    for states in driver.states:
        assert all(len({rank for rank, _ in homes}) == 1 for homes, _ in states.values())
    return ["shared 0", "twins", "shared 1", "short 0"]


def local_drain_without_room(driver: Driver, cases: Cases) -> Sequence[str]:
    """No rank has room for a whole request now: the youngest are preempted, and tokens stay the same."""
    names = ("long 0", "long 1", "shared 0", "short 0")
    start(driver, cases, names)
    driver.scheduler.drain(0)
    driver.steps(2)
    driver.finish()
    assert driver.scheduler.num_preemptions > 0 and driver.scheduler.is_drained(0)
    for states in driver.states:
        assert all(len({rank for rank, _ in homes}) <= 1 for homes, _ in states.values())
    return names


def drain_refused(driver: Driver, cases: Cases) -> Sequence[str]:
    """What the others cannot hold stays, and nothing has changed."""
    driver.add("short 0", cases["short 0"])
    driver.finish()  # leaves cached blocks
    since = start(driver, cases, ["large", "short 1"])
    scheduler, allocator = driver.scheduler, driver.allocator

    def state() -> tuple[object, ...]:
        homes = {r.number: list(r.table.homes) for r in scheduler.running if r.table}
        cached = [allocator.num_cached(rank) for rank in driver.ranks]
        reserved = [dict(r.reserved) for r in scheduler.running]
        return homes, driver.used, cached, reserved, set(scheduler.block_manager.closed)

    before = state()
    assert any(before[2]), "there is something to lose"
    need = cases["large"].tokens
    have = SIZE * sum(allocator.blocks_per_rank[1:])
    with pytest.raises(CapacityError) as caught:
        scheduler.drain(0)
    error = caught.value
    assert (error.need, error.have, error.largest) == (need, have, have) and need > have
    assert "large" in str(error) and str(need) in str(error) and str(have) in str(error)
    for rank in (-1, 3):
        with pytest.raises(RequestError, match=r"no context-parallel rank"):
            scheduler.drain(rank)
        with pytest.raises(RequestError, match=r"no context-parallel rank"):
            scheduler.reopen(rank)
    assert state() == before and not scheduler.migration.is_moving
    driver.finish()
    assert_unbroken(driver, since)
    assert not any(transfers(driver.plans))
    assert driver.add("large/again", cases["large"]), "rank 0 takes requests as before"
    driver.finish()
    return ["short 0", "large", "short 1", "large/again"]


def ends_in_flight(driver: Driver, cases: Cases) -> Sequence[str]:
    """End tokens that come while the step after is under way: it draws one token too many, which
    is dropped. Then the same again from the prefix cache, with aborts in between."""
    names = [f"ends {n}" for n in range(4)]
    for name in names:
        driver.add(name, cases[name])
    driver.finish()
    over = 0
    for name in names:
        for request in driver.answers[name]:
            assert request.output[-1] == EOS and request.finish_reason == "stop"
            assert len(request.output) == request.params.min_tokens + 1
            over += driver.num_planned(request.number) - len(request.output)
    assert over >= len(names), "steps were under way when the ends became known"
    for name in names:
        driver.add(f"{name}/again", cases[name])
    for n in range(6):
        driver.add(f"gone {n}", cases["long 0"])
    driver.step()
    for n in range(6):
        driver.abort(f"gone {n}")
        assert not driver.core.abort(f"gone {n}")
        driver.steps(n % 3)
        gone = driver.answers[f"gone {n}"][0]
        assert gone.finish_reason == "abort" and gone.table is None
    driver.finish()
    assert any(driver.answers[f"{name}/again"][0].cached_tokens for name in names)
    return [*names, *(f"{name}/again" for name in names)]


def chat(driver: Driver, cases: Cases, caching: bool, width: int) -> Sequence[str]:
    """Two turns of a chat on ``width`` ranks: the second finds the first."""

    def turn(name: str, salt: str = "") -> int:
        case = cases[name.partition("/")[0]]
        (request,) = driver.add(name, case, RequestOptions(cache_salt=salt))
        reported = []
        while name in driver.live:
            reported += [d.cached_tokens for d in driver.step() if d.cached_tokens is not None]
        driver.finish()
        assert reported == [request.cached_tokens or 0], "reported once"
        return reported[0]

    assert turn("turn 1") == 0
    assert len({rank for homes, _ in driver.states[-1].values() for rank, _ in homes}) == width
    first, second = cases["turn 1"], cases["turn 2"]
    # the last token of an answer is never computed, that of a prompt always, for its logits
    found = (len(first.prompt) + len(first.want[0][0]) - 1) // SIZE * SIZE
    again = (len(second.prompt) - 1) // SIZE * SIZE
    assert turn("turn 2") == (found if caching else 0)
    assert turn("turn 2/again") == (again if caching else 0)
    assert turn("turn 2/salted", "another key") == 0
    return ["turn 1", "turn 2", "turn 2/again", "turn 2/salted"]


def everything(world: World, cases: Cases) -> list[Seen]:
    spanning = {"context_parallel": {"local_threshold": 24}}
    local = {"context_parallel": {"mode": "local"}}
    found = []
    for placement in ("round_robin", "balanced"):
        config = {**spanning, "kv_cache": {"tokens_per_rank": 200, "placement": placement}}
        found.append(play(world, drain_under_decodes, cases, config))
        slow = {**config, "scheduler": {"max_num_batched_tokens": 8}}
        found.append(play(world, drain_under_prefill, cases, slow))
    found += [
        play(world, rebalance_under_decodes, cases, {"kv_cache": {"tokens_per_rank": 320}}),
        play(world, spans_in_place, cases, {"kv_cache": {"tokens_per_rank": [32, 60, 60]}}),
        play(world, spans_no_more, cases, {"kv_cache": {"tokens_per_rank": [32, 120, 40]}}, "drain"),
        play(world, spans_no_more, cases, {"kv_cache": {"tokens_per_rank": [32, 120, 40]}}, "gather"),
        play(world, local_drain, cases, {**local, "kv_cache": {"tokens_per_rank": 240}}),
        play(world, local_drain_without_room, cases,
             {**local, "kv_cache": {"tokens_per_rank": [128, 72, 72]}}),
        play(world, drain_refused, cases, {"kv_cache": {"tokens_per_rank": [100, 40, 32]}}),
    ]  # fmt: skip
    for mode in ({"mode": "auto"}, {"mode": "ring", "ring_pass": "q"}, {"mode": "tree"}):
        model = the_model(eos_token_id=EOS)
        kv = {"tokens_per_rank": 96, "placement": "round_robin"}
        config = {"context_parallel": mode, "kv_cache": kv}
        found.append(play(world, ends_in_flight, cases, config, model=model))
    ways = (
        ({"local_threshold": 4}, "round_robin", 120, 3),
        ({"mode": "ring"}, "balanced", 120, 3),
        ({"mode": "tree"}, "fill_then_spill", 36, 2),  # full after two
    )
    for (mode, placement, each, width), caching in itertools.product(ways, (True, False)):
        kv = {"tokens_per_rank": each, "placement": placement, "prefix_caching": caching}
        config = {"context_parallel": mode, "kv_cache": kv}
        found.append(play(world, chat, cases, config, caching, width))
    return found


def test_ranks_come_and_go(cases: Cases) -> None:
    results = run_ranks(everything, 3, cases, timeout=250)
    check(results)
    moved = {seen.scene.split()[0] for seen in results[0] if seen.moved_bytes}
    assert moved == {
        "drain_under_decodes", "drain_under_prefill", "rebalance_under_decodes", "spans_no_more",
        "local_drain", "local_drain_without_room",
    }  # fmt: skip


# --- copies of blocks, one by one

Copies = list[tuple[Home, Home]]
BLOCKS = 6  # of a rank


def copy_blocks(world: World, plans: list[Copies]) -> list[list[int]]:
    """Each block holds a number; what this rank's blocks hold after each plan."""
    kv = {"block_size": SIZE, "tokens_per_rank": SIZE * BLOCKS}
    worker = engine_on(world, the_model(), {"kv_cache": kv})._worker
    elements, found = worker.pool.block_elements, []
    for step, copies in enumerate(plans, 1):
        whole = torch.arange(BLOCKS, dtype=torch.float32) + 100 * world.rank
        worker.pool.put_blocks(range(BLOCKS), whole[:, None].expand(-1, elements))
        moves = tuple(Transfer((), 0, source, target) for source, target in copies)
        worker.run(StepPlan(step, transfers=moves))
        held = worker.pool.get_blocks(range(BLOCKS))
        assert torch.equal(held, held[:, :1].expand(-1, elements)), "blocks are copied whole"
        found.append([int(value) for value in held[:, 0]])
    return found


def test_copies_are_made_in_the_order_of_the_plan() -> None:
    """However they chain, cross, and overwrite each other's targets."""
    rng = random.Random(4)
    homes = [(rank, block) for rank in range(3) for block in range(BLOCKS)]
    plans: list[Copies] = [
        [(source, target) for source, target in (rng.sample(homes, 2) for _ in range(count))]
        for count in (1, 2, 3, 5, 8, 8, 13, 13, 20, 20, 40)
    ]
    results = run_ranks(copy_blocks, 3, plans)
    for n, copies in enumerate(plans):
        want = {(rank, block): block + 100 * rank for rank, block in homes}
        for source, target in copies:
            want[target] = want[source]
        assert {(r, b): results[r][n][b] for r, b in homes} == want, copies


# --- tensor parallel


def tokens_go_round(driver: Driver, cases: Cases) -> Sequence[str]:
    """Every fourth token is computed on another rank than the one that drew it."""
    names = ("long 0", "short 1", "short 0", "twins")
    since = start(driver, cases, names)
    driver.finish()
    assert_unbroken(driver, since)
    state = WorkerState(0, SIZE)
    handoffs = sum(len(state.apply(plan).handoffs) for plan in driver.plans)
    new = sum(len(tokens) for name in names for tokens, _ in cases[name].want)
    assert handoffs > new / SIZE / 2
    return names


def on_two_by_two(world: World, cases: Cases) -> list[Seen]:
    tp = {"tensor_parallel": {"tp_size": 2}}
    kv = {"tokens_per_rank": 240, "placement": "round_robin"}
    found = [
        play(world, tokens_go_round, cases, {**tp, "context_parallel": mode, "kv_cache": kv})
        for mode in ({"mode": "tree"}, {"mode": "ring", "ring_pass": "kv"})
    ]
    threshold = {"context_parallel": {"local_threshold": 24}}
    return [
        *found,
        play(world, drain_one_of_two, cases, {**tp, **threshold, "kv_cache": kv}),
    ]


def drain_one_of_two(driver: Driver, cases: Cases) -> Sequence[str]:
    names = ("long 0", "short 0", "short 1")
    since = start(driver, cases, names)
    assert all(driver.used)
    driver.scheduler.drain(0)
    driver.steps(6)
    assert driver.scheduler.is_drained(0) and len(driver.live) == len(names)
    driver.finish()
    assert_unbroken(driver, since)
    assert modes_of(driver, driver.answers["long 0"][0].number) == ["tree", "local"]
    return names


def test_tokens_go_round_under_tensor_parallel(cases: Cases) -> None:
    results = run_ranks(on_two_by_two, 4, cases, timeout=200)
    check(results)
    for scenes in zip(*results, strict=True):
        assert sum(seen.next_token for seen in scenes) > 0
    assert results[0][-1].moved_bytes > 0


# --- logits that are no numbers


HEALTHY = ("shared 0", "short 0", "shared 1")


def poisoned_prefix(driver: Driver, cases: Cases, broken: int, one_rank: bool) -> Sequence[str]:
    """Requests whose prompt makes NaN end with errors, whether they find blocks of one that has not
    ended yet or come later and compute anew; requests that share only the healthy beginning are not.
    """
    cases = dict(cases)

    def poison(name: str, length: int) -> None:
        prompt = (*cases["shared 0"].prompt[:PREFIX], broken, *tokens(11, 1), *tokens(length, 2))
        params = SamplingParams(temperature=0.0, max_tokens=12)
        driver.add(name, Case(prompt, params))

    for rank in driver.ranks[1:] if one_rank else ():
        driver.scheduler.drain(rank)
    driver.add("shared 0", cases["shared 0"])
    driver.add("short 0", cases["short 0"])
    driver.steps(3)
    poison("poison 1", 3)
    poison("poison 2", 4)
    driver.step()
    poison("poison 3", 5)  # while rank 0 does not know that the first are broken
    driver.add("shared 1", cases["shared 1"])
    driver.step()
    poison("poison 4", 6)
    names = [f"poison {n}" for n in range(1, 6)]
    while driver.live & set(names):
        driver.step()
    found = [driver.answers[name][0].cached_tokens or 0 for name in names[:4]]
    assert PREFIX < max(found), f"some shared blocks that are broken, not {found}"
    poison("poison 5", 7)
    driver.finish()
    late = driver.answers["poison 5"][0].cached_tokens or 0
    assert late <= PREFIX, f"{late} tokens, some of them broken, were found"
    assert [driver.said(name) for name in names] == [(((), "error"),)] * 5
    driver.add("shared 1/late", cases["shared 1"])
    driver.finish()
    return [*HEALTHY, "shared 1/late"]


def with_poison(world: World, cases: Cases, broken: int) -> list[Seen]:
    modes: tuple[dict[str, Any], ...] = (
        {"mode": "auto"}, {"mode": "local"}, {"local_threshold": 24}, {"mode": "tree"},
        {"mode": "ring", "ring_pass": "kv"}, {"mode": "ring", "ring_pass": "q"},
    )  # fmt: skip
    found = []
    for n, mode in enumerate(modes):
        kv = {"tokens_per_rank": 400, "placement": ("fill_then_spill", "round_robin")[n % 2]}
        config = {"context_parallel": mode, "kv_cache": kv}
        found.append(play(world, poisoned_prefix, cases, config, broken, n < 2, broken=broken))
    return found


def test_nan_does_not_poison_prefixes(cases: Cases) -> None:
    used = {t for name in HEALTHY for answer in cases[name].want for t in answer[0]}
    broken = next(token for token in range(TOKENS.stop, VOCAB) if token not in used)
    check(run_ranks(with_poison, 3, cases, broken, timeout=200))
