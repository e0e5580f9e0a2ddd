"""Which vLLM was tested, in one place. Others are told so once a server.

< OLDEST             left alone: what the adapters call is not there
OLDEST .. NEWEST     tested (docs/VLLM_INTEGRATION.md, "Versions")
> NEWEST, or "dev"   tried: what an apply installs is proven, whatever vLLM did
"""

import functools
import logging
import multiprocessing
import re

log = logging.getLogger(__name__)

OLDEST = (0, 28)
NEWEST = (0, 32)
TESTED = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"


def release(version: str) -> tuple[int, int] | None:
    """Major and minor number; None for a build from source that tells none ("dev")."""
    numbers = re.match(r"v?(\d+)\.(\d+)", version)
    return None if numbers is None else (int(numbers[1]), int(numbers[2]))


def judge(version: str) -> tuple[bool, str]:
    """Whether to touch an engine of this vLLM, and what to say of it; nothing of a tested one."""
    found = release(version)
    if found is None:
        return True, f"hotweights tries vLLM {version}, which names no release; tested are {TESTED}"
    if found < OLDEST:
        return False, f"hotweights leaves this engine alone: vLLM {version} is older than the tested {TESTED}"
    if found > NEWEST:
        return True, f"hotweights tries vLLM {version}, which is newer than the tested {TESTED}"
    return True, ""


def usable(version: str) -> bool:
    """Whether to touch this engine. Warns in the process that started it; cores and ranks are children of that one."""
    touch, text = judge(version)
    if text and multiprocessing.parent_process() is None:
        _warn(text)
    return touch


@functools.cache  # install_autobind registers, and vLLM's plugin loading does once more
def _warn(text: str) -> None:
    log.warning("%s", text)
