"""How each block of the documents is tested: in a sitting here, or by a test elsewhere that is named.

A new block needs a line in this file. Drawings and output need none: their fence is ```text.
"""

from dataclasses import dataclass

# What a sitting's blocks find when they begin. Who answers to vLLM's command is a stand-in, and vLLM in a live sitting.
COORDINATOR = "hotweights coord-serve --endpoint tcp://127.0.0.1:5555"
FLEET = f"""\
{COORDINATOR}
export HOTWEIGHTS_ENDPOINT=tcp://127.0.0.1:5555 HOTWEIGHTS_MODEL=my-model
python -m vllm.entrypoints.openai.api_server --model /models/v1
hotweights publish /models/v1 --version v1
hotweights publish /models/v2 --version v2
"""
MODULE = """\
import torch
module = torch.nn.Linear(64, 32)
"""


@dataclass(frozen=True)
class Sitting:
    """Blocks of one document that a person enters one after the other.

    `before` and `after` are commands around them; `python` comes before blocks that are Python. `needs` names a module
    that not every environment has. A `live` sitting is run with a real vLLM as well, by tests/docs/test_live.py.
    """

    document: str
    blocks: tuple[str, ...]
    before: str = ""
    after: str = ""
    python: str = ""
    needs: str = ""
    live: bool = False

    @property
    def name(self) -> str:
        return f"{self.document}: {self.blocks[0]}"


@dataclass(frozen=True)
class Elsewhere:
    """A block that another test runs. `commands` are all of its commands: a changed block is looked at anew."""

    document: str
    commands: tuple[str, ...]
    test: str


_THIS_RUN = "tests/docs/test_commands.py::test_make_has_every_target_that_is_named"
_CONTAINER = "tests/deploy/test_container.py"
_IMAGE_ANSWERS = "test_it_answers_its_health_check_and_status_and_stops_within_its_grace"
_AGENT = "test_what_it_keeps_in_its_volume_is_there_after_a_restart_and_its_agent_is_the_same_image"

SITTINGS = (
    Sitting(
        "README.md",
        ("hotweights coord-serve --endpoint tcp://127.0.0.1:5555",),
        live=True,
    ),
    Sitting("docs/WALKTHROUGHS.md", ("python examples/vllm_smoke_demo.py",)),
    Sitting(
        "docs/WALKTHROUGHS.md",
        (
            "hotweights coord-serve --endpoint tcp://127.0.0.1:5555",
            "python examples/vllm_smoke_demo.py --use-coord --endpoint tcp://127.0.0.1:5555",
        ),
    ),
    Sitting(
        "docs/WALKTHROUGHS.md",
        (
            "python examples/random_llama.py /tmp/walk/v1 1 small",
            "hotweights publish /tmp/walk/v1 --version v1",
            "hotweights update v2 --check-finite",
        ),
        before=COORDINATOR,
        needs="transformers",
        live=True,
    ),
    Sitting(
        "docs/WALKTHROUGHS.md",
        ("buf curl --protocol grpc --http2-prior-knowledge --list-methods http://127.0.0.1:5555",),
        before=COORDINATOR,
    ),
    Sitting("docs/PRESETS.md", ("hotweights policy my-model auto",), before=FLEET),
    Sitting(
        "docs/PRESETS.md",
        ("hotweights update v2 --canary 1 --max-unavailable 10% --inflight drain --quiesce-deadline 120",),
        before=FLEET,
    ),
    Sitting(
        "docs/PRESETS.md",
        ("hotweights update v2 --canary 2 --max-unavailable 25% --failure-policy evict --max-failed 5%",),
        before=FLEET,
    ),
    Sitting(
        "docs/PRESETS.md",
        ("export HOTWEIGHTS_NODE=$POD_NAME HOTWEIGHTS_REPLICA=$POD_NAME",),
        before="POD_NAME=vllm-0",
        after="hotweights config",
    ),
    Sitting(
        "docs/SECURITY.md",
        (
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 "
            '-subj "/CN=hotweights" -addext "keyUsage=critical,keyCertSign,cRLSign" -keyout ca.key -out ca.pem',
            'openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=coordinator" '
            "-keyout coordinator.key -out coordinator.csr",
            "hotweights coord-serve --endpoint tcp://0.0.0.0:5555 --tls-cert coordinator.pem --tls-key coordinator.key "
            "--client-ca ca.pem",
            "export HOTWEIGHTS_ENDPOINT=grpcs://localhost:5555",
            "buf curl --protocol grpc --http2-prior-knowledge --cacert ca.pem --cert node-1.pem --key node-1.key "
            "--data '{}' https://localhost:5555/hotweights.v1.CoordinatorService/GetStatus",
        ),
        before='cd "$HOME"',
    ),
    Sitting(
        "docs/SECURITY.md",
        ("umask 077",),
        before='cd "$HOME"',
        after="hotweights coord-status --token-file alice.token",
    ),
    Sitting("docs/SECURITY.md", ("export HOTWEIGHTS_AGENT_ALLOW=1001,@1002",), after="hotweights config"),
    Sitting(
        "docs/VLLM_INTEGRATION.md",
        ("from hotweights.adapters.vllm_auto import install_autobind",),
        before=COORDINATOR,
        needs="vllm",
    ),
    Sitting("docs/TRANSFER.md", ("from hotweights.publish import publish_module",), before=FLEET, python=MODULE),
    Sitting(
        "docs/VLLM_INTEGRATION.md",
        ("from hotweights.adapters.vllm_extension import HotweightsWorkerExtension",),
        before=FLEET,
        python=MODULE,
    ),
)

ELSEWHERE = (
    Elsewhere(
        "README.md", ("make demo", "make test"), "tests/docs/test_live.py::test_make_demo_says_that_all_went_well"
    ),
    Elsewhere(
        "docs/WALKTHROUGHS.md",
        (
            "docker build -t hotweights-coordinator .",
            "docker run -p 127.0.0.1:5555:5555 -v hotweights:/var/lib/hotweights hotweights-coordinator",
        ),
        f"{_CONTAINER}::{_IMAGE_ANSWERS}",
    ),
    Elsewhere(
        "deploy/README.md",
        (
            "docker build -t hotweights:0.1.0 .",
            "docker build -t hotweights-vllm:0.1.0 -f deploy/engine.Dockerfile .",
        ),
        f"{_CONTAINER}::test_the_engine_image_has_the_plugin_where_vllm_looks_for_it",
    ),
    Elsewhere(
        "deploy/README.md",
        (
            "kubectl apply -f deploy/kubernetes",
            "kubectl exec vllm-0 -c agent -- hotweights publish /models/v1 --version v1",
            "kubectl exec vllm-0 -c agent -- hotweights publish /models/v2 --version v2 --update --wait",
            "kubectl exec vllm-0 -c agent -- hotweights coord-status",
            "kubectl exec vllm-0 -c agent -- hotweights rollback",
        ),
        f"{_CONTAINER}::{_AGENT}",  # what kubectl would start; there is no cluster here
    ),
    Elsewhere(
        "deploy/README.md",
        ("sed -i -E -e '/#plain$/d' -e 's/^( *)#tls /\\1/' deploy/kubernetes/*.yaml",),
        "tests/deploy/test_kubernetes.py::test_every_resource_passes_the_schema_of_the_oldest_and_the_newest_kubernetes",
    ),
)
