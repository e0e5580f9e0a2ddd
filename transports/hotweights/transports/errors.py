"""What can go wrong between a reader and a source, by what the reader can do about it."""

from collections.abc import Sequence


class TransportError(Exception):
    """What every error of a transport is."""


class TransportMissing(TransportError):
    """There is no such transport here. `extra` is what to install; empty if nothing would help."""

    def __init__(self, name: str, extra: str = "", known: Sequence[str] = (), reason: str = "") -> None:
        what = f"transport {name!r} {reason or 'is unknown'}"
        advice = f"install hotweights[{extra}]" if extra else f"there are: {', '.join(known)}"
        super().__init__(f"{what}; {advice}")
        self.name = name
        self.extra = extra
        self.known = tuple(known)
        self.reason = reason


class PeerGone(TransportError):
    """The connection ended, or never came to be. Try another source, or this one again."""

    def __init__(self, address: str, problem: str) -> None:
        super().__init__(f"{address}: {problem}")
        self.address = address
        self.problem = problem


class TlsFailed(PeerGone):
    """The two sides do not come to TLS: one speaks none, or does not accept what the other shows."""


class NotHeld(TransportError, LookupError):
    """The source has no such range (any more). Try another source. Sources raise it themselves."""

    def __init__(self, image: bytes, file: int, offset: int, size: int, problem: str = "") -> None:
        range_text = f"{size} bytes from {offset} on of file {file}, image {image.hex()[:16]}"
        super().__init__(f"not held: {range_text}{': ' if problem else ''}{problem}")
        self.image = image
        self.file = file
        self.offset = offset
        self.size = size
        self.problem = problem


class NotYet(TransportError):
    """The range is on its way to the source. Ask again, or another source. Sources raise it themselves.

    `held_bytes` is what the source has of the image: one of which it grows is worth waiting for.
    """

    def __init__(self, image: bytes, held_bytes: int) -> None:
        super().__init__(f"not there yet: the source has {held_bytes} bytes of image {image.hex()[:16]}")
        self.image = image
        self.held_bytes = held_bytes


class TokenRefused(TransportError):
    """The source does not accept the token for this image (any more). Ask the coordinator for another."""

    def __init__(self, address: str, image: bytes) -> None:
        super().__init__(f"{address} refused the transfer token for image {image.hex()[:16]}")
        self.address = address
        self.image = image


class DeadlinePassed(TransportError):
    """No end within the deadline. The connection is closed; try another source."""

    def __init__(self, address: str, doing: str, deadline_s: float) -> None:
        super().__init__(f"{address}: {doing} took longer than {deadline_s:g} s")
        self.address = address
        self.doing = doing
        self.deadline_s = deadline_s
