"""Ray Serve's request router over prefixes: the replica that knows the prompt's beginning, else the idlest."""

import random
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from sarathi.entrypoints.replicas.affinity import PrefixAffinity
from sarathi.entrypoints.replicas.messages import ForwardedRequest


class PrefixRouter(RequestRouter):
    """Ranks by the requests that this router has sent: Serve takes a replica of the first rank, of the next where all
    of that refuse. Its own queue lengths expire after seconds without requests, and a burst would then go to one
    replica until the others have been asked.
    """

    def initialize_state(self, **settings: Any) -> None:
        """lead: see `PrefixAffinity`."""
        self._affinity = PrefixAffinity(settings["lead"])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        request = None if pending_request is None else _request_of(pending_request)
        by_name = {each.replica_id.unique_id: each for each in candidate_replicas}
        if request is not None and by_name.keys() - set(request.avoided):
            by_name = {name: each for name, each in by_name.items() if name not in request.avoided}
        wanted = None if request is None else self._wanted(request, by_name)
        ranks = [[wanted]] if wanted is not None else []
        ranks += self._affinity.by_load(by_name.keys() - {wanted})
        for names in ranks:
            random.shuffle(names)  # Serve takes the first of equals
        return [[by_name[name] for name in names] for names in ranks]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Serve calls it for what is sent to all replicas too, and later `on_request_completed` for each."""
        super().on_send_request(replica_id)
        self._affinity.start(replica_id.unique_id)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        if request := _request_of(pending_request):
            self._affinity.remember(request.prefix, replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._affinity.end(replica_id.unique_id)

    def _wanted(self, request: ForwardedRequest, replicas: dict[str, RunningReplica]) -> str | None:
        if request.owner in replicas:
            return request.owner
        return self._affinity.choose(request.prefix, replicas.keys())


def _request_of(pending: PendingRequest) -> ForwardedRequest | None:
    first = pending.args[0] if pending.args else None
    return first if isinstance(first, ForwardedRequest) else None
