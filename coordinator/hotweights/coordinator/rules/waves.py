"""Who goes when: the canary first, then `max_unavailable` at a time."""

from collections.abc import Sequence

from hotweights.coordinator.rules.orders import Declined
from hotweights.coordinator.rules.records import Options


def share(text: str, of: int) -> int:
    """ "3" or "25%" of `of`: rounded down, at least 1. Raises Declined on anything else."""
    number = text.removesuffix("%").strip()
    if not (number.isascii() and number.isdigit()) or len(number) > 9:
        raise Declined("INVALID_ARGUMENT", "BAD_SHARE", f"{text!r} is no share: write a number or a percentage")
    count = int(number)
    return max(1, of * count // 100 if text.strip().endswith("%") else count)


def check_options(options: Options) -> None:
    """Raises Declined for options that no update can follow."""
    share(options.max_unavailable, 1)
    share(options.max_failed, 1)
    deadlines = (
        options.staging_deadline_s,
        options.quiesce_deadline_s,
        options.apply_deadline_s,
        options.asleep_deadline_s,
    )
    if not all(0 < deadline <= 86400 for deadline in deadlines):
        raise Declined("INVALID_ARGUMENT", "BAD_DEADLINE", "deadlines are 0 to 86400 seconds")


def plan_waves(replicas: Sequence[str], options: Options, unready: int = 0) -> list[list[str]]:
    """Replica ids by wave. `unready` ones already count as unavailable.

    An empty roster has no waves.
    """
    size = max(1, share(options.max_unavailable, len(replicas)) - unready)
    canary = max(1, options.canary)
    waves = [list(replicas[:canary])] if replicas else []
    for start in range(canary, len(replicas), size):
        waves.append(list(replicas[start : start + size]))
    return waves
