"""Pictures of the page of a running server: ``python -m tests.browser.screenshots URL FOLDER``.

It asks the server about a long document beside short questions, and takes its pictures while the
answers are made: a desk in light and dark, and a phone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from tests.browser.tools import chromium, missing

DOCUMENT = Path(__file__).resolve().parents[2] / "LICENSE"
CHARACTERS = 5000  # of the document
VIEWS: dict[str, dict[str, Any]] = {
    "page-light": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "page-dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "page-phone": {"viewport": {"width": 360, "height": 740}, "color_scheme": "light"},
}
WAIT_MS = 60_000


def take(browser: Any, url: str, name: str, context: dict[str, Any], folder: Path) -> None:
    """One picture: a document as the prompt, and other requests beside it."""
    page = browser.new_page(**context)
    page.set_default_timeout(WAIT_MS)
    page.goto(url)
    page.locator("#map .cell").first.wait_for()
    page.evaluate(
        """() => ["What is a prime number?", "Name three rivers."].forEach((content) =>
          fetch("/v1/chat/completions", {
            method: "POST", headers: {"Content-Type": "application/json"},
            body: JSON.stringify({messages: [{role: "user", content}], max_tokens: 300}),
          }))"""
    )
    text = DOCUMENT.read_text("utf-8")[:CHARACTERS]
    text = f"A copy for {name}.\n{text}"  # none of it is in the prefix cache
    page.get_by_label("Add a text file").set_input_files(
        {"name": DOCUMENT.name, "mimeType": "text/plain", "buffer": text.encode()}
    )
    page.get_by_label("Message").fill("What does this document allow?")
    page.get_by_role("button", name="Send").click()
    page.locator("#requests progress").first.wait_for()
    page.wait_for_timeout(1500)
    page.screenshot(path=folder / f"{name}-prefill.png")
    page.locator(".message.assistant .body p").first.wait_for()
    page.wait_for_timeout(1500)
    page.screenshot(path=folder / f"{name}.png")
    page.keyboard.press("Escape")
    page.close()


def main(url: str, folder: str) -> int:
    """The exit code."""
    if why := missing():
        print(f"no pictures were taken: {why}", file=sys.stderr)
        return 1
    from playwright.sync_api import sync_playwright

    Path(folder).mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # the sandbox refuses root
        browser = playwright.chromium.launch(executable_path=chromium(), args=arguments)
        for name, context in VIEWS.items():
            take(browser, url, name, context, Path(folder))
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
