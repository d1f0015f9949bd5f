"""What all dialects do to have texts embedded or ranked: the model found, bounds kept, the client watched."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import Request

from tightrope.backends.embedding.card import Cut, EmbedderCard, Kind
from tightrope.engine.embedding.protocol import Text, Vectors, Wanted
from tightrope.engine.errors import InvalidRequest, ModelNotFound
from tightrope.server.http.body import FirstErrorOnly
from tightrope.server.http.errors import NotServed
from tightrope.server.http.hangup import or_gone
from tightrope.server.http.token_ids import Ids
from tightrope.server.served import LATEST
from tightrope.server.state import AppState

MAX_TEXTS = 2048  # OpenAI's own bound.
MAX_NUMBERS = 1 << 22  # All vectors of a request are held until it is answered, as text of some 20 bytes a number.
CUT: dict[bool, Cut] = {True: "end", False: "no"}  # What a field called truncate means.
EUCLID, AS_THEY_ARE = 2, -1  # Norms; see engine.embedding.texts.
_OPTION = "--embedding-model"
_WORDS: dict[Kind, str] = {"embedding": "an embedding model", "reranking": "a reranking model"}

# A text or its token ids, or a list of either.
Inputs = str | Annotated[list[str], FirstErrorOnly()] | Ids | Annotated[list[Ids], FirstErrorOnly()]


@dataclass(frozen=True, slots=True)
class Ranked:
    """One text's place among those of a request, and its logit."""

    index: int
    logit: float

    @property
    def score(self) -> float:
        """From 0 to 1."""
        return 1 / (1 + math.exp(-max(-700.0, min(700.0, self.logit))))


def texts_of(inputs: Inputs, name: str) -> list[Text]:
    """One text for each that is given. Raises InvalidRequest, by the field's name, where there is none."""
    if isinstance(inputs, str):
        return [inputs]
    if not inputs:
        raise InvalidRequest(f"{name}: must not be empty", name)
    if isinstance(inputs[0], int):
        return [tuple(number for number in inputs if isinstance(number, int))]
    return [item if isinstance(item, str) else tuple(item) for item in inputs if not isinstance(item, int)]


def model_of(front: AppState, kind: Kind, name: str | None) -> tuple[int, EmbedderCard]:
    """The model of a kind that a request's `model` means: the first one, where its name is nobody's.

    Raises NotServed without one, EngineUnavailable while it is loaded, ModelNotFound where names have to fit.
    """
    embedder = front.embedder
    if not embedder.is_there:
        raise NotServed(f"this server has no model for that; start it with {_OPTION} and {_WORDS[kind]}")
    embedder.check_ready()
    cards = [(place, card) for place, card in enumerate(embedder.cards) if card.kind == kind]
    if not cards:
        raise NotServed(f"{_OPTION} names no model for that; name {_WORDS[kind]} with it, beside the other")
    for place, card in cards:
        if name is not None and card.model_id in (name, name.removesuffix(LATEST)):
            return place, card
    if front.settings.any_model_name is False and name not in (None, ""):
        raise ModelNotFound(f"The model `{name}` does not exist.", "model")
    return cards[0]


async def embed(
    front: AppState,
    request: Request,
    texts: Sequence[Text],
    *,
    model: str | None,
    cut: Cut,
    dimensions: int | None = None,
    norm: int = EUCLID,
    prompt_name: str | None = None,
) -> tuple[EmbedderCard, Vectors]:
    """Vectors of texts. Raises EngineError, ClientGone when the client hangs up meanwhile."""
    place, card = model_of(front, "embedding", model)
    _check_count(len(texts), card.dimensions)
    check_dimensions(dimensions, card)
    front_text = _prompt(prompt_name, card)
    texts = [front_text + text if isinstance(text, str) else text for text in texts] if front_text else texts
    wanted = Wanted(place, cut=cut, dimensions=dimensions, norm=norm)
    return card, await or_gone(request, front.embedder.embed(texts, wanted))


async def rank(
    front: AppState, request: Request, query: str, texts: Sequence[str], *, model: str | None, cut: Cut
) -> tuple[EmbedderCard, list[Ranked], int]:
    """The texts' places and scores, the best first, and the number of tokens that were read. Raises as `embed`."""
    place, card = model_of(front, "reranking", model)
    _check_count(len(texts), 1)
    found = await or_gone(request, front.embedder.embed(texts, Wanted(place, query=query, cut=cut)))
    ranked = [Ranked(index, found.floats(index)[0]) for index in range(len(texts))]
    return card, sorted(ranked, key=lambda one: -one.logit), sum(found.num_tokens)


def check_dimensions(dimensions: int | None, card: EmbedderCard) -> None:
    """Raises InvalidRequest for a length that vectors of this model can't be cut to."""
    if dimensions is None or dimensions == card.dimensions:
        return
    if not card.is_nested:
        raise InvalidRequest(
            f"dimensions: {card.model_id} was not trained for shorter vectors; they have {card.dimensions} numbers",
            "dimensions",
        )
    if dimensions > card.dimensions:
        raise InvalidRequest(f"dimensions: at most {card.dimensions}, not {dimensions}", "dimensions")


def _check_count(num_texts: int, dimensions: int) -> None:
    most = min(MAX_TEXTS, max(1, MAX_NUMBERS // dimensions))
    if num_texts > most:
        raise InvalidRequest(f"{num_texts} texts are too many for one request; it may have {most}", "input")


def _prompt(name: str | None, card: EmbedderCard) -> str:
    """The text that stands in front of each."""
    if name is None:
        return "" if card.default_prompt is None else card.prompts[card.default_prompt]
    if name not in card.prompts:
        known = ", ".join(card.prompts) or "none"
        raise InvalidRequest(f"prompt_name: {name:.60} is no prompt of {card.model_id}; it has {known}", "prompt_name")
    return card.prompts[name]
