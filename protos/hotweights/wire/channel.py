"""Limits and keepalives of every channel and server.

The figures were measured: without `ping_timeout_ms` a stopped peer was noticed after 61 s, with it
after 3 s. Of 3,000 streams opened together, gRPC's default for calls that may wait until the server
takes them up lost 743, a limit of 0 lost 2,997, one of 2^30 lost none.
"""

from collections.abc import Callable
from typing import Any

import grpc

from hotweights.wire.access import ANONYMOUS, Access, Metadata
from hotweights.wire.endpoint import Endpoint

MESSAGE_BYTES_MAX = 4 << 20
PAGE_BYTES_MAX = 1 << 20
MANIFEST_BYTES_MAX = 256 << 20

# 0 would not stand for "without a limit": a call that came while another waits would be reset, and its client
# see a bare CANCELLED. So it is a number that is never reached.
_CALLS_WAITING_MAX = 1 << 30

_KEEPALIVE: list[tuple[str, int | str]] = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
]


def channel_options() -> list[tuple[str, int | str]]:
    """Options of a client channel."""
    return [
        *_KEEPALIVE,
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 5_000),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        # A private pool: two clients of one process must not share a broken connection.
        ("grpc.use_local_subchannel_pool", 1),
        # A coordinator or agent is reached directly, never through a proxy of the environment.
        ("grpc.enable_http_proxy", 0),
    ]


def server_options() -> list[tuple[str, int | str]]:
    """Options of a server."""
    return [
        *_KEEPALIVE,
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.server.max_pending_requests", _CALLS_WAITING_MAX),
        ("grpc.server.max_pending_requests_hard_limit", _CALLS_WAITING_MAX),
        # Two servers on one port would split the workers between them.
        ("grpc.so_reuseport", 0),
    ]


def open_channel(endpoint: Endpoint, access: Access = ANONYMOUS) -> grpc.aio.Channel:
    """A channel that shows what `access` holds now. Connecting happens at the first call. Raises BadAccess."""
    shown = access.read(endpoint)
    if endpoint.tls:
        credentials = grpc.ssl_channel_credentials(shown.ca, shown.key, shown.cert)
        channel = grpc.aio.secure_channel(endpoint.target, credentials, options=channel_options())
    else:
        channel = grpc.aio.insecure_channel(endpoint.target, options=channel_options())
    if shown.metadata:
        _add_to_every_call(channel, shown.metadata)
    return channel


def _add_to_every_call(channel: grpc.aio.Channel, shown: Metadata) -> None:
    """Stubs take their calls from these four methods.

    Not by interceptors: those of grpc.aio put a call of another class, with tasks of its own, around every stream.
    """
    for name in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
        setattr(channel, name, _showing(getattr(channel, name), shown))


def _showing(make: Callable[..., Callable[..., Any]], shown: Metadata) -> Callable[..., Callable[..., Any]]:
    def made(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        call = make(*args, **kwargs)

        def called(*args: Any, metadata: Any = None, **kwargs: Any) -> Any:
            return call(*args, metadata=(*(metadata or ()), *shown), **kwargs)

        return called

    return made
