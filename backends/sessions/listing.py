"""The chats in a folder, as a person sees them: each end of a text is one, with all that it goes on from."""

from collections.abc import Collection
from dataclasses import dataclass

from tightrope.backends.sessions.folder import Folder


@dataclass(frozen=True, slots=True)
class Chat:
    """name: of its last piece. model: that it was had with. num_bytes: on disk; other chats may share its beginning.

    used_s: seconds since 1970. pieces: names from first to last.
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
    chats: list[Chat] = []
    for name in found.keys() - parents:
        path = [found[name]]
        while (before := found.get(path[0].piece.parent)) is not None and before not in path:
            path.insert(0, before)
        chats.append(
            Chat(
                name,
                path[-1].header.model,
                path[-1].piece.stop,
                sum(stored.size for stored in path),
                path[-1].used_s,
                tuple(stored.piece.name for stored in path),
            )
        )
    return sorted(chats, key=lambda chat: (-chat.used_s, chat.name))


def delete(folder: Folder, chats: Collection[Chat], leaving: Collection[Chat]) -> None:
    """Delete chats, but for what those share that are left."""
    shared = {name for chat in leaving for name in chat.pieces}
    for chat in chats:
        for name in chat.pieces:
            if name not in shared:
                folder.remove(name)
