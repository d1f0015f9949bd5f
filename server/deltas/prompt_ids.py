"""The token ids of prompts as they are run, for who asks for them beside the answers."""

import asyncio
from collections.abc import Sequence

from tightrope.engine.types import GenerateRequest
from tightrope.server.state import AppState


async def prompt_ids(front: AppState, requests: Sequence[GenerateRequest]) -> list[list[int]]:
    """Those of each prompt, in the order of the requests. Raises as `Engine.tokenize`."""
    asked = [front.engine.tokenize(one.prompt, one.adapter, last=one.truncate_to) for one in requests]
    return [list(tokens.ids) for tokens in await asyncio.gather(*asked)]
