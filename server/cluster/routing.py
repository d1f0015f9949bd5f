"""Which replica a request goes to: what each holds of its prompt, and what each is at."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from tightrope.engine.errors import EngineError
from tightrope.engine.process.wire import Tokenize
from tightrope.engine.prompt_bytes import prompt_bytes
from tightrope.engine.types import GenerateRequest, TokenRun
from tightrope.server.cluster.choosing import Candidate, choose
from tightrope.server.cluster.digests import DigestIndex, Found
from tightrope.server.cluster.link import Link
from tightrope.server.cluster.load import BYTES_PER_TOKEN
from tightrope.server.cluster.text_ends import ends_of

MAX_SESSIONS = 1 << 16  # Whose replica is remembered; each takes some 400 bytes.

Session = tuple[str, str | int]  # A namespace, and in it a name that a client gives, or the end of a text.


@dataclass(frozen=True, slots=True)
class _Last:
    """A session's last prompt: where it ran, the last block of it that is told, and how many tokens it had."""

    replica: str
    end: bytes | None
    num_tokens: int


class Router:
    """Remembers where sessions were. Belongs to one event loop."""

    def __init__(self, index: DigestIndex, max_waiting: int) -> None:
        """max_waiting: requests that a replica lets wait."""
        self._index = index
        self._max_waiting = max_waiting
        self._sessions: OrderedDict[Session, _Last] = OrderedDict()
        self._random = Random()

    async def choose(self, request: GenerateRequest, links: Sequence[Link]) -> tuple[Link, int]:
        """One of these, of which there is at least one, and how many tokens it would have to read."""
        token_ids = await self._token_ids(request, links)
        sessions = _sessions(request, token_ids)
        last = next((last for session in reversed(sessions) if (last := self._sessions.get(session))), None)
        num_tokens = len(token_ids) or prompt_bytes(request.prompt) // BYTES_PER_TOKEN
        parts = request.namespace, request.adapter, request.adapter_scale
        found = self._index.find(token_ids, *parts)
        candidates = [self._candidate(link, found, last) for link in links if self._has_room(link)]
        candidates = candidates or [self._candidate(link, found, last) for link in links]
        name = choose(num_tokens, candidates, self._random)
        if sessions:
            end = self._index.end_of(name, token_ids, *parts)
            self._remember(sessions[-1], _Last(name, end, len(token_ids)))
        held = next(max(one.cached, one.session_tokens) for one in candidates if one.replica == name)
        return next(link for link in links if link.name == name), max(0, num_tokens - held)

    async def _token_ids(self, request: GenerateRequest, links: Sequence[Link]) -> Sequence[int]:
        """The prompt's tokens; none where they can't matter. What can't be tokenized is for the replica to refuse."""
        if len(links) == 1 or (self._index.is_empty and not request.session):
            return ()
        try:
            run = await least_busy(links).ask(
                lambda call_id: Tokenize(call_id, request.prompt, request.adapter, request.truncate_to, is_bare=True)
            )
        except EngineError:
            return ()
        assert isinstance(run, TokenRun)
        return run.ids

    def _candidate(self, link: Link, found: Mapping[str, Found], last: _Last | None) -> Candidate:
        """last: what is known of its session."""
        num_open, held, queued = _num_open(link), found.get(link.name, Found(0, 0)), link.queued_tokens
        is_session = last is not None and last.replica == link.name
        is_there = last is not None and is_session and last.end is not None and self._index.holds(link.name, last.end)
        return Candidate(
            link.name,
            cached=held.cached,
            stored=held.stored,
            read_share=held.read_share,
            queued_tokens=sum(queued),
            num_queued=len(queued),
            num_running=num_open,
            is_full=num_open >= link.exchange.num_places,
            is_session=is_session,
            session_tokens=last.num_tokens if last is not None and is_there else 0,
        )

    def _has_room(self, link: Link) -> bool:
        return link.exchange.num_open < link.exchange.num_places + self._max_waiting

    def _remember(self, session: Session, last: _Last) -> None:
        self._sessions[session] = last
        self._sessions.move_to_end(session)
        if len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)


def _sessions(request: GenerateRequest, token_ids: Sequence[int]) -> list[Session]:
    """What a request's session may be remembered as, the latest at the end, as which it is to be remembered."""
    if request.session:
        return [(request.namespace, request.session)]
    return [(request.namespace, end) for end in ends_of(token_ids)]


def _num_open(link: Link) -> int:
    """Answers that it has to write, others' as well, as of its last step."""
    stats = link.exchange.stats
    return max(link.exchange.num_open, stats.num_running + stats.num_waiting)


def least_busy(links: Sequence[Link]) -> Link:
    """Whose places are taken least."""
    return min(links, key=lambda link: _num_open(link) / link.exchange.num_places)
