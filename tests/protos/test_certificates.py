"""Certificates as files: what is no good is said of the file it is in, and never takes the place of what was good."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from tests.certificates import Authority, Files

from hotweights.wire import certificates
from hotweights.wire.certificates import BadCertificate, Watched, read_ca, read_pair


class Place:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder)
        self.good, self.other = self.authority.issue("good"), self.authority.issue("other")

    def file(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_good_pair_is_read_in_both_roles_and_says_when_it_ends(place: Place) -> None:
    files = place.authority.issue("ends", ends=2900)
    pair = read_pair(files.cert, files.key, server=True, client=True)
    assert (pair.cert, pair.key) == (files.cert.read_bytes(), files.key.read_bytes())
    assert certificates.moment(pair.ends_at_s) == "2900-01-01 00:00:00Z"
    assert "PRIVATE" not in repr(pair)


def locked(place: Place) -> Path:
    key = load_pem_private_key(place.good.key.read_bytes(), None)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    return place.file("locked.key", pem)


def of_year(place: Place, name: str, begins: int, ends: int) -> tuple[Path, Path]:
    files = place.authority.issue(name, begins=begins, ends=ends)
    return files.cert, files.key


BAD: dict[str, tuple[Callable[[Place], tuple[Path, Path]], str]] = {
    "absent": (lambda place: (place.folder / "none", place.good.key), r"none cannot be read: No such file"),
    "a folder": (lambda place: (place.folder, place.good.key), r"cannot be read: Is a directory"),
    "text": (lambda place: (place.file("text", b"hello"), place.good.key), r"text: holds no certificate in PEM form"),
    "half": (lambda place: (place.file("half", place.good.cert.read_bytes()[:300]), place.good.key), r"half: "),
    "key of text": (lambda place: (place.good.cert, place.file("k", b"hello")), r"/k holds no private key in PEM form"),
    "another's key": (lambda place: (place.good.cert, place.other.key), r"the key is not that of the certificate"),
    "locked": (lambda place: (place.good.cert, locked(place)), r"locked.key is encrypted"),
    "huge": (lambda place: (place.file("huge", bytes(5 << 20)), place.good.key), r"huge has more than \d+ bytes"),
    "over": (lambda place: of_year(place, "over", 2000, 2001), r"over.pem: certificate has expired"),
    "of the future": (lambda place: of_year(place, "new", 2900, 2901), r"new.pem: certificate is not yet valid"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("role", ["server", "client"])
def test_a_pair_that_is_no_good_is_refused_by_the_files_name(place: Place, what: str, role: str) -> None:
    make, said = BAD[what]
    cert, key = make(place)
    with pytest.raises(BadCertificate, match=said) as caught:
        read_pair(cert, key, server=role == "server", client=role == "client")
    assert "\n" not in str(caught.value)


def test_an_authority_is_one_and_not_over(place: Place) -> None:
    assert read_ca(place.authority.file) == place.authority.file.read_bytes()
    with pytest.raises(BadCertificate, match="none of an authority"):
        read_ca(place.good.cert)
    with pytest.raises(BadCertificate, match="holds no certificate"):
        read_ca(place.good.key)


class Watching:
    """A pair that is watched under the names of `files`."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.made = 0
        self.watched = Watched("the pair", [files.cert, files.key], self._make)

    def _make(self) -> bytes:
        self.made += 1
        return read_pair(self.files.cert, self.files.key, server=True).cert

    def current(self) -> bytes:
        return self.watched.current()


@pytest.fixture
def watching(place: Place, monkeypatch: pytest.MonkeyPatch) -> Watching:
    monkeypatch.setattr(certificates, "TRY_AGAIN_S", 0.0)
    return Watching(place.authority.issue("watched"))


def test_files_that_do_not_change_are_not_read_again(watching: Watching) -> None:
    assert watching.current() is watching.current()
    assert watching.made == 1


def test_files_that_changed_are_in_force(place: Place, watching: Watching) -> None:
    watching.files.become(place.other)
    assert watching.current() == place.other.cert.read_bytes()
    assert watching.made == 2


def test_a_link_that_points_elsewhere_is_a_change(place: Place) -> None:
    """As Kubernetes changes a secret."""
    for name, files in (("1", place.good), ("2", place.other)):
        (place.folder / name).mkdir()
        (place.folder / name / "tls.crt").write_bytes(files.cert.read_bytes())
        (place.folder / name / "tls.key").write_bytes(files.key.read_bytes())
    data = place.folder / "data"
    data.symlink_to(place.folder / "1")
    watching = Watching(Files(place.authority.file, data / "tls.crt", data / "tls.key"))
    (place.folder / "next").symlink_to(place.folder / "2")
    os.replace(place.folder / "next", data)
    assert watching.current() == place.other.cert.read_bytes()


def test_a_bad_change_is_said_once_and_the_old_pair_stays_until_a_good_one_comes(
    place: Place, watching: Watching, caplog: pytest.LogCaptureFixture
) -> None:
    before = watching.current()
    watching.files.cert.write_bytes(place.other.cert.read_bytes())  # the key is the old one still
    for _ in range(3):
        assert watching.current() == before
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "the old ones serve on" in errors[0]
    assert "the key is not that of the certificate" in errors[0]
    watching.files.key.write_bytes(place.other.key.read_bytes())
    assert watching.current() == place.other.cert.read_bytes()


@pytest.mark.parametrize("which", ["cert", "key"])
@pytest.mark.parametrize("reads", range(6))
def test_files_that_are_gone_for_a_moment_at_any_point_of_a_renewal_leave_the_old_in_force(
    place: Place, watching: Watching, monkeypatch: pytest.MonkeyPatch, which: str, reads: int
) -> None:
    """As it is with whoever removes them before he writes them. A try reads them six times."""
    before = watching.current()
    gone = watching.files.cert if which == "cert" else watching.files.key
    left = reads

    def removed_after(real: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **more: object) -> object:
            nonlocal left
            if left == 0:
                gone.unlink(missing_ok=True)
            left -= 1
            return real(*arguments, **more)

        return wrapped

    with monkeypatch.context() as patched:
        for name in ("read_file", "_load_authorities", "load_chain"):
            patched.setattr(certificates, name, removed_after(getattr(certificates, name)))
        watching.files.become(place.other)
        assert watching.current() == before
        assert left < 0, "it was there all the time"
    watching.files.become(place.authority.issue("last"))
    assert watching.current() == watching.files.cert.read_bytes()


def test_bad_files_are_not_tried_at_every_handshake(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "TRY_AGAIN_S", 60.0)
    watching = Watching(place.authority.issue("watched"))
    watching.files.cert.write_bytes(b"half")
    for _ in range(5):
        watching.current()
    assert watching.made == 2


def test_what_changes_while_it_is_read_is_not_taken(place: Place, watching: Watching) -> None:
    """The certificate of one moment and the key of another may fit, and be no pair that anybody meant."""
    before = watching.current()
    make = watching.watched._make

    def interrupted() -> bytes:
        made = make()
        os.utime(watching.files.key)
        return made

    watching.files.become(place.other)
    watching.watched._make = interrupted
    assert watching.current() == before
    watching.watched._make = make
    assert watching.current() == place.other.cert.read_bytes()
