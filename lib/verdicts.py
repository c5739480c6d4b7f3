"""The verdict on one claim, by the rule that its config fixed before the run.

An entry of a config's ``verdict`` list has ``quantity``, ``claim``, ``paper`` (a path of
:mod:`lib.papers`, or None), ``reproduced_if`` and, where wanted, ``same_ordering_if``. A rule
begins with a comparison that the measured value is set before, as in
``< 1 - Phi(delta - epsilon)``; it may use ``value``, ``paper``, the run's other quantities and the
scalar fields of its config.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from simpleeval import InvalidExpression, NameNotDefined, SimpleEval

from lib.papers import paper_entry, paper_value

REPRODUCED, SAME_ORDERING = "reproduced", "same ordering"
NOT_REPRODUCED, NOT_ATTEMPTED = "not reproduced", "not attempted"
VERDICTS = (REPRODUCED, SAME_ORDERING, NOT_REPRODUCED, NOT_ATTEMPTED)


class VerdictError(RuntimeError):
    """Say in one sentence which entry or rule is malformed."""


def standard_normal_cdf(x: float) -> float:
    """Return Phi(x), the share of a standard normal distribution below ``x``."""
    return math.erfc(-x / math.sqrt(2)) / 2


def verdict(
    entry: Mapping[str, Any], values: Mapping[str, float], config: Mapping[str, Any], run: str
) -> str:
    """Judge one claim by the ``values`` that the run measured, by quantity.

    ``config`` is the run's, ``run`` its name for the errors. A quantity without a value is "not
    attempted".

    Raises: VerdictError if the entry or a rule is malformed or uses an unknown name.
    """
    required = {"quantity", "claim", "paper", "reproduced_if"}
    missing, extra = required - set(entry), set(entry) - required - {"same_ordering_if"}
    if missing or extra:
        raise VerdictError(
            f"A verdict entry lacks {sorted(missing) or 'nothing'} and has the unknown keys "
            f"{sorted(extra) or 'none'}: {dict(entry)}."
        )
    if entry["quantity"] not in values:
        return NOT_ATTEMPTED
    scalars = {key: x for key, x in config.items() if isinstance(x, int | float | str)}
    names = scalars | dict(values)
    if _holds(entry["reproduced_if"], entry, names, run):
        return REPRODUCED
    weaker = entry.get("same_ordering_if")
    return SAME_ORDERING if weaker and _holds(weaker, entry, names, run) else NOT_REPRODUCED


def _holds(rule: str, entry: Mapping[str, Any], names: Mapping[str, Any], run: str) -> bool:
    quantity, path = entry["quantity"], entry["paper"]
    about = f"The rule {rule!r} for {quantity!r} of {run}"
    if not re.match(r"\s*(<=?|>=?|==|!=)", rule):
        raise VerdictError(f"{about} must begin with a comparison such as '<' or '>='.")
    known = {**names, "value": names[quantity]}
    if path is not None:
        paper = paper_value(path)
        if paper is not None:
            known["paper"] = paper
    evaluator = SimpleEval(names=known, functions={"Phi": standard_normal_cdf, "abs": abs})
    try:
        holds = evaluator.eval(f"{names[quantity]!r} {rule}")
    except NameNotDefined as error:
        if error.name == "paper":
            reason = paper_entry(path).reason if path else "the entry names no paper value"
            raise VerdictError(f"{about} uses 'paper', but {reason}.") from None
        raise VerdictError(
            f"{about} uses the unknown name {error.name!r}; known are {', '.join(sorted(known))}."
        ) from None
    except (InvalidExpression, SyntaxError, TypeError, ArithmeticError) as error:
        raise VerdictError(f"{about} cannot be evaluated: {error}.") from None
    if not isinstance(holds, bool):
        raise VerdictError(f"{about} gives {holds!r}, but must be true or false.")
    return holds


def worst(verdicts: Iterable[str]) -> str:
    """Return the worst of what was measured; "not attempted" where nothing was."""
    measured = [v for v in verdicts if v != NOT_ATTEMPTED]
    return max(measured, key=VERDICTS.index, default=NOT_ATTEMPTED)
