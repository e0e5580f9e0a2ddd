"""A coordinator as it was before there were routes: every node takes from who had the image before. For comparison."""

import sys
from collections.abc import Mapping, Sequence

from hotweights.cli.main import main
from hotweights.coordinator.rules import chains


def star(
    node: str, chain: Sequence[str], holders: Sequence[str], zones: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """In place of chains.sources_of."""
    return tuple(holder for holder in holders if holder != node)


if __name__ == "__main__":
    vars(chains)["sources_of"] = star
    sys.exit(main())
