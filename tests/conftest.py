"""Begin with the files that take minutes, so that no worker is left alone with one at the end.

``make test`` gives each worker a file at a time (``--dist loadfile``), in the order of collection.
"""

LONGEST_FIRST = ("test_browser.py", "test_run.py", "test_build.py", "test_distributed.py")


def pytest_collection_modifyitems(items):
    """Move the longest files to the front; all else keeps its order."""
    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
