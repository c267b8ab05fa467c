"""A prompt is checked once, before the engine's lock, and a refusal names the client's field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from ds_cp.errors import CapacityError, RequestError
from ds_cp.sampling_params import SamplingParams
from tests.helpers.fake_engine import FakeEngine
from tests.server.conftest import Running

C, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


class Checking(FakeEngine):
    """Counts the checks of prompts; ``fault`` is what they raise."""

    checked: list[int]
    fault: Exception | None = None

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self.checked = [*getattr(self, "checked", []), len(prompt_token_ids)]
        if self.fault is not None:
            raise self.fault
        super().check(prompt_token_ids, params)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "ours", "theirs"),
    [
        (C, {"prompt": "x", "max_tokens": 2}, "max_tokens", "max_tokens"),
        (C, {"prompt": "x"}, "prompt", "prompt"),
        (CHAT, {"messages": HELLO, "max_tokens": 2}, "max_tokens", "max_tokens"),
        (CHAT, {"messages": HELLO, "max_completion_tokens": 2}, "max_tokens",
         "max_completion_tokens"),
        (CHAT, {"messages": HELLO}, "prompt", "messages"),
        (CHAT, {"messages": HELLO, "n": 2}, "n", "n"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_clients_field(
    launch: Callable[..., Running], tokenizer: Any, path: str, body: dict[str, Any], ours: str,
    theirs: str, stream: bool,
) -> None:  # fmt: skip
    """Before the request is queued, and when it is."""
    engine = Checking(tokenizer)
    served = launch(engine)
    engine.fault = RequestError("a sentence", ours)
    reply = served.post(path, body | {"stream": stream})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, theirs)

    engine.fault, engine.refuse = None, RequestError("a sentence", ours)
    reply = served.post(path, body | {"stream": stream})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, theirs)

    if ours == "max_tokens":
        engine.refuse = CapacityError("the prompt cannot fit", need=900, have=800, largest=700)
        reply = served.post(path, body | {"stream": stream})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, theirs)


def test_each_prompt_is_checked_once(launch: Callable[..., Running], tokenizer: Any) -> None:
    engine = Checking(tokenizer)
    served = launch(engine)
    body = {"prompt": [[5, 6], [7, 8, 9]], "max_tokens": 1, "n": 3}
    assert served.post(C, body).status_code == 200
    assert engine.checked == [2, 3]
    assert served.post(CHAT, {"messages": HELLO, "max_tokens": 1}).status_code == 200
    assert len(engine.checked) == 3
