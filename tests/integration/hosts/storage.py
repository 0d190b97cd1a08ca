"""An S3 server on a host of its own."""

import os
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

from tests.integration import builds
from tests.integration.hosts.network import Host

BUCKET = "s3://bucket"
_PORT = 9000


def start(host: Host, clients: list[Host], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a server with an empty bucket; these hosts and this process find it by environment."""
    log = folder / "storage.log"
    words = ["-m", "moto.server", "-H", host.address, "-p", _PORT]
    server = host.start_python(words, log)
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host.address}:{_PORT}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for client in clients:
        client.give_environment(settings)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)

    def has_bucket() -> bool:
        assert server.poll() is None, log.read_text()
        try:
            url = f"{os.environ['AWS_ENDPOINT_URL']}/{BUCKET.partition('://')[2]}"
            urlopen(Request(url, method="PUT"), timeout=20).close()
        except (URLError, ConnectionError):
            return False
        return True

    builds.wait_for(has_bucket)
