"""A small Hugging Face Hub on a real socket: what its client needs to send and fetch files.

Repositories, commits, the tree, large files by the basic transfer of git LFS, and downloads with
ranges. Only holders of the token may write, and private repositories are seen by them alone. Files
that end in .tar or .safetensors are large ones; all others go into the commit itself.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test_token"
_LARGE = (".tar", ".safetensors")


class Fault(NamedTuple):
    """An answer that goes wrong: of a method, at paths that match."""

    method: str
    pattern: str
    status: int = 503  # 0: the connection breaks after half of the content


class Repository:
    def __init__(self, private):
        self.private = private
        self.commits = [("0" * 40, {})]  # (id, path -> content)

    def tree(self, revision):
        if revision == "main":
            return self.commits[-1]
        return next(commit for commit in self.commits if commit[0] == revision)


@contextlib.contextmanager
def running_hub(monkeypatch):
    """Give a hub to which the client sends by basic transfers alone, as the holder of the token."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # read when it was first imported
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub = Hub()
    yield hub
    hub.close()


class Hub:
    """The server; `url` is its HF_ENDPOINT."""

    def __init__(self):
        self.repositories = {}
        self.large = {}  # SHA-256 -> content
        self.faults = []
        self.requests = []  # (method, path) of every request
        self.authorisations = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def files(self, name):
        """Return the content of a repository by path."""
        return dict(self.repositories[name].commits[-1][1])

    def replace(self, name, path, content):
        """Commit a file behind everybody's back; None removes it."""
        repository = self.repositories[name]
        tree = self.files(name) | {path: content}
        repository.commits.append((_id(tree), {k: v for k, v in tree.items() if v is not None}))

    def counted(self, method, pattern):
        return sum(
            m == method and re.search(pattern, path) is not None for m, path in self.requests
        )

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _id(tree):
    listed = sorted(
        (path, hashlib.sha1(content or b"").hexdigest()) for path, content in tree.items()
    )
    return hashlib.sha1(json.dumps(listed).encode()).hexdigest()


def _blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path, content):
    entry = {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
    if path.endswith(_LARGE):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
    return entry


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_GET(self):
            self._serve()

        def do_HEAD(self):
            self._serve()

        def do_POST(self):
            self._serve()

        def do_PUT(self):
            self._serve()

        def _serve(self):
            length = int(self.headers.get("Content-Length") or 0)
            self._body = self.rfile.read(length) if length else self._chunks()
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            hub.authorisations.add(self.headers.get("Authorization"))
            self._fault = None
            for fault in hub.faults:
                if fault.method == self.command and re.search(fault.pattern, path):
                    hub.faults.remove(fault)
                    if fault.status:
                        self._answer({"error": "so it was asked"}, fault.status)
                        return
                    self._fault = fault
                    break
            for method, pattern, action in _ROUTES:
                found = re.fullmatch(pattern, path)
                if method == self.command and found:
                    action(self, *found.groups())
                    return
            self._answer({"error": f"no such place: {path}"}, 404)

        def _chunks(self):
            if self.headers.get("Transfer-Encoding") != "chunked":
                return b""
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _answer(self, value, status=200, **headers):
            self._send(json.dumps(value).encode(), status, **headers)

        def _send(self, content, status=200, **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if self._fault is not None:
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)
                return
            self.wfile.write(content)

        @property
        def _is_owner(self):
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def _repository(self, name, to_write=False):
            repository = hub.repositories.get(name)
            if repository is None or (repository.private and not self._is_owner):
                self._answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")
                return None
            if to_write and not self._is_owner:
                self._answer({"error": "this token may not write"}, 403)
                return None
            return repository

        def _create(self):
            if not self._is_owner:
                self._answer({"error": "Invalid username or password."}, 401)
                return
            asked = json.loads(self._body)
            name = f"{asked['organization']}/{asked['name']}"
            there = name in hub.repositories
            if not there:
                hub.repositories[name] = Repository(asked.get("visibility") == "private")
            self._answer({"url": f"{hub.url}/datasets/{name}"}, 409 if there else 200)

        def _info(self, name, revision):
            if repository := self._repository(name):
                try:
                    sha, _ = repository.tree(revision)
                except StopIteration:
                    self._answer({"error": "none"}, 404, X_Error_Code="RevisionNotFound")
                    return
                self._answer({"id": name, "sha": sha, "private": repository.private})

        def _tree(self, name, revision, folder):
            if repository := self._repository(name):
                prefix = f"{folder}/" if folder else ""
                _, tree = repository.tree(revision)
                found = [_entry(p, c) for p, c in sorted(tree.items()) if p.startswith(prefix)]
                if folder and not found:
                    self._answer({"error": "none"}, 404, X_Error_Code="EntryNotFound")
                    return
                self._answer(found)

        def _preupload(self, name, revision):
            if repository := self._repository(name, to_write=True):
                _, tree = repository.tree(revision)
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                        "shouldIgnore": False,
                        "oid": _blob(tree[file["path"]]) if file["path"] in tree else None,
                    }
                    for file in json.loads(self._body)["files"]
                ]
                self._answer({"files": modes})

        def _batch(self, name):
            if self._repository(name, to_write=True):
                answers = []
                for asked in json.loads(self._body)["objects"]:
                    place = {"href": f"{hub.url}/large/{asked['oid']}"}
                    there = asked["oid"] in hub.large
                    answers.append(asked | ({} if there else {"actions": {"upload": place}}))
                self._answer({"transfer": "basic", "objects": answers})

        def _upload(self, sha256):
            if hashlib.sha256(self._body).hexdigest() != sha256:
                self._answer({"error": "another digest"}, 400)
                return
            hub.large[sha256] = self._body
            self._answer({})

        def _commit(self, name, revision):
            if repository := self._repository(name, to_write=True):
                _, tree = repository.tree(revision)
                tree = dict(tree)
                for line in self._body.splitlines():
                    item = json.loads(line)
                    value = item["value"]
                    if item["key"] == "file":
                        tree[value["path"]] = base64.b64decode(value["content"])
                    elif item["key"] == "lfsFile":
                        tree[value["path"]] = hub.large[value["oid"]]
                sha = _id(tree)
                repository.commits.append((sha, tree))
                self._answer({"commitUrl": f"{hub.url}/{name}/commit/{sha}", "commitOid": sha})

        def _resolve(self, name, revision, path):
            if repository := self._repository(name):
                sha, tree = repository.tree(revision)
                if path not in tree:
                    self._answer({"error": "none"}, 404, X_Error_Code="EntryNotFound")
                    return
                content = tree[path]
                entry = _entry(path, content)
                etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
                headers = {"ETag": f'"{etag}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
                asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
                if asked is None:
                    self._send(content, **headers)
                    return
                start = int(asked[1])
                headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self._send(content[start:], 206, **headers)

        def _validate(self):
            self._answer({"errors": [], "warnings": []})

    repo = r"([\w.-]+/[\w.-]+)"
    _ROUTES = [
        ("POST", r"/api/repos/create", Handler._create),
        ("POST", r"/api/validate-yaml", Handler._validate),
        ("GET", rf"/api/(?:dataset|model)s/{repo}/revision/([^/]+)", Handler._info),
        ("GET", rf"/api/(?:dataset|model)s/{repo}/tree/([^/]+)(?:/(.+))?", Handler._tree),
        ("POST", rf"/api/(?:dataset|model)s/{repo}/preupload/([^/]+)", Handler._preupload),
        ("POST", rf"/api/(?:dataset|model)s/{repo}/commit/([^/]+)", Handler._commit),
        ("POST", rf"/(?:datasets/)?{repo}\.git/info/lfs/objects/batch", Handler._batch),
        ("PUT", r"/large/([0-9a-f]+)", Handler._upload),
        ("HEAD", rf"/(?:datasets/)?{repo}/resolve/([^/]+)/(.+)", Handler._resolve),
        ("GET", rf"/(?:datasets/)?{repo}/resolve/([^/]+)/(.+)", Handler._resolve),
    ]
    return Handler
