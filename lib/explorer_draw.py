"""Drawing for the Explorer: sprite sheets, SVG axes and SVG paths."""

import base64
import io
import math
import re
from functools import cache
from html import escape

import numpy as np

WIDTH = 400.0  # of every drawing, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 54.0, 392.0, 8.0, 42.0  # plot area; BOTTOM is the room below it


def format_number(value: float) -> str:
    """Write an axis value as shown beside its slider."""
    return f"{round(value, 12) + 0.0:.5g}".replace("-", "−")


def subscripts(text: str, tag: str) -> str:
    """Escape a label and set μ_R with a subscript; ``tag`` is "sub" in HTML and "tspan" in SVG."""
    down, up = (
        ("", "") if tag == "sub" else (' dy="4" font-size="75%"', '<tspan dy="-4">\u200b</tspan>')
    )
    return re.sub(r"_(\w)(?!\w)", rf"<{tag}{down}>\1</{tag}>{up}", escape(text))


def strides_of(shape: tuple[int, ...]) -> list[int]:
    """Return how far the frame number moves for one step of each slider; 0 if it does not."""
    return [math.prod(shape[i + 1 :]) if n > 1 else 0 for i, n in enumerate(shape)]


@cache
def viridis() -> bytes:
    """Return the 256 colours of viridis as 768 bytes."""
    from matplotlib import colormaps  # half a second, needed only where densities are drawn

    return colormaps["viridis"](np.arange(256), bytes=True)[:, :3].tobytes()


def sprite(picture: np.ndarray, palette: bytes | None = None) -> str:
    """Encode one picture without loss as a data URI, in the smaller of PNG and WebP.

    Shapes: ``picture`` (height, width) palette indices or (height, width, 1 or 3), uint8.
    """
    from PIL import Image

    if picture.ndim == 3 and picture.shape[-1] == 1:
        picture = picture[..., 0]
    image = Image.fromarray(np.ascontiguousarray(picture))
    if palette:
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette(palette)
    png = io.BytesIO()
    image.save(png, "PNG", optimize=True)
    kind, encoded = "png", png.getvalue()
    if picture.ndim == 3 and max(picture.shape) < 16384:  # the largest side WebP can store
        webp = io.BytesIO()
        image.save(webp, "WEBP", lossless=True, quality=75, exact=True)
        if len(webp.getvalue()) < len(encoded):
            kind, encoded = "webp", webp.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def sheet(frames: np.ndarray) -> np.ndarray:
    """Tile frames (n, height, width, ...) row by row into one near-square picture."""
    n, height, width = frames.shape[:3]
    columns = max(1, min(n, round(math.sqrt(n * height / width))))
    rows = math.ceil(n / columns)
    tiled = np.zeros((rows * columns, *frames.shape[1:]), dtype=frames.dtype)
    tiled[:n] = frames
    tiled = tiled.reshape(rows, columns, *frames.shape[1:]).swapaxes(1, 2)
    return tiled.reshape(rows * height, columns * width, *frames.shape[3:])


def sprite_data(frames: np.ndarray, palette: bytes | None = None) -> dict:
    """Return what the page needs to cut one frame out of a sprite sheet."""
    frame_dims = 2 if palette else 3
    leading, frame = frames.shape[:-frame_dims], frames.shape[-frame_dims:]
    tiled = sheet(frames.reshape(-1, *frame))
    return {
        "src": sprite(tiled, palette),
        "strides": strides_of(leading),
        "columns": tiled.shape[1] // frame[1],
        "width": frame[1],
        "height": frame[0],
    }


def path(kind: str, data: dict, row: list) -> str:
    """Return the SVG path of one frame of a series; explorer.js draws the same one."""
    x, floor, top = data["x"], data["floor"], data["top"]
    if kind == "marker":
        return "".join(f"M{v / 10:g} {top:g}V{floor:g}" for v in row if v is not None)
    if kind == "dots":
        return "".join(f"M{v / 10:g} {floor - 12:g}l5 12h-10z" for v in row if v is not None)
    parts, pen = [], "M"
    if data["fill"]:  # stand on the x axis, so that the area is closed by it
        row = [10 * floor if y is None else y for y in row]
        parts, pen = [f"M{x[0] / 10:g} {floor:g}"], "L"
    for i, y in enumerate(row):
        if y is None:
            pen = "M"
            continue
        if data["step"]:  # a bar from half-way to the left to half-way to the right
            left = (x[max(i - 1, 0)] + x[i]) / 20
            right = (x[i] + x[min(i + 1, len(x) - 1)]) / 20
            parts.append(f"{pen}{left:g} {y / 10:g}H{right:g}")
        else:
            parts.append(f"{pen}{x[i] / 10:g} {y / 10:g}")
        pen = "L"
    if data["fill"]:
        parts.append(f"L{x[-1] / 10:g} {floor:g}")
    return "".join(parts)


def svg(height: float, body: str, attributes: str = ' aria-hidden="true"') -> str:
    return f'<svg viewBox="0 0 {WIDTH:g} {height:g}"{attributes}>{body}</svg>'


def furniture(xlim, ylim, height, xlabel="", ylabel="", grid=True) -> str:
    """Return the SVG of the axes: frame, ticks, tick labels, grid lines and axis labels."""
    from matplotlib.ticker import MaxNLocator

    floor = height - BOTTOM
    lines, text = f"M{LEFT:g} {TOP:g}V{floor:g}H{RIGHT:g}", ""
    grid_lines = ""
    for axis, (low, high) in (("x", xlim), ("y", ylim)):
        for tick in MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high):
            share = (tick - low) / (high - low)
            if not -1e-9 <= share <= 1 + 1e-9:
                continue
            if axis == "x":
                x = LEFT + (RIGHT - LEFT) * share
                lines += f"M{x:.1f} {floor:g}v4"
                text += f'<text x="{x:.1f}" y="{floor + 18:g}" class="ex-mid">{format_number(tick)}'
            else:
                y = floor - (floor - TOP) * share
                lines += f"M{LEFT:g} {y:.1f}h-4"
                grid_lines += f"M{LEFT:g} {y:.1f}H{RIGHT:g}"
                text += (
                    f'<text x="{LEFT - 7:g}" y="{y + 5:.1f}" class="ex-end">{format_number(tick)}'
                )
            text += "</text>"
    middle = (TOP + floor) / 2
    if xlabel:
        text += (
            f'<text x="{(LEFT + RIGHT) / 2:g}" y="{height - 4:g}" class="ex-mid ex-name">'
            f"{subscripts(xlabel, 'tspan')}</text>"
        )
    if ylabel:
        text += (
            f'<text x="13" y="{middle:g}" class="ex-mid ex-name" '
            f'transform="rotate(-90 13 {middle:g})">{subscripts(ylabel, "tspan")}</text>'
        )
    grid_path = f'<path class="ex-grid" d="{grid_lines}"/>' if grid else ""
    return f'{grid_path}<path class="ex-axis" d="{lines}"/>{text}'
