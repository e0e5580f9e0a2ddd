"""For all tests: what fresh engines answer, asked once a session."""

import pytest
from tests.oracles import Oracles


@pytest.fixture(scope="session")
def fresh_engines(tmp_path_factory: pytest.TempPathFactory) -> Oracles:
    """Checkpoints by recipe, and the oracle of each."""
    return Oracles(tmp_path_factory.mktemp("fresh-engines"))
