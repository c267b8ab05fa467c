"""Masks against something independent: ``jsonschema``, Python's ``re``, and lists of texts."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence

import jsonschema
import pytest

from ds_cp.errors import RequestError
from ds_cp.grammar.checker import tokenizer_json
from ds_cp.grammar.compile_process import compile_one, vocabulary_of
from ds_cp.grammar.constraint import StructuredOutputsParams
from ds_cp.grammar.lark import Thought
from ds_cp.grammar.matcher import Compiler, GrammarError, Matcher
from ds_cp.grammar.messages import Compiled, Job
from ds_cp.grammar.vocabulary import Vocabulary
from tests.helpers.fake_engine import make_tokenizer
from tests.helpers.schemas import Schemas

ENDS = frozenset({0})  # the fake tokenizer's <|end|>
SCHEMAS = 500
EXPLODES = "(.*[a-m].{30})*"  # as an automaton it has 2**30 states
MOST = 600  # tokens of an answer


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return vocabulary_of(tokenizer_json(make_tokenizer()))


@pytest.fixture(scope="module")
def compiler(vocabulary: Vocabulary) -> Compiler:
    return Compiler(vocabulary)


def compiled(compiler: Compiler, **wish: object) -> Matcher:
    return compiler.compile(StructuredOutputsParams(**wish).source)  # type: ignore[arg-type]


def ids_in(mask: bytes) -> list[int]:
    return [8 * at + bit for at, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1]


def walk(matcher: Matcher, vocabulary: Vocabulary, rng: random.Random) -> str | None:
    """A random answer of the tokens that the masks allow; None for one that has not ended."""
    tokens = vocabulary.tokens()
    said = b""
    for _ in range(MOST):
        allowed = ids_in(matcher.allowed(ENDS))
        # Endings are taken where they come, and what is long is unlikely.
        token = 0 if 0 in allowed and rng.random() < 0.3 else rng.choice(allowed)
        if token in ENDS:
            return said.decode()
        assert token not in vocabulary.special
        said += tokens[token]
        matcher.advance([token], ENDS)
    return None


def spell(text: str, vocabulary: Vocabulary, rng: random.Random | None = None) -> list[int]:
    """A tokenization of a text: the longest tokens first, or any."""
    tokens = [(t, i) for i, t in enumerate(vocabulary.tokens()) if i not in vocabulary.special]
    left, ids = text.encode(), []
    while left:
        fits = sorted((t, i) for t, i in tokens if t and left.startswith(t))
        piece, token = rng.choice(fits) if rng else max(fits, key=lambda pair: len(pair[0]))
        ids.append(token)
        left = left[len(piece) :]
    return ids


def accepts(matcher: Matcher, ids: Sequence[int]) -> bool:
    """Whether the masks allow each of the tokens, and then the end."""
    for token in ids:
        if token not in ids_in(matcher.allowed(ENDS)):
            return False
        matcher.advance([token], ENDS)
    return 0 in ids_in(matcher.allowed(ENDS))


def test_random_answers_of_random_schemas_are_valid(
    compiler: Compiler, vocabulary: Vocabulary
) -> None:
    rng, schemas = random.Random(5), Schemas(5)
    unended = 0
    for number in range(SCHEMAS):
        schema = schemas.draw()
        answer = walk(compiled(compiler, json=schema), vocabulary, rng)
        if answer is None:
            unended += 1
            continue
        try:
            jsonschema.validate(json.loads(answer), schema)
        except (ValueError, jsonschema.ValidationError) as err:
            pytest.fail(f"schema {number} {json.dumps(schema)} has {answer!r}: {err}")
    assert unended <= SCHEMAS // 20


def test_valid_documents_are_allowed_however_they_are_spelled(
    compiler: Compiler, vocabulary: Vocabulary
) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "n": {"type": "integer"}},
        "required": ["name"],
        "additionalProperties": False,
    }
    rng = random.Random(1)
    for value in ({"name": "fox", "n": -12}, {"name": 'Größe 名 \U0001f600 " \\ /'}, {"name": ""}):
        for indent in (None, 2):
            text = json.dumps(value, indent=indent, ensure_ascii=False)
            for how in (None, rng, rng):
                ids = spell(text, vocabulary, how)
                assert accepts(compiled(compiler, json=schema), ids), text
    for text in (
        '{"n": 1}',
        '{"name": 1}',
        '{"name": "x", "m": 1}',
        '{"name": "x"',
        '{"name": "x"} ',
    ):
        assert not accepts(compiled(compiler, json=schema), spell(text, vocabulary)), text


def test_white_space_between_tokens_of_json_is_bounded_or_as_asked(
    compiler: Compiler, vocabulary: Vocabulary
) -> None:
    schema = {"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 1}

    def fine(text: str, **more: object) -> bool:
        matcher = compiled(compiler, json=schema, **more)
        return accepts(matcher, spell(text, vocabulary))

    assert fine(f"[{' ' * 80}null]") and not fine(f"[{' ' * 81}null]")
    assert fine("[null]", disable_any_whitespace=True)
    assert not fine("[ null]", disable_any_whitespace=True)
    assert fine("[\tnull]", whitespace_pattern=r"\t") and not fine(
        "[ null]", whitespace_pattern="\t"
    )


@pytest.mark.parametrize("regex", ["a+b", r"[a-f]{2,3}/\d", r"(x|yé)*\.", "[^q]{0,4}", r"a\/b|//"])
def test_answers_match_the_regex(regex: str, compiler: Compiler, vocabulary: Vocabulary) -> None:
    rng = random.Random(2)
    found = {walk(compiled(compiler, regex=regex), vocabulary, rng) for _ in range(30)}
    assert all(text is None or re.fullmatch(regex, text) for text in found)
    assert len(found - {None}) > 1


def test_every_choice_can_come_and_nothing_else(compiler: Compiler, vocabulary: Vocabulary) -> None:
    texts = ["yes", "no", "yes please", "né/\n", '"quoted"', "\\", "\U0001f600"]
    rng = random.Random(3)
    found = {walk(compiled(compiler, choice=texts), vocabulary, rng) for _ in range(300)}
    assert found == set(texts)


def test_tags_begin_at_their_trigger_and_hold_json_of_their_schema(
    compiler: Compiler, vocabulary: Vocabulary
) -> None:
    number = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"],
              "additionalProperties": False}  # fmt: skip
    begin, end = '<tool_call>{"name": "%s", "arguments": ', "}</tool_call>"
    structures = [
        {"begin": begin % "f", "schema": number, "end": end},
        {"begin": begin % "g", "schema": {"type": "object"}, "end": end},
    ]
    tag = {"triggers": ["<tool_call>"], "structures": structures}
    call_f = begin % "f" + '{"x": 3}' + end
    call_g = begin % "g" + '{"any": [1]}' + end
    bad = begin % "f" + '{"y": 3}' + end

    def fine(text: str, **more: object) -> bool:
        matcher = compiled(compiler, structural_tag=tag | more)
        return accepts(matcher, spell(text, vocabulary))

    for text in ("", "free <tool text", call_f, f"first {call_f}\nthen {call_g} done"):
        assert fine(text), text
    for text in (bad, f"x {bad}", "a <tool_call>", begin % "h" + "{}" + end):
        assert not fine(text), text
    assert fine(call_f, at_least=1) and fine(call_f + call_g, at_least=1)
    assert not fine("", at_least=1) and not fine("free " + call_f, at_least=1)
    assert fine(call_g, at_least=1, at_most=1)
    assert not fine(call_g + call_f, at_least=1, at_most=1)


def test_special_tokens_are_tokens_in_tags_and_after_reasoning(
    compiler: Compiler, vocabulary: Vocabulary
) -> None:
    """<|system|> (1) begins a call, <|user|> (2) ends reasoning: as text they come nowhere."""
    special = {"<|system|>": 1, "<|user|>": 2}
    tag = {
        "triggers": ["<|system|>"],
        "structures": [{"begin": '<|system|>{"f": ', "schema": {"type": "integer"}, "end": "}"}],
    }

    def said(*parts: int | str) -> list[int]:
        return [
            token
            for part in parts
            for token in ([part] if isinstance(part, int) else spell(part, vocabulary))
        ]

    def fine(ids: list[int], **wish: object) -> bool:
        return accepts(compiled(compiler, special_tokens=special, **wish), ids)

    call = (1, '{"f": 12}')
    assert fine(said("some text", *call, "more", *call), structural_tag=tag)
    assert fine(said('<|system|>{"f": x'), structural_tag=tag)  # it is text
    assert not fine(said(1, '{"f": x}'), structural_tag=tag)
    must = tag | {"at_least": 1}
    assert fine(said(*call, *call), structural_tag=must)
    assert not fine(said("text", *call), structural_tag=must)
    for wish in ({"regex": "[0-9]+"}, {"json": {"type": "integer"}}):
        assert fine(said("thinking 1 2", 2, "\n\n34"), thought=Thought("<|user|>"), **wish)
        assert not fine(said("thinking"), thought=Thought("<|user|>"), **wish)
        assert not fine(said(2, "thinking"), thought=Thought("<|user|>"), **wish)
        assert fine(said("hm</t>\n56"), thought=Thought("</t>"), **wish)
        assert not fine(said("hm</t>\n56</t>"), thought=Thought("</t>"), **wish)
    assert fine(said("hm", 2, *call), structural_tag=must, thought=Thought("<|user|>"))
    assert fine(
        said("hm", 2, "text", *call, "more"), structural_tag=tag, thought=Thought("<|user|>")
    )
    assert not fine(said("hm", *call), structural_tag=tag, thought=Thought("<|user|>"))


@pytest.mark.parametrize(("begin", "end"), [("<t>", "</t>"), ("<|system|>", "<|user|>")])
def test_reasoning_that_may_come_is_free_and_the_answer_behind_it_is_not(
    compiler: Compiler, vocabulary: Vocabulary, begin: str, end: str
) -> None:
    """The marks as text, and as special tokens (1 and 2)."""
    special = {"<|system|>": 1, "<|user|>": 2}

    def said(text: str) -> list[int]:
        ids: list[int] = []
        for part in re.split(r"(<\|system\|>|<\|user\|>)", text):
            ids += [special[part]] if part in special else spell(part, vocabulary)
        return ids

    def fine(text: str, or_begins: Sequence[str] = (), **thought: object) -> bool:
        wish = {"json": {"type": "integer"}, "special_tokens": special, "or_begins": or_begins}
        found = compiled(compiler, thought=Thought(end, **thought), **wish)
        return accepts(found, said(text))

    for text, may, must in (
        ("12", True, False),
        (f"{begin}hm 1 <b>{end}\n\n12", True, True),
        (f"hm{end}12", False, False),
        (f"{begin}hm{end}x", False, False),
        (f"{begin}hm", False, False),
    ):
        assert fine(text, begin=begin, optional=True) == may, text
        assert fine(text, begin=begin) == must, text
    assert fine(f"{begin}hm{end}to:12", begin=begin, optional=True, then="to:")
    assert fine("to:12", begin=begin, optional=True, then="to:")
    assert not fine("12", begin=begin, optional=True, then="to:")
    for text, may in (("call x", True), ("12", False), ("to:12", True), ("cal", False)):
        given = {"begin": begin, "optional": True, "then": "to:", "or_begins": ["call", "<c>"]}
        assert fine(text, **given) == may, text
        assert fine(f"{begin}hm{end}{text}", **given) == may, text


@pytest.mark.parametrize("at_least", [0, 1])
def test_tags_may_come_behind_reasoning_or_at_once(
    compiler: Compiler, vocabulary: Vocabulary, at_least: int
) -> None:
    tag = {"triggers": ["<c>"], "at_least": at_least, "structures": [
        {"begin": "<c>", "schema": {"type": "integer"}, "end": "</c>"}]}  # fmt: skip
    for thought in (Thought("</t>", "<t>", optional=True), Thought("</t>")):
        begin = thought.begin

        def fine(text: str) -> bool:
            found = compiled(compiler, structural_tag=tag, thought=thought)  # noqa: B023
            return accepts(found, spell(text, vocabulary))

        assert fine(f"{begin}say <b>x</b></t>\n<c>1</c>")
        assert fine("<c>1</c>") == thought.optional
        assert not fine(f"{begin}hm</t><c>x</c>") and not fine("<c>x</c>")
        assert fine(f"{begin}hm</t>text<c>1</c>") == (not at_least)


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= item ("," item)*\nitem ::= [0-9]+',
        'start: item ("," item)*\nitem: /[0-9]+/',
    ],
    ids=["gbnf", "lark"],
)
def test_grammars_of_callers(grammar: str, compiler: Compiler, vocabulary: Vocabulary) -> None:
    source = StructuredOutputsParams(grammar=grammar).source
    answer = compile_one(compiler, Job(source, True, 1.0, 1.0, 1 << 28))
    assert isinstance(answer, Compiled)
    assert accepts(compiler.compile(answer.source), spell("12,3,456", vocabulary))
    assert not accepts(compiler.compile(answer.source), spell("12,", vocabulary))


def test_end_tokens_come_only_where_the_answer_may_end(
    compiler: Compiler, vocabulary: Vocabulary
) -> None:
    """Also ones that are text: here "1", a stop token of the request."""
    (one,) = spell("1", vocabulary)
    ends = frozenset({0, one})
    matcher = compiled(compiler, regex="[0-9]{2,3}")
    (two,) = spell("2", vocabulary)
    assert one not in ids_in(matcher.allowed(ends)) and 0 not in ids_in(matcher.allowed(ends))
    matcher.advance([two], ends)
    assert not ends & set(ids_in(matcher.allowed(ends)))
    matcher.advance([two], ends)
    assert ends <= set(ids_in(matcher.allowed(ends)))
    matcher.advance([two], ends)
    assert set(ids_in(matcher.allowed(ends))) == ends
    matcher.advance([one], ends)  # the answer has ended: the step after is drawn all the same
    matcher.advance([two, two], ends)
    assert set(ids_in(matcher.allowed(ends))) == ends


def test_state_follows_from_the_tokens_alone(compiler: Compiler, vocabulary: Vocabulary) -> None:
    schema = Schemas(9)
    rng = random.Random(4)
    for _ in range(20):
        source = StructuredOutputsParams(json=schema.draw()).source
        one_by_one = compiler.compile(source)
        tokens: list[int] = []
        for _ in range(40):
            allowed = one_by_one.allowed(ENDS)
            again = compiler.compile(source)
            again.advance(tokens, ENDS)
            assert again.allowed(ENDS) == allowed
            token = rng.choice(ids_in(allowed))
            if token in ENDS:
                break
            tokens.append(token)
            one_by_one.advance([token], ENDS)


def test_a_token_that_the_grammar_does_not_allow_is_an_error_that_stays(
    compiler: Compiler, vocabulary: Vocabulary
) -> None:
    matcher = compiled(compiler, regex="[0-9]+")
    matcher.advance(spell("x", vocabulary), ENDS)
    for _ in range(2):
        with pytest.raises(GrammarError):
            matcher.allowed(ENDS)
        matcher.advance(spell("1", vocabulary), ENDS)


def test_a_vocabulary_that_cannot_spell_an_answer_is_an_error(vocabulary: Vocabulary) -> None:
    letters = Vocabulary.of([b"<end>", b"a", b"b"], [0])
    with pytest.raises(GrammarError, match="no token|NoExtension"):
        Compiler(letters).compile(StructuredOutputsParams(regex="[0-9]").source).allowed(ENDS)


def test_a_step_is_bounded() -> None:
    """A regex whose automaton is exponential ends its request; see ``limits``."""
    rng = random.Random(6)
    words = [bytes(rng.choices(b"amxyz", k=6)) for _ in range(4000)]
    matcher = compiled(Compiler(Vocabulary.of([b"<end>", *words], [0])), regex=EXPLODES)
    with pytest.raises(GrammarError, match="lexer error"):
        for _ in range(500):
            matcher.allowed(ENDS)
            matcher.advance([rng.randrange(1, 4000)], ENDS)


def test_compiled_grammars_are_kept_up_to_a_number(vocabulary: Vocabulary) -> None:
    small = Compiler(vocabulary, kept=2)
    sources = [StructuredOutputsParams(regex=f"a{{{n}}}").source for n in (1, 2, 3)]
    for source in (*sources, sources[0]):
        small.compile(source)
    assert list(small._compiled) == [sources[2], sources[0]]


def test_vocabulary_says_what_each_token_spells(vocabulary: Vocabulary) -> None:
    tokenizer = make_tokenizer()
    tokens = vocabulary.tokens()
    assert len(tokens) == len(tokenizer)
    (byte_255,) = set(vocabulary.special) - {0, 1, 2, 3}  # in no text
    assert tokenizer.convert_ids_to_tokens(byte_255) == "ÿ"
    for token in range(len(tokenizer)):
        if token not in vocabulary.special:
            text = tokenizer.decode([token])
            if "�" not in text:
                assert tokens[token] == text.encode()
    again = Vocabulary.of(tokens, vocabulary.special)
    assert again == vocabulary and vocabulary.size < 5000
    with pytest.raises(ValueError, match="65536 bytes"):
        Vocabulary.of([b"x" * 65536], [])


def test_keywords_that_cannot_be_kept_are_refused_unless_lenient(compiler: Compiler) -> None:
    for schema in (
        {"type": "array", "uniqueItems": True, "items": {"type": "integer"}},
        {"not": {"type": "string"}},
        {"type": "string", "format": "no-such-format"},
        {"oneOf": [{"type": "object"}, {"type": "object", "required": ["a"]}]},
        {"if": {"type": "integer"}, "then": {"minimum": 3}},
    ):
        with pytest.raises(GrammarError):
            compiled(compiler, json=schema)
        compiled(compiler, json=schema, lenient=True)
    with pytest.raises(GrammarError, match="http://example.com"):
        compiled(compiler, json={"$ref": "http://example.com/schema.json"}, lenient=True)
    with pytest.raises(RequestError):
        compiled(compiler, json=False)
