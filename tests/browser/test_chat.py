"""The chat: streams, stops, takes files, shows what went wrong, and takes text for text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ds_cp.errors import CapacityError
from tests.browser.conftest import Site
from tests.server.conftest import wait_for


def test_an_answer_streams(site: Site) -> None:
    site.engine.pieces = ["One", " two", " three"]
    site.engine.between_s = 0.3
    site.send("Count")
    site.until("One", ".message.assistant")
    assert site.page.get_by_role("button", name="Stop").is_visible()
    site.until("Done: 3 tokens")
    answer = site.page.locator(".message.assistant")
    assert answer.locator("p").inner_text() == "One two three"
    assert site.page.get_by_role("button", name="Stop").is_hidden()
    assert site.page.locator("#progress").is_hidden()
    assert "<|user|>Count<|end|>" in site.engine.prompt()


def test_the_conversation_goes_on_and_begins_anew(site: Site) -> None:
    for text in ("first", "second"):
        site.send(text)
        site.until("Done")
        site.page.wait_for_function("document.querySelector('#send').disabled === false")
    assert (
        "<|user|>first<|end|><|assistant|>Hello there.<|end|><|user|>second<|end|>"
        in site.engine.prompt()
    )
    site.page.get_by_role("button", name="New chat").click()
    assert site.page.locator(".message").count() == 0
    site.send("third")
    site.until("Done")
    assert "first" not in site.engine.prompt()


def test_settings_are_sent(site: Site) -> None:
    page = site.page
    page.get_by_text("Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    for label, value in (
        ("Temperature", "0.5"), ("Top p", "0.9"), ("Longest answer, tokens", "7"), ("Seed", "42"),
    ):  # fmt: skip
        page.get_by_label(label).fill(value)
    site.send("Hi")
    site.until("Done")
    params = site.engine.params()
    assert (params.temperature, params.top_p, params.max_tokens, params.seed) == (0.5, 0.9, 7, 42)
    assert "<|system|>Be brief.<|end|>" in site.engine.prompt()


def test_the_stop_button_and_escape_stop(site: Site) -> None:
    site.engine.pieces = [f"w{i} " for i in range(1000)]
    site.engine.between_s = 0.02
    for i, stop in enumerate((
        lambda: site.page.get_by_role("button", name="Stop").click(),
        lambda: site.page.keyboard.press("Escape"),
    )):  # fmt: skip
        site.send("Go on")
        site.until("w5", f".message.assistant >> nth={i}")
        stop()
        site.until("Stopped: ")
        assert wait_for(lambda i=i: len(site.engine.aborted) == i + 1), "the server was told"
    assert site.page.get_by_text("Stopped.", exact=True).count() == 2
    assert "w5" in site.page.locator(".message.assistant").first.inner_text(), "what came is kept"


def test_an_answer_is_text_and_nothing_else(site: Site) -> None:
    site.engine.pieces = [
        "<img src=x onerror='window.hit=1'>", "<script>window.hit=1</script>",
        "\n\n[here](javascript:window.hit=1) `<b>code</b>` **<i>bold</i>**",
        "\n```html\n<iframe src='//example.org'></iframe>\n```",
    ]  # fmt: skip
    site.send("<img src=y onerror='window.hit=1'>")
    site.until("Done")
    log = site.page.locator("#log")
    assert log.locator("img, script, iframe, a, b, i").count() == 0
    assert "<img src=x onerror='window.hit=1'><script>" in log.inner_text()
    assert "<img src=y" in log.locator(".user").inner_text()
    assert log.locator("code").first.inner_text() == "<b>code</b>"
    assert site.page.evaluate("window.hit") is None


def test_markdown_is_drawn(site: Site) -> None:
    site.engine.pieces = [
        "# Title\n\nSome **bold** and *slanted* text, `x = 1`.\n\n- one\n- two\n\n",
        "3. third\n4. fourth\n\n```py\nprint(1)\n\nprint(2)\n```\nThe end",
    ]
    site.send("Hi")
    site.until("Done")
    body = site.page.locator(".message.assistant .body")
    assert body.locator("ul li").all_inner_texts() == ["one", "two"]
    assert body.locator("ol").get_attribute("start") == "3"
    assert body.locator("pre code").inner_text() == "print(1)\n\nprint(2)"
    assert body.locator("strong").all_inner_texts() == ["Title", "bold"]
    assert body.locator("em").inner_text() == "slanted"


def text_file(name: str, text: bytes) -> dict[str, Any]:
    return {"name": name, "mimeType": "text/plain", "buffer": text}


def test_a_chosen_file_becomes_the_prompt(site: Site) -> None:
    chooser = site.page.get_by_label("Add a text file")
    book = "Call me Ishmael. " * 200
    chooser.set_input_files([text_file("book<b>.txt", book.encode()), text_file("b.txt", b"bee")])
    site.until("b.txt", "#files")
    site.page.get_by_role("button", name="Remove b.txt").click()
    assert site.page.locator("#files li").all_inner_texts() == ["book<b>.txt, 3.4 kB×"]
    site.send("Who speaks?")
    site.until("Done")
    prompt = site.engine.prompt()
    assert f"<|user|>{book}\n\nWho speaks?<|end|>" in prompt and "bee" not in prompt
    assert "File book<b>.txt, 3.4 kB" in site.page.locator(".message.user").inner_text()
    assert site.page.locator("#files li").count() == 0


def test_a_dropped_file_alone_is_a_message(site: Site) -> None:
    site.page.evaluate(
        """() => {
          const data = new DataTransfer();
          data.items.add(new File(["dropped text"], "note.md"));
          const at = document.querySelector("#log");
          for (const kind of ["dragover", "drop"]) {
            const about = {dataTransfer: data, bubbles: true, cancelable: true};
            at.dispatchEvent(new DragEvent(kind, about));
          }
        }"""
    )
    site.until("note.md", "#files")
    site.page.get_by_role("button", name="Send").click()
    site.until("Done")
    assert "<|user|>dropped text<|end|>" in site.engine.prompt()


def test_a_file_that_is_not_text_is_refused(site: Site) -> None:
    chooser = site.page.get_by_label("Add a text file")
    for name, content, why in (
        ("a.png", b"\x89PNG\xff\xfe", "not text in UTF-8"),
        ("b.bin", b"ab\x00cd", "not a text file"),
        ("c.txt", b"  \n", "is empty"),
    ):
        chooser.set_input_files(text_file(name, content))
        site.until(f"{name} {why}" if why.startswith("is ") else f"{name} is {why}")
    assert site.page.locator("#files li").count() == 0


def test_the_prompt_has_a_progress_bar(site: Site) -> None:
    site.engine.go = False
    site.send("A long one")
    bar = site.page.locator("#bar")
    site.until("Waiting for the first token", "#progress-text")
    assert bar.get_attribute("value") is None
    assert wait_for(lambda: bool(site.engine.ids))
    mine = replace(
        site.job.picture().requests[0], id=site.engine.ids[0], phase="waiting", number=99
    )
    others = site.job.picture().requests
    site.show(requests=(*others, replace(mine, number=98, id="x"), mine))
    site.until("Waiting in the queue, 1 ahead", "#progress-text")
    mine = replace(mine, phase="prefill", computed=30, to_compute=120)
    site.show(requests=(*others, mine))
    site.until("Reading the prompt: 30 of 120 tokens", "#progress-text")
    assert bar.get_attribute("value") == "0.25"
    assert bar.evaluate("bar => bar.labels[0].textContent").startswith("Reading the prompt")
    site.engine.go = True
    site.until("Done")
    assert bar.is_hidden()


def test_what_went_wrong_is_said_and_the_message_kept(site: Site) -> None:
    site.expected.append("400")
    site.engine.refuse = CapacityError(
        "the request needs KV for 9000 tokens, but all ranks together hold 64",
        need=9000, have=64, largest=64,
    )  # fmt: skip
    site.send("Too long")
    alert = site.page.get_by_role("alert")
    alert.wait_for()
    assert "needs KV for 9000 tokens" in alert.inner_text()
    assert site.page.get_by_label("Message").input_value() == "Too long"
    site.engine.refuse = None
    site.page.get_by_role("button", name="Send").click()
    site.until("Done")
    assert site.engine.prompt().count("Too long") == 1, "the failed turn is not sent again"


def test_the_key_is_asked_for_and_kept_in_memory(open_site: Callable[..., Site]) -> None:
    site = open_site(ready=False, api_key=("sesame",))
    site.expected.append("401")
    page = site.page
    key = page.get_by_label("API key")
    key.wait_for()
    assert page.evaluate("document.activeElement.id") == "key"
    key.fill("wrong")
    page.get_by_role("button", name="Use key").click()
    site.until("refused this API key", "#key-text")
    key.fill("sesame")
    page.keyboard.press("Enter")
    site.until("fake-model", "#model")
    assert key.is_hidden() and page.locator("#key").input_value() == ""
    site.send("Hi")
    site.until("Done")
    kept = "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])"
    assert "sesame" not in page.evaluate(kept) + page.content()
