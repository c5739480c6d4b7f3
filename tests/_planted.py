"""Plant an error in a module, for tests of tests: a check that passes it checks nothing."""

import inspect
import types


def planted(module: types.ModuleType, right: str, wrong: str) -> types.ModuleType:
    """Return the module with ``right``, which stands in it, replaced by ``wrong``."""
    source = inspect.getsource(module)
    assert right in source
    broken = types.ModuleType("broken")
    exec(source.replace(right, wrong), vars(broken))
    return broken
