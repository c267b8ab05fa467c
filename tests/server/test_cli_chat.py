"""``ds-cp chat`` as a user has it: at a terminal and through pipes, against the application over
the fake engine, and against a server that says what the real one never does."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ds_cp.cli import main as cli
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.pictures import PicturedJob
from tests.helpers.scripted import Scripted, scripted
from tests.helpers.terminal import Terminal, variables
from tests.server.conftest import Running, answer_text, wait_for

CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: Any) -> None:
    for name in ("RANK", "WORLD_SIZE", *variables()):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def there() -> Iterator[Scripted]:
    with scripted() as server:
        yield server


@pytest.fixture
def piped(monkeypatch: Any, capfd: Any) -> Callable[..., tuple[int, str, str]]:
    """``piped(text, *argv)``: ds-cp chat with ``text`` on stdin; code, stdout and stderr."""

    def run(text: str | bytes, *argv: str) -> tuple[int, str, str]:
        data = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        code = cli.main(["chat", *argv])
        return (code, *capfd.readouterr())

    return run


def prompt_of(engine: FakeEngine, *messages: tuple[str, str]) -> list[int]:
    """The tokens of a conversation, as the fake model's template writes it."""
    text = "".join(f"<|{role}|>{content}<|end|>" for role, content in messages)
    ids: list[int] = engine.tokenizer(text + "<|assistant|>")["input_ids"]
    return ids


# --- pipes


def test_a_pipe_is_one_question(served: Running, piped: Any) -> None:
    url = ("--url", served.url)
    code, out, err = piped("one\ntwo\n", *url, "--max-tokens", "5")
    prompt = prompt_of(served.engine, ("user", "one\ntwo"))
    assert (code, err) == (0, "")
    assert out.rstrip("\n") == answer_text(served.engine, prompt, 5).rstrip("\n")
    code, out, _ = piped("the text", "count it", *url, "--system", "be brief", "--max-tokens", "3")
    wanted = prompt_of(served.engine, ("system", "be brief"), ("user", "count it\n\nthe text"))
    assert code == 0 and served.engine.seen[-1][0] == wanted


def test_settings_go_with_the_request(served: Running, piped: Any) -> None:
    flags = "--temperature 0.5 --top-p 0.9 --top-k 5 --min-p 0.1 --seed 3 --max-tokens 4"
    more = "--presence-penalty 1 --frequency-penalty -1 --repetition-penalty 1.5"
    argv = [*flags.split(), *more.split(), "--stop", "'x y' z"]
    assert piped("hi", "--url", served.url + "/v1", *argv)[0] == 0
    [(_, params)] = served.engine.seen
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 5, 0.1)
    assert (params.seed, params.max_tokens, params.stop) == (3, 4, ("x y", "z"))
    assert (params.presence_penalty, params.frequency_penalty) == (1.0, -1.0)
    assert params.repetition_penalty == 1.5


def test_json_has_the_answer_exactly(served: Running, piped: Any) -> None:
    code, out, err = piped("hi", "--url", served.url, "--json", "--max-tokens", "6")
    prompt = prompt_of(served.engine, ("user", "hi"))
    assert (code, err, out.count("\n")) == (0, "", 1)
    found = json.loads(out)
    assert found["content"] == answer_text(served.engine, prompt, 6)
    assert (found["prompt_tokens"], found["completion_tokens"]) == (len(prompt), 6)
    assert found["finish_reason"] == "length" and found["stopped"] is False
    assert 0 < found["ttft_s"] <= found["seconds"]


def test_lines_of_a_pipe_are_a_conversation(served: Running, piped: Any, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    book = tmp_path / "my book.txt"
    book.write_text("a book")
    lines = f"""one
/set max_tokens 2
two
/undo
/retry
/system be brief
/file "{book}" what?
/save {file}
/clear
//slash
/exit
never asked
"""
    url = ("--url", served.url)
    code, out, err = piped(lines, *url, "--lines", "--json", "--max-tokens", "3")
    assert code == 0, err
    answers = [json.loads(line)["content"] for line in out.splitlines()]
    engine = served.engine
    one = answer_text(engine, prompt_of(engine, ("user", "one")), 3)
    assert answers[0] == one and len(answers) == 5
    two = prompt_of(engine, ("user", "one"), ("assistant", one), ("user", "two"))
    asked = [prompt for prompt, _ in engine.seen]
    assert asked[1] == two and [p.max_tokens for _, p in engine.seen] == [3, 2, 2, 2, 2]
    assert asked[2] == asked[0]  # /undo forgot the second, and /retry asks the first again
    again = answer_text(engine, asked[0], 2)
    turns = (("system", "be brief"), ("user", "one"), ("assistant", again))
    assert asked[3] == prompt_of(engine, *turns, ("user", "a book\n\nwhat?"))
    assert asked[4] == prompt_of(engine, ("system", "be brief"), ("user", "/slash"))
    assert "settings: max_tokens 2" in err and "forgotten: two" in err
    saved = json.loads(file.read_text())
    assert saved["messages"][-1] == {"role": "assistant", "content": answers[3]}
    code, out, err = piped("and then?", *url, "--load", str(file))
    assert code == 0 and len(engine.seen[-1][0]) > len(asked[3])
    assert engine.seen[-1][1].max_tokens == 2  # as it was set


@pytest.mark.parametrize(
    ("text", "argv", "code", "part"),
    [
        ("", [], 2, "there is no question"), (" \n", [], 0, ""),
        (b"\xff", [], 2, "stdin is not UTF-8 text: wrong byte at 0"),
        ("x", ["--temperature", "9"], 2, "temperature is 9"),
        ("x", ["--max-tokens", "x"], 2, "max_tokens is x; it must be an integer"),
        ("x", ["--load", "none.json"], 2, "cannot read none.json"),
        ("x", ["--timeout", "0"], 2, "--timeout is 0"),
        ("x", ["--model", "other"], 2, "HTTP 404: "),
        ("/nothing", ["--lines"], 2, "no command /nothing; the nearest one is"),
        ("/retry", ["--lines"], 2, "no question to ask again"),
        ("/undo", ["--lines"], 2, "no question to forget"),
        ("/file", ["--lines"], 2, "/file needs the path"), ("/save", ["--lines"], 2, "/save needs"),
        ("/file none.txt", ["--lines"], 2, "cannot read none.txt"),
        ("/load setup.py", ["--lines"], 2, "setup.py holds no conversation"),
        ("/set tempratur 1", ["--lines"], 2, "nearest one is temperature"),
        ("/save setup.py", ["--lines"], 2, "setup.py is there already"),
        ("x" * 5000, [], 2, "HTTP 400: "),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    served: Running, piped: Any, text: Any, argv: list[str], code: int, part: str
) -> None:
    found, out, err = piped(text, "--url", served.url, *argv)
    assert (found, err.count("\n")) == (code, 1 if code else 0)
    assert part in err
    assert not code or (out == "" and err.startswith("ds_cp: error: "))


def test_keys(launch: Any, piped: Any, monkeypatch: Any) -> None:
    server = launch(api_key=("right",))
    code, _, err = piped("x", "--url", server.url)
    assert code == 2 and "HTTP 401" in err and "--api-key" in err
    assert piped("x", "--url", server.url, "--api-key", "right", "--max-tokens", "1")[0] == 0
    monkeypatch.setenv("DS_CP_CHAT_API_KEY", "right")
    monkeypatch.setenv("DS_CP_CHAT_URL", server.url)
    monkeypatch.setenv("DS_CP_CHAT_MAX_TOKENS", "2")
    assert piped("x")[0] == 0 and server.engine.seen[-1][1].max_tokens == 2
    assert piped("x", "--api-key", "wrong")[0] == 2


def test_escape_codes_are_text(there: Scripted, piped: Any) -> None:
    evil = "a\x1b[2J\x1b]0;title\x07\x9bb\r\nc\u202e"
    there.answers[CHAT] = lambda h, _: h.chat(evil, reason="st\x1b[0mop")
    code, out, err = piped("x", "--url", there.url)
    assert code == 0 and out == "a\u241b[2J\u241b]0;title\u2407\ufffdb\nc\ufffd\n"
    code, out, _ = piped("x", "--url", there.url, "--json")
    assert json.loads(out)["content"] == evil and out.isascii() and "\x1b" not in out
    there.answers[CHAT] = lambda h, _: h.reply({"error": {"message": "\x1b[31mno"}}, 500)
    code, _, err = piped("x", "--url", there.url)
    assert code == 1 and "\x1b" not in err and "[31mno" in err


def test_an_answer_that_breaks_off_is_code_1(there: Scripted, piped: Any) -> None:
    def answer(h: Any, body: Any) -> None:
        h.begin()
        h.event({"id": "1", "choices": [{"delta": {"content": "half"}}]})

    there.answers[CHAT] = answer
    code, out, err = piped("x", "--url", there.url)
    assert (code, out) == (1, "half\n") and "broke off its answer" in err


# --- at a terminal


def test_a_conversation_at_a_terminal(served: Running, tmp_path: Path) -> None:
    engine = served.engine
    with Terminal("chat", "--url", served.url, "--max-tokens", "4") as terminal:
        assert f"fake-model, 128 tokens, at {served.url}" in terminal.until("Ctrl-D leaves")
        terminal.until("> ")
        terminal.line("/help")
        text = terminal.until("settings:")
        for name in ("help", "system", "set", "file", "retry", "undo", "clear", "save", "load",
                     "exit"):  # fmt: skip
            assert f"  /{name}" in text
        terminal.until("> ")
        terminal.line("hello")
        terminal.until("(length, prompt ")
        terminal.until("answer 4 tokens")
        terminal.until("> ")
        assert engine.seen[-1][0] == prompt_of(engine, ("user", "hello"))
        terminal.line('"""two')
        terminal.until("... ")
        terminal.line('lines"""')
        terminal.until("answer 4 tokens")
        terminal.until("> ")
        assert engine.tokenizer.decode(engine.seen[-1][0]).count("two\nlines") == 1
        terminal.line("/frobnicate")
        terminal.until("no command /frobnicate")
        terminal.until("> ")
        terminal.line("/set temperature 7")
        terminal.until("temperature is 7")
        terminal.until("> ")
        terminal.send("/sy\t")  # completed
        terminal.line("be brief")
        terminal.until("system prompt: be brief")
        terminal.until("> ")
        terminal.line("/exit")
        assert terminal.ends() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(served: Running, monkeypatch: Any) -> None:
    engine = served.engine
    engine.delay_s = 0.25  # 25 s for all tokens: it does not end by itself
    made = engine._delta
    monkeypatch.setattr(engine, "_delta", lambda *about: replace(made(*about), text="tick "))
    with Terminal("chat", "--url", served.url, "--max-tokens", "100") as terminal:
        terminal.until("> ")
        terminal.line("count")
        terminal.until("tick tick ")
        terminal.send("\x03")
        terminal.until("(stopped")
        terminal.until("> ")
        assert wait_for(lambda: not engine.live and bool(engine.aborted), 30)
        engine.delay_s = 0.0
        terminal.line("/set max_tokens 2")
        terminal.until("> ")
        terminal.line("go on")
        terminal.until("(length")
        terminal.until("> ")
        asked = engine.tokenizer.decode(engine.seen[-1][0])
        assert "count" in asked and "<|assistant|>tick tick" in asked and "go on" in asked
        terminal.send("half a line")
        terminal.until("half a line")  # read: Ctrl-C makes the terminal drop what is not
        terminal.insist("\x03", "leaves)")  # at the prompt it clears the line
        terminal.until("> ")
        terminal.send("\x04")
        assert terminal.ends() == 0


def test_sigterm_at_the_prompt_gives_the_terminal_back(served: Running) -> None:
    with Terminal("chat", "--url", served.url) as terminal:
        terminal.until("> ")
        assert not terminal.echoes, "the editor of lines shows what is typed"
        for _ in range(3):  # as ``insist``: one that comes just now may be missed
            terminal.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                terminal.process.wait(20)
                break
        assert terminal.ends() == 143
        assert terminal.echoes and "Traceback" not in terminal.shown


def test_ctrl_c_before_the_first_token(served: Running) -> None:
    engine = served.engine
    engine.first_delay_s = 600.0
    with Terminal("chat", "--url", served.url) as terminal:
        terminal.until("> ")
        terminal.line("slow")
        assert wait_for(lambda: bool(engine.live), 30)
        terminal.send("\x03")
        terminal.until("(stopped)")
        terminal.until("> ")
        assert wait_for(lambda: not engine.live, 30)
        engine.first_delay_s = 0.0
        terminal.line("/set max_tokens 2")
        terminal.until("> ")
        terminal.line("/retry")  # it was not answered
        terminal.until("(length")
        terminal.until("> ")  # what is typed before may be lost when the terminal's mode changes
        assert engine.seen[-1][0] == engine.seen[0][0]
        terminal.send("\x04")
        assert terminal.ends() == 0


def test_a_lost_server_does_not_end_the_conversation(there: Scripted) -> None:
    there.answers[CHAT] = lambda h, _: h.reply({"error": {"message": "b\x1b[2Jusy"}}, 503)
    with Terminal("chat", "--url", there.url) as terminal:
        terminal.until("> ")
        terminal.line("hi")
        terminal.until("HTTP 503: b [2Jusy")
        terminal.until("> ")
        there.answers[CHAT] = lambda h, _: h.chat("back\x1b[2J again")
        terminal.line("/retry")
        terminal.until("back\u241b[2J again")
        terminal.until("> ")
        assert there.bodies(CHAT)[-1]["messages"] == [{"role": "user", "content": "hi"}]
        terminal.send("\x04")
        assert terminal.ends() == 0


def test_the_progress_of_a_prompt_from_the_stream(there: Scripted) -> None:
    go_on = threading.Event()

    def answer(h: Any, body: Any) -> None:
        h.begin()
        for done in (256, 512):
            h.event({"id": "c", "choices": [], "prompt_progress":
                     {"total": 1024, "processed": done, "cache": 128}})  # fmt: skip
        go_on.wait(60)
        h.event({"id": "c", "choices": [{"delta": {"reasoning": "let me see"}}]})
        h.event({"id": "c", "choices": [{"delta": {"content": "done"}, "finish_reason": "stop"}]})
        h.event("[DONE]")

    there.answers[CHAT] = answer
    with Terminal("chat", "hi", "--url", there.url) as terminal:
        terminal.until("512 of 1024 tokens")
        go_on.set()
        terminal.until("let me see")
        terminal.until("done")
        assert terminal.ends() == 0


def test_the_progress_of_a_prompt_from_the_live_picture(served: Running, monkeypatch: Any) -> None:
    """Where the stream does not say it: the request of the picture whose id is the answer's."""
    engine = served.engine
    engine.first_delay_s = 600.0
    job = PicturedJob()
    with Terminal("chat", "x" * 40, "--url", served.url) as terminal:
        assert wait_for(lambda: bool(engine.live), 30)
        (name,) = engine.live
        job.add(40)
        job.step()
        picture = job.picture()
        [request] = picture.requests
        assert request.phase == "prefill"
        engine.shown = replace(picture, requests=(replace(request, id=name),))
        terminal.until(f"{request.computed} of {request.to_compute} tokens")
        terminal.send("\x03")
        assert terminal.ends() == 130
    assert wait_for(lambda: not engine.live, 30)
