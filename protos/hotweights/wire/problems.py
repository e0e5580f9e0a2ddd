"""Why no connection came to be, in one line that says what to do, from what gRPC says about it.

gRPC names every address and layer. A server that closes during or after the TLS handshake gives no reason to it
at all: what is then likely depends on what was shown, which only the client knows.
"""

import re

import grpc

from hotweights.wire.access import Access
from hotweights.wire.endpoint import Endpoint
from hotweights.wire.errors import HotweightsError, Unreachable, from_rpc_error

_AT_CONNECTING = re.compile(r"failed to connect|errors resolving|empty address list", re.IGNORECASE)
_CLOSED = re.compile(r"socket closed|connection reset|broken pipe|recvmsg|handshake.*(closed|eof)", re.IGNORECASE)
_CERTIFICATE = re.compile(r"CERTIFICATE_VERIFY_FAILED: ([^:]+)")


def call_error(error: grpc.aio.AioRpcError, endpoint: Endpoint, access: Access) -> HotweightsError:
    """The error of this package for a failed call to the coordinator there."""
    what, text = f"coordinator {endpoint}", error.details() or ""
    if error.code() is grpc.StatusCode.UNAVAILABLE and _AT_CONNECTING.search(text):
        return Unreachable(what, connecting(text, endpoint, access))
    return from_rpc_error(error, what)


def connecting(text: str, endpoint: Endpoint, access: Access) -> str:
    """What went wrong, from the details of a call that found no connection."""
    if "errors resolving" in text or "empty address list" in text:
        return f"the name {endpoint.host} has no address here"
    if found := _CERTIFICATE.search(text):
        return _untrusted(found[1].strip(), access)
    if "Hostname Verification Check failed" in text or "not in peer certificate" in text:
        return (
            f"its certificate is not for the name {endpoint.host}: write a name or address that the certificate has, "
            "or give it one that has this"
        )
    if "WRONG_VERSION_NUMBER" in text:
        return f"it speaks no TLS: write tcp://{endpoint.target}, or start it with --tls-cert and --tls-key"
    if _CLOSED.search(text):
        return _closed(endpoint, access)
    why = text.rpartition(": ")[2]
    if why == "Connection refused":
        return f"{why}; start one with `hotweights coord-serve`, or name another endpoint"
    return why


def _untrusted(why: str, access: Access) -> str:
    if why in ("certificate has expired", "certificate is not yet valid"):
        return f"its {why}; is this machine's clock right?"
    trusted = f"{access.ca} did not sign it" if access.ca else "name its authority with --ca or HOTWEIGHTS_CA"
    return f"its certificate is not trusted ({why}): {trusted}"


def _closed(endpoint: Endpoint, access: Access) -> str:
    if not endpoint.tls:
        return f"it closed the connection at once: if it speaks TLS, write grpcs://{endpoint.target}"
    if access.cert is None:
        return (
            "it closed the connection in the TLS handshake: it wants a client certificate (--cert and --key, or "
            "HOTWEIGHTS_CERT and HOTWEIGHTS_KEY), or is no coordinator"
        )
    return f"it closed the connection in the TLS handshake: it does not accept {access.cert} (another --client-ca?)"
