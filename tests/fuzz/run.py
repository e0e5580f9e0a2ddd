"""Fuzzes one target for a while with atheris: `make fuzz` calls it for each of them.

    python -m tests.fuzz.run TARGET SECONDS [FOLDER]

The corpus grows in FOLDER/TARGET and is used again; an input that lets something out is kept beside it as
FOLDER/TARGET-crash-...; `python -m tests.fuzz.run TARGET FILE` runs that one. libFuzzer ends the process without
Python's own end: scripts/fuzz.sh removes what is left in TMPDIR.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["hotweights"]):
    from tests.fuzz.targets import TARGETS, tidy


def main() -> None:
    name, what, *rest = sys.argv[1:]
    target = TARGETS[name]
    if not what.isdigit():
        target.run(Path(what).read_bytes())
        tidy()
        return
    folder = Path(rest[0] if rest else ".fuzz")
    corpus = folder / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup(
        [
            sys.argv[0],
            f"-max_total_time={what}",
            f"-max_len={target.length_max}",
            f"-artifact_prefix={folder / name}-",
            "-timeout=30",
            "-rss_limit_mb=2048",
            "-print_final_stats=1",
            str(corpus),
        ],
        target.run,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
