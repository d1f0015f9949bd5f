"""The front asks nothing of an engine beyond the protocol: it serves one without a model, a process or a thread."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from types import MappingProxyType

import httpx
import pytest
from one_model import front_of_one

from tightrope.engine.errors import InvalidRequest
from tightrope.engine.protocol import Engine, FindMarks
from tightrope.engine.types import (
    Delta,
    Finish,
    GenerateRequest,
    ModelInfo,
    Prompt,
    PromptInfo,
    Stats,
    TextPrompt,
    Timings,
    TokenPiece,
    TokenRun,
)
from tightrope.server.app import create_app
from tightrope.server.settings.settings import ServerSettings

pytestmark = pytest.mark.quick

INFO = ModelInfo("echo", "none", "none", 256, 1024, 1024, 1024, "f16", 1, None, None, (), None, ())


class Echo:
    """Its answer is the prompt. Bytes are tokens."""

    info: ModelInfo | None = None
    adapters: Mapping[str, str] = MappingProxyType({})
    stats = Stats(steps=7)
    is_healthy = True
    restarts = num_running = num_waiting = retry_after_s = private_bytes = 0
    load_share = 0.0
    is_closed = False

    async def start(self, find_marks: FindMarks | None = None) -> None:
        assert find_marks is not None
        await find_marks(INFO)
        self.info = INFO

    async def wait_ready(self) -> ModelInfo:
        return INFO

    async def wait_failed(self) -> str:
        raise AssertionError("nobody is to wait for the failure of an engine that serves")

    async def close(self) -> None:
        self.is_closed = True

    def check_room(self, num_coming: int = 0) -> None:
        return

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        run = await self.tokenize(request.prompt)
        finish = Finish("eos", len(run), Timings(0.0, 0.0, 0.0))
        prompt, text = PromptInfo(len(run), 0, 0), await self.detokenize(run.ids)
        yield Delta(request.request_id, 0, text, (), prompt, finish)

    async def tokenize(self, prompt: Prompt, adapter: str | None = None, *, last: int | None = None) -> TokenRun:
        assert isinstance(prompt, TextPrompt)
        ids = list("".join(span.text for span in prompt.spans).encode())
        return TokenRun.of(ids, lambda i: TokenPiece(bytes([i]), False))

    async def detokenize(self, token_ids: Sequence[int], adapter: str | None = None) -> str:
        return bytes(token_ids).decode()

    async def load_adapter(self, name: str, path: str, *, in_place: bool = False) -> None:
        raise InvalidRequest("there is no model to put it beside")

    async def unload_adapter(self, name: str) -> None:
        return


async def test_an_engine_is_whatever_keeps_the_protocol() -> None:
    echo = Echo()
    engine: Engine = echo
    app = create_app(front_of_one(engine, ServerSettings()))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as http,
    ):
        assert (await http.get("/health")).status_code == 200
        assert "tgi_batch_inference_count 7" in (await http.get("/metrics")).text
        completion = (await http.post("/v1/completions", json={"prompt": "back to me"})).json()
        assert completion["choices"][0]["text"] == "back to me"
        assert (await http.post("/generate", json={"inputs": "and me"})).json()["generated_text"] == "and me"
        tokens = (await http.post("/tokenize", json={"prompt": "ab"})).json()["tokens"]
        assert tokens == [97, 98]
        assert (await http.post("/detokenize", json={"tokens": tokens})).json()["prompt"] == "ab"
    assert echo.is_closed
