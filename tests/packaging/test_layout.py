"""The four roots make one namespace: what would hide a root, or leave a file out of the wheel, fails here."""

import subprocess
import sys
import zipfile
from pathlib import Path

REPO = Path(__file__).parents[2]
ROOTS = ("protos", "transports", "worker_client", "coordinator")


def packages() -> list[Path]:
    """Every import package of the distribution: hotweights/<name> in each root."""
    return [folder for root in ROOTS for folder in (REPO / root / "hotweights").glob("[a-z]*") if folder.is_dir()]


def test_no_root_has_an_init_that_would_hide_the_other_three() -> None:
    strays = [REPO / root / "hotweights" / "__init__.py" for root in ROOTS]
    assert [stray for stray in strays if stray.exists()] == []


def test_no_package_stands_in_two_roots() -> None:
    names = [folder.name for folder in packages()]
    assert sorted(names) == sorted(set(names))


def test_every_package_is_typed() -> None:
    assert [folder for folder in packages() if not (folder / "py.typed").exists()] == []


def test_the_wheel_holds_every_file_of_the_four_roots_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=REPO,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(REPO / root))
        for root in ROOTS
        for path in (REPO / root).rglob("*")
        if path.suffix in {".py", ".pyi"} or path.name == "py.typed"
    }
    assert expected <= packed
    assert {name for name in packed if not name.startswith("hotweights/")} == set()
