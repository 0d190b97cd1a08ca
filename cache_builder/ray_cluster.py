"""The connection to a Ray cluster: the only `import ray` of this package.

By default a cluster of this machine's cores is started and stopped again; with an address, the
command joins a running cluster and sends this package along, compiled kernels included, so that
its nodes need no disk in common. A head node that no longer answers ends the command here, with a
line of ours, before Ray's own patience runs out and takes the process down.
"""

import contextlib
import io
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cache_builder.errors import (
    ConfigError,
    MissingDependencyError,
    PatchCacheError,
    WorkerLostError,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TERMINATED = 128 + signal.SIGTERM  # exit status
_POLL_S = 1.0
_SECONDS_BETWEEN_CHECKS = 2.0  # of whether the head node answers
_HEAD_PATIENCE_S = 20.0  # Ray ends a process that has lost its head node after 60
_CONNECT_S = 2.0
_MAX_STARTS = 3  # of a node of our own
_LEAST_SHARE = 1e-4  # the smallest part of a resource that Ray counts
_UNIT_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)  # bounds of the histogram


class ClusterOptions(NamedTuple):
    """Where the work runs."""

    address: str | None = None  # None: a cluster of this machine alone, for this job alone
    num_workers: int | None = None  # None: as many as find a place now
    gpus_per_worker: float = 0  # below 1: several workers share a GPU
    cpus_per_worker: float = 1

    @property
    def threads_per_worker(self) -> int:
        """Threads that a worker may keep busy."""
        return max(1, int(self.cpus_per_worker))


class Cluster:
    """A cluster that this process is connected to."""

    def __init__(self, ray: Any, name: str) -> None:
        """Take the connected module, and what to call the cluster in messages."""
        self.ray = ray
        self._name = name
        host, port = ray.get_runtime_context().gcs_address.rsplit(":", 1)
        self._head = (host.strip("[]"), int(port))
        self._asked_s = self._answered_s = time.monotonic()

    def num_places(self, options: ClusterOptions) -> int:
        """Return how many workers find a place on the nodes that are there now."""
        return sum(
            min(
                _times(node.get("CPU", 0), options.cpus_per_worker),
                _times(node.get("GPU", 0), options.gpus_per_worker),
            )
            for node in self._nodes()
        )

    def cpus_for_each(self, count: int, wanted: float) -> float:
        """Return the most CPUs, up to `wanted`, at which `count` workers all find a place now."""
        sizes = [cpus for node in self._nodes() if (cpus := node.get("CPU", 0))]
        shares = {size / parts for size in set(sizes) for parts in range(1, count + 1)}
        for share in sorted({wanted, *(share for share in shares if share < wanted)}, reverse=True):
            if sum(_times(size, share) for size in sizes) >= count:
                return share
        return 0

    def describe_resources(self) -> str:
        """Say what the cluster has now: `4 CPUs and 0 GPUs on 2 nodes`."""
        nodes = self._nodes()
        cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        return f"{cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} nodes"

    def wait(self, references: list[Any]) -> list[Any]:
        """Return what is done of `references`: one, or none when a second has passed.

        Raises:
            WorkerLostError: The head node has not answered for a while.
        """
        done, _ = self.ray.wait(references, num_returns=1, timeout=_POLL_S)
        self._check_head()
        return list(done)

    def fetch(self, reference: Any, timeout_s: float | None = None) -> Any:
        """Return what a call gave, or raise what it raised.

        Raises:
            PatchCacheError: What a user can mend comes without Ray's wrapper and remote traceback;
                so do OSError and MemoryError.
        """
        try:
            return self.ray.get(reference, timeout=timeout_s)
        except self.ray.exceptions.RayTaskError as exc:
            if isinstance(exc.cause, PatchCacheError | OSError | MemoryError):
                raise exc.cause from None
            raise

    def is_loss(self, exc: BaseException) -> bool:
        """Say whether an exception means that a process or what it held is gone."""
        errors = self.ray.exceptions
        return isinstance(exc, errors.RayError) and not isinstance(exc, errors.RayTaskError)

    def is_out_of_memory(self, exc: BaseException) -> bool:
        """Say whether Ray killed a process because its node ran out of memory."""
        # Of a call that waited behind the one that was killed, the text alone says so.
        is_named = isinstance(exc, self.ray.exceptions.OutOfMemoryError)
        return is_named or "running low on memory" in str(exc)

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def _check_head(self) -> None:
        now_s = time.monotonic()
        if now_s - self._asked_s < _SECONDS_BETWEEN_CHECKS:
            return
        self._asked_s = now_s
        if self._is_there():
            self._answered_s = now_s
        elif now_s - self._answered_s >= _HEAD_PATIENCE_S:
            raise WorkerLostError(
                f"The head node of the Ray cluster at {self._name} is gone: {self._head[0]} has "
                f"not answered for {now_s - self._answered_s:.0f} s. Run the same command again "
                "when the cluster is back; what was finished is kept."
            )

    def _is_there(self) -> bool:
        """Whether the head node answers and some node, itself at least, can do work."""
        try:
            socket.create_connection(self._head, _CONNECT_S).close()
        except OSError:
            return False
        return bool(self._nodes())


class _ToLog(io.TextIOBase):
    """Where Ray's messages go: it prints them on stdout, which is for results."""

    def write(self, text: str) -> int:
        if text.strip():
            logger.debug("%s", text.rstrip())
        return len(text)


class Meters:
    """What a job counts, on the metrics page of every node and in Ray's dashboard."""

    def __init__(self, job: str, node: str) -> None:
        """Name the job and the node: the tags of everything."""
        from ray.util import metrics

        self._metrics = metrics
        self._tags = {"job": job, "node": node}
        self._counters: dict[str, Any] = {}
        self._gauges: dict[str, Any] = {}
        self._seconds = metrics.Histogram(
            "patchcache_unit_seconds",
            description="Time that a unit of work took.",
            boundaries=list(_UNIT_SECONDS),
            tag_keys=tuple(self._tags),
        )

    def unit_done(self, seconds: float, counts: Mapping[str, float]) -> None:
        """Count a unit; `counts` become counters such as `patchcache_images_total`."""
        self._seconds.observe(seconds, self._tags)
        for name, value in {"units": 1, **counts}.items():
            if name not in self._counters:
                self._counters[name] = self._metrics.Counter(
                    f"patchcache_{name}",
                    description=f"{name.replace('_', ' ').capitalize()} of this job so far.",
                    tag_keys=tuple(self._tags),
                )
            if value > 0:
                self._counters[name].inc(value, self._tags)

    def set_gauge(self, name: str, value: float) -> None:
        """Show a number that goes up and down."""
        if name not in self._gauges:
            self._gauges[name] = self._metrics.Gauge(
                f"patchcache_{name}",
                description=f"{name.replace('_', ' ').capitalize()} of this job now.",
                tag_keys=tuple(self._tags),
            )
        self._gauges[name].set(value, self._tags)


def node_name() -> str:
    """Name the node that this process runs on: its host, and the start of Ray's id for it."""
    import ray

    return f"{socket.gethostname()}/{ray.get_runtime_context().get_node_id()[:6]}"


def use_one_thread() -> None:
    """Let torch compute in one thread in this process, whether it is there already or comes later.

    Several actors share the cores; intra-op threads would only fight over them. Importing torch for
    that would cost a worker that needs none two seconds.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # what torch looks at when it is imported
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@contextlib.contextmanager
def connect(
    options: ClusterOptions,
    *,
    env_vars: Mapping[str, str] | None = None,
    packages: Sequence[Path] = (),
) -> Iterator[Cluster]:
    """Join a cluster, or start one and stop it afterwards.

    SIGTERM ends the block as SystemExit does, so that nothing of ours is left running.

    Args:
        options: Which cluster.
        env_vars: Set in the environment of every process of this job.
        packages: Sent to the cluster beside this one.

    Raises:
        ConfigError: The address or the resources make no sense, or no cluster answers.
        MissingDependencyError: Ray is not installed.
    """
    address = None if options.address == "local" else options.address
    _check(options)
    ray = _import_ray()
    if ray.is_initialized():
        yield Cluster(ray, address or "this machine")
        return
    # Warnings of workers come with their results; Ray would prefix, delay and drop some of them.
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    environment: dict[str, Any] = {"env_vars": dict(env_vars)} if env_vars else {}
    if address is None:
        # `local` starts a new cluster even where RAY_ADDRESS names another one.
        settings |= {"address": "local", "include_dashboard": False, "num_cpus": os.cpu_count()}
    else:
        settings["address"] = address
        environment["py_modules"] = [str(path) for path in (Path(__file__).parent, *packages)]
    if environment:
        settings["runtime_env"] = environment
    with _sigterm_exits() as install, contextlib.redirect_stdout(_ToLog()):
        try:
            if address is None:
                start_patiently(lambda: ray.init(**settings), ray.shutdown)
            else:
                ray.init(**settings)
        except SystemExit:  # what Ray makes of SIGTERM meanwhile
            sys.exit(_TERMINATED)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as exc:
            raise ConfigError(
                f"No Ray cluster answers at {address or 'this machine'}: {_first_line(exc)} "
                "Is it running? A cluster that asks for a token (Ray's default for `ray start`) "
                "needs RAY_AUTH_MODE=token here; on one of its nodes `--ray-address auto` does "
                "without."
            ) from exc
        install()  # `ray.init` has put a handler of its own in place
        try:
            yield Cluster(ray, address or "this machine")
        finally:
            ray.shutdown()


def start_patiently(start: Callable[[], T], clean_up: Callable[[], object]) -> T:
    """Start a Ray node of our own, again where it was too slow.

    Ray gives the helpers of a node 15 seconds, which no setting changes. While other programs keep
    the machine busy, that is not always enough.

    Args:
        start: Starts the node, and returns something.
        clean_up: Takes away what a start that failed has left.

    Raises:
        RuntimeError: It was too slow every time.
    """
    num_tries = 0
    while True:
        num_tries += 1
        try:
            return start()
        except Exception as exc:
            if "timed out" not in str(exc).lower():
                raise
            clean_up()
            if num_tries == _MAX_STARTS:
                raise RuntimeError(
                    f"Ray has not started in time, {num_tries} times: {_first_line(exc)} Run the "
                    "same command again when the machine is less busy, or with --workers 0."
                ) from exc
            logger.warning("Ray has not started in time on this busy machine; trying again")


def _check(options: ClusterOptions) -> None:
    address = options.address or ""
    if address.startswith("ray://"):
        raise ConfigError(
            f"{address} is an address of Ray Client, which patchcache does not speak. Run the "
            "command on a node of the cluster with --ray-address auto, or send it there: ray job "
            "submit --address http://HEAD:8265 -- patchcache ... --ray-address auto."
        )
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"{address} is where a cluster takes jobs. Send the command there: ray job submit "
            f"--address {address} -- patchcache ... --ray-address auto. To run it on this machine "
            "alone, pass --ray-address local."
        )
    if options.cpus_per_worker <= 0:
        raise ConfigError(f"--cpus-per-worker must be above 0, not {options.cpus_per_worker:g}.")
    if options.gpus_per_worker > 1 and options.gpus_per_worker % 1:
        raise ConfigError(
            f"--gpus-per-worker is a share of one GPU, such as 0.25, or a whole number, "
            f"not {options.gpus_per_worker:g}."
        )


@contextlib.contextmanager
def _sigterm_exits() -> Iterator[Any]:
    """Let SIGTERM raise SystemExit in the main thread; yield what puts the handler in place."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    received = []
    before = signal.getsignal(signal.SIGTERM)

    def interrupt(signum: int, frame: object) -> None:
        # Ray's calls pass an interrupt on, and give SystemExit another status.
        received.append(signum)
        raise KeyboardInterrupt

    def install() -> None:
        signal.signal(signal.SIGTERM, interrupt)

    install()
    try:
        yield install
    except KeyboardInterrupt:
        if received:
            sys.exit(_TERMINATED)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _times(available: float, share: float) -> int:
    """Return how often a share is contained in what is available."""
    return int(available / share + _LEAST_SHARE) if share else sys.maxsize


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as exc:
        raise MissingDependencyError(
            "This command needs 'ray', which is not installed. Run: pip install 'patchcache[build]'"
        ) from exc
    return ray
