"""A rendering in the process beside is transformers' own, whatever the template."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from jinja2.exceptions import TemplateError

from ds_cp.errors import ChatTemplateError
from ds_cp.model.loading import load_tokenizer
from ds_cp.model.source import ModelSource
from ds_cp.templates.chat import MEMORY_BYTES, ChatTemplate, beside, choose
from ds_cp.templates.messages import Ended
from ds_cp.templates.processes import TemplateProcesses
from tests.helpers import chat_templates as templates
from tests.helpers.fake_engine import make_tokenizer, template_processes

HELLO = [{"role": "user", "content": "hello"}]


def opened(text: Any, processes: TemplateProcesses | None = None, **rest: Any) -> ChatTemplate:
    tokenizer = make_tokenizer(text)
    tokenizer.bos_token = "<s>"
    return ChatTemplate(tokenizer, processes or template_processes(), **rest)


def render(template: ChatTemplate, messages: Any, prompt: bool = True, **rest: Any) -> str:
    given = {"max_chars": 100_000, "timeout_s": 60.0} | rest
    return template.render(messages, add_generation_prompt=prompt, **given)


def transformers_own(text: str, messages: Any, prompt: bool) -> str:
    tokenizer = make_tokenizer(text)
    tokenizer.bos_token = "<s>"
    own: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return own


@pytest.mark.parametrize("name", templates.TEXTS)
def test_the_text_is_transformers_own(name: str) -> None:
    text = templates.TEXTS[name]
    template = opened(text)
    assert not [note for note in template.look(60) if "not available" in note]
    rendered = 0
    for messages in templates.CONVERSATIONS:
        for prompt in (True, False):
            try:
                expected = transformers_own(text, messages, prompt)
            except TemplateError as err:
                with pytest.raises(ChatTemplateError, match="refuses these messages") as caught:
                    render(template, messages, prompt)
                assert str(err) in str(caught.value)
                assert caught.value.code == "chat_template_refused"
            else:
                assert render(template, messages, prompt) == expected
                rendered += 1
    assert rendered >= 6


@pytest.mark.parametrize("text", [templates.PARTS, templates.EITHER, templates.FIRST_PART])
def test_a_template_that_walks_over_parts_gets_parts(text: str) -> None:
    template = opened(text)
    for messages in templates.CONVERSATIONS:
        parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
        expected = transformers_own(text, parts, True)
        assert render(template, messages) == render(template, parts) == expected


def test_parts_are_joined_where_a_template_adds_text() -> None:
    two = [{"role": "user", "content": [{"type": "text", "text": t} for t in ("one", "two")]}]
    joined = [{"role": "user", "content": "one\ntwo"}]
    text = templates.CHATML
    assert render(opened(text), two) == transformers_own(text, joined, True)
    assert render(opened(templates.PARTS), two) == transformers_own(templates.PARTS, two, True)
    assert render(opened(templates.FIRST_PART), two) == "<user>one\ntwo"
    assert render(opened(templates.EITHER), two) == "<user>onetwo"


def test_each_role_has_its_shape() -> None:
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hello"}]
    assert render(opened(templates.MIXED), messages) == "<system>be!<user>hello"


def test_no_content_is_no_text() -> None:
    messages = [*HELLO, {"role": "assistant", "content": None}, {"role": "user", "content": "on"}]
    expected = [m | {"content": m["content"] or ""} for m in messages]
    for text in (templates.CHATML, templates.PARTS):
        parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in expected]
        own = transformers_own(text, parts if text == templates.PARTS else expected, True)
        assert render(opened(text), messages) == own


@pytest.mark.parametrize(
    ("text", "messages", "reason"),
    [
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", HELLO, "TypeError: can only"),
        ("{{ messages[0].foo.bar }}", HELLO, "UndefinedError: 'dict object'"),
        (templates.TRAPS, [{"role": "user", "content": "divide"}], "ZeroDivisionError"),
        (templates.TRAPS, [{"role": "user", "content": "recurse"}], "RecursionError"),
        (templates.TRAPS, [{"role": "user", "content": "memory"}], "more than 64 MiB of memory"),
        (templates.TRAPS, [{"role": "user", "content": "loop"}], "within 0.1 s of computing"),
        (templates.TRAPS, [{"role": "user", "content": "huge"}], "makes 5000010 characters"),
        ("{{ messages[-1].content }}", [*HELLO, {"role": "assistant", "content": "b"}],
         "leaves out what the user says"),
        ("nothing", HELLO, "leaves out what the user says, so it is not answered: 'hello'"),
        ("{{ '\\ud800' }}{{ messages[0].content }}", HELLO, "is not text"),
    ],
)  # fmt: skip
def test_what_goes_wrong_names_the_template(text: str, messages: Any, reason: str) -> None:
    template = opened(text, cpu_s=0.1)
    with pytest.raises(ChatTemplateError) as caught:
        render(template, messages)
    assert str(caught.value).startswith("the model's chat template ('default') ")
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    slow = "of computing" in reason
    assert caught.value.code == ("chat_template_too_slow" if slow else "chat_template_error")
    assert caught.value.param == "messages"
    assert render(opened(templates.TRAPS), HELLO) == "<user>hello"  # others go on


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(ChatTemplateError, match="surrogate"):
        render(opened(templates.TRACKED), [HELLO[0] | {"name": "\ud800"}])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% if x %}", "does not compile: line 1: TemplateSyntaxError"),
        ("{{ x | nosuch }}", "does not compile: line 1: TemplateAssertionError"),
        ("{{ 'a' * 10**10 }}", "needs more than 64 MiB of memory"),
        (templates.LOOP, "does not end within 0.1 s of computing"),
    ],
)
def test_a_template_of_no_use_is_found_at_start(text: str, reason: str) -> None:
    class Counting(TemplateProcesses):
        count = 0

        def run(self, work: Any, limits: Any) -> Any:
            self.count += 1
            return template_processes().run(work, limits)

    processes = Counting()
    template = opened(text, processes, cpu_s=0.1)
    [line] = template.look(60)
    assert line.startswith("chat is not available: the model's chat template ('default') ")
    assert reason in line and "/v1/completions" in line
    tried = processes.count
    with pytest.raises(ChatTemplateError) as caught:
        render(template, HELLO)
    assert reason in str(caught.value) and processes.count == tried  # it is not tried again


@pytest.mark.parametrize(
    ("templates_of", "used", "said"),
    [
        (None, None, "no chat template"),
        ("  \n", None, "is empty"),
        ({}, None, "(none) but none called 'default'"),
        ({"tool_use": "t", "rag": "r"}, None, "(rag, tool_use) but none called 'default'"),
        ({"tool_use": "t", "default": "d"}, "d", "(default, tool_use) 'default' is used"),
        ([{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}], "d", "is used"),
        ({"default": "d"}, "d", ""),
        ({"default": 5}, None, "no text but int"),
        (7, None, "no text but int"),
        ("d", "d", ""),
    ],
)
def test_which_template_is_used(templates_of: Any, used: str | None, said: str) -> None:
    choice = choose(templates_of)
    assert choice.text == used
    assert said in " ".join([choice.problem, *choice.notes])
    assert bool(choice.problem) == (used is None)
    assert choice == choose(templates_of)


def test_two_sources_of_a_template_are_noted(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "a"}))
    assert beside(str(tmp_path), choose("a")) == []
    (tmp_path / "chat_template.jinja").write_text("b")
    assert "tokenizer_config.json has another" in beside(str(tmp_path), choose("b"))[0]
    (tmp_path / "chat_template.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("not json")
    assert beside(str(tmp_path), choose("b")) == []
    (tmp_path / "tokenizer_config.json").unlink()
    assert "processor" in beside(str(tmp_path), choose(None))[0]
    assert beside("owner/name", choose(None)) == beside("", choose(None)) == []


def test_files_of_a_model_are_read_as_transformers_does(tmp_path: Path) -> None:
    make_tokenizer(templates.CHATML).save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "other"}))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    tokenizer = load_tokenizer(ModelSource("directory", str(tmp_path)))
    template = ChatTemplate(tokenizer, template_processes())
    assert [note.split(";")[0] for note in template.look(60)] == [
        "of the model's chat templates (default, rag) 'default' is used",
        "chat_template.jinja is used",
    ]
    own = tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    assert render(template, HELLO) == own == transformers_own(templates.CHATML, HELLO, True)


def test_notes_say_what_a_template_leaves_out() -> None:
    assert opened(templates.CHATML).look(60) == []
    assert "reads content as parts" in opened(templates.PARTS).look(60)[0]
    users = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    assert [n.split(") ")[1] for n in opened(users).look(60)] == [
        "leaves out what the system says",
        "leaves out what the assistant says",
    ]
    [note] = opened("{{ messages[0].content + 1 }}").look(60)
    assert "fails for a user's text: TypeError" in note


# --- processes


@pytest.fixture
def processes() -> Iterator[TemplateProcesses]:
    mine = TemplateProcesses()
    yield mine
    mine.close()


def test_processes_that_are_killed_are_replaced(processes: TemplateProcesses) -> None:
    template = opened(templates.TRACKED, processes)
    expected = render(template, HELLO)
    assert processes.pid is not None
    nursery = psutil.Process(processes.pid)
    [worker] = nursery.children()
    worker.kill()
    worker.wait(60)
    assert render(template, HELLO) == expected and nursery.is_running()
    workers = nursery.children()
    nursery.kill()
    assert psutil.wait_procs(workers, timeout=60)[1] == []  # they follow it
    assert render(template, HELLO) == expected
    assert processes.pid != nursery.pid
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, and a launcher's end of the group
        os.kill(processes.pid, number)
    assert render(template, HELLO) == expected
    last = psutil.Process(processes.pid)
    everyone = [last, *last.children()]
    processes.close()
    assert psutil.wait_procs(everyone, timeout=60)[1] == []
    with pytest.raises(OSError, match="have been ended"):
        render(template, HELLO)


def until(true: Callable[[], object]) -> None:
    limit = time.monotonic() + 60
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.002)


def test_a_job_that_no_worker_read_is_given_to_another(processes: TemplateProcesses) -> None:
    """Killed while idle, and its end told only once the next job was sent to it."""
    template = opened(templates.TRAPS, processes, cpu_s=20.0)
    render(template, HELLO)
    assert processes.pid is not None
    nursery = psutil.Process(processes.pid)
    [worker] = nursery.children()
    nursery.suspend()
    worker.kill()
    until(lambda: worker.status() == psutil.STATUS_ZOMBIE)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(render, template, HELLO)
        until(lambda: not processes._idle)
        time.sleep(0.02)  # the job is sent
        nursery.resume()
        assert late.result(60) == "<user>hello"
        # One that has read its job may have been killed for it: that is told.
        [worker] = nursery.children()
        before = sum(worker.cpu_times())
        loops = pool.submit(render, template, [HELLO[0] | {"content": "loop"}])
        until(lambda: sum(worker.cpu_times()) > before + 0.04)
        worker.kill()
        with pytest.raises(OSError, match=r"ended \(Killed\)"):
            loops.result(60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGRTMIN + 9])
def test_a_worker_that_is_killed_says_nothing_of_the_template(number: int) -> None:
    class Killed(TemplateProcesses):
        killed = 0

        def run(self, work: Any, limits: Any) -> Any:
            self.killed += 1
            if self.killed < 3:
                return Ended(number, 0)
            return template_processes().run(work, limits)

    template = opened(templates.CHATML, Killed())
    [line] = template.look(60)
    assert "cannot be rendered: the process that renders" in line and "ended (" in line
    with pytest.raises(OSError, match="ended"):
        render(template, HELLO)
    assert "hello" in render(template, HELLO)


def test_renderings_do_not_wait_for_one_that_loops() -> None:
    template = opened(templates.TRAPS, cpu_s=1.5)
    render(template, HELLO)
    with ThreadPoolExecutor(4) as pool:
        looping = [pool.submit(render, template, [HELLO[0] | {"content": "loop"}]) for _ in "ab"]
        honest = [pool.submit(render, template, HELLO) for _ in range(20)]
        assert {future.result(60) for future in honest} == {"<user>hello"}
        assert not any(future.done() for future in looping)
        assert all(isinstance(future.exception(60), ChatTemplateError) for future in looping)


def test_a_long_conversation_after_a_short_one_has_its_own_limits() -> None:
    template = opened(templates.CHATML, memory_bytes=MEMORY_BYTES // 4)
    long = "word " * 400_000 + "\U0001f9ff"  # four bytes a character, once one is beyond the BMP
    for _ in range(2):
        assert len(render(template, HELLO)) < 100
        text = render(template, [HELLO[0] | {"content": long}], max_chars=3 * 10**6)
        assert long in text
    with pytest.raises(ChatTemplateError, match="characters of messages of 2000001"):
        render(template, [HELLO[0] | {"content": long}], max_chars=10**6)


def test_a_clock_ends_a_rendering_that_waits() -> None:
    template = opened(templates.TRAPS, cpu_s=20.0)
    render(template, HELLO)
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        render(template, [HELLO[0] | {"content": "loop"}], timeout_s=0.3)
    assert time.monotonic() - begun < 18.0  # not after cpu_s


def test_the_processes_end_with_their_server() -> None:
    code = (
        "import time, types\n"
        "from ds_cp.templates.chat import ChatTemplate\n"
        "from ds_cp.templates.processes import TemplateProcesses\n"
        "mine = TemplateProcesses()\n"
        "tokenizer = types.SimpleNamespace(chat_template='{{ messages[0].content }}')\n"
        "ChatTemplate(tokenizer, mine).look(60)\n"
        "print(mine.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    with server.stdout as out:
        nursery = psutil.Process(int(out.readline()))
    everyone = [nursery, *nursery.children()]
    assert len(everyone) == 2
    server.kill()
    server.wait(60)
    assert psutil.wait_procs(everyone, timeout=60)[1] == []
