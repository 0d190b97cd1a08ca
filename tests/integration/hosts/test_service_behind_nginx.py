"""Two replicas behind deploy/nginx: killing, cutting off or replacing one loses no answer."""

import re
import shutil
import signal
from pathlib import Path

import httpx
import pytest

from tests import factories
from tests.integration import builds
from tests.integration.hosts.load import Load, questions
from tests.integration.hosts.network import network
from tokenizers_svc.client import TokenizerClient

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("hosts_are_possible"),
    pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed"),
]

CONFIGURATION = Path("deploy/nginx/patchcache.conf").resolve()
KEY = "a-key-of-these-tests"
IMAGES_TOTAL = re.compile(r"^patchcache_images_total\{.*\} (\S+)$", re.MULTILINE)

# What a distribution's nginx.conf says around conf.d; everything it writes lies in one folder.
NGINX = """
user root;
worker_processes 2;
daemon off;
pid {folder}/nginx.pid;
error_log stderr;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    scgi_temp_path {folder}/scgi;
    uwsgi_temp_path {folder}/uwsgi;
    include {configuration};
}}
"""


class Replica:
    """`patchcache serve` on a host; it may be ended and started again."""

    def __init__(self, host, codebook, folder):
        self.host = host
        self._log = folder / f"{host.name}.log"
        self._key_file = folder / "keys"
        self._key_file.write_text(f"{KEY} tests\n")
        self._words = [
            *("-m", "cache_builder", "serve", "--codebook", codebook, "--device", "cpu"),
            *("--host", host.address, "--port", 8000, "--key-file", self._key_file),
            *("--limit", "kept_bytes=0"),  # every answer is worked for
        ]
        self.start()

    def start(self):
        self.process = self.host.start_python(self._words, self._log)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(builds.TIMEOUT_S) == 0

    def wait_until_ready(self):
        builds.wait_for(lambda: self._get("/readyz") is not None or self.process.poll() is not None)
        assert self.process.poll() is None, self._log.read_text()

    def num_images(self):
        """Return how many pictures it has answered since it started."""
        text = self._get("/metrics") or ""
        return sum(map(float, IMAGES_TOTAL.findall(text)))

    def wait_for_work(self):
        before = self.num_images()
        builds.wait_for(lambda: self.num_images() > before)

    def _get(self, path):
        headers = {"Authorization": f"Bearer {KEY}"}
        try:
            answer = httpx.get(f"http://{self.host.address}:8000{path}", headers=headers)
        except httpx.TransportError:
            return None
        return answer.text if answer.is_success else None


@pytest.fixture(scope="module")
def proxied(hosts_are_possible, tmp_path_factory):
    """Yield two replicas, and the URL of the proxy before them."""
    folder = tmp_path_factory.mktemp("proxied")
    codebook = factories.write_codebook(folder / "codebook.safetensors")
    nginx_conf = folder / "nginx.conf"
    nginx_conf.write_text(NGINX.format(folder=folder, configuration=CONFIGURATION))
    with network("proxy", "replica-1", "replica-2") as (proxy, *hosts):
        replicas = [Replica(host, codebook, folder) for host in hosts]
        nginx = proxy.start(["nginx", "-c", nginx_conf], folder / "nginx.log")
        for replica in replicas:
            replica.wait_until_ready()
        url = f"http://{proxy.address}"
        with TokenizerClient(url, key=KEY) as client:
            client.wait_ready(timeout_s=builds.TIMEOUT_S)
        assert nginx.poll() is None, (folder / "nginx.log").read_text()
        yield *replicas, url


def test_no_answer_is_lost_while_replicas_are_killed_and_replaced(proxied):
    one, two, url = proxied
    with Load(url, KEY, questions(200)) as load:
        one.wait_for_work()
        two.wait_for_work()
        for replica, leave in ((one, one.host.kill), (two, two.stop), (one, one.stop)):
            leave()
            load.wait_for_more(100)
            replica.start()
            replica.wait_until_ready()
            replica.wait_for_work()
    assert load.failures == []


def test_a_host_that_is_cut_off_delays_answers_and_loses_none(proxied):
    one, two, url = proxied
    try:
        # nginx waits for 35 s where a request was with that host already.
        with Load(url, KEY, questions(200)) as load:
            one.wait_for_work()
            two.wait_for_work()
            one.host.pull_cable()
            load.wait_for_more(100)
    finally:
        one.host.plug_in()
    assert load.failures == []
    assert one.process.poll() is None


def test_what_nginx_says_by_itself_is_a_problem_of_the_service(proxied):
    *_, url = proxied
    headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "mine-1"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        told = client.get("/v1/models")
        assert told.headers["X-Request-Id"] == "mine-1"
        bodies = told.json()["models"][0]["limits"]["max_batch_body_bytes"]
        for path, size, status, code in (
            ("/v1/tokenize/batch", bodies + 1, 413, "body-too-large"),  # the service
            ("/v1/tokenize/batch", 70_000_000, 413, "body-too-large"),  # nginx
            ("/metrics", 0, 404, "not-found"),
            ("/v1/admin/models/codebook:reload", 1, 404, "not-found"),
        ):
            answer = client.request("POST" if size else "GET", path, content=bytes(size))
            assert answer.status_code == status
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert answer.headers["X-Request-Id"] == "mine-1"
            assert answer.json()["code"] == code
            assert answer.json()["instance"] == "urn:request:mine-1"
        answer = client.get("/healthz", headers={"X-Request-Id": 'not"harmless'})
        assert len(answer.headers["X-Request-Id"]) == 32
