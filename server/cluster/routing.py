"""Which replica a request goes to: what each holds of its prompt, and what each is at."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from random import Random

from tightrope.engine.errors import EngineError
from tightrope.engine.process.wire import Tokenize
from tightrope.engine.prompt_bytes import prompt_bytes
from tightrope.engine.types import GenerateRequest, TokenRun
from tightrope.server.cluster.choosing import Candidate, choose
from tightrope.server.cluster.digests import DigestIndex, Found
from tightrope.server.cluster.link import Link
from tightrope.server.cluster.load import BYTES_PER_TOKEN

MAX_SESSIONS = 1 << 16  # Whose replica is remembered; each takes some 300 bytes.

Session = tuple[str, str]  # A namespace, since names are its own, and a name.


class Router:
    """Remembers where sessions were. Belongs to one event loop."""

    def __init__(self, index: DigestIndex, max_waiting: int) -> None:
        """max_waiting: requests that a replica lets wait."""
        self._index = index
        self._max_waiting = max_waiting
        self._sessions: OrderedDict[Session, str] = OrderedDict()
        self._random = Random()

    async def choose(self, request: GenerateRequest, links: Sequence[Link]) -> tuple[Link, int]:
        """One of these, of which there is at least one, and how many tokens it would have to read."""
        session = (request.namespace, request.session) if request.session else None
        num_tokens, found = await self._found(request, links)
        with_room = [link for link in links if self._has_room(link)] or links
        last = None if session is None else self._sessions.get(session)
        name = choose(num_tokens, [_candidate(link, found, last) for link in with_room], self._random)
        if session is not None:
            self._remember(session, name)
        chosen = next(link for link in with_room if link.name == name)
        return chosen, num_tokens - (found[name].cached if name in found else 0)

    async def _found(self, request: GenerateRequest, links: Sequence[Link]) -> tuple[int, Mapping[str, Found]]:
        """How many tokens the prompt has, and what of them each replica holds.

        Where that can't matter its tokens are guessed, and none looked for; what can't be tokenized is for the replica
        to refuse.
        """
        guessed = prompt_bytes(request.prompt) // BYTES_PER_TOKEN
        if len(links) == 1 or self._index.is_empty:
            return guessed, {}
        try:
            run = await least_busy(links).ask(
                lambda call_id: Tokenize(call_id, request.prompt, request.adapter, request.truncate_to, is_bare=True)
            )
        except EngineError:
            return guessed, {}
        assert isinstance(run, TokenRun)
        return len(run), self._index.find(run.ids, request.namespace, request.adapter, request.adapter_scale)

    def _has_room(self, link: Link) -> bool:
        return link.exchange.num_open < link.exchange.num_places + self._max_waiting

    def _remember(self, session: Session, name: str) -> None:
        self._sessions[session] = name
        self._sessions.move_to_end(session)
        if len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)


def _candidate(link: Link, found: Mapping[str, Found], last: str | None) -> Candidate:
    """last: where its session was."""
    num_open, held = _num_open(link), found.get(link.name, Found(0, 0))
    return Candidate(
        link.name,
        cached=held.cached,
        stored=held.stored,
        read_share=held.read_share,
        queued_tokens=sum(queued := link.queued_tokens),
        num_queued=len(queued),
        num_running=num_open,
        is_full=num_open >= link.exchange.num_places,
        is_session=link.name == last,
    )


def _num_open(link: Link) -> int:
    """Answers that it has to write, others' as well, as of its last step."""
    stats = link.exchange.stats
    return max(link.exchange.num_open, stats.num_running + stats.num_waiting)


def least_busy(links: Sequence[Link]) -> Link:
    """Whose places are taken least."""
    return min(links, key=lambda link: _num_open(link) / link.exchange.num_places)
