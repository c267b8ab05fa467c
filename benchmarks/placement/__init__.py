"""Where blocks go: fill_then_spill, round_robin and balanced on the same seeded traces.

    python -m benchmarks.placement [--out DIR]

The real scheduler and the state of every rank (``WorkerState``) run, no model and no clock: an
answer has a fixed length and its tokens follow from the request, so every policy gets the same
prompts,
and the same command gives the same files bit for bit.

A trace is sessions that arrive at given steps: *chats* (one of three shared system prompts, a
question, an answer), *conversations* (two to five turns, each with everything before it as its
prompt, some steps after the answer before), *documents* (1.2 to 3 times what one rank holds, a
question and a second one later) and two prompts that no cluster of this size can hold. Bytes on
the wire are counted request by request from the spans that occur, with the shapes of SmolLM2-135M:
L = 30 layers, H = 9 query and G = 3 KV heads, D = 64, e = 4 bytes (see ``Wire``).

The last line is one JSON object.
"""
