"""The head of an answer leaves with its body.

uvicorn writes the two one after the other, and each wakes the client. On a machine that both share,
the client then takes the core of the event loop to read a head that is of no use to it yet, and
everybody waits until it has.
"""

import asyncio


class Corked:
    """The transport of a connection, as the answer to one request sees it."""

    __slots__ = ("_head", "_is_open", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        """Hold the head back until something follows it."""
        self._transport = transport
        self._head = b""
        self._is_open = False  # once the head has left, everything leaves at once

    def write(self, data: bytes) -> None:
        """Hold a head, or send a piece of the body and the head before it.

        `100 Continue`, which is no answer yet, is sent at once.
        """
        if self._is_open or data.startswith(b"HTTP/1.1 100 "):
            self._transport.write(data)
        elif self._head:
            self._is_open = True
            self._transport.write(self._head + data)
        else:
            self._head = data

    def flush(self) -> None:
        """Send a head that nothing has followed."""
        if self._head and not self._is_open:
            self.write(b"")

    def close(self) -> None:
        """Send what is held, then close the connection."""
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """Whether the connection is closed, or about to be."""
        return self._transport.is_closing()
