"""The client of the service: pictures in, numpy arrays out.

    from tokenizers_svc.client import TokenizerClient

    with TokenizerClient("http://127.0.0.1:8000") as client:
        tokens = client.tokenize("photo.jpg")

It needs httpx, msgpack, numpy and Pillow, and none of what the service itself needs.

What is sent, what an answer means and when to ask again is decided in `steps`, `batches`,
`answers` and `retries`, which send nothing; `TokenizerClient` and `AsyncTokenizerClient` only send.
"""

from tokenizers_svc.client.answers import Item, ModelInfo, Reconstruction, SoftTokens, Tokens
from tokenizers_svc.client.asynchronous import AsyncTokenizerClient
from tokenizers_svc.client.errors import (
    BadAnswerError,
    ProblemError,
    ServiceUnavailableError,
)
from tokenizers_svc.client.images import Picture
from tokenizers_svc.client.retries import Retries
from tokenizers_svc.client.synchronous import TokenizerClient

__all__ = [
    "AsyncTokenizerClient", "BadAnswerError", "Item", "ModelInfo", "Picture", "ProblemError",
    "Reconstruction", "Retries", "ServiceUnavailableError", "SoftTokens", "TokenizerClient",
    "Tokens",
]  # fmt: skip
