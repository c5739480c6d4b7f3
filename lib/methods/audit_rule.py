"""The rule by which an audit speaks: suppressed, erased, or undecided.

It was written before the numbers, and compares a model's answer to a question with those of the
untouched original and of a model RETRAINED without the data.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np


class Answer(Protocol):
    """A number with its standard deviation over seeds, or None; a row of a result is one."""

    value: float
    sd: float | None


def audited(
    rows: Mapping[str, Answer], row: str, name: str, names: Iterable[str], factor: float = 2.0
) -> str:
    """Say in a word what one question tells of the model ``name``.

    ``row`` is the question's quantity with {} for the model, such as ``error_zc_{}``; a quantity
    with "error" in its name is better known the lower it is. Of ``names`` those that have an answer
    count, "original" and "retrained" among them. The margin is ``factor`` spreads, but at least a
    tenth of the original's lead over the retrained model. The spread is the larger of the model's
    own standard deviation and the median one.

    An error can be high because everything is drawn badly: where other pictures (the same quantity
    with ``zc_others`` or ``rest``) are missed by more than the margin, too, the model is wrecked.
    """
    answers = {n: rows[row.format(n)] for n in names if row.format(n) in rows}
    if name not in answers or "retrained" not in answers:
        return "undecided: no control" if answers else "not asked"
    sign = -1 if "error" in row else 1
    found, never = answers[name], answers["retrained"]
    sds = [answer.sd for answer in answers.values() if answer.sd is not None]
    spread = max(np.median(sds or [np.inf]), found.sd or 0)
    lead = sign * (answers["original"].value - never.value)
    if not lead > factor * spread:
        return "undecided: no power"
    margin = max(factor * spread, 0.1 * lead)
    if sign * (found.value - never.value) > margin:
        return "suppressed"
    others = row.replace("zc", "zc_others").replace("forget", "rest")
    if sign < 0:
        now, then = (rows[others.format(n)].value for n in (name, "retrained"))
        if now - then > margin:
            return "undecided: wrecked"
    return "erased"
