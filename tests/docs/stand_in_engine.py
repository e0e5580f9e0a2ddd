"""In place of vLLM's server where a document starts one: the same arguments, a replica without an engine.

python stand_in_engine.py --model FOLDER [whatever vLLM takes]
"""

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.cli.stand_in import StandIn

from hotweights.worker_client.config import load_config
from hotweights.worker_client.image import build_manifest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    folder = parser.parse_known_args()[0].model
    config = load_config()
    digest = build_manifest(folder).digest.hex()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with StandIn(str(config.endpoint), config.model, digest):
        signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    main()
