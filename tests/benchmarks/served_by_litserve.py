"""The accelerator behind LitServe.

python -m tests.benchmarks.served_by_litserve PORT
"""

import sys
from typing import Any

import litserve
from fastapi import Request

from tests.benchmarks.accelerator import MAX_BATCH, NUM_PATCHES, WAIT_S, wait_for_device


class Api(litserve.LitAPI):
    """Bodies in, token ids out, in batches."""

    def setup(self, device: Any) -> None:
        """Load nothing."""

    def decode_request(self, request: Request) -> bytes:
        """Take the file out of a form, whatever the annotation, by which LitServe goes, says.

        LitServe reads forms and JSON, no raw bodies.
        """
        content: bytes = request["file"].file.read()
        return content

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        """Leave bodies as they are."""
        return inputs

    def predict(self, inputs: list[bytes]) -> list[list[int]]:
        """Run a batch on the device."""
        wait_for_device(len(inputs))
        return [[0] * NUM_PATCHES for _ in inputs]

    def unbatch(self, output: list[list[int]]) -> list[list[int]]:
        """Leave answers as they are."""
        return output

    def encode_response(self, output: list[int]) -> dict[str, Any]:
        """Answer as ours does, or less."""
        return {"token_ids": output}


if __name__ == "__main__":
    api = Api(max_batch_size=MAX_BATCH, batch_timeout=WAIT_S, api_path="/v1/tokenize")
    server = litserve.LitServer(api, accelerator="cpu")
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False)
