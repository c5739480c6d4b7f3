"""Directives whose content is generated when the book is built.

Each is a function from the root of the repository, and the directive's argument where it has one,
to MyST text, which is then read as if it stood in the page. The pages that use one are read anew
in every build, since Sphinx does not know what they depend on.
"""

import re
from collections.abc import Callable
from pathlib import Path

import page_deviations
import page_equations
import page_planning
import page_planning_sd
import page_scoreboard
import page_status
import page_teaching
from docutils import nodes
from docutils.statemachine import StringList
from page_text import PageError
from sphinx.util.docutils import SphinxDirective

from lib.papers import PaperError
from lib.results import ResultsError
from lib.verdicts import VerdictError

WITHOUT_ARGUMENT: dict[str, Callable[[Path], str]] = {
    "scoreboard-counts": page_scoreboard.counts_table,
    "own-claims": page_scoreboard.own_claims,
    "deviation-counts": page_deviations.counts,
    "planning-estimates": page_planning.estimates,
    "planning-latent": page_planning_sd.latent_estimates,
    "planning-assumptions": page_planning.assumptions,
    "planning-measured": page_planning.measured_steps,
    "chapter-times": page_status.chapter_times,
    "versions": page_status.versions,
    "machine": page_status.machine,
    "benchmarks": page_status.benchmarks,
    "runs": page_status.runs,
    "chapter-costs": page_teaching.chapter_costs,
    "run-costs": page_teaching.run_costs,
    "exercise-list": page_teaching.exercise_list,
}
WITH_ARGUMENT: dict[str, Callable[[Path, str], str]] = {
    "scoreboard": page_scoreboard.paper_tables,
    "deviations": page_deviations.part_deviations,
    "equations": page_equations.paper_equations,
    "session-cost": page_teaching.session_cost,
}
USED = re.compile(rf"^(?:```|:::)\{{({'|'.join([*WITHOUT_ARGUMENT, *WITH_ARGUMENT])})\}}", re.M)


def directive(generate: Callable[..., str], arguments: int) -> type[SphinxDirective]:
    """Make the directive that shows what ``generate`` returns."""

    class Generated(SphinxDirective):
        required_arguments = arguments

        def run(self) -> list[nodes.Node]:
            try:
                text = generate(Path(self.env.srcdir), *self.arguments)
            except (PageError, PaperError, ResultsError, VerdictError) as error:
                raise self.error(str(error)) from error
            section = nodes.section()  # holds the headings, which cannot stand in a paragraph
            self.state.nested_parse(StringList(text.splitlines()), 0, section, match_titles=True)
            return section.children

    return Generated


def pages_to_read_anew(app, env, added, changed, removed) -> list[str]:
    """List the pages with a generated part."""
    paths = {name: Path(env.doc2path(name)) for name in env.found_docs if name.startswith("book/")}
    return [name for name, path in paths.items() if USED.search(path.read_text("utf8"))]


def setup(app) -> dict:
    """Register the directives with Sphinx."""
    for name, generate in WITHOUT_ARGUMENT.items():
        app.add_directive(name, directive(generate, 0))
    for name, generate in WITH_ARGUMENT.items():
        app.add_directive(name, directive(generate, 1))
    app.connect("env-get-outdated", pages_to_read_anew)
    app.add_css_file("generated.css")
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
