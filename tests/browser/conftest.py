"""A browser, and the page in it over a scripted engine. Every test also checks that the page made
no error, broke no rule of its policy, and asked nobody but its server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.browser.scripted import Scripted
from tests.browser.tools import chromium, missing
from tests.helpers.pictures import PicturedJob
from tests.server.conftest import Running, launch, stopped, tokenizer

__all__ = ["launch", "stopped", "tokenizer"]  # fixtures
WAIT_MS = 8000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = missing()
    for item in items:
        if why and "browser" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    root = os.geteuid() == 0  # Chromium's sandbox refuses root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox"] if root else []
        )
        yield browser
        browser.close()


@dataclass
class Site:
    """The page as a visitor has it. ``expected``: parts of errors that a test means to cause."""

    page: Any
    served: Running
    engine: Scripted
    job: PicturedJob
    errors: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)

    def show(self, **changes: Any) -> None:
        """Let the engine show the job as it is now."""
        from dataclasses import replace

        self.engine.shown = replace(self.job.picture(), **changes)

    def send(self, text: str) -> None:
        """Type and send a message."""
        self.page.get_by_label("Message").fill(text)
        self.page.get_by_role("button", name="Send").click()

    def until(self, text: str, where: str = "#status") -> None:
        """Wait for a text."""
        self.page.locator(where).filter(has_text=text).first.wait_for(timeout=WAIT_MS)

    def unexpected(self) -> list[str]:
        return [e for e in self.errors if not any(part in e for part in self.expected)]


@pytest.fixture
def open_site(
    browser: Any, launch: Callable[..., Running], tokenizer: Any
) -> Iterator[Callable[..., Site]]:
    """``open_site(context={...}, **server settings)`` opens the page."""
    sites: list[Site] = []

    def start(context: dict[str, Any] | None = None, ready: bool = True, **server: Any) -> Site:
        engine, job = Scripted(tokenizer), PicturedJob()
        job.add(100)
        job.add(6)
        job.step(3)
        engine.shown = job.picture()
        served = launch(engine, drain_timeout_s=0.2, **server)
        page = browser.new_context(**(context or {})).new_page()
        page.set_default_timeout(WAIT_MS)
        site = Site(page, served, engine, job)
        page.on("pageerror", lambda error: site.errors.append(str(error)))
        page.on("console", lambda said: said.type == "error" and site.errors.append(said.text))
        page.on(
            "request",
            lambda asked: asked.url.startswith(served.url) or site.strangers.append(asked.url),
        )
        sites.append(site)
        page.goto(served.url + "/")
        if ready:
            site.until("fake-model", "#model")
            page.locator("#map .cell").first.wait_for()
        return site

    yield start
    for site in sites:
        site.page.context.close()
        assert site.unexpected() == [] and site.strangers == []


@pytest.fixture
def site(open_site: Callable[..., Site]) -> Site:
    """The page with the default settings."""
    return open_site()
