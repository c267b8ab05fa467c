"""Small chat templates in the style of the families in use, and conversations to render."""

from __future__ import annotations

from typing import Any

LLAMA3 = (
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system_message = '' %}{%- endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday: {{ date_string or '26 Jul 2024' }}\n\n"
    "{{ system_message }}<|eot_id|>"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
QWEN = (
    "{%- if tools %}{{ tools | tojson }}{%- endif %}"
    "{%- set ns = namespace(last=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if message.role == 'user' and ns.last == messages|length - 1 %}"
    "{%- set ns.last = index %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'assistant' and '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>' }}"
    "{%- endif %}{%- endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% continue %}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{% if loop.last and messages[0]['role'] == 'system' %}"
    "{{ '[INST] ' + messages[0]['content'] + '\n\n' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}\n"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n{{ '<|im_start|>assistant\n' }}\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
DATED = (
    "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}|"
    "{% for m in messages %}{{ {'role': m.role, 'content': m.content, 'a<b': \"é'&\"} | tojson }}"
    "{% endfor %}"
)
TRACKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}[{{ m['role'] }}{% if m.name is defined %} {{ m.name }}{% endif %}] "
    "{{ m['content'] }}{% endif %}\n{% endfor %}"
)
# Walks over parts: a text has none.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EITHER = (
    "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for p in content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %}{% endmacro %}"
    "{% for m in messages %}<{{ m.role }}>{{ text(m.content) }}{% endfor %}"
)
FIRST_PART = "{% for m in messages %}<{{ m.role }}>{{ m['content'][0]['text'] }}{% endfor %}"
# The system's content is text, the others' are parts.
MIXED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'system' %}{{ m.content + '!' }}"
    "{% else %}{% for p in m.content %}{{ p['text'] }}{% endfor %}{% endif %}{% endfor %}"
)
TEXTS = {
    "llama3": LLAMA3, "qwen": QWEN, "mistral": MISTRAL, "chatml": CHATML, "gemma": GEMMA,
    "dated": DATED, "tracked": TRACKED,
}  # fmt: skip

_SAID = "  how <b>many</b>\n\tare there? \u00e9 \U0001f9ff {{ 7 * 7 }} {% raw %} <|im_end|> "
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello world"}],
    [{"role": "user", "content": _SAID, "name": "ann"}],
    [{"role": "system", "content": " be short "}, {"role": "user", "content": _SAID}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>no</think>\n\ntwo"},
        {"role": "user", "content": "three"},
    ],
    [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}],
]
# Templates that write tools, calls and results.
HERMES = (
    "{%- if tools %}<|im_start|>system\n<tools>{% for tool in tools %}\n{{ tool | tojson }}"
    "{% endfor %}\n</tools><|im_end|>\n{% endif %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n"
    "{%- elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n"
    "{%- else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
HARMONY = (
    "Reasoning: {{ reasoning_effort or 'medium' }}\n"
    "{%- if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}"
    "{%- for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}{% if m.tool_calls %}{% set c = m.tool_calls[0] %}"
    "<|start|>assistant to=functions.{{ c.function.name }}<|channel|>commentary json<|message|>"
    "{{ c.function.arguments | tojson }}<|call|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% elif m.role == 'tool' %}<|start|>functions.{{ m.name }} to=assistant<|channel|>commentary"
    "<|message|>{{ m.content }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}<|start|>assistant{% endif %}"
)
HARMONY_TOKENS = (
    "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|call|>", "<|return|>",
)  # fmt: skip
# Sees a call only where its content is null, and joins texts.
NULL_CONTENT = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'tool' %}<result>{{ m['content'] }}"
    "{% elif m['role'] != 'assistant' %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% elif m['content'] is none %}{% for c in m['tool_calls'] %}<call>"
    "{{ c['function']['name'] + ' ' + c['function']['arguments'] }}{% endfor %}"
    "{% else %}<assistant>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)

# Computes for ever, and takes memory without end, where a text says so.
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TRAPS = (
    "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if 'loop' in m.content %}" + LOOP + "{% endif %}"
    "{% if 'memory' in m.content %}{{ 'a' * 10**10 }}{% endif %}"
    "{% if 'recurse' in m.content %}{{ again(0) }}{% endif %}"
    "{% if 'huge' in m.content %}{{ 'a' * 5000000 }}{% endif %}"
    "{% if 'divide' in m.content %}{{ 1 // 0 }}{% endif %}{% endfor %}"
)
