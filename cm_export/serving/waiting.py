"""Who is next: clients take turns, and the requests of one client come in the order in which they were handed in.

handed in   a1 a2 a3 b1 c1 b2      served   a1 b1 c1 a2 b2 a3
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Waiting(Generic[T]):
    """A queue of several clients. Not for several threads at once."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[T]] = OrderedDict()  # client -> its requests; the first client is next

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def put(self, client: str, item: T) -> None:
        """Behind the other requests of that client."""
        self._of.setdefault(client, deque()).append(item)

    def take(self) -> T:
        """The next one. Raises IndexError when none waits."""
        if not self._of:
            raise IndexError("nobody waits")
        client, items = self._of.popitem(last=False)
        item = items.popleft()
        if items:
            self._of[client] = items  # behind the other clients
        return item

    def remove(self, gone: list[T]) -> None:
        """Let these leave without being served."""
        for client in list(self._of):
            left = deque(item for item in self._of[client] if item not in gone)
            if left:
                self._of[client] = left
            else:
                del self._of[client]

    def all(self) -> list[T]:
        """Everyone who waits, client by client."""
        return [item for items in self._of.values() for item in items]
