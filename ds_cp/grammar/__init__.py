"""Structured output: what an answer must look like, as grammars that say which token may come.

``constraint``: what a caller asks for, checked and bounded. ``lark``: its grammar as text, which is
all that travels. ``checker``: compiles it once in a process that can be killed, before anything runs.
``matcher``: the state of one answer, on the rank that draws its tokens. No torch in this folder,
and llguidance only here.
"""
