"""The bounds of structured output: sizes of what is asked for, and what compiling it and one step
of it may take."""

from __future__ import annotations

MAX_SOURCE_BYTES = 128 * 1024  # bytes of one grammar's text; it travels in the plan of its request
MAX_GRAMMAR_BYTES = 2 * MAX_SOURCE_BYTES  # of it as ranks compile it, once it was converted
MAX_DEPTH = 100  # levels of nested objects and lists in a JSON schema
MAX_VALUES = 2**16  # values in a JSON schema, of any kind
MAX_ENUM = 10_000  # values of all enums of one schema
MAX_CHOICES = 10_000  # strings to choose from
MAX_REGEX_CHARS = 8192  # characters of one regex
MAX_REPEAT = 10_000  # times that a regex or grammar repeats something, as {n,m} says
MAX_TAGS = 256  # tags and triggers of one request
MAX_WHITESPACE = 80  # characters of white space between two tokens of JSON, unless asked otherwise

# Of one compilation, in a process that the kernel ends.
COMPILE_CPU_S = 2.0  # seconds of computing; 100 KiB of JSON schema take 0.1 s
COMPILE_BYTES = 512 * 2**20  # bytes of memory beside the tokenizer

# The library walks a grammar by recursion, and a stack that overflows ends its process. What fits
# in the first stack, in a process of its own, fits in the second one on a rank.
COMPILE_STACK_BYTES = 2 * 2**20
RANK_STACK_BYTES = 16 * 2**20

# Of the library. Fuel and items are its own units of work, the same on every machine.
INITIAL_FUEL = 1_000_000  # for the regexes of a grammar; 50,000 take a millisecond
STEP_FUEL = 200_000  # for one mask; 14,000 take a millisecond
STEP_ITEMS = 50_000  # Earley items of one mask; 20,000 take a millisecond
ROW_ITEMS = 2_000  # Earley items at one position
LEXER_STATES = 50_000  # states of one grammar's lexer; each has 1 to 2 KiB
GRAMMAR_SYMBOLS = 500_000  # symbols in all rules

KEPT_CHECK_BYTES = 32 * 2**20  # bytes of the grammars whose check is remembered on rank 0
KEPT_GRAMMARS = 32  # compiled grammars that a rank keeps for later requests
