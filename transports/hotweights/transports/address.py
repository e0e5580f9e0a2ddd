"""HOST:PORT as people write it, with IPv6 in brackets. (The protocol's endpoints are not known here.)"""

import re


def parse_address(text: str) -> tuple[str, int]:
    """Host and port; port 0 lets a server pick one. Raises ValueError."""
    host, separator, port = text.removeprefix("tcp://").rpartition(":")
    if not separator or not host or host.startswith("[") != host.endswith("]") or (":" in host and host[0] != "["):
        raise ValueError(f"{text!r} is not HOST:PORT")
    # Brackets only around, and something inside them.
    if not re.fullmatch(r"\[[^][/\s]+\]|[^][/\s]+", host) or not host.isprintable():
        raise ValueError(f"{text!r} is not HOST:PORT: {host!r} is no host")
    # The length first: int() raises for thousands of digits.
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 65536):
        raise ValueError(f"{text!r}: {port!r} is not a port")
    return host.strip("[]"), int(port)


def format_address(host: str, port: int) -> str:
    """What parse_address reads."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
