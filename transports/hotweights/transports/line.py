"""A connected socket to send and receive on, in plaintext or over TLS; the frames know no difference.

    plaintext:  socket <---------------------------------> the reader's memory; the source's, or a file by sendfile
    TLS:        socket <--ciphertext, 256 KiB at once--> OpenSSL in memory <--decrypted in place--> the reader's memory

OpenSSL works on memory here, not on the socket: on a socket it makes two calls for every record of 16 KiB, and
asyncio waits only for plain sockets. Measured on one core of an EPYC for both ends together, in GB a CPU second:
2.8 in plaintext, 0.72 here, 0.64 with blocking SSL sockets; 64 to 512 KiB at once make little difference.
"""

import asyncio
import select
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from typing import Protocol

CIPHER_BYTES = 256 << 10
# What a server receives are frames of a few bytes.
CIPHER_BYTES_SERVER = 16 << 10
LOW_WATER_BYTES = 256 << 10
# So much is encrypted before others have their turn.
YIELD_BYTES = 1 << 20


@dataclass(frozen=True)
class Tls:
    """Where the contexts for TLS come from. Asked at every connection, so that renewed certificates take effect.

    Contexts are of TLS 1.3. Who is to be verified, and by which authorities, is what the contexts say.
    """

    server: Callable[[], ssl.SSLContext]
    client: Callable[[], ssl.SSLContext]


class NoTls(Exception):
    """The two sides do not come to TLS with each other; the text goes on from the peer's name.

    `one_is_plain` if one of them speaks TLS and the other does not.
    """

    def __init__(self, text: str, *, one_is_plain: bool = False) -> None:
        super().__init__(text)
        self.one_is_plain = one_is_plain


class Late(Exception):
    """It is later than what `block_until` was told."""


class Line(Protocol):
    """One side of a connection. One task receives and one sends, at most."""

    def block_until(self, ends: float | None) -> float | None:
        """Receiving and sending block until then (time.monotonic), in whatever thread; None: they wait on the loop.

        What was so before.
        """

    async def receive_some(self, into: memoryview) -> int:
        """At least a byte, at most what fits; 0 when the other side has ended. Raises OSError, NoTls."""

    async def send(self, part: bytes | memoryview) -> None:
        """All of it. Raises OSError, NoTls."""

    @property
    def sends_files(self) -> bool:
        """Whether the system sends from a file by itself here; then `send_file` does."""

    async def send_file(self, handle: int, offset: int, size: int) -> None:
        """All of a range of an open file. Raises OSError, where it ends before that too."""

    def shut_down(self) -> None:
        """Wakes whoever waits. Closing the socket under the event loop would confuse its selector. Raises OSError."""

    def close(self) -> None:
        """Nobody may be waiting."""


class PlainLine:
    """See Line."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._low_water = 1
        self._ends: float | None = None

    def block_until(self, ends: float | None) -> float | None:
        before, self._ends = self._ends, ends
        return before

    async def receive_some(self, into: memoryview) -> int:
        # What is due wakes us when it is there, not with every packet: on a slow link a fifth of an agent's work.
        if (low_water := min(len(into), LOW_WATER_BYTES)) != self._low_water:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low_water)
            self._low_water = low_water
        return await self._take(into)

    async def _take(self, into: memoryview) -> int:
        if self._ends is None:
            return await asyncio.get_running_loop().sock_recv_into(self.sock, into)
        while True:
            try:
                return self.sock.recv_into(into)
            except BlockingIOError:
                _wait(self.sock, select.POLLIN, self._ends)

    async def send(self, part: bytes | memoryview) -> None:
        if self._ends is None:
            await asyncio.get_running_loop().sock_sendall(self.sock, part)
            return
        view = memoryview(part)
        while view:
            try:
                view = view[self.sock.send(view) :]
            except BlockingIOError:
                _wait(self.sock, select.POLLOUT, self._ends)

    @property
    def sends_files(self) -> bool:
        return isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop)  # uvloop does not

    async def send_file(self, handle: int, offset: int, size: int) -> None:
        with FileIO(handle, closefd=False) as file:
            sent = await asyncio.get_running_loop().sock_sendfile(self.sock, file, offset, size, fallback=False)
        if sent != size:
            raise OSError(f"the file ended {size - sent} bytes early")

    def shut_down(self) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.sock.close()


class TlsLine(PlainLine):
    """See Line. `shake_hands` comes first."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_name: str | None = None) -> None:
        """Without `server_name` this is the server's side."""
        super().__init__(sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_name is None, server_hostname=server_name
        )
        self._cipher = bytearray(CIPHER_BYTES_SERVER if server_name is None else CIPHER_BYTES)

    sends_files = False

    async def shake_hands(self) -> None:
        """Has no deadline of its own. Raises OSError, NoTls."""
        try:
            while not self._has_shaken():
                await self._flush()
                if not await self._fill():
                    raise NoTls("ended the connection in the TLS handshake; it may speak no TLS")
            await self._flush()
        except ssl.SSLError as error:
            await self._flush_last_words()
            raise NoTls(_said(error), one_is_plain=error.reason in _NO_RECORD) from error
        except ConnectionResetError as error:
            raise NoTls("reset the connection in the TLS handshake; it may speak no TLS") from error

    def _has_shaken(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    async def receive_some(self, into: memoryview) -> int:
        got = 0
        while not got:
            try:
                # A record is 16 KiB at most; all that is there is taken.
                while got < len(into):
                    got += int(self._tls.read(len(into) - got, into[got:]))  # a number, as it is given a buffer
            except ssl.SSLWantReadError:
                await self._flush()
                if not got and not await self._fill():
                    return 0
            except ssl.SSLZeroReturnError:
                return got
            except ssl.SSLError as error:
                raise NoTls(_said(error)) from error
        return got

    async def send(self, part: bytes | memoryview) -> None:
        view = memoryview(part)
        for at in range(0, len(view), CIPHER_BYTES):
            try:
                self._tls.write(view[at : at + CIPHER_BYTES])
            except ssl.SSLError as error:
                raise NoTls(_said(error)) from error
            await self._flush()
            if at % YIELD_BYTES == 0:
                # A fast reader would keep the loop to itself: sending to a socket with room does not wait.
                await asyncio.sleep(0)

    async def _flush(self) -> None:
        if self._outgoing.pending:
            await super().send(self._outgoing.read())

    async def _flush_last_words(self) -> None:
        """The alert that tells the other side why."""
        try:
            await self._flush()
        except OSError:  # it has gone already
            return

    async def _fill(self) -> int:
        with memoryview(self._cipher) as cipher:
            got = await self._take(cipher)  # as much as there is
            self._incoming.write(cipher[:got])
        return got


def _wait(sock: socket.socket, event: int, ends: float) -> None:
    """In a thread. Raises Late."""
    poll = select.poll()
    poll.register(sock, event)
    if not poll.poll(max(0.0, ends - time.monotonic()) * 1000):
        raise Late


# OpenSSL's words for bytes that are no TLS.
_NO_RECORD = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")


def _said(error: ssl.SSLError) -> str:
    """What a person can do something about, without OpenSSL's numbers."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"shows a certificate that is not accepted: {error.verify_message}"
    reason = error.reason or "an error without a name"
    if reason in _NO_RECORD:
        return "speaks no TLS"
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "shows no certificate"
    if "ALERT" in reason:
        return f"refuses TLS with this side: {reason.rpartition('ALERT_')[2].replace('_', ' ').lower()}"
    return f"fails at TLS: {reason.replace('_', ' ').lower()}"
