"""Fields of the Responses protocol that are not served: those that are harmless, read and dropped
whatever their value, and those that would change the answer."""

from __future__ import annotations

from ds_cp.api.requests.foreign_fields import Unsupported

# Where they stand -> fields that do not change the answer.
HARMLESS: dict[str, frozenset[str]] = {
    "body": frozenset(
        # Who asks, and how it is paid for and cached.
        "user safety_identifier service_tier prompt_cache_key prompt_cache_options "
        "prompt_cache_retention access_programs background_options "
        # Of hosted tools and images, which there are none of.
        "max_tool_calls image".split()
    ),
    "text": frozenset({"verbosity"}),
    # Reasoning is given whole, where a summary is asked for too.
    "reasoning": frozenset({"summary", "generate_summary"}),
    "stream_options": frozenset({"include_obfuscation"}),
    "tool": frozenset({"allowed_callers", "defer_loading", "output_schema", "async"}),
    "message": frozenset({"id", "status", "phase"}),
    "part": frozenset({"annotations", "logprobs", "prompt_cache_breakpoint"}),
    "function_call": frozenset({"status", "caller", "async", "namespace", "parsed_arguments"}),
    "function_call_output": frozenset({"status", "caller", "name", "namespace", "created_by"}),
    "reasoning_item": frozenset({"summary", "status"}),
}
_NO_CONVERSATIONS = "send previous_response_id, or the whole input"
BODY: dict[str, Unsupported] = {
    "conversation": Unsupported((), _NO_CONVERSATIONS),
    "context_management": Unsupported((), "an input is never compacted"),
    "prompt": Unsupported((), "prompt templates are not kept here; send instructions and input"),
    "moderation": Unsupported((), "this server does not judge what it reads and writes"),
    "personality": Unsupported((), "say it in instructions"),
    "messages": Unsupported((), "send input, or use /v1/chat/completions"),
    "max_tokens": Unsupported((), "say max_output_tokens", names=("max_output_tokens",)),
    "response_format": Unsupported((), "say text.format"),
    "n": Unsupported((1,), "a response is one answer"),
    "stop": Unsupported((), "the protocol has no stop strings; use /v1/chat/completions"),
}
REASONING: dict[str, Unsupported] = {
    "context": Unsupported(("auto",), "the chat template says which earlier reasoning is read"),
    "mode": Unsupported(("standard",), "there is one mode"),
}
# What ``include`` may name: served, or of hosted tools and images, which there are none of.
LOGPROBS, ENCRYPTED = "message.output_text.logprobs", "reasoning.encrypted_content"
INCLUDE_NOTHING = (
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
