"""For all tests: the recorder of faults."""

from tests.faults_recorder import (
    fault_row,
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_makereport,
)

__all__ = ["fault_row", "pytest_addoption", "pytest_collection_modifyitems", "pytest_runtest_makereport"]
