"""Fields of the Messages protocol that are not served: those that are harmless, read and dropped
whatever their value, and those that would change the answer."""

from __future__ import annotations

from ds_cp.api.requests.foreign_fields import Unsupported

# Where they stand -> fields that do not change the answer.
HARMLESS: dict[str, frozenset[str]] = {
    "body": frozenset(
        "metadata cache_control service_tier speed inference_geo diagnostics user_profile_id "
        "workspace_id betas billing_policy fallbacks fallback_credit_token".split()
    ),
    "text": frozenset({"cache_control", "citations"}),
    "thinking": frozenset({"signature", "cache_control"}),
    "redacted_thinking": frozenset({"data", "cache_control"}),
    "tool_use": frozenset({"cache_control", "caller", "toolset_name"}),
    "tool_result": frozenset({"cache_control", "toolset_name"}),
    # All tools are loaded, none is called by a program, and no argument is held back.
    "tool": frozenset({"cache_control", "allowed_callers", "defer_loading",
                       "eager_input_streaming", "strict_input_streaming"}),
    # How much is thought is the model's: ``output_config.effort`` is what it may be told.
    "thinking_config": frozenset({"budget_tokens"}),
}  # fmt: skip
BODY: dict[str, Unsupported] = {
    "container": Unsupported((), "this server runs no code"),
    "compaction": Unsupported((), "an input is never summarized"),
    "thread": Unsupported((), "no conversation is held between requests; send all its messages"),
    "mcp_servers": Unsupported((), "this server makes no outbound connection"),
    "output_format": Unsupported((), "say output_config.format"),
    "stop": Unsupported((), "say stop_sequences", names=("stop_sequences",)),
    "max_completion_tokens": Unsupported((), "say max_tokens", names=("max_tokens",)),
    "n": Unsupported((1,), "a message is one answer"),
    "reasoning_effort": Unsupported((), "say output_config.effort"),
    "response_format": Unsupported((), "say output_config.format"),
}
