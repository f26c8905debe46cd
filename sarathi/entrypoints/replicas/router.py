"""Request router of Ray Serve: the replica that has the prompt's prefix in its cache, else the least loaded."""

import random
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from sarathi.entrypoints.replicas.affinity import PrefixAffinity
from sarathi.entrypoints.replicas.messages import ForwardedRequest


class PrefixRouter(RequestRouter):
    """Ranks replicas by the requests that this router has sent: Serve picks one of the first rank, and of the next if
    all of those refuse. Serve's own queue lengths expire after seconds without requests; a burst would then go to one
    replica until the others are probed.
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
            random.shuffle(names)  # Serve takes the first of equal ones
        return [[by_name[name] for name in names] for names in ranks]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Called by Serve for every request, also broadcasts; `on_request_completed` follows for each."""
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
