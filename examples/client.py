"""The openai package against a running server, streaming.

make serve
python examples/client.py http://127.0.0.1:8000 "Why is the sky blue?"
"""

from __future__ import annotations

import sys

from openai import OpenAI

url, question = sys.argv[1:3]
client = OpenAI(base_url=f"{url}/v1", api_key="none")
stream = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": question}],
    max_tokens=24,
    temperature=0.0,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    elif chunk.usage:
        print(f"\n{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens")
