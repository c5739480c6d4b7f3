"""Execute each chapter once, for the book and for the tests, and never serve a stale output.

jupyter-cache knows a notebook by its code cells and their tags, so an edit of ``lib/``, a result or
the profile would go unnoticed. Here its folder is named by a digest of everything else that can
change an output: an edit of one chapter executes that chapter, an edit of anything else executes
all of them.

As a Sphinx extension this module fills the cache before pages are read, two chapters at a time, and
points myst-nb to it. The collector in ``conftest.py`` calls :func:`execute` on the same cache.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml
from filelock import FileLock
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from myst_nb.core.read import is_myst_markdown_notebook, read_myst_markdown_notebook
from myst_parser.config.main import MdParserConfig
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)
INPUT_FOLDERS = ("lib", "configs", "results", "checkpoints", "book/papers")
CACHES = Path("_build", ".executed")
CACHES_KEPT = 3
MEGABYTES_NEEDED = 300  # executed chapters and pages
CELL_SECONDS = 600
KERNELS = 2
ANSI_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Execution:
    """A chapter with its outputs; ``error`` is the traceback of the cell that stopped it.

    ``cached`` says that an earlier execution of the same code on the same inputs gave them.
    """

    notebook: NotebookNode
    error: str | None
    cached: bool = False


def profile() -> str:
    """Name the profile in use."""
    return os.environ.get("BOOK_PROFILE") or "cpu"


def is_chapter(path: Path) -> bool:
    """Tell whether a page carries the jupytext header, without which it is never executed."""
    return path.suffix == ".md" and is_myst_markdown_notebook(path.read_text("utf8"))


def check_header(path: Path, root: Path) -> None:
    """Refuse a page that holds code, or lies in ``chapters/``, and would not be executed.

    Raises: ValueError if the jupytext header is missing.
    """
    page = path.relative_to(root)
    text = path.read_text("utf8") if path.suffix == ".md" else ""
    expected = page.parts[0] == "chapters" or re.search(r"^(```|:::)\{code-cell\}", text, re.M)
    if expected and not is_chapter(path):
        raise ValueError(
            f"{page} has no jupytext header, so its code would not be executed: "
            "begin it with the front matter of the other chapters."
        )


def read_chapter(path: Path, root: Path) -> NotebookNode:
    """Read a MyST chapter as the book reads it, with the syntax that ``_config.yml`` enables."""
    config = yaml.safe_load((root / "_config.yml").read_text("utf8"))
    syntax = config.get("parse", {}).get("myst_enable_extensions", ["colon_fence", "dollarmath"])
    return read_myst_markdown_notebook(
        path.read_text("utf8"),
        config=MdParserConfig(enable_extensions=set(syntax)),
        add_source_map=True,
        path=path,
    )


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """List the code cells of a notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def inputs_digest(root: Path) -> str:
    """Compute the digest of all that can change an output, the chapters themselves excepted."""
    # One folder, since sys.path differs between Sphinx and pytest.
    packages = importlib.metadata.distributions(path=[sysconfig.get_paths()["purelib"]])
    installed = sorted(f"{package.name}=={package.version}" for package in packages)
    parts = [profile(), sys.version, platform.system(), platform.machine(), *installed]
    for folder in INPUT_FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            hidden = any(part.startswith((".", "__pycache__")) for part in path.parts[-2:])
            if path.is_file() and not hidden:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                parts.append(f"{path.relative_to(root).as_posix()} {content}")
    # Snapshots are large and never edited in place: their names and sizes will do.
    if snapshots := os.environ.get("BOOK_DATA"):
        files = sorted(Path(snapshots).rglob("*.parquet"))
        parts += [f"{f.relative_to(snapshots).as_posix()} {f.stat().st_size}" for f in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def cache_folder(root: Path) -> Path:
    """Create the cache folder that is valid now, and delete all but the last few others.

    Raises: OSError if it cannot be written, or if the disk is nearly full.
    """
    folder = root / CACHES / inputs_digest(root)[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
    except OSError as error:
        raise OSError(
            f"The outputs of the chapters cannot be kept in {folder}: {error.strerror}. Make "
            "_build a folder that you may write to, or delete it."
        ) from error
    if (free := shutil.disk_usage(folder).free) < MEGABYTES_NEEDED * 2**20:
        raise OSError(
            f"The disk of {root / '_build'} has {free >> 20} MB left, and the book needs "
            f"{MEGABYTES_NEEDED} MB: delete something, for instance `make clean`."
        )
    others = [path for path in folder.parent.iterdir() if path.is_dir()]
    for old in sorted(others, key=lambda path: path.stat().st_mtime)[:-CACHES_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def kernel_environment(folder: Path) -> dict[str, str]:
    """Build the environment of a kernel: the user's, without what could change an output."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "PYTHONWARNINGS")}
    return environment | {
        "BOOK_PROFILE": profile(),
        "IPYTHONDIR": str(folder / "ipython"),
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
    }


def execute(path: Path, root: Path, folder: Path) -> Execution:
    """Return a chapter with its outputs: from the cache ``folder``, else from a new kernel.

    A chapter that raises is never stored, so that it fails each time.
    """
    notebook = read_chapter(path, root)
    page = path.relative_to(root).as_posix()
    with FileLock(folder / (page.replace("/", "--") + ".lock")):
        database = FileLock(folder / "database.lock")
        with database:
            cache = get_cache(folder)
            with suppress(KeyError):  # the cache's word for "not stored"
                return Execution(cache.merge_match_into_notebook(notebook)[1], None, cached=True)
        start = time.monotonic()
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            resources={"metadata": {"path": str(path.parent)}},
            record_timing=False,  # time stamps would become part of the key
            store_widget_state=False,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
        try:
            client.execute(env=kernel_environment(folder))
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            return Execution(notebook, ANSI_COLOURS.sub("", str(error)).strip())
        seconds = round(time.monotonic() - start, 1)
        with database:
            bundle = CacheBundleIn(notebook, str(path), data={"execution_seconds": seconds})
            cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
            write_seconds(folder.parent / "seconds.json", {page: seconds})
        return Execution(notebook, None)


def read_seconds(path: Path) -> dict[str, float]:
    """Read how long each chapter took when it was last executed."""
    return json.loads(path.read_text("utf8")) if path.exists() else {}


def write_seconds(path: Path, new: dict[str, float]) -> None:
    """Note how long chapters took, so that the slowest can start first."""
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(read_seconds(path) | new, indent=1), "utf8")
    os.replace(temporary, path)


def execute_all(paths: Iterable[Path], root: Path, folder: Path) -> dict[str, str]:
    """Execute the chapters that the cache lacks, slowest first; return page to traceback."""
    seconds = read_seconds(folder.parent / "seconds.json")
    pages = {path.relative_to(root).as_posix(): path for path in paths}
    slowest_first = sorted(pages, key=lambda page: -seconds.get(page, float("inf")))
    with ThreadPoolExecutor(KERNELS) as pool:
        runs = pool.map(lambda page: execute(pages[page], root, folder), slowest_first)
        return {page: run.error for page, run in zip(slowest_first, runs, strict=True) if run.error}


def use_cache(app, config) -> None:
    """Point myst-nb to the cache that is valid now.

    SystemExit, since Jupyter Book would bury the message of any other exception in tracebacks.
    """
    config.nb_execution_mode = "cache"
    try:
        config.nb_execution_cache_path = str(cache_folder(Path(app.srcdir)))
    except OSError as error:
        raise SystemExit(str(error)) from error


def execute_before_reading(app, env, docnames) -> None:
    """Execute the chapters that Sphinx is about to read; end the build if one raises."""
    root = Path(app.srcdir)
    paths = [Path(env.doc2path(name)) for name in docnames]
    try:
        for path in paths:
            check_header(path, root)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    chapters = list(filter(is_chapter, paths))
    LOGGER.info(f"executing those of {len(chapters)} chapters that are not in the cache ...")
    errors = execute_all(chapters, root, Path(app.config.nb_execution_cache_path))
    if errors:
        report = "\n\n".join(f"{page}:\n{error}" for page, error in sorted(errors.items()))
        raise SystemExit(f"{report}\n\n{len(errors)} of the chapters raised an error.")


def setup(app) -> dict:
    """Register the hooks with Sphinx."""
    app.connect("config-inited", use_cache)
    app.connect("env-before-read-docs", execute_before_reading)
    return {"parallel_read_safe": True}
