"""The process that compiles grammars first: what does not end or eats memory ends only a child of
it.

``main`` makes the vocabulary from a tokenizer once, and then forks a child for each socket that it
is sent. The child compiles one grammar under limits that the kernel keeps. Nobody tells how a child
ended that did not answer: its end of the socket closes. No torch, no transformers.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import threading
import time
from typing import NoReturn

from llguidance import LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from ds_cp.frames import frame, receive
from ds_cp.grammar.lark import HEADER
from ds_cp.grammar.limits import COMPILE_STACK_BYTES, MAX_GRAMMAR_BYTES
from ds_cp.grammar.matcher import MAX_REASON_CHARS, Compiler, GrammarError
from ds_cp.grammar.messages import Answer, Compiled, Failed, Job, Known, Tokens, Unable
from ds_cp.grammar.vocabulary import Vocabulary
from ds_cp.process import die_with_parent
from ds_cp.sandbox import limit_this_process
from ds_cp.text import shorten

NICENESS = 5  # of compilations: a long one takes less than ranks and server
LOAD_S = 60.0  # seconds for the tokenizer to arrive


def main(control_fd: int) -> None:
    """Until the control socket closes."""
    control = socket.socket(fileno=control_fd)
    for number in (signal.SIGINT, signal.SIGTERM):  # of a terminal or launcher: not for this one
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGPROF, signal.SIGALRM, signal.SIGCHLD))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel takes away what has ended
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        tokens: Tokens | None = receive(control, Tokens, time.monotonic() + LOAD_S)
        control.settimeout(None)
        if tokens is None:
            os._exit(0)
        vocabulary = vocabulary_of(tokens.text)
        _serve(control, vocabulary)
    except (OSError, ValueError) as err:
        _tell(control, Failed(_one_line(err)))
    os._exit(0)


def vocabulary_of(tokenizer_json: str) -> Vocabulary:
    """What each token of a tokenizer spells. Raises ``ValueError`` for one that does not say."""
    tokenizer = LLTokenizer(tokenizer_json)
    ids = range(tokenizer.vocab_size)
    special = [token for token in ids if tokenizer.is_special_token(token)]
    return Vocabulary.of([tokenizer.decode_bytes([token]) for token in ids], special)


def _serve(control: socket.socket, vocabulary: Vocabulary) -> None:
    compiler = Compiler(vocabulary)
    control.sendall(frame(Known(vocabulary)))
    follow = die_with_parent(os.getpid())
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        for fd in fds:
            with socket.socket(fileno=fd) as sock:
                try:
                    pid = os.fork()
                except OSError as err:  # no room for one more process, which may pass
                    _tell(sock, Unable(_one_line(err)))
                    continue
                if pid == 0:
                    control.close()
                    follow()
                    _child(sock, compiler)


def _child(sock: socket.socket, compiler: Compiler) -> NoReturn:
    try:
        os.nice(NICENESS)
        job: Job | None = receive(sock, Job, time.monotonic() + LOAD_S)
        if job is not None:
            limit_this_process(job.cpu_s, job.wall_s, job.memory_bytes)
            sock.settimeout(job.wall_s)
            threading.stack_size(COMPILE_STACK_BYTES)
            answers: list[Answer] = []
            thread = threading.Thread(target=lambda: answers.append(compile_one(compiler, job)))
            thread.start()
            thread.join(job.wall_s)
            sock.sendall(frame(answers[0]))
    finally:
        os._exit(0)


def compile_one(compiler: Compiler, job: Job) -> Answer:
    """What compiling gives."""
    source = job.source
    try:
        if job.foreign:
            source = HEADER + any_to_lark(source).replace("%llguidance {}", "", 1)
            if (size := len(source.encode())) > MAX_GRAMMAR_BYTES:  # plans are bounded by it
                raise GrammarError(
                    f"it has {size} bytes once converted; at most {MAX_GRAMMAR_BYTES}"
                )
        matcher = compiler.compile(source)
        matcher.allowed(frozenset())
    except GrammarError as err:
        return Failed(str(err))
    except Exception as err:  # of the conversion, for what is no grammar
        return Failed(_one_line(err))
    return Compiled(source)


def _one_line(err: Exception) -> str:
    return shorten(f"{type(err).__name__}: {err}", MAX_REASON_CHARS)


def _tell(sock: socket.socket, message: Failed | Unable) -> None:
    try:
        sock.sendall(frame(message))
    except OSError:
        pass
