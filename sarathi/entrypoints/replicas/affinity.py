"""Which replica has the beginning of a prompt in its cache, as far as the requests sent there tell."""

from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence

_MOST_BLOCKS = 200_000


class PrefixAffinity:
    """The replica that each prompt's beginning went to last, and the requests under way at each replica.

    lead: requests that a replica may have more than the idlest one and still be chosen for its cache.
    """

    def __init__(self, lead: int, most_blocks: int = _MOST_BLOCKS) -> None:
        self._lead = lead
        self._most_blocks = most_blocks
        self._replicas: OrderedDict[int, str] = OrderedDict()  # by hash of a beginning
        self._running: Counter[str] = Counter()

    def choose(self, prefix: Sequence[int], replicas: Collection[str]) -> str | None:
        """The replica with the longest common beginning; None where none has any, or it is too busy."""
        fewest = min((self._running[name] for name in replicas), default=0)
        for block in reversed(prefix):
            name = self._replicas.get(block)
            if name in replicas:
                assert name is not None
                return name if self._running[name] <= fewest + self._lead else None
        return None

    def by_load(self, replicas: Collection[str]) -> list[list[str]]:
        """The replicas in groups of as many requests each, the fewest first."""
        groups: dict[int, list[str]] = {}
        for name in replicas:
            groups.setdefault(self._running[name], []).append(name)
        return [groups[count] for count in sorted(groups)]

    def start(self, replica: str) -> None:
        """A request goes to a replica."""
        self._running[replica] += 1

    def remember(self, prefix: Sequence[int], replica: str) -> None:
        """A replica has taken a prompt that begins so."""
        for block in prefix:
            self._replicas[block] = replica
            self._replicas.move_to_end(block)
        while len(self._replicas) > self._most_blocks:
            self._replicas.popitem(last=False)

    def end(self, replica: str) -> None:
        """A request has left a replica, for whatever reason."""
        self._running[replica] -= 1
        if self._running[replica] <= 0:
            del self._running[replica]
