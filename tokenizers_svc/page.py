"""The page at `/`: a picture in, its token map out, for a person with a browser.

The files are static and travel in the package: no build step, no script or font from elsewhere, so
the page works where the service does. It asks the same routes as every other client, and knows
nothing that they do not say. Its Content-Security-Policy lets in the files of this service alone,
and no script or style that stands in the HTML.

Files are read once, when the application is made, and answered from memory. Browsers ask again
each time and get 304 by the ETag, so an upgraded service never meets an old script.
"""

import hashlib
from pathlib import Path
from typing import Final, NamedTuple

from fastapi import APIRouter, Request, Response

from tokenizers_svc.conditional import is_known
from tokenizers_svc.problems import ProblemError

_FOLDER: Final = Path(__file__).with_name("page")
_INDEX: Final = "index.html"
_MEDIA_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_LINK_TO_DOCS: Final = b'<nav aria-label="Documentation"><a href="docs">API documentation</a></nav>'


class _File(NamedTuple):
    content: bytes
    media_type: str
    etag: str


def page_router(*, has_docs: bool = True) -> APIRouter:
    """Return the routes `/` and `/page/...`; leave them out to serve no page.

    Args:
        has_docs: Whether the service answers `/docs`, to which the page then links.
    """
    files = _read_files(has_docs=has_docs)

    async def show_page(request: Request) -> Response:
        return _answer(request, files[_INDEX])

    async def show_file(request: Request, name: str) -> Response:
        if name not in files or name == _INDEX:
            raise ProblemError("not-found", "The page has no such file; it begins at /.")
        return _answer(request, files[name])

    router = APIRouter(include_in_schema=False)
    router.add_api_route("/", show_page, methods=["GET", "HEAD"])
    router.add_api_route("/page/{name}", show_file, methods=["GET", "HEAD"])
    return router


def _read_files(*, has_docs: bool) -> dict[str, _File]:
    files = {}
    for path in _FOLDER.iterdir():
        content = path.read_bytes()
        if path.name == _INDEX and not has_docs:
            content = content.replace(_LINK_TO_DOCS, b"")
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        files[path.name] = _File(content, _MEDIA_TYPES[path.suffix], etag)
    return files


def _answer(request: Request, file: _File) -> Response:
    headers = {**_HEADERS, "ETag": file.etag}
    if is_known(request, file.etag):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)
