"""Replicas on the machines of a Ray cluster, by Ray Serve, behind a front of our own.

Ray starts, watches, replaces and counts replicas, and carries requests to them. The front is the
HTTP and gRPC side of `impatient serve` in front of a `FleetService`: Ray's own proxy reads a whole
request before its time could be taken, and answers 500 where a replica is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from impatient import checks
from impatient.clock import SYSTEM_CLOCK
from impatient.errors import ServingError
from impatient.serving.base import Answered, Limits, Offer
from impatient.serving.fleet import Ask, Backlog, Fleet, ReplicaLost, answer
from impatient.serving.model import ServedModel
from impatient.serving.scheduler import Refuse
from impatient.serving.service import Hosted, Service

log = logging.getLogger(__name__)

# How often replicas say what their stages cost, and how often the front asks how many there are.
STATS_S = 1.0
DEPLOYMENT = "replicas"
QUIET = {"log_level": "WARNING", "enable_access_log": False}
Load = Callable[[str], Hosted]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How many replicas there are, and what each takes.

    Attributes:
        replicas: how many there are at least.
        most: how many there may be; None for no more than `replicas`.
        ongoing: requests without a reply per replica, beyond which Ray starts another one.
        cpus: processors that Ray reserves for each; one thread computes.
        up_s: seconds of too much load after which one is started.
        down_s: seconds of too little after which one is ended.
        drain_s: most seconds that the requests of one that ends are waited for.
    """

    replicas: int = 1
    most: int | None = None
    ongoing: float = 2.0
    cpus: float = 1.0
    up_s: float = 5.0
    down_s: float = 60.0
    drain_s: float = 5.0

    def __post_init__(self) -> None:
        checks.at_least(ServingError, 1, replicas=self.replicas)
        if self.most is not None and self.most < self.replicas:
            raise ServingError(
                f"at least {self.replicas} replicas and at most {self.most}; expected the second "
                "number to be no smaller."
            )
        checks.positive(ServingError, ongoing=self.ongoing, cpus=self.cpus)

    @property
    def options(self) -> Mapping[str, Any]:
        """What Ray Serve is told of it."""
        if self.most is None:
            return {"num_replicas": self.replicas}
        scaling = {
            "min_replicas": self.replicas,
            "max_replicas": self.most,
            "target_ongoing_requests": self.ongoing,
            "upscale_delay_s": self.up_s,
            "downscale_delay_s": self.down_s,
            "look_back_period_s": self.up_s,
            "metrics_interval_s": STATS_S,
        }
        return {"autoscaling_config": scaling}


class Replica:
    """One replica: a `Service`, and how Ray reaches it.

    Args:
        load: loads a network from a source.
        limits: what callers may ask for.
    """

    def __init__(self, load: Load, limits: Limits) -> None:
        self._load = load
        self._limits = limits
        self._name = serve.get_replica_context().replica_id.unique_id
        self._service: Service | None = None
        self._retiring: set[asyncio.Task[None]] = set()

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Load the networks anew, and go over to them.

        Requests that are here end on the old ones.
        """
        sources = user_config["sources"]
        hosted = await asyncio.to_thread(lambda: [self._load(source) for source in sources])
        service = Service(hosted, self._limits)
        await service.start()
        old, self._service = self._service, service
        if old is not None:
            retiring = asyncio.ensure_future(self._retire(old))
            self._retiring.add(retiring)
            retiring.add_done_callback(self._retiring.discard)

    async def _retire(self, service: Service) -> None:
        service.drain()
        if not await service.drained(self._limits.most_s):
            service.end()
        await asyncio.to_thread(service.stop)

    @property
    def _now(self) -> Service:
        if self._service is None:
            raise ServingError("the replica has no networks; expected user_config with sources.")
        return self._service

    def check_health(self) -> None:
        """Raise an error, for Ray to replace this replica, if its networks hang."""
        if not self._now.ready:
            raise ServingError("the networks do not come back from earlier requests.")

    def record_routing_stats(self) -> dict[str, Any]:
        """Tell the fronts what stages and heads cost on this machine."""
        return {name: _plain(one.model) for name, one in self._now.offers.items()}

    def offers(self) -> list[Offer]:
        """Return what is served."""
        return [_offer(one) for one in self._now.hosted.values()]

    async def loadable(self, sources: Sequence[str]) -> list[Offer]:
        """Return what would be served with other sources."""
        return await asyncio.to_thread(lambda: [_offer(self._load(one)) for one in sources])

    async def answers(self, ask: Ask) -> AsyncGenerator[tuple[str, Answered | Refuse]]:
        """Give the answers of a request, with the name of this replica."""
        async with contextlib.aclosing(answer(self._now, ask)) as events:
            async for event in events:
                yield self._name, event


def _offer(hosted: Hosted) -> Offer:
    return Offer(model=hosted.model, input=hosted.input, classes=hosted.classes)


def _face(offer: Offer) -> tuple[Any, ...]:
    """Return what callers rely on."""
    return offer.model.name, offer.model.num_exits, offer.input, offer.classes


def _plain(model: ServedModel) -> dict[str, Any]:
    """Write a model's costs as plain data, which passes through Ray's controller."""
    return {
        "quality": model.quality,
        "max_batch": model.max_batch,
        "stages_s": dict(model.stages_s),
        "heads_s": dict(model.heads_s),
    }


def _ask_of(pending_request: PendingRequest) -> Ask | None:
    """Return what is asked, None for calls that ask for no answer."""
    return next((one for one in pending_request.args if isinstance(one, Ask)), None)


class SlackRouter(RequestRouter):
    """Sends each request where its predicted slack is the greatest."""

    def initialize_state(self, **_options: Any) -> None:
        self._backlog = Backlog()
        # what was last heard of each replica
        self._heard: dict[str, Mapping[str, Any]] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Order the replicas by predicted slack, each alone in its rank."""
        ask = None if pending_request is None else _ask_of(pending_request)
        if pending_request is None or ask is None:
            return [candidate_replicas]
        # Without it, Ray asks again at once where no replica takes a request.
        pending_request.routing_context.should_backoff = True
        replicas = {one.replica_id.unique_id: one for one in candidate_replicas}
        self._hear(replicas)
        names = list(replicas)
        order = self._backlog.ranked(names, ask.request, SYSTEM_CLOCK.now(), ask.tried)
        # Requests that are chosen for before this one is on its way must see it.
        name = pending_request.metadata.internal_request_id
        self._backlog.sent(order[0], name, ask.request)
        return [[replicas[name]] for name in order]

    def _hear(self, replicas: Mapping[str, RunningReplica]) -> None:
        self._backlog.keep(list(replicas))
        for name, replica in replicas.items():
            told = replica.routing_stats
            if told and told is not self._heard.get(name):
                self._heard[name] = told
                self._backlog.models[name] = {
                    model: ServedModel(name=model, **costs) for model, costs in told.items()
                }

    def on_request_routed(
        self,
        pending_request: PendingRequest,
        replica_id: ReplicaID,
        result: Any,  # noqa: ARG002  Ray gives it
    ) -> None:
        """Take in which replica has the request."""
        ask = _ask_of(pending_request)
        if ask is not None:
            name = pending_request.metadata.internal_request_id
            self._backlog.sent(replica_id.unique_id, name, ask.request)

    def on_request_completed(
        self,
        replica_id: ReplicaID,  # noqa: ARG002  Ray gives it
        internal_request_id: str,
    ) -> None:
        """Take in that the request is no longer there."""
        self._backlog.ended(internal_request_id)


@dataclass(slots=True, kw_only=True)
class RayFleet(Fleet):
    """Replicas of a Ray Serve application, which this process deploys and ends.

    Ray must have been initialised: `ray.init()` joins the cluster of this machine, or begins one.

    Attributes:
        load: loads a network from a source, on the machine of each replica.
        sources: what the replicas load, such as paths of run directories that all machines see.
        limits: what callers may ask for.
        plan: how many replicas there are.
        name: name of the application. Fronts with the same name have the same replicas.
    """

    load: Load
    sources: Sequence[str]
    limits: Limits = field(default_factory=Limits)
    plan: Plan = field(default_factory=Plan)
    name: str = "impatient"
    _version: str = field(default_factory=lambda: uuid.uuid4().hex)
    _revision: int = 0
    _size: int = 0
    _handle: Any = None
    _asking: asyncio.Future[int] | None = None
    _asked_at: float = 0.0

    def deploy(self) -> None:
        """Start the replicas, or have those that run load the sources.

        It waits until they are ready. Ray reconfigures a fifth of them at a time, at least one.
        """
        # No proxy of Ray's: the front is ours.
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        router = RequestRouterConfig(
            request_router_class=f"{__name__}:SlackRouter",
            request_routing_stats_period_s=STATS_S,
        )
        deployment = serve.deployment(Replica, name=DEPLOYMENT).options(
            **self.plan.options,
            user_config={"sources": list(self.sources), "revision": self._revision},
            # The scheduler of the replica refuses, not Ray.
            max_ongoing_requests=self.limits.waiting,
            ray_actor_options={"num_cpus": self.plan.cpus},
            request_router_config=router,
            health_check_period_s=STATS_S,
            graceful_shutdown_timeout_s=self.plan.drain_s,
            logging_config=QUIET,
            # Without one, each call has its own, for which Ray restarts all replicas.
            version=self._version,
            _internal=True,
        )
        application = deployment.bind(self.load, self.limits)
        handle = serve.run(application, name=self.name, route_prefix=None)
        self._handle = handle.options(stream=True)
        self._size = self.count()

    def renew(self, sources: Sequence[str] | None = None) -> None:
        """Have all replicas load their sources again, or other ones.

        One loads them first, to see whether it can. If not, nothing changes; else one replica
        after the other goes over to them.

        Raises:
            ServingError: if they cannot be loaded, or callers would have to know of it.
        """
        sources = list(self.sources if sources is None else sources)
        handle = self._handle.options(stream=False)
        try:
            now = handle.offers.remote().result()
            then = handle.loadable.remote(sources).result()
        except RayTaskError as error:
            raise ServingError(f"{', '.join(sources)} cannot be loaded: {error.cause}") from error
        if [_face(one) for one in now] != [_face(one) for one in then]:
            raise ServingError(
                f"{', '.join(sources)} have other names, inputs, classes or exits than what is "
                "served; start another server."
            )
        self.sources = sources
        self._revision += 1
        self.deploy()

    def count(self) -> int:
        """Ask Ray how many replicas run."""
        application = serve.status().applications.get(self.name)
        if application is None or DEPLOYMENT not in application.deployments:
            return 0
        return int(application.deployments[DEPLOYMENT].replica_states.get("RUNNING", 0))

    async def offers(self) -> Sequence[Offer]:
        """Return what the replicas serve."""
        found: Sequence[Offer] = await self._handle.options(stream=False).offers.remote()
        return found

    @property
    def size(self) -> int:
        return self._size

    def look_after(self) -> None:
        now = SYSTEM_CLOCK.now()
        if self._asking is not None and self._asking.done():
            if self._asking.exception() is None:
                self._size = self._asking.result()
            self._asking = None
        elif self._asking is None and now - self._asked_at > STATS_S:
            self._asked_at = now
            self._asking = asyncio.ensure_future(asyncio.to_thread(self.count))

    async def ask(self, ask: Ask) -> AsyncGenerator[tuple[str, Answered | Refuse]]:
        response = self._handle.answers.remote(ask)
        try:
            async for told in response:
                yield told
        except RayTaskError:
            log.exception("a replica failed on request %d", ask.request.id)
            yield "", Refuse(request=ask.request.id, why="failed")
        except (RayError, RayServeException) as error:
            first = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ReplicaLost(first) from error
        finally:
            # Nothing happens if it has ended.
            response.cancel()

    def stop(self) -> None:
        serve.delete(self.name)


def join_ray() -> None:
    """Join the Ray cluster of RAY_ADDRESS or of this machine, or begin one here.

    Raises:
        ServingError: if it cannot be joined.
    """
    if ray.is_initialized():
        return
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise ServingError(
            f"{error}; RAY_ADDRESS says where it is. If it asks for a token, set "
            "RAY_AUTH_MODE=token, and give this machine the token of the others."
        ) from error


def processors() -> float:
    """Return how many processors the machines of the cluster have."""
    return float(ray.cluster_resources().get("CPU", 0.0))
