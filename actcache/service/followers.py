"""Who reads how far in which order, as far as it shows in what they ask for: it says which windows are still wanted.

Only a hint: it is kept in memory, a client is forgotten when nothing was heard of it for a moment, and one that comes
again, after a restart of either side, is known again with its next request.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

IDLE_S = 5.0
"""A client that asked for nothing for so long holds up nobody. A message takes far less, even of four clients on two cores."""

Key = tuple[str, int, int]
"""A window: its order, epoch and number."""


@dataclass(slots=True)
class _Follower:
    """at  the window it needs next.    heard  when.    had  parts of that window that were handed out to the end."""

    at: Key
    heard: float
    had: set[int] = field(default_factory=set)


class Followers:
    """Clients by what identifies them. Not safe to share among threads."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._known: dict[Hashable, _Follower] = {}

    def asks(self, client: Hashable, at: Key) -> None:
        """It wants a window, whether or not it is further on than the last."""
        found = self._known.get(client)
        if found is None or found.at != at:
            self._known[client] = _Follower(at, self._clock())
        else:
            found.heard = self._clock()

    def lives(self, client: Hashable) -> None:
        """It is still there."""
        if client in self._known:
            self._known[client].heard = self._clock()

    def had(self, client: Hashable, at: Key, part: int, parts: int, following: Key) -> None:
        """A part of a window was handed out to it; with the last one it goes on to the following window."""
        found = self._known.get(client)
        if found is not None and found.at == at:
            found.had.add(part)
            if len(found.had) == parts:
                found.at, found.had = following, set()

    def leaves(self, client: Hashable) -> None:
        """It has gone."""
        self._known.pop(client, None)

    def places(self) -> list[Key]:
        """Where those are that were heard of."""
        oldest = self._clock() - IDLE_S
        self._known = {client: found for client, found in self._known.items() if found.heard > oldest}
        return [found.at for found in self._known.values()]
