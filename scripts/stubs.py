"""Generates the stubs of protos/hotweights/v1, or with --check compares them with the committed ones.

Run by .venv-tools, which holds the one pinned generator: `make stubs`, `make check`.

    python scripts/stubs.py [--check] [PROTO_ROOT]
"""

import argparse
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

STUBS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def main() -> int:
    """Returns the exit status: 1 if --check found a difference, or protoc's own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parent.parent / "protos")
    args = parser.parse_args()
    if not args.check:
        return generate(args.root, args.root)
    with tempfile.TemporaryDirectory() as fresh:
        status = generate(args.root, Path(fresh))
        return status or compare(stubs(Path(fresh)), stubs(args.root))


def generate(root: Path, out: Path) -> int:
    """Writes the stubs of every .proto below root into out, under the same relative folders."""
    protos = sorted(str(path.relative_to(root)) for path in root.rglob("*.proto"))
    if not protos:
        print(f"stubs: no .proto below {root}", file=sys.stderr)
        return 1
    google = Path(grpc_tools.__file__).parent / "_proto"  # timestamp.proto and its kind
    flags = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    return int(protoc.main(["protoc", f"-I{root}", f"-I{google}", *flags, *protos]))


def stubs(folder: Path) -> dict[str, bytes]:
    """The bytes of every stub below folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for kind in STUBS for path in folder.rglob(kind)}


def compare(fresh: dict[str, bytes], committed: dict[str, bytes]) -> int:
    """Prints one line for each stub that is missing, left over or different; 0 when there is none."""
    different = [name for name in sorted({*fresh, *committed}) if fresh.get(name) != committed.get(name)]
    for name in different:
        why = "missing" if name not in committed else "without a .proto" if name not in fresh else "out of date"
        print(f"stubs: {name} is {why}; run `make stubs`", file=sys.stderr)
    return int(bool(different))


if __name__ == "__main__":
    raise SystemExit(main())
