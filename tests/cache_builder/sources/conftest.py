"""Servers for the tests of remote sources."""

import boto3
import pytest
from moto.server import ThreadedMotoServer

from cache_builder.sources import remote
from tests.servers import FileServer


@pytest.fixture(scope="session")
def s3_server():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch, request):
    """An empty bucket that the environment leads to; `put(name, data)` fills it."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_server,
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    name = "b-" + request.node.name.split("[")[0].replace("_", "-").lower()[:50].rstrip("-")
    client.create_bucket(Bucket=name)
    remote._filesystem_of.cache_clear()

    class Bucket:
        url = f"s3://{name}"

        def put(self, key, data):
            client.put_object(Bucket=name, Key=key, Body=data)

    return Bucket()


@pytest.fixture
def serve(monkeypatch):
    """Start web servers; pauses between tries are short."""
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.001)
    servers = []

    def start(files, **moods):
        servers.append(FileServer(files, **moods))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
