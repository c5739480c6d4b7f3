"""The panels of an Explorer: what each stores for all positions and how it is drawn at one.

A panel holds arrays whose leading dimensions are the slider axes. A leading dimension of length 1
means "does not depend on that axis", so a reference curve is stored once. Every panel offers
`data()` (what the page's script gets), `html(position)` (a drawing without any script, used for
the first view, without JavaScript and live in Jupyter), `arrays()` (what the fingerprint reads) and
`options()` (what a newly computed panel takes over).
"""

import math
from html import escape

import numpy as np

from lib.explorer_draw import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    furniture,
    path,
    sprite,
    sprite_data,
    strides_of,
    subscripts,
    svg,
    viridis,
)

PALETTE = ("blue", "vermillion", "green", "purple", "orange", "sky", "black", "yellow")
DASHES = ("", "7 3", "2 3", "10 3 2 3", "5 2", "1 2", "12 4", "3 6")


def frames_of(array, axes: dict, frame_dims: int, what: str) -> np.ndarray:
    """Check an array against the axes and return it with one leading dimension an axis.

    Shapes: ``array`` is (*axes lengths, *frame), where any leading length may be 1, or (*frame)
    alone; ``frame_dims`` is the number of dimensions of one frame.
    Raises: ValueError if the leading dimensions fit neither, or if a number is infinite.
    """
    array = np.asarray(array)
    lengths = tuple(len(values) for values in axes.values())
    if array.ndim == frame_dims:
        array = array.reshape((1,) * len(lengths) + array.shape)
    fits = array.ndim == len(lengths) + frame_dims and all(
        got in (1, wanted) for got, wanted in zip(array.shape, lengths, strict=False)
    )
    if not fits:
        names = ", ".join(f"{label}: {n}" for label, n in zip(axes, lengths, strict=True))
        raise ValueError(
            f"{what} has shape {array.shape}, wanted one leading dimension an axis ({names}), then "
            f"{frame_dims} for one frame; reorder or reshape the array."
        )
    if array.dtype.kind == "f" and np.isinf(array).any():
        raise ValueError(
            f"{what} contains an infinite value, wanted finite ones; clip it, or use nan for a gap."
        )
    return array


def frame_index(position: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the index of the frame shown at a slider position; length-1 dimensions give 0."""
    return tuple(p if n > 1 else 0 for p, n in zip(position, shape, strict=True))


class Density:
    """A field over two coordinates, drawn in the viridis colours on one scale for all frames."""

    key = "density"

    def __init__(
        self,
        title,
        axes,
        array,
        extent,
        vmin=None,
        vmax=None,
        unit="density",
        xlabel="",
        ylabel="",
        alt="",
    ):
        self.title, self.unit = title, unit
        self.labels, self.alt = {"xlabel": xlabel, "ylabel": ylabel}, alt or title
        self.extent = tuple(map(float, extent))
        self.frames = frames_of(array, axes, 2, f"density '{title}'").astype(np.float64)
        if not np.isfinite(self.frames).all():
            raise ValueError(
                f"density '{title}' contains nan, wanted numbers everywhere; fill them."
            )
        self.vmin = min(0.0, self.frames.min()) if vmin is None else float(vmin)
        self.vmax = self.frames.max() if vmax is None else float(vmax)
        if not self.vmin < self.vmax:
            raise ValueError(
                f"density '{title}' has the colour range {self.vmin} to {self.vmax}, wanted "
                "vmin < vmax; pass both, or an array that is not constant."
            )
        self.height, self.width = self.frames.shape[-2:]

    def levels(self) -> np.ndarray:
        """Return the frames as palette indices 0 to 255, first row on top as in a picture."""
        scaled = (self.frames - self.vmin) / (self.vmax - self.vmin)
        return np.round(255 * scaled.clip(0, 1)).astype(np.uint8)[..., ::-1, :]

    def options(self) -> dict:
        scale = {"extent": self.extent, "vmin": self.vmin, "vmax": self.vmax}
        return scale | {"unit": self.unit, "alt": self.alt} | self.labels

    def arrays(self) -> list[np.ndarray]:
        return [self.frames]

    def data(self) -> dict:
        return sprite_data(self.levels(), viridis())

    def html(self, position) -> str:
        x0, x1, y0, y1 = self.extent
        ratio = min(1.5, max(0.4, abs((y1 - y0) / (x1 - x0))))
        height = TOP + (RIGHT - LEFT) * ratio + BOTTOM
        box = furniture((x0, x1), (y0, y1), height, grid=False, **self.labels)
        image = sprite(self.levels()[frame_index(position, self.frames.shape[:-2])], viridis())
        style = (
            f"left:{100 * LEFT / WIDTH:.2f}%;top:{100 * TOP / height:.2f}%;"
            f"width:{100 * (RIGHT - LEFT) / WIDTH:.2f}%;"
            f"height:{100 * (height - TOP - BOTTOM) / height:.2f}%"
        )
        stops = ",".join("#" + viridis()[i : i + 3].hex() for i in range(0, 768, 3 * 51))
        bar = (
            f'<p class="ex-legend"><span>{self.vmin:.3g}</span>'
            f'<span class="ex-bar" style="background:linear-gradient(90deg,{stops})"></span>'
            f"<span>{self.vmax:.3g} {escape(self.unit)}</span></p>"
        )
        picture = (
            f'<img class="ex-frame" style="{style}" src="{image}" alt="{escape(self.alt)}" '
            f'width="{self.width}" height="{self.height}">'
        )
        return f'<div class="ex-plot">{svg(height, box)}{picture}</div>{bar}'


class Images:
    """A picture a position, for instance a grid of samples; stored without loss."""

    key = "images"

    def __init__(self, title, axes, array, alt=""):
        self.title, self.alt = title, alt or title
        array = np.asarray(array)
        if array.dtype != np.uint8:
            raise ValueError(
                f"images '{title}' has type {array.dtype}, wanted uint8 from 0 to 255; convert it."
            )
        self.frames = frames_of(array, axes, 3, f"images '{title}'")
        if self.frames.shape[-1] not in (1, 3):
            raise ValueError(
                f"images '{title}' has {self.frames.shape[-1]} channels, wanted 1 or 3; "
                "put the channels last."
            )
        self.height, self.width = self.frames.shape[-3:-1]

    def options(self) -> dict:
        return {"alt": self.alt}

    def arrays(self) -> list[np.ndarray]:
        return [self.frames]

    def data(self) -> dict:
        return sprite_data(self.frames)

    def html(self, position) -> str:
        image = sprite(self.frames[frame_index(position, self.frames.shape[:-3])])
        return (
            f'<div class="ex-plot"><img class="ex-frame ex-pixels" src="{image}" '
            f'alt="{escape(self.alt)}" width="{self.width}" height="{self.height}"></div>'
        )


class Curves:
    """Lines over one x, with vertical markers and dots on the x axis, drawn as SVG."""

    key = "curves"
    HEIGHT = 250.0

    def __init__(
        self,
        title,
        axes,
        x,
        lines,
        markers=None,
        dots=None,
        xlim=None,
        ylim=None,
        colors=None,
        step=False,
        fill=False,
        xlabel="",
        ylabel="",
        alt="",
    ):
        self.title, self.step, self.fill = title, step, fill
        self.labels, self.alt = {"xlabel": xlabel, "ylabel": ylabel}, alt or title
        self.colors = colors or {}
        self.x = np.asarray(x, dtype=np.float64)
        if self.x.ndim != 1 or len(self.x) < 2 or not (np.diff(self.x) > 0).all():
            raise ValueError(
                f"curves '{title}' got an x of shape {self.x.shape}, wanted at least two values "
                "that increase; sort them."
            )
        self.series = []  # (label, kind, frames, colour, dash)
        given = [(label, "line", a, 1) for label, a in lines.items()]
        given += [(label, "marker", a, 0) for label, a in (markers or {}).items()]
        given += [(label, "dots", a, 1) for label, a in (dots or {}).items()]
        for number, (label, kind, array, dims) in enumerate(given):
            frames = frames_of(array, axes, dims, f"{kind} '{label}' of curves '{title}'")
            if kind == "line" and frames.shape[-1] != len(self.x):
                raise ValueError(
                    f"line '{label}' of curves '{title}' has {frames.shape[-1]} points, wanted "
                    f"{len(self.x)} as in x; use the same grid for all lines."
                )
            colour = self.colors.get(label, PALETTE[number % len(PALETTE)])
            if colour not in PALETTE:
                raise ValueError(
                    f"curves '{title}' got the colour {colour!r}, wanted one of "
                    f"{', '.join(PALETTE)}."
                )
            dash = DASHES[number % len(DASHES)]
            self.series.append((label, kind, frames.astype(np.float64), colour, dash))
        self.xlim = limits(xlim) or self._range(("marker", "dots"), self.x)
        self.ylim = limits(ylim) or self._range(("line",), np.zeros(1), room=0.05)

    def _range(self, kinds, values, room=0.0) -> tuple[float, float]:
        seen = [values] + [frames.ravel() for _, kind, frames, *_ in self.series if kind in kinds]
        low, high = np.nanmin(np.concatenate(seen)), np.nanmax(np.concatenate(seen))
        high = high if high > low else low + 1.0
        return float(low - room * (high - low) * (low < 0)), float(high + room * (high - low))

    def options(self) -> dict:
        scale = {"x": self.x, "xlim": self.xlim, "ylim": self.ylim, "colors": self.colors}
        return scale | {"step": self.step, "fill": self.fill, "alt": self.alt} | self.labels

    def arrays(self) -> list[np.ndarray]:
        return [self.x, *(frames for _, _, frames, *_ in self.series)]

    def to_x(self, values) -> np.ndarray:
        """Map values of x to SVG units, held at the plot's edges."""
        low, high = self.xlim
        return LEFT + (RIGHT - LEFT) * ((np.asarray(values) - low) / (high - low)).clip(0, 1)

    def to_y(self, values) -> np.ndarray:
        """Map values of y to SVG units (downwards), held at the plot's edges."""
        low, high = self.ylim
        floor = self.HEIGHT - BOTTOM
        return floor - (floor - TOP) * ((np.asarray(values) - low) / (high - low)).clip(0, 1)

    def _tenths(self, kind, frames) -> list:
        """Round to tenths of an SVG unit, far below a line's width; nan becomes None."""
        tenths = np.round(10 * (self.to_y(frames) if kind == "line" else self.to_x(frames)))
        flat = tenths.reshape(-1, tenths.shape[-1]) if kind != "marker" else tenths.reshape(-1, 1)
        return [[None if math.isnan(v) else int(v) for v in row] for row in flat.tolist()]

    def data(self) -> dict:
        series = [
            {
                "kind": kind,
                "strides": strides_of(self._leading(kind, frames)),
                "frames": self._tenths(kind, frames),
            }
            for _, kind, frames, *_ in self.series
        ]
        x = np.round(10 * self.to_x(self.x)).astype(int).tolist()
        floor = self.HEIGHT - BOTTOM
        return {
            "x": x,
            "top": TOP,
            "floor": floor,
            "step": self.step,
            "fill": self.fill,
            "series": series,
        }

    @staticmethod
    def _leading(kind, frames) -> tuple[int, ...]:
        return frames.shape if kind == "marker" else frames.shape[:-1]

    def html(self, position) -> str:
        body = furniture(self.xlim, self.ylim, self.HEIGHT, **self.labels)
        legend = ""
        data = self.data()
        for (label, kind, frames, colour, dash), series in zip(
            self.series, data["series"], strict=True
        ):
            shape = self._leading(kind, frames)
            number = int(np.ravel_multi_index(frame_index(position, shape), shape))
            d = path(kind, data, series["frames"][number])
            dashes = f' stroke-dasharray="{dash}"' if dash and kind != "dots" else ""
            filled = " ex-fill" if self.fill and kind == "line" else ""
            body += f'<path class="ex-series ex-{kind} ex-{colour}{filled}" d="{d}"{dashes}/>'
            sample = {"line": "M0 6H26", "marker": "M13 0V12", "dots": "M13 0l5 12h-10z"}[kind]
            legend += (
                f'<span><svg viewBox="0 0 26 12" width="26" height="12" aria-hidden="true">'
                f'<path class="ex-{kind} ex-{colour}" d="{sample}"{dashes}/></svg>'
                f"{subscripts(label, 'sub')}</span>"
            )
        if self._clipped():
            legend += "<span>(marks at an edge lie beyond it)</span>"
        drawing = svg(self.HEIGHT, body, f' role="img" aria-label="{escape(self.alt)}"')
        return f'<div class="ex-plot">{drawing}</div><p class="ex-legend">{legend}</p>'

    def _clipped(self) -> bool:
        low, high = self.xlim
        marks = [frames for _, kind, frames, *_ in self.series if kind != "line"]
        return any(np.nanmin(m) < low or np.nanmax(m) > high for m in marks)


class Values:
    """Numbers (or words) a position, written with a format."""

    key = "values"

    def __init__(self, title, axes, array, format=".3g"):
        self.title, self.format = title, format
        array = frames_of(array, axes, 0, f"value '{title}'")
        self.shape = array.shape
        is_text = array.dtype.kind in "UO"
        self.text = [str(v) if is_text else f"{v:{format}}" for v in array.ravel().tolist()]

    def options(self) -> dict:
        return {"format": self.format}

    def arrays(self) -> list[np.ndarray]:
        return [np.asarray(self.text)]

    def data(self) -> dict:
        return {"label": self.title, "strides": strides_of(self.shape), "text": self.text}

    def at(self, position) -> str:
        number = np.ravel_multi_index(frame_index(position, self.shape), self.shape)
        return self.text[int(number)]


def limits(pair) -> tuple[float, float] | None:
    """Check a pair of axis limits given by the user; None stays None."""
    if pair is None:
        return None
    low, high = map(float, pair)
    if not low < high:
        raise ValueError(f"Axis limits are ({low}, {high}), wanted the smaller one first.")
    return low, high
