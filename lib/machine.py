"""What the machine is that measures something."""

import os
import platform
import time
from pathlib import Path


def processor() -> str:
    """Name the processor, as far as the system tells."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text("utf8", "replace").splitlines() if file.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or "unknown"


def cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> str:
    """Tell the memory of the machine, as far as the system tells."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system says
        return "unknown"
    return f"{total / 2**30:.0f} GiB"


def clock() -> float:
    """Return seconds to take the difference of, for what a method costs.

    They are those of the CPU, which other work on the machine does not stretch, or of the clock
    where a GPU does the work.
    """
    import torch  # the pages of the book do without

    return time.perf_counter() if torch.cuda.is_available() else time.process_time()
