"""The same application in many replicas on a Ray cluster: the only `import ray` of this package.

Ray Serve is the supervisor and the way in; each replica is the whole service of `create_app` with
its own device, door and batcher, so batches and refusals are those of one process. Ray's own
batching is not used. Its limits are set so that ours speak first; what its proxy says by itself,
when all replicas are full or none is there, gets the form of our problems.

    SIGTERM    replicas are not ready and still serve for `drain_s`; then no new requests, all that
               was let in is answered, exit code 0
    SIGHUP     every replica reads its keys and codebooks again

Codebooks and key files are read by the replicas: they must lie where each node finds them. Keys of
the environment are those of the command, and travel with the options.

A cluster has one Ray Serve, which this takes for itself: it refuses one that serves others, and
ends it when it goes. What a command that was killed has left goes on serving until the next one.
"""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cache_builder.errors import ConfigError, MissingDependencyError, WorkerLostError
from cache_builder.formats.codebook import Codebook
from cache_builder.ray_cluster import Cluster, ClusterOptions, connect
from tokenizers_svc import logs
from tokenizers_svc.access import Access, check_exposure
from tokenizers_svc.app import create_app
from tokenizers_svc.collection import spare_what_is_loaded
from tokenizers_svc.limits import Limits
from tokenizers_svc.options import ServiceOptions
from tokenizers_svc.ray_proxy import proxy_middleware
from tokenizers_svc.renewal import renew
from tokenizers_svc.serve import listen, with_environment
from tokenizers_svc.service import TokenizeService
from tokenizers_svc.signals import Signals, caught_signals, next_signal

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)

_APP: Final = "patchcache"
_PROXY_CALLBACK: Final = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
# Ray's own 5 and 10 s take a proxy on a busy machine for dead before it has started.
_PATIENCE: Final = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
}
_NUM_STARTS: Final = 3
_FAREWELL_S: Final = 2.0  # the proxy tells who still asks that nobody serves, before it is killed
_PORT_S: Final = 10.0
_ORDERS: Final = "orders"
_POLL_S: Final = 0.5
_OBEY_S: Final = 0.5  # between two looks of a replica for orders
_HEALTH_PERIOD_S: Final = 5.0
_WARM_UP_POLL_S: Final = 0.05
_HEADROOM: Final = 16  # probes, metrics and looks at models, beside the pictures


class ReplicaOptions(NamedTuple):
    """How many replicas, where, and what each of them holds."""

    address: str | None = None  # of a cluster; None: one of this machine alone
    num_replicas: int = 1
    max_replicas: int | None = None  # above `num_replicas`, then the least: as many as are needed
    gpus_per_replica: float = 0  # below 1: several replicas share a GPU
    cpus_per_replica: float = 1


def run(
    options: ServiceOptions,
    replicas: ReplicaOptions,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    insecure: bool = False,
) -> None:
    """Serve on Ray until SIGTERM or SIGINT. Call it from the main thread.

    Args:
        options: Of every replica.
        replicas: How many, and what each of them holds.
        host: Address that the proxy of each node listens at.
        port: Its port.
        insecure: Listen where others can reach it although there are no keys.

    Raises:
        ArtifactError: There is no codebook, or it is damaged.
        ConfigError: The options make no sense, the port cannot be listened at, or others have the
            Ray Serve of the cluster.
        MissingDependencyError: Ray Serve is not installed.
        WorkerLostError: No replica could start, or Ray gave up on them.
    """
    options = with_environment(options)
    check_numbers(replicas)
    if port == 0:
        raise ConfigError("On Ray the port is chosen by you: pass --port with a free one.")
    check_exposure(host, Access(options.access), insecure=insecure)
    for path in options.codebooks.values():
        Codebook.load(path)  # the user's mistakes are told here, not in the log of a replica
    if replicas.address is None:
        listen(host, port).close()  # a port that is taken would be told in a log of Ray alone
    serve = import_serve()
    environment = {
        _PROXY_CALLBACK: f"{proxy_middleware.__module__}.{proxy_middleware.__name__}",
        **_PATIENCE,
    }
    where = ClusterOptions(
        replicas.address, None, replicas.gpus_per_replica, replicas.cpus_per_replica
    )
    with (
        connect(where, env_vars=environment, packages=[Path(__file__).parent]) as cluster,
        caught_signals(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals,
    ):
        orders = _claim(cluster, serve)
        try:
            _wait_for_port(host, port)
            _start(
                cluster,
                serve,
                proxy_location="HeadOnly" if replicas.address is None else "EveryNode",
                http_options={"host": host, "port": port, "keep_alive_timeout_s": 75},
            )
            deployment = make_deployment(serve, options, replicas)
            target = serve.RunTarget(deployment.bind(), name=_APP, route_prefix="/")
            serve.run_many([target], wait_for_applications_running=False)
            _supervise(cluster, serve, orders, options, signals, f"http://{host}:{port}")
        finally:
            serve.shutdown()


def _claim(cluster: Cluster, serve: Any) -> Any:
    """Take the Ray Serve of a cluster; return the actor that gives orders, which others see.

    Raises:
        ConfigError: Somebody has it.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    others = sorted(serve.status().applications.keys() - {_APP})
    if others:
        raise ConfigError(
            f"Ray Serve already serves {', '.join(others)} on this cluster, which has one Ray "
            "Serve. Pass the --ray-address of another cluster, or stop it: serve shutdown"
        )
    here = cluster.ray.get_runtime_context().get_node_id()
    actor_class = cluster.ray.remote(Orders).options(
        name=_ORDERS,
        namespace=_APP,
        num_cpus=0,
        # No other node takes the orders with it when it is lost.
        scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
    )
    try:
        orders = actor_class.remote()
    except ValueError as exc:  # the name is taken
        raise ConfigError(
            "Another `patchcache serve --ray` runs on this cluster. Stop it, or pass the "
            "--ray-address of another cluster."
        ) from exc
    serve.shutdown()  # what a command that was killed has left
    return orders


def _wait_for_port(host: str, port: int) -> None:
    """Wait until a proxy that was told to end has left the port of this node.

    Raises:
        ConfigError: Somebody listens there.
    """
    end_s = time.monotonic() + _PORT_S
    while True:
        try:
            listen(host, port).close()
        except ConfigError:
            if time.monotonic() >= end_s:
                raise
            time.sleep(_POLL_S)
        else:
            return


def _start(cluster: Cluster, serve: Any, **options: Any) -> None:
    """Start Ray Serve; a proxy that is not there in time is started again by its controller."""
    for left in reversed(range(_NUM_STARTS)):
        try:
            serve.start(**options)
        except (TimeoutError, cluster.ray.exceptions.RayActorError) as exc:
            if not left:
                raise WorkerLostError(f"The proxy of Ray Serve does not start: {exc}") from exc
            logger.warning("the proxy of Ray Serve is late")
        else:
            return


def _supervise(
    cluster: Cluster,
    serve: Any,
    orders: Any,
    options: ServiceOptions,
    signals: Signals,
    url: str,
) -> None:
    """Obey signals, and come back when all that was let in is answered."""
    is_announced, before = False, ""
    while (number := next_signal(signals, _POLL_S)) in (None, signal.SIGHUP):
        if number == signal.SIGHUP:
            logger.info("SIGHUP: every replica reads its keys and codebooks again")
            cluster.ray.get(orders.reload.remote())
        known = serve.status()
        status = known.applications[_APP]
        if status.status == "DEPLOY_FAILED":
            raise WorkerLostError(f"The replicas do not serve. {_reason(status)}")
        if status.status == "UNHEALTHY" and before != "UNHEALTHY":
            logger.warning("a replica has died; Ray starts another one")
        before = status.status
        has_proxy = "HEALTHY" in known.proxies.values()
        if status.status == "RUNNING" and has_proxy and not is_announced:
            is_announced = True
            logger.info("serving %s on Ray at %s", ", ".join(options.codebooks), url)
            logger.info("try: curl --data-binary @photo.jpg %s/v1/tokenize", url)
    logger.info("%s: finishing what has begun", signal.Signals(number).name)
    if number == signal.SIGTERM:
        cluster.ray.get(orders.drain.remote())
        next_signal(signals, _OBEY_S + options.limits.drain_s)
    serve.delete(_APP)
    next_signal(signals, _FAREWELL_S)


class Orders:
    """An actor that the replicas ask for what they should do; the driver gives the orders."""

    def __init__(self) -> None:
        """Give none."""
        self._is_draining = False
        self._num_reloads = 0

    def drain(self) -> None:
        """Let replicas be not ready."""
        self._is_draining = True

    def reload(self) -> None:
        """Let replicas read their files again."""
        self._num_reloads += 1

    def current(self) -> tuple[bool, int]:
        """Return whether to be draining, and how often there was something to read again."""
        return self._is_draining, self._num_reloads


def make_deployment(serve: Any, options: ServiceOptions, replicas: ReplicaOptions) -> Any:
    """Return what Ray Serve runs: limits, health and numbers of replicas."""
    limits = _resolved(options.limits, replicas)
    settings: dict[str, Any] = {
        "name": "tokenizer",
        # Ours refuse first, with the reason; the default of 5 would starve every batch.
        "max_ongoing_requests": limits.max_queue + 2 * limits.max_batch + _HEADROOM,
        "max_queued_requests": limits.max_queue,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "graceful_shutdown_timeout_s": limits.request_deadline_s + 5,
        "graceful_shutdown_wait_loop_s": _POLL_S,
        "health_check_period_s": _HEALTH_PERIOD_S,
        "ray_actor_options": {
            "num_cpus": replicas.cpus_per_replica,
            "num_gpus": replicas.gpus_per_replica,
        },
    }
    if replicas.max_replicas is None:
        settings["num_replicas"] = replicas.num_replicas
    else:
        settings["autoscaling_config"] = {
            "min_replicas": replicas.num_replicas,
            "max_replicas": replicas.max_replicas,
            # A batch on the device and one that gathers.
            "target_ongoing_requests": 2 * limits.max_batch,
        }
    ingress = serve.ingress(
        _builder(options.model_copy(update={"num_cores": _num_cores(replicas)}))
    )(Replica)
    return serve.deployment(**settings)(ingress)


def _builder(options: ServiceOptions) -> Callable[[], "FastAPI"]:
    """Return what makes the application inside a replica."""

    def build() -> "FastAPI":
        logs.configure("json")
        app = create_app(options=options)
        app.router.lifespan_context = _until_warm(app.router.lifespan_context)
        return app

    return build


def _until_warm(lifespan: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a lifespan that begins when the models are warm: Ray sends requests from then on."""

    @contextlib.asynccontextmanager
    async def until_warm(app: "FastAPI") -> AsyncIterator[Any]:
        async with lifespan(app) as state:
            service = app.state.service
            while service.why_not_ready() is not None:
                if service.failure is not None:
                    raise service.failure
                await asyncio.sleep(_WARM_UP_POLL_S)
            spare_what_is_loaded()
            obeying = asyncio.create_task(_obey(app))
            try:
                yield state
            finally:
                obeying.cancel()

    return until_warm


async def _obey(app: "FastAPI") -> None:
    """Do for ever what the driver orders; return when the driver has gone."""
    import ray

    with contextlib.suppress(ray.exceptions.RayActorError, ValueError):  # no such actor
        orders = ray.get_actor(_ORDERS, namespace=_APP)
        _, num_done = await orders.current.remote()
        while True:
            app.state.service.is_draining, num_reloads = await orders.current.remote()
            if num_reloads > num_done:
                num_done = num_reloads
                await renew(app)
            await asyncio.sleep(_OBEY_S)


class Replica:
    """What Ray Serve asks of a replica beside HTTP; `app` comes with `serve.ingress`."""

    app: "FastAPI"

    async def check_health(self) -> None:
        """Raise when this replica should be replaced."""
        service: TokenizeService = self.app.state.service
        if service.failure is not None:
            raise service.failure
        complaint = service.complaint()
        if complaint is not None:
            raise WorkerLostError(complaint)


def check_numbers(replicas: ReplicaOptions) -> None:
    """Refuse numbers of replicas that make no sense.

    Raises:
        ConfigError: There are to be at most fewer than at least.
    """
    least, most = replicas.num_replicas, replicas.max_replicas
    if most is not None and most < max(least, 1):
        raise ConfigError(
            f"--max-replicas {most} is less than the {max(least, 1)} replicas that there are at "
            "least. Pass a larger one."
        )


def _resolved(limits: Limits, replicas: ReplicaOptions) -> Limits:
    """Return the limits as a replica resolves them."""
    return limits.resolved(on_cpu=not replicas.gpus_per_replica, num_cores=_num_cores(replicas))


def _num_cores(replicas: ReplicaOptions) -> int:
    """Return how many cores a replica may keep busy."""
    return max(1, int(replicas.cpus_per_replica))


def _reason(status: Any) -> str:
    """Return why Ray Serve gave up: the last line of what it says about each deployment."""
    messages = [status.message, *(x.message for x in status.deployments.values())]
    lines = [message.strip().splitlines()[-1] for message in messages if message.strip()]
    return " ".join(lines) or "The logs of Ray say why."


def import_serve() -> Any:
    """Return the module `ray.serve`.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        from ray import serve
    except ImportError as exc:
        raise MissingDependencyError(
            "--ray needs Ray Serve, which is not installed. "
            "Run: pip install 'patchcache[serve-ray]'"
        ) from exc
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return serve
