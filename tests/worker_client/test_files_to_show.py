"""Settings of the worker side as processes hand them on."""

from pathlib import Path

import pytest

from hotweights.worker_client.config import BadSetting, load_config

FILES = {
    "HOTWEIGHTS_CA": "/etc/hw/ca.pem",
    "HOTWEIGHTS_CERT": "/etc/hw/tls.crt",
    "HOTWEIGHTS_KEY": "/etc/hw/tls.key",
    "HOTWEIGHTS_TOKEN_FILE": "/etc/hw/token",
}


def test_a_child_reads_the_same_files_and_the_token_goes_only_the_way_it_came() -> None:
    config = load_config({**FILES, "HOTWEIGHTS_TOKEN": "hw-secret", "HOTWEIGHTS_ENDPOINT": "grpcs://h:1"})
    environ = config.as_environ()
    assert {name: environ[name] for name in FILES} == FILES
    assert load_config(environ).access == load_config({**FILES}).access
    assert str(load_config(environ).endpoint) == "grpcs://h:1"
    assert "hw-secret" not in repr(config) + repr(environ)
    assert config.access.token == "hw-secret"


def test_files_are_absolute_as_an_agent_has_another_working_directory() -> None:
    config = load_config({**FILES, "HOTWEIGHTS_CA": "ca.pem", "HOTWEIGHTS_TOKEN_FILE": "~/token"})
    assert (config.ca, config.token_file) == (Path.cwd() / "ca.pem", Path.home() / "token")


@pytest.mark.parametrize(
    ("name", "other"), [("HOTWEIGHTS_CERT", "HOTWEIGHTS_KEY"), ("HOTWEIGHTS_KEY", "HOTWEIGHTS_CERT")]
)
def test_a_certificate_and_its_key_come_together(name: str, other: str) -> None:
    with pytest.raises(BadSetting, match=f"goes with {other}, which is not set"):
        load_config({name: "/x"})
