"""Structured output: what an answer must look like, as grammars that say which token may come.

``constraint``: what a caller asks for, checked and bounded. ``lark``: its grammar as text, which is
all that travels. ``checker``: has it compiled once before anything runs, in a process that can be
killed (``compile_process``). ``matcher``: the state of one answer, on the rank that draws its
tokens. No torch in this folder, and llguidance only here.
"""
