"""Text to token ids and back. One path serves several dialects, told apart by the key that is present."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, Tag

from tightrope.engine.types import ModelInfo, Span, TextPrompt, Token
from tightrope.server.chats.offers import offer_of
from tightrope.server.chats.tools import check_tools
from tightrope.server.dialects.openai.reading import rendered_chat
from tightrope.server.dialects.openai.requests import ChatRequest, SamplingBody
from tightrope.server.dialects.tgi.requests import GenerateBody
from tightrope.server.fields import structured
from tightrope.server.fields.names import KNOWN
from tightrope.server.fields.numbers import MAX_INT
from tightrope.server.http.body import Body, JsonRoute, by_key
from tightrope.server.http.error_docs import STATUS_ERRORS, TGI_ERRORS, only
from tightrope.server.http.long_lists import json_answer, json_list
from tightrope.server.http.token_ids import Ids
from tightrope.server.served import check_model
from tightrope.server.state import AppState


class TokenizeText(Body):
    """vLLM's form."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = Field(None, ge=1, le=MAX_INT, description="Keep the last n.")
    return_token_strs: bool = False


class CountedChat(ChatRequest):
    """A chat of which only the prompt matters, TGI's form: how its answer is to be written changes nothing."""

    without_effect = frozenset(
        {*KNOWN, *structured.NAMES, *SamplingBody.model_fields, "logprobs", "top_logprobs", "parallel_tool_calls"}
        | {"include_reasoning", "reasoning_format", "thinking_token_budget", "thinking_budget"}
        - {"truncate_prompt_tokens"}
    )


class TokenizeChat(CountedChat):
    """vLLM's form for a chat: `count` is what its prompt will be."""

    without_effect = CountedChat.without_effect - {"model"}

    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeInputs(GenerateBody):
    """TGI's form, the body of a request to generate."""

    without_effect = frozenset({"parameters", "explain", "model"})


class TokenizeContent(Body):
    """llama-server's form."""

    content: str
    add_special: bool = False
    parse_special: bool = Field(True, description="Whether the text of special tokens becomes those tokens.")
    with_pieces: bool = Field(False, description="List each token's text beside its id.")


TokenizeBody = Annotated[
    Annotated[TokenizeInputs, Tag("<inputs>")]
    | Annotated[TokenizeChat, Tag("<messages>")]
    | Annotated[TokenizeText, Tag("<prompt>")]
    | Annotated[TokenizeContent, Tag("<content>")],
    by_key("inputs", "messages", "prompt", "content"),
]


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Ids


class Tokenized(BaseModel):
    """vLLM's answer."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TokenPlace(BaseModel):
    """TGI's answer for one token; start and stop are byte offsets into the input."""

    id: int
    text: str
    start: int
    stop: int


class TokenPiece(BaseModel):
    """piece: the token's text, or its bytes where they are no text by themselves."""

    id: int
    piece: str | list[int]


class TokenIds(BaseModel):
    """llama-server's answer."""

    tokens: list[int] | list[TokenPiece]


class ChatTokenized(BaseModel):
    """TGI's answer for a chat: the tokens of its prompt, and the prompt."""

    tokenize_response: list[TokenPlace]
    templated_text: str


class TokenizerInfo(BaseModel):
    """What lm-evaluation-harness and others read of tokenizer_config.json."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    additional_special_tokens: list[str]
    model_max_length: int
    chat_template: str


class Detokenized(BaseModel):
    """The text, special tokens kept, under vLLM's name and llama-server's."""

    prompt: str
    content: str


def places(tokens: Iterable[Token], inputs: str) -> Iterator[dict[str, str | int]]:
    """Where each token lies in `inputs`, as TokenPlace has it. A BOS put in front, or a space, has no bytes there."""
    raw, start = inputs.encode(), 0
    for token in tokens:
        piece = token.raw
        if not raw.startswith(piece, start):
            piece = piece[1:] if piece[:1] == b" " and raw.startswith(piece[1:], start) else b""
        stop = start + len(piece)
        text = raw[start:stop].decode("utf-8", "replace")
        yield {"id": token.token_id, "text": text, "start": start, "stop": stop}
        start = stop


def _piece(token: Token) -> dict[str, object]:
    """As TokenPiece has it."""
    try:
        return {"id": token.token_id, "piece": token.raw.decode()}
    except UnicodeDecodeError:
        return {"id": token.token_id, "piece": list(token.raw)}


def _tokenizer_info(info: ModelInfo, template: str) -> TokenizerInfo:
    return TokenizerInfo(
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=info.bos_token,
        eos_token=info.eos_token,
        pad_token=None,
        additional_special_tokens=list(info.special_texts),
        model_max_length=info.max_model_len,
        chat_template=template,
    )


def tokenize_router(front: AppState) -> APIRouter:
    """POST /tokenize and /detokenize, with and without /v1."""
    router = APIRouter(route_class=JsonRoute, tags=["tokens"])
    documented = only(400, 401, 404, 413, 503, "default")

    shared = {**documented, 422: TGI_ERRORS[422], 424: TGI_ERRORS[424]}

    answers = Tokenized | list[TokenPlace] | TokenIds

    @router.post("/tokenize", responses=shared, response_model=answers)
    @router.post("/v1/tokenize", responses=documented, response_model=answers)
    async def tokenize(body: TokenizeBody, request: Request) -> Tokenized | list[TokenPlace] | TokenIds | Response:
        """The token ids of a text or a chat."""
        chosen = await front.at(request, body.named_model)
        if isinstance(body, TokenizeInputs):
            tokens = await chosen.engine.tokenize(TextPrompt((Span(body.inputs),)))
            return json_answer(await json_list(places(tokens, body.inputs)))
        if isinstance(body, TokenizeContent):
            span = Span(body.content, body.parse_special)
            tokens = await chosen.engine.tokenize(TextPrompt((span,), body.add_special))
            if body.with_pieces:
                return json_answer({"tokens": await json_list(map(_piece, tokens))})
            return json_answer({"tokens": await json_list(tokens.ids)})
        served = chosen.served()
        check_model(body.model, served)
        if isinstance(body, TokenizeChat):
            check_tools(offer_of(body))
            prompt = TextPrompt((await rendered_chat(chosen, body, request)).prompt.spans, body.add_special_tokens)
        else:
            prompt = TextPrompt((Span(body.prompt),), body.add_special_tokens)
        tokens = await chosen.engine.tokenize(prompt, last=body.truncate_prompt_tokens)
        texts = await json_list(token.text for token in tokens) if body.return_token_strs else None
        counted = {"count": len(tokens), "max_model_len": served.info.max_model_len}
        return json_answer(counted | {"tokens": await json_list(tokens.ids), "token_strs": texts})

    @router.post("/chat_tokenize", responses=TGI_ERRORS, response_model=ChatTokenized)
    async def chat_tokenize(body: CountedChat, request: Request) -> Response:
        """The tokens of a chat's prompt, as TGI lists them, and the prompt."""
        check_tools(offer_of(body))
        chosen = await front.at(request, body.named_model)
        spans = (await rendered_chat(chosen, body, request)).prompt.spans
        text = "".join(span.text for span in spans)
        tokens = await chosen.engine.tokenize(TextPrompt(spans, body.add_special_tokens))
        num_cut = 0 if (last := body.truncate_prompt_tokens) is None else max(0, len(tokens) - last)
        found = await json_list(islice(places(tokens, text), num_cut, None))
        return json_answer({"tokenize_response": found, "templated_text": text})

    @router.get("/tokenizer_info", responses=STATUS_ERRORS)
    async def tokenizer_info() -> TokenizerInfo:
        """The model's special tokens and its chat template, as in a tokenizer_config.json."""
        return _tokenizer_info(front.info(), front.template().source)

    @router.post("/detokenize", responses=documented)
    @router.post("/v1/detokenize", responses=documented)
    async def detokenize(body: DetokenizeBody, request: Request) -> Detokenized:
        """The text of token ids."""
        chosen = await front.at(request, body.named_model)
        check_model(body.model, chosen.served())
        text = await chosen.engine.detokenize(body.tokens)
        return Detokenized(prompt=text, content=text)

    return router
