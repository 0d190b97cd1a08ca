"""Pictures, tokenizers and servers for the tests of the service; all of them real."""

import contextlib
import io
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import torch
from PIL import Image

from cache_builder import imaging
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.codebook_header import ExtractorSpec, PixelRule
from cache_builder.formats.views import centre_square
from cache_builder.tokenizers import PatchTokenizer
from tokenizers_svc.serve import make_server

ROOT = Path(__file__).parents[2]
RULE = PixelRule(size=32, patch_size=8)
GRID = [4, 4]


def make_codebook(num_stages=1, dtype=np.uint8, seed=0, metric="l2", objective=(30_000.0,)):
    rng = np.random.default_rng(seed)
    centroids = rng.integers(0, 256, (num_stages, 16, 192)).astype(dtype)
    if metric == "cosine":
        centroids = (centroids / np.linalg.norm(centroids, axis=-1, keepdims=True)).astype(dtype)
    counts = np.ones(centroids.shape[:2], np.int64)
    extractor = ExtractorSpec(id="pixel")
    return Codebook(
        centroids, counts, metric=metric, pixel_rule=RULE, extractor=extractor, objective=objective
    )


def make_tokenizer():
    return PatchTokenizer.load(make_codebook())


def make_zoo():
    """Models beside the plain one: two stages, centroids that are no pixels."""
    return {
        "residual": PatchTokenizer.load(make_codebook(num_stages=2, dtype=np.int16)),
        "cosine": PatchTokenizer.load(make_codebook(dtype=np.float32, metric="cosine")),
    }


def draw(size=(80, 60), mode="RGB", seed=0):
    """A picture with large shapes and some noise, width x height."""
    rng = np.random.default_rng(seed)
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 6, height))
    waves = [np.sin(x * (i + 1) + seed) + np.cos(y * (3 - i)) for i in range(3)]
    pixels = 128 + 50 * np.stack(waves, -1) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def encode_image(image, file_format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def jpeg(size=(80, 60), seed=0):
    return encode_image(draw(size, seed=seed), quality=90)


RED = encode_image(Image.new("RGB", (40, 40), (255, 0, 0)))


def resized_view(body, view=None):
    """What the library cuts out of a picture, (3, S, S)."""
    pixels = imaging.decode(body)
    view = view or centre_square(tuple(pixels.shape[-2:]))
    return imaging.apply_view(pixels, view, RULE.size, RULE.interpolation)


def expected_ids(body, view=None, tokenizer=None):
    """What the library says."""
    tokenizer = tokenizer or make_tokenizer()
    return tokenizer.encode(resized_view(body, view)[None])[0].flatten().tolist()


class WatchedTokenizer:
    """A pixel tokenizer that notes the size of every batch, and runs one only when it may."""

    def __init__(self):
        self.inner = make_tokenizer()
        self.codebook, self.device = self.inner.codebook, self.inner.device
        self.quantizer, self.features = self.inner.quantizer, self.inner.features
        self.may_run = threading.Event()
        self.may_run.set()
        self.batch_sizes = []

    def encode(self, pixels):
        self.batch_sizes.append(len(pixels))
        assert self.may_run.wait(20), "the test never let the tokenizer run"
        return self.inner.encode(pixels)


class AllergicTokenizer(WatchedTokenizer):
    """A tokenizer that cannot stand red pictures."""

    def encode(self, pixels):
        ids = super().encode(pixels)
        red, green = pixels[:, 0].float(), pixels[:, 1].float()
        if bool(((red.mean((1, 2)) > 240) & (green.mean((1, 2)) < 15)).any()):
            raise RuntimeError("a secret: /etc/passwd")
        return ids


class MortalTokenizer(AllergicTokenizer):
    """A tokenizer that never works again after it has seen a red picture, like a lost GPU."""

    is_lost = False

    def encode(self, pixels):
        if self.is_lost:
            raise RuntimeError("device lost")
        try:
            return super().encode(pixels)
        except RuntimeError:
            self.is_lost = True
            raise


@contextlib.contextmanager
def serving(app, wait=True):
    """Serve `app` on a free port; gives a client that knows where."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = make_server(app)
    thread = threading.Thread(target=server.run, args=([listener],))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread.start()
    try:
        with make_client(url) as client:
            if wait:
                wait_ready(client)
            yield client
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server did not stop"


def make_client(url):
    # Without verify=False every client spends 20 ms on certificates that no test uses.
    return httpx.Client(base_url=url, timeout=20, trust_env=False, verify=False)


def wait_ready(client):
    wait_until(lambda: client.get("/readyz").status_code == 200)


def wait_until(is_so, timeout_s=20):
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def post(client, body, **options):
    return client.post("/v1/tokenize", content=body, **options)


def check_problem(answer, status, code):
    """Assert that an answer is a complete problem document; return it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["type"] == f"urn:patchcache:problem:{code}"
    assert problem["status"] == status
    assert problem["code"] == code
    assert problem["instance"] == f"urn:request:{answer.headers['x-request-id']}"
    assert problem["title"]
    assert problem["detail"]
    return problem


def open_request(client, body, *, num_sent=None, headers=()):
    """Begin a POST on a socket of its own; without `num_sent`, the whole body."""
    host, port = client.base_url.host, client.base_url.port
    connection = socket.create_connection((host, port), timeout=20)
    lines = ["POST /v1/tokenize HTTP/1.1", f"Host: {host}", *headers]
    if not any(line.lower().startswith("content-length") for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body[:num_sent])
    return connection


def read_answer(connection):
    """Status and body of the one answer on a socket; closes it."""
    from http.client import HTTPResponse

    with connection:
        response = HTTPResponse(connection)
        response.begin()
        with response:
            return response.status, response.read()


@contextlib.contextmanager
def process(code, *arguments):
    """Run Python code that logs to standard error; gives it and a client of the URL it logs."""
    setup = "import logging, sys; logging.basicConfig(level='INFO')\n"
    running = subprocess.Popen(
        [sys.executable, "-c", setup + code, *map(str, arguments)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    with running:
        try:
            for line in running.stderr:
                lines.append(line)
                if "try: curl" in line:
                    break
            else:
                raise AssertionError("".join(lines))
            url = line.split()[-1].removesuffix("/v1/tokenize")
            reader = threading.Thread(target=lambda: lines.extend(running.stderr))
            reader.start()
            with make_client(url) as client:
                yield running, client, lines
            running.wait(20)
            reader.join(10)
        finally:
            running.kill()


def ids_of(view):
    """What the library says of a view."""
    return make_tokenizer().encode(view[None])[0].flatten().tolist()


def ids_in(answers):
    """The ids of every answer of a batcher."""
    return [answer.ids.tolist() for answer in answers]


def make_views(num_views, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_views, 3, RULE.size, RULE.size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
