"""Sliders over results: live in Jupyter, and static in the book, where no kernel runs.

An Explorer shows panels (densities, pictures, curves, numbers) computed for every position of one
or more sliders. The same object sends a live widget to Jupyter and a self-contained HTML element
to the book, which works from a USB stick: no server, no network, no library.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable
from functools import cached_property
from html import escape

import numpy as np

from lib import ROOT
from lib.explorer_draw import format_number, subscripts
from lib.explorer_panels import Curves, Density, Images, Values

MAX_BYTES = 1_500_000  # a page stays under 2 MB with its text and figures


class Explorer:
    """Show results at every position of some sliders.

    Arguments
    ---------
    axes: label -> increasing values, for example ``{"δ (delta)": [1, 2, 4], "α (alpha)": [0, 1]}``.
        Every array below begins with one dimension an axis, in this order; a length of 1 there
        means that the array does not depend on that axis, and an array without these dimensions
        depends on none.
    density: title -> ``dict(array=(*axes, H, W), extent=(x0, x1, y0, y1))``. Row 0 is the LOWEST y
        (as in ``np.meshgrid``). Optional: ``vmin``, ``vmax`` (default: 0 and the largest value of
        all frames), ``unit``, ``xlabel``, ``ylabel``, ``alt``.
    images: title -> uint8 array (*axes, H, W, 1 or 3), or ``dict(array=..., alt=...)``.
    curves: title -> ``dict(x=(n,), lines={label: (*axes, n)})``. Optional: ``markers``
        {label: (*axes,)} vertical lines; ``dots`` {label: (*axes, k)} marks on the x axis;
        ``xlim``, ``ylim``, ``colors`` {label: Okabe-Ito name}, ``step`` and ``fill`` for
        histograms, ``xlabel``, ``ylabel``, ``alt``. A nan leaves a gap.
    values: label -> (*axes,) array of numbers or words, or ``dict(array=..., format=".1%")``.
    compute: called in live Jupyter as ``compute(delta=..., alpha=...)``; returns a dict with the
        same keys ``density``, ``images``, ``curves``, ``values`` for that one position (arrays
        without slider dimensions), so that the sliders become continuous. An argument is named by
        the word in parentheses of its axis label, else by the label.
    title, caption: plain text above and below.
    start: label -> value of the first view; an axis not named starts at its first value.

    Raises: ValueError, in one sentence, for arrays that do not fit the axes, an axis that is empty
    or does not increase, nothing to show, or more than 1.5 MB.
    """

    def __init__(
        self,
        axes: dict,
        density: dict | None = None,
        images: dict | None = None,
        curves: dict | None = None,
        values: dict | None = None,
        compute: Callable[..., dict] | None = None,
        title: str = "",
        caption: str = "",
        start: dict | None = None,
    ):
        self.axes = {label: check_axis(label, numbers) for label, numbers in axes.items()}
        self.compute, self.title, self.caption = compute, title, caption
        self.start = start_position(self.axes, start or {})
        self.panels = [Density(k, self.axes, **as_dict(v)) for k, v in (density or {}).items()]
        self.panels += [Images(k, self.axes, **as_dict(v)) for k, v in (images or {}).items()]
        self.panels += [Curves(k, self.axes, **as_dict(v)) for k, v in (curves or {}).items()]
        self.values = [Values(k, self.axes, **as_dict(v)) for k, v in (values or {}).items()]
        if not self.axes or not self.panels + self.values:
            raise ValueError(
                f"An Explorer got {len(self.axes)} axes and {len(self.panels + self.values)} "
                "panels, wanted at least one of each."
            )
        size = len(self.html.encode())
        if size > MAX_BYTES:
            raise ValueError(
                f"The Explorer '{title}' takes {size / 1e6:.2f} MB, wanted at most "
                f"{MAX_BYTES / 1e6:.1f} MB; use fewer positions, smaller frames or fewer samples."
            )

    def fingerprint(self) -> str:
        """Return eight letters that change with the payload, its order or its labels.

        Pictures (uint8) and written values count exactly. Other arrays count through the range of
        the array and the mean and first moments of every frame in steps of 1/256 of that range,
        so that float noise of 1e-6 does not change it in general (a moment may lie on the edge of
        a step), while reversed frames, swapped axes or a flipped frame do.
        """
        digest = hashlib.sha256()
        digest.update(json.dumps([self.title, list(self.axes.items())]).encode())
        for panel in self.panels + self.values:
            digest.update(f"{panel.key} {panel.title}".encode())
            for array in panel.arrays():
                digest.update(str(array.shape).encode())
                digest.update(moments(array, len(self.axes)))
        # Letters only: the notebook tests compare digits as numbers, with a tolerance.
        return digest.hexdigest()[:8].translate(str.maketrans("0123456789", "ghijklmnop"))

    def __repr__(self) -> str:
        axes = " × ".join(
            f"{label} {format_number(v[0])} to {format_number(v[-1])} ({len(v)} values)"
            for label, v in self.axes.items()
        )
        lines = [f"Explorer over {axes}"]
        for panel in self.panels:
            shapes = " ".join(str(array.shape) for array in panel.arrays())
            lines.append(f"  {panel.key} '{panel.title}' {shapes}")
        start = ", ".join(f"{v.title} = {v.at(self.start)}" for v in self.values)
        lines += [f"  at the start: {start}"] if start else []
        return "\n".join([*lines, f"  fingerprint {self.fingerprint()}"])

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        bundle = {"text/plain": repr(self), "text/html": self.html}
        if in_live_frontend():
            view = self.widget()._repr_mimebundle_()
            key = "application/vnd.jupyter.widget-view+json"
            bundle |= {key: view[key]}
        return bundle

    @cached_property
    def html(self) -> str:
        """The static element: the first view as plain HTML, and the data for its script."""
        data = {
            "axes": [
                {"label": label, "values": [format_number(v) for v in numbers]}
                for label, numbers in self.axes.items()
            ],
            "panels": [panel.data() for panel in self.panels],
            "values": [value.data() for value in self.values],
        }
        payload = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace(
            "<", "\\u003c"
        )
        sliders = "".join(
            slider(label, numbers, at)
            for (label, numbers), at in zip(self.axes.items(), self.start, strict=True)
        )
        shown = ", ".join(
            f"{label} = {format_number(numbers[at])}"
            for (label, numbers), at in zip(self.axes.items(), self.start, strict=True)
        )
        title = f'<p class="ex-title">{escape(self.title)}</p>' if self.title else ""
        caption = f'<p class="ex-caption">{escape(self.caption)}</p>' if self.caption else ""
        return (
            f'<book-explorer class="ex" role="group" aria-label="{escape(self.title)}">'
            f'{title}<div class="ex-sliders">{sliders}</div>'
            f'<p class="ex-still">Shown: {escape(shown)}. The sliders need JavaScript.</p>'
            f"{self.view(self.start)}{caption}"
            f'<p class="ex-say" role="status"></p>'
            f'<script type="application/json">{payload}</script></book-explorer>'
        )

    def view(self, position: tuple[int, ...]) -> str:
        """Return the panels and values at one position as HTML that needs no script."""
        figures = "".join(
            f'<div class="ex-panel"><p class="ex-name">{subscripts(panel.title, "sub")}</p>'
            f"{panel.html(position)}</div>"
            for panel in self.panels
        )
        numbers = "".join(
            f"<div><dt>{subscripts(value.title, 'sub')}</dt>"
            f"<dd>{escape(value.at(position))}</dd></div>"
            for value in self.values
        )
        return (f'<div class="ex-panels">{figures}</div>' if figures else "") + (
            f'<dl class="ex-values">{numbers}</dl>' if numbers else ""
        )

    def at(self, **settings: float) -> "Explorer":
        """Compute one position anew; what ``compute`` leaves out is as in the stored panels.

        Raises: ValueError if the Explorer was made without ``compute``.
        """
        if self.compute is None:
            raise ValueError("This Explorer has no compute function; pass compute= to make one.")
        stored = {(p.key, p.title): p.options() for p in self.panels + self.values}
        found = {
            key: {title: stored.get((key, title), {}) | as_dict(v) for title, v in panels.items()}
            for key, panels in self.compute(**settings).items()
        }
        return Explorer({label: [settings[argument_name(label)]] for label in self.axes}, **found)

    def widget(self):
        """Return the live ipywidgets view: continuous with ``compute``, else the stored steps."""
        import ipywidgets

        style = f"<style>{(ROOT / 'book/_static/explorer.css').read_text()}</style>"
        view = ipywidgets.HTML()

        def show(panels: str, note: str = "") -> None:
            title = f'<p class="ex-title">{escape(self.title)}</p>' if self.title else ""
            below = f'<p class="ex-caption">{escape(note or self.caption)}</p>'
            view.value = f'{style}<div class="ex ex-live">{title}{panels}{below}</div>'

        sliders = {}
        for (label, numbers), at in zip(self.axes.items(), self.start, strict=True):
            common = {"description": label, "continuous_update": self.compute is None}
            if self.compute:
                low, high = numbers[0], numbers[-1]
                slider = ipywidgets.FloatSlider(
                    value=numbers[at], min=low, max=high, step=(high - low) / 100 or 1, **common
                )
            else:
                options = [(format_number(v), i) for i, v in enumerate(numbers)]
                slider = ipywidgets.SelectionSlider(options=options, index=at, **common)
            sliders[argument_name(label)] = slider

        def move(_change) -> None:
            settings = {name: slider.value for name, slider in sliders.items()}
            if self.compute is None:
                show(self.view(tuple(settings.values())))
                return
            view.value += "<p>computing …</p>"
            try:
                moved = self.at(**settings)
            except Exception as error:  # shown where the reader looks; the log has the traceback
                show("", f"{type(error).__name__}: {error}")
                raise
            show(moved.view(moved.start))

        for slider in sliders.values():
            slider.observe(move, names="value")
        show(self.view(self.start))
        return ipywidgets.VBox([*sliders.values(), view])


def as_dict(panel) -> dict:
    """Let a panel that is only an array be given without ``dict(array=...)``."""
    return panel if isinstance(panel, dict) else {"array": panel}


def check_axis(label: str, numbers) -> list[float]:
    """Return the values of an axis as floats, or say what is wrong with them."""
    numbers = [float(v) for v in numbers]
    if not numbers:
        raise ValueError(f"Axis '{label}' is empty, wanted at least one value.")
    if any(not a < b for a, b in itertools.pairwise(numbers)):
        raise ValueError(
            f"Axis '{label}' is {numbers}, wanted values that increase; sort it and its arrays."
        )
    return numbers


def start_position(axes: dict, start: dict) -> tuple[int, ...]:
    """Turn the values of the first view into one index an axis."""
    for label, value in start.items():
        if label not in axes:
            raise ValueError(f"start names the axis '{label}', wanted one of {list(axes)}.")
        if not any(np.isclose(value, v) for v in axes[label]):
            raise ValueError(f"start['{label}'] is {value}, wanted one of {axes[label]}.")
    return tuple(
        int(np.argmin([abs(v - start.get(label, numbers[0])) for v in numbers]))
        for label, numbers in axes.items()
    )


def argument_name(label: str) -> str:
    """Return the name by which `compute` receives an axis: "δ (delta)" gives delta."""
    inside = re.search(r"\((\w+)\)", label)
    return inside.group(1) if inside else re.sub(r"\W+", "_", label).strip("_")


def slider(label: str, numbers: list[float], at: int) -> str:
    """Return one labelled native slider over the positions of an axis."""
    shown = [escape(format_number(v)) for v in numbers]
    return (
        f'<label class="ex-slider" style="--steps:{max(1, len(numbers) - 1)}">'
        f'<span class="ex-label">{subscripts(label, "sub")}</span><output>{shown[at]}</output>'
        f'<input type="range" min="0" max="{len(numbers) - 1}" step="1" value="{at}" '
        f'aria-label="{escape(label)}" aria-valuetext="{escape(label)} = {shown[at]}" '
        f'autocomplete="off"><span class="ex-ends" aria-hidden="true"><span>{shown[0]}</span>'
        f"<span>{shown[-1]}</span></span></label>"
    )


def moments(array: np.ndarray, n_axes: int) -> bytes:
    """Reduce an array to bytes for the fingerprint; see `Explorer.fingerprint`."""
    if array.dtype == np.uint8:
        return array.tobytes()
    if array.dtype.kind in "US":
        return json.dumps(array.tolist()).encode()
    low, high = float(np.nanmin(array)), float(np.nanmax(array))
    size = max(abs(low), abs(high)) or 1.0
    span = high - low if high - low > 1e-5 * size else size  # else noise would fill the range
    scaled = np.nan_to_num((array - low) / span, nan=-1.0)
    frame_dims = tuple(range(min(n_axes, array.ndim), array.ndim))
    parts = [scaled.mean(frame_dims)]
    for dim in frame_dims:
        weights = np.linspace(-1, 1, array.shape[dim]).reshape(-1, *[1] * (array.ndim - dim - 1))
        parts.append((scaled * weights).mean(frame_dims))
    # The shift keeps simple fractions such as 1/2 away from the edges of the steps.
    steps = np.floor(256 * np.stack(parts) + 0.318).astype(np.int32)
    return f"{size:.2e} {round(low / size, 3) + 0.0}".encode() + steps.tobytes()


def in_live_frontend() -> bool:
    """Say whether a person is at the other end of the kernel.

    A front end that shows widgets lets the user answer `input()`; the tools that execute the book
    and its tests do not, and a widget made there would only bloat the page with its state.
    """
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    kernel = getattr(get_ipython(), "kernel", None)
    return bool(getattr(kernel, "_allow_stdin", False))
