"""For all tests: what fresh engines answer, asked once a session, the recorder of faults, and an end that comes."""

import faulthandler

import pytest
from tests import architectures, faults_recorder
from tests.architectures import recorded
from tests.faults_recorder import fault_row, pytest_collection_modifyitems, pytest_runtest_makereport
from tests.oracles import Oracles

from hotweights.transports.ucx_lane import close_lane

END_S = 60

__all__ = ["fault_row", "pytest_collection_modifyitems", "pytest_runtest_makereport", "recorded"]


def pytest_addoption(parser: pytest.Parser) -> None:
    faults_recorder.pytest_addoption(parser)
    architectures.pytest_addoption(parser)


def pytest_unconfigure() -> None:
    """What keeps the process after its last test is shown, and ends it: CI would wait for it until its own deadline."""
    close_lane()
    faulthandler.dump_traceback_later(END_S, exit=True, file=2)


@pytest.fixture(scope="session")
def fresh_engines(tmp_path_factory: pytest.TempPathFactory) -> Oracles:
    """Checkpoints by recipe, and the oracle of each."""
    return Oracles(tmp_path_factory.mktemp("fresh-engines"))
