"""A model's output, read as it arrives: content, reasoning and tool calls; and the other way round,
what a request says of tools. No torch, no HTTP.

``choose`` names the parsers that fit a chat template, ``registry.make_parser`` makes them for one
answer, ``events`` says what they find. ``registry`` has each family's ``ToolFormat`` too, of which
a grammar is built. ``definitions`` and ``history`` read what a client sends.

No output is an error. Text that begins like a call, and is none, is content; it is held until that
is known, and at most ``calls.MAX_HELD`` characters. A call is certain once its name and the
beginning of its arguments are there. One that ends before its arguments do, or whose arguments are
no JSON object, is announced and ends incomplete. A name need not be that of a tool, so that a
client can tell the model; but where nothing marks a call (``json``, ``llama3_json``) only a known
name makes one. An answer has at most ``calls.MAX_CALLS`` calls, as many as a client can send back
in one message: text of further ones is content. White space around calls and reasoning is dropped;
all other text is passed on as it is.
"""
