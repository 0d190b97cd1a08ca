"""Hosts of their own on one machine: network namespaces that are plugged into one switch.

A host has an address, a name that the others resolve, a loopback of its own, and places of the
file system that it does not share. What runs on it can be killed, and its cable can be pulled while
everything on it goes on running. This process sits at the switch and reaches every host.

Names carry the number of this process, so that what a killed one has left is known and swept away
by the next.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

_PREFIX = "pch"
_OURS = re.compile(rf"{_PREFIX}(\d+)(-[\w-]+|v\d+)?")
_FILES_OF_HOSTS = Path("/etc/netns")  # `ip netns exec` lays these over /etc
_SETTLE_S = 20

# Gives a process its host's name and its host's places, then becomes the command.
_ENTER = """
hostname "$1"; shift
while [ "$1" != -- ]; do mount --bind "$1" "$2"; shift 2; done
shift
exec "$@"
"""


def why_there_are_none() -> str | None:
    """Say why this machine can have no such hosts; None if it can."""
    if os.geteuid() != 0:
        return "hosts of network namespaces need root"
    if missing := [name for name in ("ip", "tc", "unshare", "mount") if not shutil.which(name)]:
        return f"hosts of network namespaces need {' and '.join(missing)}"
    try:
        with _network(["probe"]) as (host,):
            subprocess.run([*host.entering(), "true"], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as exc:
        return f"there can be no network namespaces here: {exc.stderr.strip()}"
    return None


class Host:
    """A machine in the network."""

    def __init__(self, name: str, address: str, cable: str) -> None:
        """Describe a host that `network` has made."""
        self.name = name
        self.address = address
        self.namespace = f"{_PREFIX}{os.getpid()}-{name}"
        self.cable = cable  # its end at the switch
        self._own: list[str] = []
        self._environment: dict[str, str] = {}
        self._started: list[subprocess.Popen[bytes]] = []

    def lay_cable(self, switch: str) -> None:
        """Make the host, and a pair of virtual Ethernet devices from it to a bridge."""
        inside = self.namespace
        _ip(f"netns add {inside}")
        _ip(f"link add {self.cable} type veth peer name eth0 netns {inside}")
        _ip(f"link set {self.cable} master {switch} up")
        _ip(f"-n {inside} addr add {self.address}/24 dev eth0")
        for device in ("lo", "eth0"):
            _ip(f"-n {inside} link set {device} up")
        (_FILES_OF_HOSTS / inside).mkdir(parents=True)

    def give_place(self, place: Path, content: Path) -> None:
        """Let processes that start here from now on find `content` at `place`; others do not."""
        for path in (place, content):
            path.mkdir(parents=True, exist_ok=True)
        self._own += [str(content), str(place)]

    def give_environment(self, values: Mapping[str, str]) -> None:
        """Let processes that start here from now on find these variables."""
        self._environment |= values

    def entering(self) -> list[str]:
        """Return the words before a command that let it run here, as the same process."""
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts"]
        return [*inside, "sh", "-ec", _ENTER, "sh", self.name, *self._own, "--"]

    def start(self, words: Sequence[object], log: Path) -> "subprocess.Popen[bytes]":
        """Start a command; what it says goes to the end of `log`."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*self.entering(), *map(str, words)],
                env=self._variables(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        self._started.append(process)
        return process

    def start_python(self, words: Sequence[object], log: Path) -> "subprocess.Popen[bytes]":
        """Start `python ...`, this Python."""
        return self.start([sys.executable, *words], log)

    def processes(self) -> dict[int, str]:
        """Return what runs here: command lines by number of process."""
        found = _ip(f"netns pids {self.namespace}").split()
        return {int(pid): _command_line(int(pid)) for pid in found}

    def kill(self) -> None:
        """SIGKILL everything that runs here, until nothing does."""
        _kill_all(self.namespace)
        for process in self._started:
            process.wait()

    def pull_cable(self) -> None:
        """Cut the host off: nothing gets in or out, and nobody is told."""
        _ip(f"link set {self.cable} down")

    def plug_in(self) -> None:
        """End what `pull_cable` began."""
        _ip(f"link set {self.cable} up")

    def slow_down(self, bits_per_s: int) -> None:
        """Let no more get out of the host than this; 0 ends it."""
        words = "del dev eth0 root"
        if bits_per_s:
            words = f"replace dev eth0 root tbf rate {bits_per_s} burst 32kb latency 1s"
        inside = ["ip", "netns", "exec", self.namespace]
        subprocess.run([*inside, "tc", "qdisc", *words.split()], check=True)

    def _variables(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        commands = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        ours = {"PATH": commands, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
        return {**kept, **ours, **self._environment}


@contextlib.contextmanager
def network(*names: str) -> Iterator[list[Host]]:
    """Yield hosts of these names, and take them away again with everything that runs on them."""
    sweep()
    with _network(names) as hosts:
        yield hosts


def sweep() -> None:
    """Take away what processes have left that are gone."""
    names = {line.split()[0] for line in _ip("netns list").splitlines() if line}
    links = {link.name for link in Path("/sys/class/net").iterdir()}
    for name in sorted(names | links):
        found = _OURS.fullmatch(name)
        if found and not Path(f"/proc/{found[1]}").exists():
            _remove(name, is_namespace=name in names)


@contextlib.contextmanager
def _network(names: Iterable[str]) -> Iterator[list[Host]]:
    """Lay the cables: the switch is a bridge, a cable a pair of virtual Ethernet devices."""
    switch, (start, rest) = f"{_PREFIX}{os.getpid()}", divmod(os.getpid(), 256)
    subnet = f"10.{64 + start % 128}.{rest}"
    hosts = [
        Host(name, f"{subnet}.{number}", f"{switch}v{number}")
        for number, name in enumerate(names, start=2)
    ]
    told = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts)
    try:
        _ip(f"link add {switch} type bridge")
        _ip(f"addr add {subnet}.1/24 dev {switch}")
        _ip(f"link set {switch} up")
        for host in hosts:
            host.lay_cable(switch)
            (_FILES_OF_HOSTS / host.namespace / "hosts").write_text(told)
        yield hosts
    finally:
        for host in hosts:
            with contextlib.suppress(subprocess.CalledProcessError):  # it was never made
                host.kill()
            _remove(host.cable, is_namespace=False)
            _remove(host.namespace, is_namespace=True)
        _remove(switch, is_namespace=False)


def _kill_all(namespace: str) -> None:
    """SIGKILL everything that runs in a namespace, until nothing does."""
    give_up_s = time.monotonic() + _SETTLE_S
    while pids := _ip(f"netns pids {namespace}").split():
        assert time.monotonic() < give_up_s, f"{pids} in {namespace} cannot be killed"
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.02)


def _remove(name: str, *, is_namespace: bool) -> None:
    with contextlib.suppress(subprocess.CalledProcessError):  # it was never made, or is gone
        if is_namespace:
            _kill_all(name)
            _ip(f"netns del {name}")
        else:
            _ip(f"link del {name}")
    shutil.rmtree(_FILES_OF_HOSTS / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # it is not empty
        _FILES_OF_HOSTS.rmdir()


def _ip(words: str) -> str:
    return subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True).stdout


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:  # it has ended meanwhile
        return ""
