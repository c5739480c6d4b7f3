"""Begin with the files that take minutes, so that no worker is left alone with one at the end.

``make test`` gives each worker a file at a time (``--dist loadfile``), in the order of collection.
Each worker computes with one thread: two that wait for each other on two cores take twice as long.
"""

import sys

import pytest

LONGEST_FIRST = ("test_browser.py", "test_run.py", "test_build.py", "test_distributed.py")


def pytest_collection_modifyitems(items):
    """Move the longest files to the front; all else keeps its order."""
    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def one_thread():
    """Go back to one thread after a run that has set more."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
