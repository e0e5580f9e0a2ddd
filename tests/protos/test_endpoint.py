"""Endpoints as people write them."""

import pytest

from hotweights.wire.endpoint import BadEndpoint, Endpoint, parse_endpoint

GOOD = {
    "tcp://127.0.0.1:5555": (Endpoint("127.0.0.1", 5555), "127.0.0.1:5555", "tcp://127.0.0.1:5555"),
    "grpc://host.example:1": (Endpoint("host.example", 1), "host.example:1", "tcp://host.example:1"),
    "grpcs://host.example:1": (Endpoint("host.example", 1, tls=True), "host.example:1", "grpcs://host.example:1"),
    "grpcs://[::1]:80": (Endpoint("::1", 80, tls=True), "[::1]:80", "grpcs://[::1]:80"),
    "localhost:0": (Endpoint("localhost", 0), "localhost:0", "tcp://localhost:0"),
    " 10.0.0.1:65535 ": (Endpoint("10.0.0.1", 65535), "10.0.0.1:65535", "tcp://10.0.0.1:65535"),
    "tcp://h:1/": (Endpoint("h", 1), "h:1", "tcp://h:1"),
    "[::1]:80": (Endpoint("::1", 80), "[::1]:80", "tcp://[::1]:80"),
    "tcp://[fe80::1]:80": (Endpoint("fe80::1", 80), "[fe80::1]:80", "tcp://[fe80::1]:80"),
    "unix:/run/a.sock": (Endpoint(path="/run/a.sock"), "unix:/run/a.sock", "unix:/run/a.sock"),
    "unix:///run/a.sock": (Endpoint(path="/run/a.sock"), "unix:/run/a.sock", "unix:/run/a.sock"),
    "unix:here.sock": (Endpoint(path="here.sock"), "unix:here.sock", "unix:here.sock"),
}


@pytest.mark.parametrize("text", GOOD)
def test_it_is_read_and_written(text: str) -> None:
    endpoint, target, shown = GOOD[text]
    assert parse_endpoint(text) == endpoint
    assert endpoint.target == target
    assert str(endpoint) == shown
    assert parse_endpoint(shown) == endpoint


BAD = {
    "": "port is missing",
    "host": "port is missing",
    ":5555": "host is missing",
    "tcp://": "port is missing",
    "host:": "not a port",
    "host:x": "not a port",
    "host:-1": "not a port",
    "host:65536": "not a port",
    "host:٣": "not a port",
    "tcp://host:" + "9" * 5000: "not a port",  # int() raises for so many
    "http://host:1": "unknown scheme",
    "[]:80": "no host",
    "[]]:80": "no host",
    "[[::1]]:80": "no host",
    "a/b:80": "no host",
    "a b:80": "no host",
    "a\udc80:80": "no host",
    "grpcs://": "port is missing",
    "GRPCS://host:1": "unknown scheme",
    "::1:80": "in brackets",
    "[::1:80": "in brackets",
    "::1]:80": "in brackets",
    "unix:": "path is missing",
    "unix://": "path is missing",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_none_is_refused_and_says_how_one_is_written(text: str) -> None:
    with pytest.raises(BadEndpoint, match=BAD[text]) as caught:
        parse_endpoint(text)
    assert "write tcp://HOST:PORT" in str(caught.value)
    assert caught.value.text == text


@pytest.mark.parametrize("text", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1", "unix:/x"])
def test_only_this_machine_reaches(text: str) -> None:
    assert parse_endpoint(text).is_loopback


@pytest.mark.parametrize("text", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "localhost.example.org:1", "myhost:1"])
def test_others_may_reach(text: str) -> None:
    assert not parse_endpoint(text).is_loopback
