"""The tokens file: who may speak to the coordinator, and as what.

    # ROLE NAME TOKEN, or ROLE NAME sha256:HEX; one a line, comments with #
    operator  alice    sha256:8c2f...
    worker    gpu-17   hw_Zc2...

Only SHA-256 digests are kept in memory, and every entry is compared with every token that comes, in
constant time: how long a refusal takes says nothing of how close a guess was. A digest without salt
is enough for tokens drawn at random, and only for those; that is why short ones are refused.
"""

import asyncio
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hotweights.coordinator.access.roles import Role

log = logging.getLogger(__name__)

FILE_BYTES_MAX = 1 << 20
# Each call is compared with all of them, about 0.3 us each.
ENTRIES_MAX = 1000
TOKEN_LENGTH_MIN, TOKEN_LENGTH_MAX = 20, 512
RANDOM_BYTES = 32
LOOK_EVERY_S = 1.0

_HASHED = "sha256:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
_HEX = re.compile(r"[0-9a-fA-F]{64}")
# What `Authorization: Bearer` can carry (RFC 6750, "b64token").
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")


class BadTokens(ValueError):
    """The file cannot be used; the message names the line, never a token."""

    def __init__(self, path: Path, problem: str, line: int = 0) -> None:
        super().__init__(f"tokens file {path}{f', line {line}' if line else ''}: {problem}")
        self.line = line


@dataclass(frozen=True)
class Caller:
    """Whom a token belongs to. `digest` is the token's SHA-256."""

    role: Role
    name: str
    digest: bytes = field(repr=False)


def new_token() -> str:
    """A fresh token of 32 random bytes."""
    return "hw_" + secrets.token_urlsafe(RANDOM_BYTES)


def digest_of(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def hashed(token: str) -> str:
    """The token as a line of the file may have it instead of the token itself."""
    return _HASHED + digest_of(token).hex()


def read_tokens(path: Path) -> tuple[Caller, ...]:
    """The file's entries. Raises BadTokens."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for whoever writes to it
            raise BadTokens(path, "is no plain file")
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            # A group may read it, as secrets mounted into containers are; nobody else, and no one may write.
            if mode & 0o027:
                raise BadTokens(path, f"others can read or change it (mode {mode:04o}): chmod 600 {path}")
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise BadTokens(path, f"cannot be read: {error.strerror or error}") from error
    return parse_tokens(path, data)


def parse_tokens(path: Path, data: bytes) -> tuple[Caller, ...]:
    """The entries of a file's content. Raises BadTokens."""
    if len(data) > FILE_BYTES_MAX:
        raise BadTokens(path, f"is larger than {FILE_BYTES_MAX} bytes")
    callers: list[Caller] = []
    names: dict[str, int] = {}
    digests: dict[bytes, int] = {}
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            words = line.decode("ascii").split()
        except UnicodeDecodeError:
            raise BadTokens(path, "is not plain ASCII", number) from None
        if not words or words[0].startswith("#"):
            continue
        caller = _parse_line(path, number, words)
        for what, seen in (("name", names.get(caller.name)), ("token", digests.get(caller.digest))):
            if seen is not None:
                raise BadTokens(path, f"its {what} stands in line {seen} already", number)
        names[caller.name] = digests[caller.digest] = number
        callers.append(caller)
        if len(callers) > ENTRIES_MAX:
            raise BadTokens(path, f"more than {ENTRIES_MAX} tokens", number)
    if not callers:
        raise BadTokens(path, "has no token: `hotweights token operator NAME` prints a line for it")
    return tuple(callers)


def _parse_line(path: Path, number: int, words: list[str]) -> Caller:
    # No word of the line is repeated in an error: people put them in the wrong order, and one is a secret.
    if len(words) != 3:
        raise BadTokens(path, f"has {len(words)} words; a line is ROLE NAME TOKEN or ROLE NAME sha256:HEX", number)
    roles = {role.value: role for role in Role}
    if words[0] not in roles:
        raise BadTokens(path, f"its first word is no role; roles are {', '.join(roles)}", number)
    if not _NAME.fullmatch(words[1]):
        raise BadTokens(path, "its second word is no name: 1 to 64 letters, digits and ._@+-", number)
    return Caller(roles[words[0]], words[1], _parse_secret(path, number, words[2]))


def _parse_secret(path: Path, number: int, word: str) -> bytes:
    if word.startswith(_HASHED):
        digits = word.removeprefix(_HASHED)
        if not _HEX.fullmatch(digits):
            raise BadTokens(path, "after sha256: come 64 hex digits", number)
        return bytes.fromhex(digits)
    if not TOKEN_LENGTH_MIN <= len(word) <= TOKEN_LENGTH_MAX or not _TOKEN.fullmatch(word):
        raise BadTokens(
            path,
            f"its token is not {TOKEN_LENGTH_MIN} to {TOKEN_LENGTH_MAX} letters, digits and ._~+/-; "
            "`hotweights token ROLE NAME` draws one",
            number,
        )
    return digest_of(word)


class Tokens:
    """The file's entries as they are now: read again when it changes, the old ones kept while it is bad."""

    def __init__(self, path: Path) -> None:
        """Raises BadTokens."""
        self._path = path
        self._stamp = _stamp(path)
        self._callers = read_tokens(path)
        self._problem = ""

    def find(self, token: bytes) -> Caller | None:
        """Whose token it is. Looks at every entry, whatever it finds."""
        digest = hashlib.sha256(token).digest()
        found: Caller | None = None
        for caller in self._callers:
            if hmac.compare_digest(caller.digest, digest):
                found = caller
        return found

    def still(self, caller: Caller) -> bool:
        """Whether the token is as it was: not revoked, not of another role."""
        return caller in self._callers

    async def follow(self, on_change: Callable[[], None]) -> None:
        """Looks at the file for ever; calls `on_change` after its entries were replaced."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if await asyncio.to_thread(self.look):
                on_change()

    def look(self) -> bool:
        """Reads the file again if it changed; True when its entries are now in force."""
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            self._problem = ""
            return False
        try:
            self._callers = read_tokens(self._path)
        except BadTokens as error:
            # Its stamp is not kept: what could not be read now, for want of file descriptors say, is tried again.
            if self._problem != str(error):
                self._problem = str(error)
                log.error("%s; the tokens of before stay in force", error)
            return False
        self._stamp, self._problem = stamp, ""
        log.info("tokens file %s was read again: %d tokens", self._path, len(self._callers))
        return True


def _stamp(path: Path) -> tuple[int, ...]:
    """Changes with the file. Empty while there is none."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
