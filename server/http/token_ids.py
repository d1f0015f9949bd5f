"""Token ids in bodies and answers, in shapes that several families share."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from tightrope.server.fields.numbers import MAX_INT
from tightrope.server.http.body import Body, FirstErrorOnly

Ids = Annotated[list[Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)]], FirstErrorOnly()]


class DecodeBody(Body):
    """POST /v1/token/decode."""

    tokens: Ids
    decode_special_tokens: Literal[True] = Field(True, description="Special tokens keep their text.")


class Encoded(BaseModel):
    tokens: list[int]
    length: int


class Decoded(BaseModel):
    text: str
