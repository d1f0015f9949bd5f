"""The reader of an engine: what goes wrong with a request is its answer, and no text that is long stands in the way."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from fakes import BOS, ByteTokenizer, FakeBackend, script

from tightrope.engine.errors import BackendFailed, ContextLengthExceeded, InvalidRequest, Overloaded
from tightrope.engine.intake import encode_prompt
from tightrope.engine.process.client import EngineClient
from tightrope.engine.process.lanes import SHORT_BYTES, Lanes
from tightrope.engine.process.launch import thread_launcher
from tightrope.engine.prompt_bytes import LEAST_BYTES
from tightrope.engine.settings import EngineSettings, LimitSettings
from tightrope.engine.types import GenerateRequest, Grammar, Guidance, Span, StopRules, TextPrompt

pytestmark = pytest.mark.quick

LONG = "x" * (SHORT_BYTES + 1)


class Panic(BaseException):
    """What a tokenizer written in Rust raises where it gives up."""


class Watched(ByteTokenizer):
    """Counts what it reads; "panic" in a text is too much for it, and long texts take it until `release` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []
        self.begun, self.release = threading.Event(), threading.Event()
        self.release.set()

    def encode(self, text: str, *, parse_special: bool, is_start: bool) -> list[int]:
        self.read.append(text)
        if "panic" in text:
            raise Panic("the text is\ntoo much for a pattern")
        if len(text) > SHORT_BYTES:
            self.begun.set()
            assert self.release.wait(60)
        return super().encode(text, parse_special=parse_special, is_start=is_start)


@asynccontextmanager
async def engine(tokenizer: Watched, **limits: int) -> AsyncIterator[EngineClient]:
    backend = FakeBackend(script("fine"), capacity=1 << 18, max_model_len=1 << 17)
    backend.tokenizer = tokenizer
    launch = thread_launcher(lambda settings, progress: backend)
    client = EngineClient(EngineSettings(limits=LimitSettings(**limits)), launch)
    await client.start()
    await client.wait_ready()
    try:
        yield client
    finally:
        tokenizer.release.set()
        await client.close()


def text(content: str) -> TextPrompt:
    return TextPrompt((Span(content),))


async def answer(client: EngineClient, request_id: str, content: str, **fields: object) -> str:
    request = GenerateRequest(request_id, text(content), stop=StopRules(max_tokens=8), **fields)  # type: ignore[arg-type]
    return "".join([delta.text async for delta in client.generate(request)])


async def test_whatever_a_request_raises_is_the_answer_to_it(caplog: pytest.LogCaptureFixture) -> None:
    async with engine(Watched()) as client:
        with pytest.raises(BackendFailed, match="the text is too much for a pattern") as caught:
            await answer(client, "one", "panic?")
        assert "\n" not in caught.value.message
        with pytest.raises(BackendFailed, match="too much for a pattern"):
            await client.tokenize(text("panic"))
        assert await answer(client, "two", "Well?") == "fine"
        assert client.restarts == 0
    assert "request_id=one" in caplog.text


async def test_a_reader_that_ends_takes_the_engine_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Watched()
    async with engine(tokenizer) as client:
        reads = iter([BaseException("no reader reads on after this")])

        def handle(self: object, message: object) -> None:
            if (error := next(reads, None)) is not None:
                raise error
            return real(self, message)

        from tightrope.engine.process.reader import Reader

        real = Reader._handle
        monkeypatch.setattr(Reader, "_handle", handle)
        assert await answer(client, "one", "Well?") == "fine"  # by the engine after it
        assert client.restarts == 1


async def test_short_requests_and_cancels_are_served_while_long_texts_are_read() -> None:
    tokenizer = Watched()
    async with engine(tokenizer) as client:
        tokenizer.release.clear()
        long_ones = [asyncio.create_task(client.tokenize(text(LONG))) for _ in range(8)]
        cancelled = asyncio.create_task(answer(client, "long", f"{LONG}?"))
        await asyncio.to_thread(tokenizer.begun.wait, 60)
        assert await answer(client, "short", "Well?") == "fine"
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert await answer(client, "after it", "Well?") == "fine"
        assert not any(task.done() for task in long_ones)

        tokenizer.release.set()

        assert [len(tokens) for tokens in await asyncio.gather(*long_ones)] == [len(LONG) + 1] * 8
        assert await answer(client, "last", "Well?") == "fine"
        assert not [read for read in tokenizer.read if read == f"{LONG}?"]  # cancelled before its turn
        assert client.stats.num_running == client.stats.num_waiting == 0


@pytest.mark.plain
async def test_a_request_with_a_new_grammar_waits_with_the_long_ones_and_with_a_known_one_does_not() -> None:
    tokenizer = Watched()
    known, new = (Grammar("regex", pattern, "guided_regex") for pattern in ("fine|bad", "fine|good"))
    async with engine(tokenizer) as client:
        await answer(client, "first", "Well?", grammar=known)
        tokenizer.release.clear()
        long_one = asyncio.create_task(client.tokenize(text(LONG)))
        await asyncio.to_thread(tokenizer.begun.wait, 60)
        with_new = asyncio.create_task(answer(client, "new", "Well?", grammar=new))
        assert await answer(client, "known", "Well?", grammar=known) == "fine"
        assert not with_new.done()

        tokenizer.release.set()

        assert await with_new == "fine"
        await long_one


async def test_a_request_that_is_cancelled_while_its_text_is_read_never_runs() -> None:
    tokenizer = Watched()
    async with engine(tokenizer, max_waiting=0) as client:
        tokenizer.release.clear()
        cancelled = asyncio.create_task(answer(client, "long", f"{LONG}?"))
        await asyncio.to_thread(tokenizer.begun.wait, 60)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        await client.tokenize(text("the cancel has been read"))
        tokenizer.release.set()
        await client.tokenize(text(LONG))  # behind it
        assert client.stats.steps == 0


@pytest.mark.plain
async def test_requests_whose_texts_are_being_read_wait_like_others() -> None:
    tokenizer = Watched()
    async with engine(tokenizer, max_waiting=1) as client:
        tokenizer.release.clear()
        # 8 places to run in, and one to wait
        tasks = [asyncio.create_task(answer(client, f"{i}", f"{LONG}?")) for i in range(9)]
        await asyncio.to_thread(tokenizer.begun.wait, 60)
        await client.tokenize(text("all have been sent"))
        with pytest.raises(Overloaded, match="1 requests are waiting already; the limit is 1"):
            await answer(client, "one more", "Well?")
        tokenizer.release.set()
        assert await asyncio.gather(*tasks) == ["fine"] * 9


async def test_a_text_that_cannot_fit_is_refused_before_it_is_read() -> None:
    tokenizer = Watched()
    longest = tokenizer.max_token_bytes
    assert longest is not None
    too_long = "é" * (((1 << 17) * longest) // 2 + 1)
    async with engine(tokenizer) as client:
        with pytest.raises(ContextLengthExceeded, match=r"requested at least 131074 tokens \(at least 131073 in"):
            await answer(client, "one", too_long)
        with pytest.raises(ContextLengthExceeded, match="at least 131073"):
            await answer(client, "two", "Well?", guidance=Guidance(too_long, 2.0))
        with pytest.raises(ContextLengthExceeded, match="at least 131073"):
            await answer(client, "three", too_long, truncate_to=(1 << 17) + 1)
        assert not [read for read in tokenizer.read if len(read) > 10]


async def test_where_text_may_be_left_out_the_bound_is_a_plain_one() -> None:
    tokenizer = Watched()
    tokenizer.max_token_bytes = None
    most = max(LEAST_BYTES, (1 << 17) * 64)
    async with engine(tokenizer) as client:
        with pytest.raises(InvalidRequest, match=f"prompt has {most + 1} bytes; .* may have {most}"):
            await answer(client, "one", "x" * (most + 1))
        assert not [read for read in tokenizer.read if len(read) > 10]


async def test_of_a_text_that_is_cut_the_end_alone_is_read() -> None:
    tokenizer = Watched()
    longest = tokenizer.max_token_bytes
    async with engine(tokenizer) as client:
        tokens = await client.tokenize(text("é" * 1_000_000 + "end?"), last=5)
        assert (tokens.ids, len(tokens)) == (list("\xa9end?".encode("latin-1")), 5)
        assert await answer(client, "one", "a" * 1_000_000 + "end?", truncate_to=4) == "fine"
    assert longest is not None
    assert max(map(len, tokenizer.read)) <= 5 * longest


@pytest.mark.parametrize("lost", [b"", b"-"])
def test_the_last_tokens_of_a_cut_text_are_those_of_the_whole(lost: bytes) -> None:
    tokenizer = Losing(lost)
    spans = ("<s>-ab" * 20, "cé" + "-" * 500, "", "de<s>", "fgé-h" + "-" * 90)
    for prompt in (TextPrompt(tuple(Span(part, place % 2 == 0) for place, part in enumerate(spans))), text(spans[0])):
        whole = encode_prompt(prompt, tokenizer)
        for last in range(1, len(whole) + 3):
            assert encode_prompt(prompt, tokenizer, last) == whole[-last:], last
    assert encode_prompt(text("ab"), tokenizer, 3) == [BOS, *b"ab"]


class Losing(ByteTokenizer):
    """Leaves some bytes out."""

    def __init__(self, lost: bytes) -> None:
        super().__init__()
        self.lost_bytes = lost

    def encode(self, text: str, *, parse_special: bool, is_start: bool) -> list[int]:
        token_ids = super().encode(text, parse_special=parse_special, is_start=is_start)
        return [token_id for token_id in token_ids if token_id not in set(self.lost_bytes)]


def test_a_job_is_passed_by_shorter_ones_for_as_long_as_it_takes_itself() -> None:
    now, order, done = [0.0], list[str](), threading.Event()
    lanes = Lanes(lambda: now[0])
    begun, release = threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        assert release.wait(60)

    def job(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    lanes.put(2_000_000, first)
    assert begun.wait(60)
    lanes.put(2_000_000, job("two megabytes"))
    now[0] = 1.0
    lanes.put(900_000, job("a shorter one"))
    now[0] = 2.0
    lanes.put(100_000, job("one that came later"))
    lanes.put(3_000_000, done.set)
    release.set()
    assert done.wait(60)
    lanes.close()
    assert order == ["a shorter one", "two megabytes", "one that came later"]
