"""The failpoints of both sides are in hotweights.wire.failpoints; these names stay where the ranks look for them."""

from hotweights.wire.failpoints import NAMES, BadFailpoint, Failpoints, Injected, parse_failpoints

__all__ = ["NAMES", "BadFailpoint", "Failpoints", "Injected", "parse_failpoints"]
