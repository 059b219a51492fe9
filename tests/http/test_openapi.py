"""The document at /openapi.json: complete, true of what fields are accepted, and borne out by random requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from triptych.client.openai_api import Service, ShimOptions, create_app, fields
from triptych.client.openai_api.schemas import MESSAGE, PART, chat_body, sampling
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.tools import TURN_FIELDS

NAME = "tiny-omni"
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "f"}}
# What some fields need beside them.
BESIDE: dict[str, dict[str, Any]] = {
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
    "tool_choice": {"tools": [TOOL]},
    "continue_final_message": {"messages": [{"role": "assistant", "content": "hi"}]},
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """As the application gives it, without a server behind it."""
    app = create_app(Service(ShimOptions("m")))

    async def get() -> dict[str, Any]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            found: dict[str, Any] = (await client.get("/openapi.json")).json()
            return found

    return asyncio.run(get())


def accepts(name: str, value: Any) -> TriptychError | None:
    """What is said against a field with this value, or None."""
    try:
        fields.parse(json.dumps(BODY | BESIDE.get(name, {}) | {name: value}).encode(), "m", 10.0)
    except TriptychError as error:
        return error
    return None


def simple_values(schema: dict[str, Any]) -> Iterator[tuple[Any, bool]]:
    """(value, whether it fits) at the bounds of a schema."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    for item in schema.get("enum", ()):
        yield item, True
    if "enum" in schema:
        yield "no such value", False
    elif kinds:
        examples = {"null": None, "boolean": True, "string": "x", "integer": 3, "object": {}, "array": []}
        for kind, example in examples.items():
            if kind not in kinds and not (kind == "integer" and "number" in kinds):
                yield example, False
    if "null" in kinds:
        yield None, True
    if "boolean" in kinds:
        yield from ((True, True), (False, True))
    for bound, step in (("minimum", -1), ("maximum", 1)):
        if bound in schema:
            yield schema[bound], True
            yield schema[bound] + step, False
    if "exclusiveMinimum" in schema:
        yield schema["exclusiveMinimum"], False
    if "maxLength" in schema:
        yield "x" * schema["maxLength"], True
        yield "x" * (schema["maxLength"] + 1), False
    if "minLength" in schema:
        yield "", False
    if "maxItems" in schema and schema.get("items"):
        yield [None] * (schema["maxItems"] + 1), False


def test_the_body_of_a_chat_has_the_fields_that_are_accepted() -> None:
    known = {*fields._OWN, *fields._SAMPLING, *fields.NEUTRAL}
    assert set(chat_body()["properties"]) == known
    neutral = {name for name, schema in chat_body()["properties"].items() if schema.get("x-no-effect")}
    assert neutral == set(fields.NEUTRAL)
    assert all(len(schema["description"].split()) > 2 for schema in sampling().values())
    assert isinstance(error := accepts("no_such_field", 1), TriptychError)
    assert "unknown field" in error.message


@pytest.mark.parametrize("name", sorted(set(chat_body()["properties"]) - {"model", "messages"}))
def test_a_field_takes_what_the_document_says(name: str) -> None:
    schema = chat_body()["properties"][name]
    tried = 0
    for form in schema.get("anyOf", schema.get("oneOf", [schema])):
        for value, fits in simple_values(form):
            # of several forms another one may take it
            if fits or form is schema:
                tried += 1
                error = accepts(name, value)
                assert (error is None) == fits, (name, value, error)
                assert fits or (error is not None and (error.param or "").startswith(name)), (name, value, error)
    assert tried


def test_messages_have_the_fields_that_are_accepted() -> None:
    assert {"role", "content", *TURN_FIELDS} <= set(MESSAGE["properties"])
    for name in MESSAGE["properties"]:
        message = {"role": "user", "content": "hi", name: None} | ({name: "user"} if name == "role" else {})
        error = accepts("messages", [message])
        assert error is None or "unknown" not in error.message, name
    assert "unknown" in str(accepts("messages", [{"role": "user", "content": "hi", "more": 1}]))
    for part in PART["oneOf"]:
        kind = part["properties"]["type"]["const"]
        error = accepts("messages", [{"role": "user", "content": [{"type": kind}]}])
        assert error is None or f".{kind}" in str(error.param), (kind, error)
        error = accepts("messages", [{"role": "user", "content": [{"type": kind, "more": 1}]}])
        assert error is not None
        assert "unknown" in error.message


def test_every_route_is_described(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    wanted = {
        *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/v1/models/{name}"),
        *("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/speech", "/v1/images/generations"),
        *("/tokenize", "/detokenize", "/generate", "/health", "/ready", "/live", "/version", "/metrics"),
    }
    assert wanted <= set(document["paths"])
    for path, item in document["paths"].items():
        for method, operation in item.items():
            where = f"{method} {path}"
            assert operation["summary"], where
            assert operation["tags"], f"{where} is not described; see documentation.py"
            assert "content" in operation["responses"]["200"] or path in ("/health_generate", "/abort_request"), where
            assert "422" not in operation["responses"], where
            for status, answer in operation["responses"].items():
                assert answer["description"], (where, status)
            if method == "post" and "requestBody" in operation:
                assert {"400", "413", "415"} <= set(operation["responses"]), where


def test_errors_of_the_application_are_in_the_document(document: dict[str, Any]) -> None:
    """Every kind of error that an endpoint can answer with is one that the document names."""
    statuses = {kind.status for kind in ErrorKind}
    named = set(map(int, document["paths"]["/v1/chat/completions"]["post"]["responses"]))
    assert statuses <= named


def test_every_endpoint_takes_the_fields_that_it_names(server: Any, document: dict[str, Any]) -> None:
    """Who sends an unknown field is told all that there are: the document has the same."""
    wrong = {}
    for path, item in document["paths"].items():
        forms = item.get("post", {}).get("requestBody", {"content": {}})["content"]
        if "Not here" in item.get("post", {}).get("tags", ()) or not forms:
            continue
        [(media_type, form)] = forms.items()
        named = set(form["schema"]["properties"])
        odd = "qqqqqqqq"
        if media_type == "application/json":
            answer = httpx.post(server.url + path, json={odd: 1}, trust_env=False)
        else:
            answer = httpx.post(server.url + path, data={odd: "1"}, files={"file": b"x"}, trust_env=False)
        assert answer.status_code == 400, (path, answer.text)
        assert odd in answer.text, (path, answer.text)
        known = set(answer.text.partition("allowed: ")[2].partition('"')[0].split(", "))
        # fields that are refused by name, with a reason
        refused = {"timestamp_granularities", "chunking_strategy"} if media_type != "application/json" else set()
        if known - refused != named:
            wrong[path] = {"not in the document": known - refused - named, "not accepted": named - known}
    assert not wrong


def tame(value: Any) -> Any:
    """A random body that asks for this server's model and for little of it."""
    limits = {"max_tokens": 3, "max_completion_tokens": 3, "max_output_tokens": 16, "max_new_tokens": 3, "n": 2}
    limits |= {"best_of": 2, "min_tokens": 1, "min_new_tokens": 1}
    if isinstance(value, dict):
        return {
            key: min(item, limits[key]) if key in limits and type(item) is int else tame(item)
            for key, item in value.items()
        }
    return [tame(item) for item in value] if isinstance(value, list) else value


CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
def test_random_requests_get_what_the_document_says(server: Any, mode: GenerationMode) -> None:
    """No 5xx, no status, type or form of an answer that is not in the document: for every endpoint that there is."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    tried = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        body = operation.definition.raw.get("requestBody", {"content": {}})["content"]
        takes_anything = not any(form["schema"] for form in body.values())
        if mode is GenerationMode.NEGATIVE and takes_anything:
            continue

        @settings(
            max_examples=5,
            phases=[Phase.generate],
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def attempt(case: Any) -> None:
            if isinstance(case.body, dict):
                body = tame(case.body)
                if mode is GenerationMode.POSITIVE and "model" in body:
                    body["model"] = NAME
                for limit in ("max_tokens", "max_output_tokens"):
                    if limit in case.operation.body[0].optimized_schema.get("properties", {}):
                        body.setdefault(limit, 16)
                case.body = body
            case.call_and_validate(checks=CHECKS, timeout=120)

        attempt()
        tried.add(operation.label)
    assert len(tried) > 5
    assert server.ask().status_code == 200
