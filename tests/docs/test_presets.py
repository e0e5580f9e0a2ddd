"""The settings table is the code's own."""

import re
from pathlib import Path

from hotweights.worker_client.config import SETTINGS

PRESETS = Path(__file__).parents[2] / "docs" / "PRESETS.md"


def test_every_setting_stands_in_the_presets_with_its_default_and_meaning() -> None:
    text = PRESETS.read_text()
    for setting in SETTINGS:
        default = f"`{setting.default}`" if setting.default else ""
        assert f"| `{setting.name}` | {default} | {setting.meaning} |" in text


def test_the_presets_name_no_setting_that_is_not_read() -> None:
    named = set(re.findall(r"HOTWEIGHTS_[A-Z_]+", PRESETS.read_text()))
    coordinators = {"HOTWEIGHTS_STORE", "HOTWEIGHTS_TOKENS", "HOTWEIGHTS_TLS_CERT", "HOTWEIGHTS_TLS_KEY"}
    known = {setting.name for setting in SETTINGS} | coordinators
    assert named <= known | {"HOTWEIGHTS_COORD", "HOTWEIGHTS_CLIENT_CA"}
