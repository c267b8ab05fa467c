"""The live picture: ranks by host, cells by request, ring and tree at work, figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ds_cp.engine.picture import MAX_CELLS, RankPicture
from tests.browser.conftest import Site
from tests.server.conftest import wait_for


def test_ranks_are_grouped_by_host_and_blocks_coloured_by_request(site: Site) -> None:
    page = site.page
    assert page.locator("#map .host").count() == 2
    texts = page.locator("#map text").all_text_contents()
    assert {"host alpha", "host beta", "rank 0", "rank 3"} <= set(texts)
    assert page.locator("#map .cell").count() == 4 * 12
    picture = site.job.picture()
    for place, request in enumerate(picture.requests):
        cells = sum(n for rank in picture.ranks for what, n in rank.cells if what == place)
        fill = f'#map .cell[fill="url(#slot{request.number % 8})"]:not(.reserved)'
        assert page.locator(fill).count() == cells > 0
    assert page.locator("#map .tag", has_text="A").count() > 0, "a letter beside the colour"
    legend = page.locator("#legend").inner_text()
    assert "request A" in legend and "free" in legend and "one block of 4 tokens" in legend


def test_requests_have_mode_reason_span_and_progress(site: Site) -> None:
    row = site.page.locator("#requests tbody tr").first
    long = site.job.picture().requests[0]
    text = row.inner_text()
    assert long.why in text and "0-2" in text and long.mode is not None and long.mode in text
    if long.phase == "prefill":
        assert row.locator("progress").get_attribute("aria-label") == "prompt of request A"
    ranks = site.page.locator("#ranks tbody tr")
    site.page.get_by_text("Ranks as a table").click()
    assert ranks.count() == 4 and "alpha" in ranks.first.inner_text()


def test_ring_and_tree_are_drawn_while_they_work(site: Site) -> None:
    page, job = site.page, site.job
    base = job.picture()
    long = base.requests[0]

    def show(**changes: Any) -> None:
        site.show(requests=(replace(long, **changes), *base.requests[1:]))

    show(working=True, mode="ring", ring_pass="kv", ranks=(0, 1, 2, 3))
    page.locator("#map .ring").wait_for()
    assert page.locator("#map .ring .link").count() == 4, "each rank sends to the next"
    assert page.locator("#map .ring").text_content() == "A ring, KV"
    assert page.locator("#map .rank.working").count() == 4
    show(working=True, mode="tree", ranks=(0, 1, 2, 3))
    page.locator("#map .tree").wait_for()
    assert page.locator("#map .tree .link").count() == 3, "each but the root sends up"
    assert page.locator("#map .ring").count() == 0
    show(working=False)
    page.locator("#map .tree").wait_for(state="detached")
    assert page.locator("#map .rank.working").count() == 0


def test_it_follows_the_engine(site: Site) -> None:
    page = site.page
    site.show(num_running=31)
    site.until("31", "#figures dd")
    site.job.cluster.settle()
    site.show()
    site.until("No request runs or waits.", "#requests")
    assert page.locator("#map .cell.cached").count() > 0 and page.locator("#map .tag").count() == 0
    page.get_by_text("Answers that ended last").click()
    assert page.locator("#recent tbody tr").count() == 2
    figures = page.locator("#figures").inner_text()
    assert "TTFT" in figures and "New tokens/s" in figures and "Sent by rank 0" in figures
    site.engine.state = "stalled"
    site.until("stalled", "#state")


def test_a_large_job_is_drawn_in_bounds(site: Site) -> None:
    count = 64
    cells = tuple((i % 3 - 2, 1) for i in range(128))
    ranks = tuple(
        RankPicture(r, f"node{r // 8}", "open", 900, 50, 10**6, 7812.5, cells) for r in range(count)
    )
    site.show(ranks=ranks, num_ranks=count, ring_order=tuple(range(count)))
    site.page.locator("#map .host").nth(7).wait_for()
    assert site.page.locator("#map .cell").count() == 64 * 128 <= MAX_CELLS
    assert "about 7,813 blocks" in site.page.locator("#legend").inner_text()
    begun = time.monotonic()
    site.show(ranks=ranks, num_ranks=count, num_running=55)
    site.until("55", "#figures dd")
    assert time.monotonic() - begun < 20


def test_nothing_is_asked_while_nobody_looks(site: Site) -> None:
    hide = """hidden => {
      Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    site.page.evaluate(hide, True)

    def still() -> bool:
        before = site.engine.looks
        time.sleep(1.5)
        return site.engine.looks == before

    assert wait_for(still)
    looks = site.engine.looks
    site.page.evaluate(hide, False)
    assert wait_for(lambda: site.engine.looks > looks + 1)


def test_a_lost_server_is_said_and_found_again(
    open_site: Callable[..., Site], launch: Callable[..., Any]
) -> None:
    site = open_site()
    site.expected += ["ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE", "ERR_", "503"]
    site.served.stop()
    site.until("The connection was lost; trying again.", "#feed")
    assert site.page.locator("#state").inner_text() == "unreachable"
    site.served.thread.join(60)
    launch(site.engine, port=site.served.port)
    site.until("ready", "#state")
    assert site.page.locator("#feed").inner_text() == ""
