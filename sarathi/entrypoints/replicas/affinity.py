"""Prefix affinity: the replica that probably has a prompt's prefix in its cache, from the requests sent to it."""

from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence

_MOST_BLOCKS = 200_000


class PrefixAffinity:
    """The replica that each prompt prefix was last sent to, and the number of running requests of each replica.

    lead: how many more requests than the least loaded replica one may have and still be chosen for its cache.
    """

    def __init__(self, lead: int, most_blocks: int = _MOST_BLOCKS) -> None:
        self._lead = lead
        self._most_blocks = most_blocks
        self._replicas: OrderedDict[int, str] = OrderedDict()  # by hash of a prefix
        self._running: Counter[str] = Counter()

    def choose(self, prefix: Sequence[int], replicas: Collection[str]) -> str | None:
        """The replica with the longest common prefix; None if no replica has one, or it has too many requests."""
        fewest = min((self._running[name] for name in replicas), default=0)
        for block in reversed(prefix):
            name = self._replicas.get(block)
            if name in replicas:
                assert name is not None
                return name if self._running[name] <= fewest + self._lead else None
        return None

    def by_load(self, replicas: Collection[str]) -> list[list[str]]:
        """The replicas grouped by their number of requests, in ascending order."""
        groups: dict[int, list[str]] = {}
        for name in replicas:
            groups.setdefault(self._running[name], []).append(name)
        return [groups[count] for count in sorted(groups)]

    def start(self, replica: str) -> None:
        """Count a request that is sent to a replica."""
        self._running[replica] += 1

    def remember(self, prefix: Sequence[int], replica: str) -> None:
        """Record that a replica has accepted a prompt with this prefix."""
        for block in prefix:
            self._replicas[block] = replica
            self._replicas.move_to_end(block)
        while len(self._replicas) > self._most_blocks:
            self._replicas.popitem(last=False)

    def end(self, replica: str) -> None:
        """Count a request that ended, for any reason."""
        self._running[replica] -= 1
        if self._running[replica] <= 0:
            del self._running[replica]
