"""The certificates of docs/SECURITY.md, made as it says, do what it says."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hotweights.wire.certificates import read_ca, read_pair

SECURITY = Path(__file__).parents[2] / "docs" / "SECURITY.md"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the page's commands are openssl's")
def test_the_commands_of_the_page_make_certificates_for_both_roles(tmp_path: Path) -> None:
    blocks = re.findall(r"<!-- run -->\n```bash\n(.*?)```", SECURITY.read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        subprocess.run(["bash", "-euc", block], cwd=tmp_path, check=True, timeout=60, capture_output=True)
    assert read_ca(tmp_path / "ca.pem")
    for name in ("coordinator", "node-1"):
        read_pair(tmp_path / f"{name}.pem", tmp_path / f"{name}.key", server=True, client=True)
        check = ["openssl", "verify", "-CAfile", "ca.pem", f"{name}.pem"]
        assert subprocess.run(check, cwd=tmp_path, timeout=60, check=False, capture_output=True).returncode == 0
