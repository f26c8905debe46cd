"""Ray Serve applications: engines alone, or engines behind a gateway that Serve's proxies forward requests to.

A YAML names `build` as `import_path`, with the knobs of sections `engine`, `server` and `scaling` as `args`.
"""

import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import Receive, Scope, Send

from sarathi.config.load import load_config
from sarathi.config.scaling import ScalingConfig
from sarathi.config.schema import EngineConfig
from sarathi.config.server import ADMIN_KEYS_VARIABLE, API_KEYS_VARIABLE, ServerConfig
from sarathi.entrypoints.replicas.gateway import Gateway, ReplicaLostError
from sarathi.entrypoints.replicas.messages import ForwardedRequest, Piece, WholeAnswer
from sarathi.entrypoints.replicas.replica import EngineGoneError, Replica
from sarathi.entrypoints.replicas.resources import actor_options
from sarathi.entrypoints.replicas.router import PrefixRouter
from sarathi.entrypoints.routers import ROUTERS
from sarathi.entrypoints.server.app import with_middleware

_UNLIMITED = 1_000_000  # requests per replica: the engine's own limits apply, with status 429
_HEALTH_PERIOD_S = 1.0
_ASK_TIMEOUT_S = 10.0
_LONGEST_AVERAGE_S, _REPORTS_PER_AVERAGE = 30.0, 3  # of the number of running requests: Serve's defaults
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


def build(settings: Mapping[str, Any]) -> serve.Application:
    """The application with engines and gateway. Raises ConfigError."""
    engine = load_config(EngineConfig, overrides=_flat(settings.get("engine", {})))
    config = load_config(ServerConfig, overrides=_flat(settings.get("server", {})))
    scaling = load_config(ScalingConfig, overrides=_flat(settings.get("scaling", {})))
    gateway: Any = serve.deployment(GatewayDeployment)
    options = gateway.options(
        name="gateway", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=_UNLIMITED, logging_config=_QUIET
    )
    application: serve.Application = options.bind(engines(engine, config, scaling), config)
    return application


def engines(engine: EngineConfig, config: ServerConfig, scaling: ScalingConfig) -> serve.Application:
    """The deployment of `scaling.replicas` engines, each with the devices of its ranks."""
    deployment: Any = serve.deployment(Replica)
    replicas = deployment.options(
        name="engine", ray_actor_options={**actor_options(engine, scaling), **_keys()}, logging_config=_QUIET,
        max_ongoing_requests=_UNLIMITED, request_router_config=_router(scaling),
        health_check_period_s=_HEALTH_PERIOD_S, health_check_timeout_s=config.heartbeat_timeout_s,
        graceful_shutdown_timeout_s=config.shutdown_timeout_s, **_count(scaling),
    )  # fmt: skip
    application: serve.Application = replicas.bind(engine, config)
    return application


class ServeReplicas:
    """The replicas behind a deployment handle of `engines`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._streaming: Any = handle.options(method_name="stream", stream=True)

    async def stream(self, request: ForwardedRequest) -> AsyncGenerator[Piece, None]:
        response = self._streaming.remote(request)
        try:
            async for each in response:
                yield each
        except (RayError, RayServeException) as error:
            gone = getattr(error, "cause", None)  # the exception that the replica raised
            raise ReplicaLostError(gone.replica if isinstance(gone, EngineGoneError) else "") from None
        finally:
            response.cancel()

    async def ask_all(self, request: ForwardedRequest) -> Sequence[WholeAnswer]:
        asked = self._handle.broadcast("answer", request)
        try:
            answers = await asked.results_async(timeout_s=_ASK_TIMEOUT_S, return_exceptions=True)
        except (TimeoutError, RayError, RayServeException):  # a replica hangs, or none has started
            return ()
        return [each for each in answers if isinstance(each, WholeAnswer)]


class _CurrentGateway:
    """The ASGI application of the gateway that runs in this process."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        gateway: Any = serve.get_replica_context().servable_object
        await gateway.forward(scope, receive, send)


async def _live(receive: Receive, send: Send) -> None:
    """Handle the ASGI lifespan protocol: startup and shutdown."""
    kind = ""
    while kind != "lifespan.shutdown":
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})


@serve.ingress(_CurrentGateway())
class GatewayDeployment:
    """A gateway behind Serve's proxies."""

    def __init__(self, replicas: DeploymentHandle[Any], config: ServerConfig) -> None:
        self.forward = with_middleware(Gateway(ServeReplicas(replicas)), config, ROUTERS)


def _router(scaling: ScalingConfig) -> RequestRouterConfig:
    settings: dict[str, Any] = {
        "request_router_class": f"{PrefixRouter.__module__}.{PrefixRouter.__name__}",
        "request_router_kwargs": {"lead": scaling.prefix_affinity_lead},
    }
    return RequestRouterConfig(**settings)


def _count(scaling: ScalingConfig) -> dict[str, Any]:
    if scaling.max_replicas is None:
        return {"num_replicas": scaling.replicas}
    averaged_s = min(scaling.scale_up_delay_s, _LONGEST_AVERAGE_S)
    autoscaling = AutoscalingConfig(
        min_replicas=scaling.replicas, max_replicas=scaling.max_replicas,
        target_ongoing_requests=scaling.requests_per_replica, look_back_period_s=averaged_s,
        metrics_interval_s=averaged_s / _REPORTS_PER_AVERAGE, upscale_delay_s=scaling.scale_up_delay_s,
        downscale_delay_s=scaling.scale_down_delay_s,
    )  # fmt: skip
    return {"autoscaling_config": autoscaling}


def _keys() -> dict[str, Any]:
    """The API keys of this process, as environment of the replicas."""
    keys = {name: os.environ[name] for name in (API_KEYS_VARIABLE, ADMIN_KEYS_VARIABLE) if name in os.environ}
    return {"runtime_env": {"env_vars": keys}} if keys else {}


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in section.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
