"""A model that says what a script says, so that an agent's whole loop can be tried.

It is a real Llama: attention and MLP add nothing, embeddings are independent directions, and the
head's row of a token is the embedding of the one before it in its reply. The chat template knows
tools as Hermes' does, and ends with the mark of a reply: a call of a tool that the agent offers,
or, behind a tool's result, the last word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

HIDDEN = 512
POSITIONS = 65_536
SURE = 4.0  # scale of the head: the logit of the next token is about 90, of others 8 at most
LAST = "last"
_TEMPLATE = """\
{%- if tools %}<|im_start|>system
You may call tools as <tool_call>{"name": ..., "arguments": ...}</tool_call>.
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% set ns = namespace(say="last") %}{% if messages[-1].role != "tool" %}
{%- for tool in tools or [] %}{% if tool.function.name in NAMES %}
{%- set ns.say = tool.function.name %}{% endif %}{% endfor %}{% endif %}
{{- "<|say:" + ns.say + "|>" }}{% endif %}"""


def write_model(
    folder: Path, base: Path, calls: Mapping[str, Mapping[str, Any]], last: str
) -> None:
    """Write the model into ``folder``. ``base``: a model whose tokenizer it has; ``calls``: the
    arguments with which it calls a tool, by name; ``last``: what it says behind a result, and where
    no tool of these is offered."""
    replies = {name: _call(name, arguments) for name, arguments in calls.items()} | {LAST: [last]}
    tokenizer = AutoTokenizer.from_pretrained(base)
    marks = {name: f"<|say:{name}|>" for name in replies}
    tokenizer.add_tokens([_token(mark, True) for mark in marks.values()], special_tokens=True)
    texts = dict.fromkeys(chain(*replies.values()))
    tokenizer.add_tokens([_token(text, False) for text in texts])
    tokenizer.chat_template = _TEMPLATE.replace("NAMES", json.dumps(list(calls)))
    tokenizer.model_max_length = POSITIONS
    follows: set[tuple[int, int]] = set()  # a token, and the one behind it
    for name, pieces in replies.items():
        ids = tokenizer.convert_tokens_to_ids([marks[name], *pieces])
        follows |= set(pairwise([*ids, tokenizer.eos_token_id]))
    _llama(len(tokenizer), tokenizer.eos_token_id, sorted(follows)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _call(name: str, arguments: Mapping[str, Any]) -> list[str]:
    """A call in two tokens: a grammar takes one that begins with < and ends with > for a mark."""
    inside = json.dumps({"name": name, "arguments": arguments})
    return [f"<tool_call>\n{inside}", "\n</tool_call>"]


def _token(text: str, special: bool) -> AddedToken:
    return AddedToken(text, special=special, normalized=False)


def _llama(vocab_size: int, end: int, follows: Sequence[tuple[int, int]]) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        directions = torch.nn.functional.normalize(torch.randn(vocab_size, HIDDEN), dim=-1)
        model.model.embed_tokens.weight.copy_(directions)
        head = model.lm_head.weight.zero_()
        for before, token in follows:
            head[token] += SURE * directions[before]
    return model.to(torch.bfloat16)
