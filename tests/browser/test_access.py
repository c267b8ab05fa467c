"""Who uses the page: by keyboard, with a screen reader, on a phone, in the dark, without motion."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.browser.conftest import Site
from tests.browser.tools import AXE

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


def talk(site: Site) -> None:
    """A conversation, and a ring at work."""
    site.engine.pieces = ["Some `code`:\n```\n" + "x" * 200 + "\n```\n", "- one\n- two"]
    site.send("Show me some code, please")
    site.until("Done")
    base = site.job.picture()
    at_work = replace(
        base.requests[0], working=True, mode="ring", ring_pass="kv", ranks=(0, 1, 2, 3)
    )
    site.show(requests=(at_work, *base.requests[1:]))
    site.page.locator("#map .link").first.wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", [{}, PHONE], ids=["desk", "phone"])
def test_axe_finds_nothing(
    open_site: Callable[..., Site], scheme: str, device: dict[str, Any]
) -> None:
    if not AXE.is_file():
        pytest.skip("axe-core is not here; make browser fetches it by npm")
    site = open_site({"bypass_csp": True, "color_scheme": scheme, **device})
    axe = AXE.read_text("utf-8")

    def violations() -> list[Any]:
        site.page.evaluate(axe)
        tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
        found = site.page.evaluate("tags => axe.run({runOnly: {type: 'tag', values: tags}})", tags)
        assert len(found["passes"]) > 20
        return [(v["id"], [n["html"] for n in v["nodes"]]) for v in found["violations"]]

    assert violations() == []
    talk(site)
    for summary in site.page.locator("summary").all():
        summary.click()
    site.page.get_by_label("Add a text file").set_input_files(
        {"name": "a.txt", "mimeType": "text/plain", "buffer": b"text"}
    )
    site.page.evaluate("document.querySelector('#key-form').hidden = false")
    assert violations() == []


def test_it_works_without_a_mouse(site: Site) -> None:
    page = site.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the message field"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("again")
    page.keyboard.press("Enter")
    site.until("Done")
    assert "<|user|>Hello\nagain<|end|>" in site.engine.prompt()
    order = []
    page.goto(site.served.url + "/")
    site.until("fake-model", "#model")
    for _ in range(40):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.localName"))
    reached = ["new", "log", "prompt", "send", "file"]
    places = [order.index(name) for name in reached]
    assert places == sorted(places), "the order of the keyboard is that of the page"
    outline = "getComputedStyle(document.querySelector('#prompt')).outlineStyle"
    page.get_by_label("Message").focus()
    assert page.evaluate(outline) != "none"


def test_live_regions_do_not_chatter(site: Site) -> None:
    """A long answer and a picture that changes all the time are a few announcements."""
    page = site.page
    page.evaluate(
        """() => {
          window.said = [];
          const regions = '[role=status], [role=alert], [aria-live]';
          for (const node of document.querySelectorAll(regions)) {
            if (node.getAttribute('aria-live') === 'off') continue;
            new MutationObserver(() => window.said.push(node.textContent))
              .observe(node, {childList: true, characterData: true, subtree: true});
          }
        }"""
    )
    site.engine.pieces = [f"word{i} " for i in range(60)]
    site.engine.between_s = 0.02
    site.send("Talk")
    for number in range(6):
        site.show(num_running=number)
        page.wait_for_timeout(150)
    site.until("Done")
    said = page.evaluate("window.said")
    assert len(said) == 2 and said[0] == "Answering" and said[1].startswith("Done: 60 tokens")
    assert page.locator("#log").get_attribute("aria-live") == "off"


def test_landmarks_and_names(site: Site) -> None:
    page = site.page
    for role in ("banner", "main", "contentinfo"):
        assert page.get_by_role(role).count() == 1
    for name in ("Chat", "Live picture"):
        assert page.get_by_role("region", name=name, exact=True).count() == 1
    assert page.get_by_role("log", name="Conversation").count() == 1
    picture = page.get_by_role("img", name="KV blocks of 4 ranks on 2 hosts")
    assert picture.count() == 1
    assert page.locator("html").get_attribute("lang") == "en"


def test_a_phone_is_wide_enough(open_site: Callable[..., Site]) -> None:
    site = open_site(PHONE)
    talk(site)
    for summary in site.page.locator("summary").all():
        summary.click()
    wide = site.page.evaluate(
        """() => [...document.querySelectorAll('body *')].filter((node) =>
          node.getBoundingClientRect().right > innerWidth + 1
          && !node.closest('.scroll, pre, .skip, defs'))
          .map((node) => node.outerHTML.slice(0, 80))"""
    )
    assert wide == []
    assert site.page.evaluate("document.documentElement.scrollWidth") <= 360
    button = site.page.get_by_role("button", name="Send").bounding_box()
    assert button["height"] >= 40


def test_light_and_dark(open_site: Callable[..., Site]) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    seen = {
        scheme: open_site({"color_scheme": scheme}).page.evaluate(colour)
        for scheme in ("light", "dark")
    }
    assert len(set(seen.values())) == 2, json.dumps(seen)


def test_motion_is_left_out_on_request(open_site: Callable[..., Site]) -> None:
    names = {}
    for wish in ("no-preference", "reduce"):
        site = open_site({"reduced_motion": wish})
        talk(site)
        link = site.page.locator("#map .link").first
        names[wish] = link.evaluate("link => getComputedStyle(link).animationName")
    assert names == {"no-preference": "flow", "reduce": "none"}


def test_the_policy_is_kept(site: Site) -> None:
    """Script and style that a mistake would let in are refused by the browser itself."""
    site.expected += ["Content Security Policy", "TrustedHTML", "Trusted"]
    tried = site.page.evaluate(
        """() => {
          const refused = [];
          try { document.body.insertAdjacentHTML("beforeend", "<b>x</b>"); }
          catch { refused.push("markup"); }
          const script = document.createElement("script");
          try { script.textContent = "window.hit = 1"; document.body.append(script); }
          catch { refused.push("script"); }
          return [refused.includes("markup"), window.hit === undefined];
        }"""
    )
    assert tried == [True, True]
    blocked = site.page.evaluate(
        "fetch('https://example.org/').then(() => 'sent', () => 'refused')"
    )
    assert blocked == "refused"
    site.strangers.clear()  # it was refused before it was sent
