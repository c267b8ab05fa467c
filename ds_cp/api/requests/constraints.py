"""What an answer must look like, as clients say it: OpenAI's ``response_format``, and vLLM's
``structured_outputs`` with its older ``guided_*`` fields, as one ``StructuredOutputsParams``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field, PrivateAttr, field_validator, model_validator

from ds_cp.api.errors import FieldError, shown
from ds_cp.api.requests.strict_model import StrictModel
from ds_cp.errors import RequestError
from ds_cp.grammar.constraint import FIELD, StructuredOutputsParams, as_params
from ds_cp.grammar.limits import MAX_CHOICES

GUIDED = {  # vLLM's older field -> field of ``structured_outputs``
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
FIELDS = ("response_format", FIELD, *GUIDED)
MAX_KEYS = 64  # keys of these objects themselves, not of what is in them
MAX_NAME_CHARS = 64  # characters of a schema's name, as OpenAI has it


class ConstrainedRequest(StrictModel):
    """The fields that say what an answer must look like; at most one of them."""

    response_format: dict[str, Any] | None = Field(
        None,
        max_length=MAX_KEYS,
        description="type text, json_object, json_schema (strict: kept exactly), structural_tag",
    )
    structured_outputs: dict[str, Any] | None = Field(
        None,
        max_length=MAX_KEYS,
        description="one of json, regex, choice, grammar, json_object, structural_tag",
    )
    guided_json: str | dict[str, Any] | None = Field(None, description="structured_outputs.json")
    guided_regex: str | None = Field(None, description="structured_outputs.regex")
    guided_choice: list[str] | None = Field(
        None, max_length=MAX_CHOICES, fail_fast=True, description="structured_outputs.choice"
    )
    guided_grammar: str | None = Field(None, description="structured_outputs.grammar")

    @field_validator(
        "guided_json", mode="plain", json_schema_input_type=str | dict[str, Any] | None
    )
    @classmethod
    def _guided_json(cls, value: Any) -> Any:
        """Its size is looked at before what is in it, which ``StructuredOutputsParams`` checks."""
        if value is not None and not isinstance(value, str | dict):
            raise FieldError("guided_json must be a JSON schema: an object, or its text")
        if isinstance(value, dict) and len(value) > MAX_KEYS:
            raise FieldError(f"guided_json has {len(value)} keys; at most {MAX_KEYS}")
        return value

    _constraint: StructuredOutputsParams | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _find_constraint(self) -> ConstrainedRequest:
        self._constraint = constraint_of({name: getattr(self, name) for name in FIELDS})
        return self

    @property
    def constraint(self) -> StructuredOutputsParams | None:
        """What these fields ask for; None for free text."""
        return self._constraint


def constraint_of(given: Mapping[str, Any]) -> StructuredOutputsParams | None:
    """The constraint that a body's ``FIELDS`` spell; None for free text. Raises ``FieldError`` that
    names the field."""
    found: list[StructuredOutputsParams] = []
    for field in FIELDS:
        value = given.get(field)
        if value in (None, {}, [], ""):
            continue
        try:
            wish = _wish(field, value)
        except RequestError as err:
            message = str(err)
            if field != FIELD:
                message = re.sub(rf"\b{FIELD}(\.|: )", f"{field}: ", message)
            raise FieldError(message, field) from None
        if wish is not None:
            found.append(replace(wish, asked_as=field))
    if len(found) > 1:
        one, other = found[0].asked_as, found[1].asked_as
        raise FieldError(f"{one} and {other} both say what the answer is; send one", other)
    return found[0] if found else None


def constraint_as(field: str, response_format: Mapping[str, Any]) -> StructuredOutputsParams | None:
    """The constraint that a ``field`` of another protocol asks for, spelt as ``response_format``;
    None for free text. Raises ``FieldError`` that names the field."""
    try:
        found = constraint_of({"response_format": response_format})
    except FieldError as err:
        message = str(err).replace("response_format.json_schema", field)
        raise FieldError(message.replace("response_format", field), field) from None
    return None if found is None else replace(found, asked_as=field)


def _wish(field: str, value: Any) -> StructuredOutputsParams | None:
    if field == "response_format":
        return _response_format(value)
    if field == FIELD:
        return as_params(value)
    return as_params({GUIDED[field]: value})


def _response_format(value: Any) -> StructuredOutputsParams | None:
    """``{"type": "text" | "json_object" | "json_schema" | "structural_tag", ..}``.

    ``json_schema`` with ``strict`` true is kept exactly or refused by name; else keywords that
    cannot be kept are left out, as OpenAI does.
    """
    if not isinstance(value, Mapping):
        raise FieldError("response_format must be an object with a type", "response_format")
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if kind == "structural_tag":
        tag = {name: each for name, each in value.items() if name != "type"}
        return StructuredOutputsParams(structural_tag=tag)
    if kind != "json_schema":
        raise FieldError(
            "response_format.type must be text, json_object, json_schema or structural_tag, "
            f"not {shown(kind)}",
            "response_format",
        )
    named = value.get("json_schema")
    if not isinstance(named, Mapping):
        raise FieldError(
            "response_format.json_schema must be an object with a name and a schema",
            "response_format",
        )
    name, strict, schema = named.get("name"), named.get("strict"), named.get("schema")
    if name is not None and not (isinstance(name, str) and 1 <= len(name) <= MAX_NAME_CHARS):
        raise FieldError(
            f"response_format.json_schema.name must be a string of 1 to {MAX_NAME_CHARS} "
            "characters",
            "response_format",
        )
    if strict is not None and not isinstance(strict, bool):
        raise FieldError(
            "response_format.json_schema.strict must be true or false", "response_format"
        )
    if schema is None:
        return StructuredOutputsParams(json_object=True)
    if not isinstance(schema, Mapping):
        raise FieldError(
            "response_format.json_schema.schema must be a JSON schema: an object",
            "response_format",
        )
    return StructuredOutputsParams(json=schema, lenient=not strict)
