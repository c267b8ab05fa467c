"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from time import monotonic
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ds_cp.api.answers.json_pieces import json_array, json_integers, json_object, json_text
from ds_cp.api.answers.logprobs import chat_entries
from ds_cp.api.answers.openai_shape import Envelope, ending, prompt_logprobs, usage_of
from ds_cp.api.answers.respond import Json, respond
from ds_cp.api.answers.timings import Timings, prompt_progress
from ds_cp.api.chat.answer import Call, ChatAnswer, Message
from ds_cp.api.chat.events import ArgumentsDelta, CallBegin, Content, Event, Reasoning, Step
from ds_cp.api.chat.request import ChatRequest, FieldNames
from ds_cp.api.chat.start import Conversation, start_chat
from ds_cp.api.context import AppContext, request_options, sampling_params
from ds_cp.api.requests.chat_body import ChatCompletionRequest, TokenizeRequest
from ds_cp.outputs import PromptProgress, TokenLogprob
from ds_cp.parsing.definitions import read_choice
from ds_cp.sampling_params import RequestOptions, SamplingParams

KIND, CHUNK = "chat.completion", "chat.completion.chunk"


async def chat_completions(
    context: AppContext, body: ChatCompletionRequest, request: Request
) -> Response:
    """Answer a chat request, whole or as a stream."""
    arrival = monotonic()
    context.check(body.model)
    newer = body.max_completion_tokens is not None
    max_param = "max_completion_tokens" if newer else "max_tokens"
    params = sampling_params(
        body,
        max_tokens=body.max_completion_tokens if newer else body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        names={"max_tokens": max_param, "logprobs": "top_logprobs"},
    )
    chat = ChatRequest(
        turns=body.turns,
        params=params,
        options=request_options(body, request),
        tools=body.functions,
        choice=body.choice,
        template_kwargs=body.chat_template_kwargs or {},
        effort=body.reasoning_effort,
        add_generation_prompt=body.begins_answer,
        continue_final=bool(body.continue_final_message),
        stream=bool(body.stream),
        names=FieldNames(max_tokens=max_param),
    )
    envelope = Envelope("chatcmpl", context.model_name(body.model))
    conversation = await start_chat(context, chat, request, envelope.id, arrival)
    answer = _ChatAnswer(context, conversation, body, envelope, arrival)
    return await respond(
        context, request, answer, conversation.generation, stream=bool(body.stream)
    )


def tokenized(body: TokenizeRequest) -> ChatRequest:
    """The chat whose prompt /tokenize counts."""
    return ChatRequest(
        turns=body.turns,
        params=SamplingParams(),
        options=RequestOptions(),
        tools=body.functions,
        choice=read_choice(None, body.functions),
        template_kwargs=body.chat_template_kwargs or {},
        add_generation_prompt=body.begins_answer,
        continue_final=bool(body.continue_final_message),
    )


class _ChatAnswer(ChatAnswer):
    """The JSON of one chat request: one prompt, ``n`` messages."""

    def __init__(
        self,
        context: AppContext,
        conversation: Conversation,
        body: ChatCompletionRequest,
        envelope: Envelope,
        arrival: float,
    ) -> None:
        super().__init__(context, conversation)
        self.timings = Timings(arrival) if body.timings_per_token else None
        self.shows_progress = bool(body.return_progress)
        self._envelope = envelope
        self._body = body
        self._top = (body.top_logprobs or 0) if body.logprobs else None
        self._reasons = body.include_reasoning is not False

    def of_progress(self, progress: PromptProgress) -> Json:
        """A chunk without choices, as llama.cpp's clients read it."""
        fields = {"choices": [], "prompt_progress": prompt_progress(progress)}
        return self._envelope.head(CHUNK) | fields

    def lists_of(self, step: Step) -> Mapping[str, list[Any]]:
        """``logprobs.content`` and ``token_ids``."""
        lists: dict[str, list[Any]] = {}
        if self._top is not None and step.logprobs:
            lists["content"] = self._entries(step.logprobs)
        if self._body.return_token_ids:
            lists["token_ids"] = list(step.token_ids)
        return lists

    def whole(self) -> Iterator[bytes]:
        """The messages, and beside them what the client asks for of the prompt."""
        prompt = self.prompts[0]
        choices = (self._choice(index, message) for index, message in enumerate(self.messages))
        fields: Json = {"choices": json_array(choices)}
        fields |= prompt_logprobs(prompt, self.context.texts, self._body.prompt_logprobs)
        if self._body.return_token_ids:
            fields["prompt_token_ids"] = json_integers(prompt.ids)
        fields |= {"usage": self._usage()} | self.times()
        return json_object(self._envelope.head(KIND) | fields)

    def opening(self) -> Iterator[Json]:
        """The role of every message; in the first one, the prompt's ids, if asked for."""
        for index in range(self.n):
            chunk = self._chunk(index, {"role": "assistant", "content": ""})
            if self._body.return_token_ids and index == 0:
                chunk["prompt_token_ids"] = self.prompts[0].ids
            yield chunk

    def events_of(self, step: Step) -> list[Json]:
        """A chunk for each event, the first one with what belongs to the step's tokens; then the
        finish."""
        deltas = [delta for event in step.events if (delta := self._delta(event))]
        ids = self._body.return_token_ids and step.token_ids
        if not deltas and (step.logprobs or ids):
            deltas = [{}]
        chunks = [self._chunk(step.choice, delta) for delta in deltas]
        if chunks:
            first = chunks[0]["choices"][0]
            if self._top is not None and step.logprobs:
                first["logprobs"] = {"content": self._entries(step.logprobs), "refusal": None}
            if ids:
                first["token_ids"] = list(step.token_ids)
        if step.finished is not None:
            last = self._chunk(step.choice, {})
            last["choices"][0] |= ending(step.finished.reason, step.finished.stop_reason)
            chunks.append(last)
        return chunks

    def closing(self) -> list[Json]:
        """The token counts, if the client asked for them."""
        if not self._body.include_usage:
            return []
        fields = {"choices": [], "usage": self._usage()} | self.times()
        return [self._envelope.head(CHUNK) | fields]

    def _delta(self, event: Event) -> Json:
        match event:
            case Content(text):
                return {"content": text}
            case Reasoning(text) if self._reasons:
                return {"reasoning_content": text}
            case CallBegin(index, id_, name):
                function = {"name": name, "arguments": ""}
                return _call_delta(index, function, {"id": id_, "type": "function"})
            case ArgumentsDelta(index, text):
                return _call_delta(index, {"arguments": text})
        return {}

    def _choice(self, index: int, message: Message) -> Iterator[bytes]:
        assert message.finished is not None
        logprobs: Any = None
        if self._top is not None:
            content = json_array([message.lists["content"].items()])
            logprobs = json_object({"content": content, "refusal": None})
        said: Json = {"role": "assistant", "content": None}
        if message.content or not message.calls:
            said["content"] = json_text(message.content)
        if message.reasoning and self._reasons:
            said["reasoning_content"] = json_text(message.reasoning)
        if message.calls:
            said["tool_calls"] = json_array(map(_call, message.calls))
        fields = {"index": index, "message": json_object(said), "logprobs": logprobs}
        fields |= ending(message.finished.reason, message.finished.stop_reason)
        if self._body.return_token_ids:
            fields["token_ids"] = json_array([message.lists["token_ids"].items()])
        return json_object(fields)

    def _chunk(self, index: int, delta: Json) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk = self._envelope.head(CHUNK) | {"choices": [choice]} | self.times()
        if not self._body.include_usage:
            return chunk
        return chunk | {"usage": self._usage() if self._body.continuous_usage else None}

    def _usage(self) -> Json:
        details = {"reasoning_tokens": self.usage.reasoning}
        usage = usage_of(self.prompts, self.completion_tokens)
        return usage | {"completion_tokens_details": details}

    def _entries(self, logprobs: Sequence[TokenLogprob]) -> list[Json]:
        return chat_entries(logprobs, self.context.texts, self._top or 0)


def _call(call: Call) -> Iterator[bytes]:
    function = json_object({"name": call.name, "arguments": json_text(call.arguments)})
    return json_object({"id": call.id, "type": "function", "function": function})


def _call_delta(index: int, function: Json, first: Mapping[str, str] = {}) -> Json:
    return {"tool_calls": [{"index": index, **first, "function": function}]}
