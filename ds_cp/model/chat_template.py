"""The processes in which chat templates are rendered, by transformers' own functions.

``main`` is the nursery: it imports transformers and forks workers, and never touches a template
itself. Each socket that it is sent gets a worker; when a worker ends without having answered a job
that it read, the nursery says so on that socket (``Ended``). It ends with its control socket, and
the workers with it. No torch here.
"""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import socket
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec

from ds_cp.frames import frame, receive
from ds_cp.process import die_with_parent
from ds_cp.sandbox import bytes_of_this_process, limit_this_process, unlimit_this_process
from ds_cp.templates.messages import (
    Answer,
    Ended,
    Failed,
    Job,
    Look,
    Looked,
    Render,
    Rendered,
)
from ds_cp.templates.shape import learn, marked, missing, mostly_there, shaped
from ds_cp.templates.tools import learn_tools
from ds_cp.text import shorten

NICENESS = 5  # of workers: a long rendering takes less than ranks and server
KEPT_GROWTH = 32 << 20  # bytes that a worker may have grown by before it is replaced
MAX_REASON_CHARS = 200  # characters of an exception's text in an answer

Renderer = Callable[[Render], str]


def main(control_fd: int) -> None:
    """Fork a worker for each socket that arrives, until the control socket closes."""
    control = socket.socket(fileno=control_fd)
    for number in (signal.SIGINT, signal.SIGTERM):  # of a terminal or launcher: not for this one
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGPROF, signal.SIGALRM, signal.SIGCHLD))
    render: Renderer | None = None
    reason = ""
    try:
        render = _transformers()
    except Exception as err:  # a broken installation: say so to whoever asks
        reason = f"transformers cannot render chat templates: {_one_line(err)}"
    gc.collect()
    gc.freeze()  # so that collections in the workers do not copy its pages
    _Nursery(control, render, reason).run()
    os._exit(0)


def _transformers() -> Renderer:
    """What ``tokenizer.apply_chat_template(messages, tokenize=False)`` does, without a
    tokenizer."""
    os.putenv("OPENBLAS_NUM_THREADS", "1")  # numpy's; a fork copies no threads
    os.putenv("OMP_NUM_THREADS", "1")
    from transformers.utils import chat_template_utils

    renders: Any = chat_template_utils.render_jinja_template  # its types say too little

    def render(work: Render) -> str:
        messages = [
            {k: v for k, v in m.items() if v is not None or k == "content"} for m in work.messages
        ]
        rendered, _ = renders(
            conversations=[messages],
            chat_template=work.template,
            add_generation_prompt=work.add_generation_prompt,
            tools=work.tools,
            continue_final_message=work.continue_final,
            **{**work.values, **work.tokens},
        )
        text: str = rendered[0]
        return text

    return render


class _Nursery:
    def __init__(self, control: socket.socket, render: Renderer | None, reason: str) -> None:
        self._control = control
        self._render = render
        self._reason = reason
        self._workers: dict[int, socket.socket] = {}  # by process id
        self._follow_nursery = die_with_parent(os.getpid())
        self._wake, woken = socket.socketpair()
        self._woken = woken
        woken.setblocking(False)
        self._wake.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)

    def run(self) -> None:
        """Until the control socket closes; then kill the workers."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._wake.fileno() in ready:
                self._wake.recv(4096)
                self._reap()
            if self._control.fileno() in ready:
                try:
                    data, fds, _, _ = socket.recv_fds(self._control, 1, 1)
                except OSError:  # the server was killed with something unread
                    break
                if not data:
                    break
                for fd in fds:
                    self._start_worker(socket.socket(fileno=fd))
        for pid in self._workers:
            os.kill(pid, signal.SIGKILL)

    def _start_worker(self, sock: socket.socket) -> None:
        if self._render is None:
            _tell(sock, Failed("unavailable", self._reason))
            return
        try:
            pid = os.fork()
        except OSError as err:
            _tell(sock, Failed("unavailable", f"no process can be started: {err.strerror}"))
            return
        if pid:
            self._workers[pid] = sock
            return
        try:
            self._follow_nursery()
            os.nice(NICENESS)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for other in (self._control, self._wake, self._woken, *self._workers.values()):
                other.close()
            work_off(sock, self._render)
        finally:
            os._exit(1)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            sock = self._workers.pop(pid, None)
            if sock is not None and _has_unread(sock):
                sock.close()  # whoever sent a job sees the end, and gives it to another worker
            elif sock is not None:
                code = os.waitstatus_to_exitcode(status)
                _tell(sock, Ended(max(-code, 0), max(code, 0)))


def _has_unread(sock: socket.socket) -> bool:
    """Whether a job was sent that the worker, now gone, has not read whole: it did not end for
    that. None can be sent after this."""
    try:
        sock.shutdown(socket.SHUT_RD)
        return bool(sock.recv(1, socket.MSG_DONTWAIT))
    except OSError:  # the server has closed its end
        return False


def _tell(sock: socket.socket, message: Ended | Failed) -> None:
    """Send a last word without waiting for its reader, and close."""
    sock.setblocking(False)
    try:
        sock.send(frame(message))
    except OSError:
        pass  # its reader has left, or has a full socket to read and then sees the end
    finally:
        sock.close()


def work_off(sock: socket.socket, render: Renderer) -> NoReturn:
    """A worker: answer jobs until the socket closes, or until this process has grown."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = bytes_of_this_process(1)
    while (job := receive(sock, Job)) is not None:
        limits = job.limits
        limit_this_process(limits.cpu_s, limits.wall_s, limits.memory_bytes)
        answer = _answer(job.work, render)
        try:
            raw = frame(answer)
        except MemoryError:
            raw = _NO_MEMORY
        except ValueError as err:  # half a surrogate pair, which no tokenizer takes
            raw = frame(Failed("raised", f"the rendering is not text: {_one_line(err)}"))
        unlimit_this_process()  # the next job may be a large one to read
        sock.sendall(raw)
        if bytes_of_this_process(1) - before > KEPT_GROWTH or raw == _NO_MEMORY:
            break
    os._exit(0)


def _answer(work: Render | Look, render: Renderer) -> Answer:
    """The answer to a piece of work, whatever its template raises."""
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    try:
        if isinstance(work, Look):
            return _look(work, render)
        text = render(work)
        if len(text) > work.max_chars:
            return Failed("long", f"{len(text)} characters")
        if (lost := _left_out(work, text, render)) is not None:
            return Failed("lost", shorten(lost, 60))
        return Rendered(text)
    except MemoryError:
        pass  # outside this handler the memory of the rendering is free again
    except TemplateSyntaxError as err:
        return Failed("broken", f"line {err.lineno}: {_one_line(err)}")
    except TemplateError as err:
        refuses = type(err) is TemplateError  # raise_exception's, with the author's words
        return Failed("refused", _text(err)) if refuses else Failed("raised", _one_line(err))
    except Exception as err:
        return Failed("raised", _one_line(err))
    return Failed("memory", "")


def _left_out(work: Render, text: str, render: Renderer) -> str | None:
    """A user's text that the rendering leaves out, or None. One that it only changes is in it: its
    words are, and marks in its place are rendered."""
    lost = missing(work.messages, text)
    if lost is None or not mostly_there(work.messages, text):
        return lost
    marks = marked(work.messages)
    try:
        rendered = render(msgspec.structs.replace(work, messages=marks))
    except MemoryError:
        raise
    except Exception:
        return lost
    return None if missing(marks, rendered.casefold()) is None else lost


_NO_MEMORY = frame(Failed("memory", ""))


def _look(work: Look, render: Renderer) -> Looked:
    from jinja2.exceptions import TemplateSyntaxError

    def render_messages(messages: list[dict[str, Any]]) -> str:
        return render(Render(work.template, work.tokens, messages, True, 0))

    def render_tools(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
        shaped_messages = shaped(messages, shapes)
        for message, shaped_one in zip(messages, shaped_messages, strict=True):
            if message["content"] is None:
                shaped_one["content"] = None
        return render(Render(work.template, work.tokens, shaped_messages, True, 0, tools))

    passing = (MemoryError, TemplateSyntaxError)
    shapes, lost, failed = learn(render_messages, passing)
    tools = learn_tools(render_tools, passing)
    tools = msgspec.structs.replace(tools, system="system" in shapes)
    reasons = {
        role: shorten(" ".join(why.split()), MAX_REASON_CHARS) for role, why in failed.items()
    }
    return Looked(shapes, lost, reasons, tools)


def _one_line(err: BaseException) -> str:
    return shorten(f"{type(err).__name__}: {_text(err)}", MAX_REASON_CHARS)


def _text(err: BaseException) -> str:
    """An exception's words; a template's own ``raise_exception`` may be given any value."""
    try:
        words = " ".join(str(err)[: 10 * MAX_REASON_CHARS].split())
        return shorten(words.encode("utf-8", "replace").decode(), MAX_REASON_CHARS)
    except Exception:
        return "no reason given"
