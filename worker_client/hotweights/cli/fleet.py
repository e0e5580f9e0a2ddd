"""`undrain` and `policy`: what an operator sets on replicas and models."""

import argparse

from hotweights.cli.arguments import Subparsers, add_command, add_connection


def add_commands(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    parser = add_command(commands, "policy", policy, "Set whether a published version starts an update by itself.")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("policy", choices=("auto", "manual"))
    add_connection(parser)

    parser = add_command(commands, "undrain", undrain, "Let an excluded replica catch up again.")
    parser.add_argument("replica", metavar="REPLICA", help="its id, as coord-status shows it")
    add_connection(parser)


async def policy(arguments: argparse.Namespace) -> int:
    from hotweights.cli.client import connect
    from hotweights.cli.output import print_json, word
    from hotweights.v1 import coordinator_service_pb2 as pb
    from hotweights.v1 import model_pb2

    async with connect(arguments) as coordinator:
        request = pb.SetModelPolicyRequest(model=arguments.model, policy=f"MODEL_POLICY_{arguments.policy.upper()}")
        model = (await coordinator.ask(request, pb.SetModelPolicyResponse)).model
    if arguments.json:
        print_json(model)
    else:
        held = ", held since a rollback: `hotweights resume` lifts that" if model.held else ""
        print(f"{model.name}: policy {word(model_pb2.ModelPolicy, model.policy)}{held}")
    return 0


async def undrain(arguments: argparse.Namespace) -> int:
    from hotweights.cli.client import connect
    from hotweights.cli.output import print_json
    from hotweights.v1 import coordinator_service_pb2 as pb

    async with connect(arguments) as coordinator:
        request = pb.UndrainReplicaRequest(replica_id=arguments.replica)
        replica = (await coordinator.ask(request, pb.UndrainReplicaResponse)).replica
    if arguments.json:
        print_json(replica)
    else:
        print(f"{replica.id}: no longer excluded, catches up to {replica.desired_version or 'what is committed'}")
    return 0
