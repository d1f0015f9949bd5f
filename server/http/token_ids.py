"""Token ids in bodies and answers, in shapes that several families share."""

from typing import Annotated, Literal

from fastapi import Response
from pydantic import BaseModel, Field

from tightrope.engine.types import TokenRun
from tightrope.server.fields.numbers import MAX_INT
from tightrope.server.http.body import Body, FirstErrorOnly
from tightrope.server.http.long_lists import json_answer, json_list

Ids = Annotated[list[Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)]], FirstErrorOnly()]


class DecodeBody(Body):
    """POST /v1/token/decode."""

    tokens: Ids
    decode_special_tokens: Literal[True] = Field(True, description="Special tokens keep their text.")


class Encoded(BaseModel):
    tokens: list[int]
    length: int


async def encoded(tokens: TokenRun) -> Response:
    """Token ids as an Encoded."""
    return json_answer({"tokens": await json_list(tokens.ids), "length": len(tokens)})


class Decoded(BaseModel):
    text: str
