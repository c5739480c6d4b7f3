"""The equations page: a paper's equation as the book writes it, its function and its tests."""

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml
from page_text import Chapter, chapters, table

LABELLED = re.compile(r"^\$\$ \(((?:tnf|sa|fu)-\w+)\)\s*$", re.M)
CITED = re.compile(r"Implements (TNF|SA|FU) Eqs?\. ((?:\(\w+\)(?:, | and |, and )?)+)")
NUMBERED = re.compile(r"\s*\\q?quad\s*\\text\{\[[^]]*\]\}")
NO_CODE = "% no code: "
MAX_TESTS = 3


@dataclass(frozen=True)
class Function:
    """A function or method whose docstring says that it implements an equation."""

    name: str
    path: str
    line: int

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").replace("/", ".")


@dataclass
class Equation:
    """A paper's equation; ``no_code`` is the reason why no function needs to implement it.

    ``tex`` is what the chapter shows, without the paper's number at its end.
    """

    label: str
    chapter: Chapter | None = None
    no_code: str | None = None
    tex: str = ""
    functions: list[Function] = field(default_factory=list)

    @property
    def number(self) -> str:
        """The paper's name for it, as in ``TNF (7)``."""
        paper, number = self.label.split("-", 1)
        return f"{paper.upper()} ({number})"

    @property
    def problem(self) -> str | None:
        """Say what is missing, None if nothing is."""
        if self.chapter is None:
            return "no chapter shows it"
        return None if self.functions or self.no_code else "no function yet"


def labelled_equations(chapter: Chapter) -> list[Equation]:
    """List the labelled equations of a chapter in their order."""
    found = []
    for match in LABELLED.finditer(chapter.text):
        before = chapter.text[: match.start()].splitlines()
        opening = max(i for i, line in enumerate(before) if line.startswith("$$"))
        above = before[opening - 1]
        reason = above.removeprefix(NO_CODE) if above.startswith(NO_CODE) else None
        tex = NUMBERED.sub("", " ".join(" ".join(before[opening + 1 :]).split()))
        found.append(Equation(match[1], chapter, reason, tex))
    return found


def cited_equations(source: str, path: str) -> Iterable[tuple[str, Function]]:
    """Yield the label of each equation that a docstring says it implements, with the function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            text = re.sub(r"\s+", " ", ast.get_docstring(node) or "")
            for paper, numbers in CITED.findall(text):
                for number in re.findall(r"\((\w+)\)", numbers):
                    yield (
                        f"{paper.lower()}-{number.lower()}",
                        Function(node.name, path, node.lineno),
                    )


def all_equations(root: Path) -> list[Equation]:
    """Join the chapters' labels and the docstrings of ``lib``."""
    found = {e.label: e for chapter in chapters(root) for e in labelled_equations(chapter)}
    for path in sorted((root / "lib").rglob("*.py")):
        name = path.relative_to(root).as_posix()
        for label, function in cited_equations(path.read_text("utf8"), name):
            found.setdefault(label, Equation(label)).functions.append(function)
    return sorted(found.values(), key=lambda equation: _order(equation.label))


def _order(label: str) -> tuple:
    number = label.split("-", 1)[1]
    return (not number.isdigit(), int(number) if number.isdigit() else 0, number)


@cache
def _trees(root: Path) -> dict[str, ast.Module]:
    paths = sorted((root / "tests").rglob("test_*.py"))
    return {p.relative_to(root).as_posix(): ast.parse(p.read_text("utf8")) for p in paths}


def tests_of(function: Function, root: Path) -> list[tuple[str, str]]:
    """List (file, test) of the tests that name a function, themselves or through a helper.

    Only files that import from its module count, since names such as ``log_prob`` are common.
    """
    found = []
    for path, tree in _trees(root).items():
        if function.module in _imports(tree):
            uses = {name: _names(node) for node in tree.body for name in _defined(node)}
            found += [
                (path, name)
                for name in uses
                if name.startswith("test_") and function.name in _reached(name, uses)
            ]
    return found


def _defined(node: ast.stmt) -> list[str]:
    """List the names that a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _reached(name: str, uses: dict[str, set[str]]) -> set[str]:
    """Collect the names that a definition uses, and those that the definitions it uses use."""
    reached, new = set(), {name}
    while new:
        reached |= new
        new = {used for one in new for used in uses.get(one, ())} - reached
    return reached


def _imports(tree: ast.Module) -> set[str]:
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def _names(node: ast.AST) -> set[str]:
    """Collect the names in a piece of code; an argument may be the name of a fixture."""
    parts = list(ast.walk(node))
    return (
        {part.id for part in parts if isinstance(part, ast.Name)}
        | {part.attr for part in parts if isinstance(part, ast.Attribute)}
        | {part.arg for part in parts if isinstance(part, ast.arg)}
    )


def repository(root: Path) -> str:
    """Return the address of the files on the web, empty if ``_config.yml`` names no repository."""
    found = yaml.safe_load((root / "_config.yml").read_text("utf8")).get("repository", {})
    return f"{found['url']}/blob/{found.get('branch', 'main')}" if found.get("url") else ""


def paper_equations(root: Path, paper: str) -> str:
    """Write the table of a paper's equations; ``paper`` is TNF, SA or FU."""
    _trees.cache_clear()  # a live preview builds more than once in a process
    found = [e for e in all_equations(root) if e.label.startswith(f"{paper.lower()}-")]
    if not found:
        return "No chapter shows an equation of this paper yet."
    address = repository(root)
    rows = [
        [e.number, "\n\n".join([_place(e), _functions(e, address), _tests(e, root)])] for e in found
    ]
    return table(["Paper", "Equation, its functions and tests"], rows, [12, 88], "equations")


def _place(equation: Equation) -> str:
    if equation.chapter is None:
        return f"**{equation.problem}**"
    where = f"Eq. {{eq}}`{equation.label}` of {{ref}}`{equation.chapter.label}`"
    return f"$$\n{equation.tex}\n$$\n\n{where}"


def _functions(equation: Equation, address: str) -> str:
    if not equation.functions:
        return equation.no_code or f"**{equation.problem}**"
    lines = []
    for function in equation.functions:
        place = f"{function.path}:{function.line}"
        if address:
            place = f"[{place}]({address}/{function.path}#L{function.line})"
        lines.append(f"*Function:* `{function.name}` in {place}")
    return "\n\n".join(lines)


def _tests(equation: Equation, root: Path) -> str:
    if not equation.functions:
        return ""
    found = list(dict.fromkeys(t for f in equation.functions for t in tests_of(f, root)))
    if not found:
        return "**no test names it**"
    names = ", ".join(f"`{name}`" for _, name in found[:MAX_TESTS])
    more = f" and {len(found) - MAX_TESTS} more" if len(found) > MAX_TESTS else ""
    files = ", ".join(dict.fromkeys(path for path, _ in found))
    return f"*Tests:* {names}{more} in {files}"
