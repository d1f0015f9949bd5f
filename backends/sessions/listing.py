"""The chats in a folder, as a person sees them: each text to its end is one, with all that it goes on from.

States that it can go back to, and windows that it has moved on from, belong to it as well.
"""

from collections.abc import Collection
from dataclasses import dataclass

from tightrope.backends.removals import num_left
from tightrope.backends.sessions.folder import Folder, Stored
from tightrope.backends.sessions.piece import Ints, has_moved_on, num_common, tokens_of

TURN_S = 5.0  # What was of use within so long of each other was of use in one turn.


@dataclass(frozen=True, slots=True)
class Chat:
    """name: of its last piece. model: that it was had with. num_bytes: on disk; other chats may share its beginning.

    used_s: seconds since 1970. pieces: names from first to last, and then those of what else belongs to it.
    """

    name: bytes
    model: str
    num_tokens: int
    num_bytes: int
    used_s: float
    pieces: tuple[bytes, ...]


def chats_in(folder: Folder) -> list[Chat]:
    """All chats, the one of use last in front."""
    found = {stored.piece.name: stored for stored in folder.scan()}
    parents = {stored.piece.parent for stored in found.values()}
    texts: list[list[Stored]] = []
    for name in found.keys() - parents:
        path = [found[name]]
        while (before := found.get(path[0].piece.parent)) is not None and before not in path:
            path.insert(0, before)
        texts.append(path)
    texts.sort(key=lambda path: (-path[-1].piece.stop, -path[-1].used_s, path[-1].piece.name))
    groups: list[tuple[Ints, list[list[Stored]]]] = []
    for path in texts:
        tokens = tokens_of([stored.piece for stored in path])
        group = next((group for group in groups if _belong_together(tokens, path, *group)), None)
        if group is None:
            groups.append((tokens, [path]))
        else:
            group[1].append(path)
    return sorted((_chat(paths) for _, paths in groups), key=lambda chat: (-chat.used_s, chat.name))


def _belong_together(tokens: Ints, path: list[Stored], others: Ints, paths: list[list[Stored]]) -> bool:
    """Whether two texts are of one chat: the second isn't shorter than the first."""
    if path[-1].header.fingerprint != paths[0][-1].header.fingerprint:
        return False
    is_beginning = num_common(tokens, others) == len(tokens)
    return is_beginning or has_moved_on(tokens, others) or 2 * num_left(others, tokens) >= len(tokens)


def _chat(paths: list[list[Stored]]) -> Chat:
    """The longest of the texts that were of use in the last turn stands for all."""
    latest_s = max(path[-1].used_s for path in paths) - TURN_S
    last = max(paths, key=lambda path: (path[-1].used_s > latest_s, path[-1].piece.stop))
    pieces = {stored.piece.name: stored.size for path in (last, *paths) for stored in path}
    end = last[-1]
    return Chat(end.piece.name, end.header.model, end.piece.stop, sum(pieces.values()), end.used_s, tuple(pieces))


def delete(folder: Folder, chats: Collection[Chat], leaving: Collection[Chat]) -> None:
    """Delete chats, but for what those share that are left. Raises OSError."""
    shared = {name for chat in leaving for name in chat.pieces}
    for chat in chats:
        for name in chat.pieces:
            if name not in shared:
                folder.delete(name)
