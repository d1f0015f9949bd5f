"""Where sessions were last, and whether what they had there is there still."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from tightrope.engine.types import GenerateRequest
from tightrope.server.cluster.digests import DigestIndex

MAX_SESSIONS = 1 << 16  # Each takes some 400 bytes.

Session = tuple[str, str]  # A namespace, since names are its own, and a name.


@dataclass(frozen=True, slots=True)
class Last:
    """The last prompt of a session: where it ran, how many tokens it had, and what its replica tells of its end."""

    replica: str
    num_tokens: int
    end: bytes | None


class Sessions:
    """The last prompts of the sessions that were of use last."""

    def __init__(self, index: DigestIndex) -> None:
        self._index = index
        self._last: OrderedDict[Session, Last] = OrderedDict()

    def last(self, key: Session | None) -> tuple[str, int] | None:
        """The replica where a session was, and how many tokens of its prompt are known to be cached there still."""
        last = None if key is None else self._last.get(key)
        if last is None:
            return None
        is_there = last.end is not None and self._index.holds(last.replica, last.end)
        return last.replica, last.num_tokens if is_there else 0

    def remember(self, key: Session | None, request: GenerateRequest, replica: str, token_ids: Sequence[int]) -> None:
        """A session's request goes to this replica. token_ids: of its prompt, or none where they aren't known."""
        if key is None:
            return
        end = self._index.end_of(replica, token_ids, request.namespace, request.adapter, request.adapter_scale)
        self._last[key] = Last(replica, len(token_ids), end)
        self._last.move_to_end(key)
        if len(self._last) > MAX_SESSIONS:
            self._last.popitem(last=False)
