"""What each role may call: one table, every method of every service the coordinator has.

A method that is not in the table is the operator's alone; a test fails while one is missing.
"""

from enum import Enum


class Role(Enum):
    """As the tokens file spells it."""

    VIEWER = "viewer"
    WORKER = "worker"
    PUBLISHER = "publisher"
    OPERATOR = "operator"


_LOOKS = frozenset({Role.VIEWER, Role.PUBLISHER, Role.OPERATOR})
# What agents, engines and `apply_update` read as well.
_READS = _LOOKS | {Role.WORKER}
_WORKS = frozenset({Role.WORKER, Role.OPERATOR})
_PUBLISHES = frozenset({Role.PUBLISHER, Role.OPERATOR})
_OPERATES = frozenset({Role.OPERATOR})

_COORDINATOR = {
    "GetVersion": _READS,
    "ListVersions": _READS,
    "GetManifest": _READS,
    "GetStatus": _READS,
    "GetUpdate": _LOOKS,
    "ListUpdates": _LOOKS,
    "PlanUpdate": _LOOKS,
    "ListReplicas": _LOOKS,
    "ListNodes": _LOOKS,
    "WatchEvents": _LOOKS,
    # With `start_update` it needs START_UPDATE as well.
    "PublishVersion": _PUBLISHES,
    "DeleteVersion": _OPERATES,
    "StartUpdate": _OPERATES,
    "CancelUpdate": _OPERATES,
    "RollBack": _OPERATES,
    "SetModelPolicy": _OPERATES,
    "ResumeModel": _OPERATES,
    "UndrainReplica": _OPERATES,
}

START_UPDATE = "/hotweights.v1.CoordinatorService/StartUpdate"

ALLOWED = {
    **{f"/hotweights.v1.CoordinatorService/{name}": roles for name, roles in _COORDINATOR.items()},
    "/hotweights.v1.WorkerService/Session": _WORKS,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _READS,
}

# Probes carry no secrets: open to whoever reaches the port.
OPEN = frozenset(f"/grpc.health.v1.Health/{name}" for name in ("Check", "Watch", "List"))


def allowed(method: str) -> frozenset[Role]:
    """The roles that may call the method ("/package.Service/Method")."""
    return ALLOWED.get(method, _OPERATES)


def named(roles: frozenset[Role]) -> str:
    """For a person, the lowest role first."""
    return " or ".join(role.value for role in Role if role in roles)
