"""For all tests: what fresh engines answer, asked once a session, and the recorder of faults."""

import pytest
from tests import architectures, faults_recorder
from tests.architectures import recorded
from tests.faults_recorder import fault_row, pytest_collection_modifyitems, pytest_runtest_makereport
from tests.oracles import Oracles

__all__ = ["fault_row", "pytest_collection_modifyitems", "pytest_runtest_makereport", "recorded"]


def pytest_addoption(parser: pytest.Parser) -> None:
    faults_recorder.pytest_addoption(parser)
    architectures.pytest_addoption(parser)


@pytest.fixture(scope="session")
def fresh_engines(tmp_path_factory: pytest.TempPathFactory) -> Oracles:
    """Checkpoints by recipe, and the oracle of each."""
    return Oracles(tmp_path_factory.mktemp("fresh-engines"))
