"""What the avatars are drawn with: smooth coverage of shapes, painted back to front on a sheet.

Only additions, products, quotients, square roots, roundings and comparisons are used, one a kernel.
IEEE 754 fixes their results to the last bit, whereas an exponential, or a product and a sum fused
into one kernel, depends on the vector width; so a picture is the same in every batch. (A GPU may
multiply by a reciprocal instead of dividing.)
"""

import math
from collections.abc import Mapping

from torch import Tensor


class Traits:
    """Numbers of n pictures under their names, each with n as its first axis."""

    def __init__(self, values: Mapping[str, Tensor], index: Tensor | None = None) -> None:
        self._values, self._index = values, index

    def __getattr__(self, name: str) -> Tensor:
        try:
            value = self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(f"there is no trait {name!r}") from None
        return value if self._index is None else value[self._index]

    def part(self, rows: slice) -> "Traits":
        """Look at neighbouring pictures."""
        return Traits({name: value[rows] for name, value in self._values.items()})

    def take(self, index: Tensor) -> "Traits":
        """Select some of the pictures."""
        return Traits(self._values, index if self._index is None else self._index[index])


class Sheet:
    """A rectangle of n canvases: colours ``rgb`` (n, 3, h, w) and fields (n, h, w) named at will.

    The canvas of size×size pixels reaches from -1 to 1, y down; ``top`` and ``left`` say where on
    it the sheet lies. ``sharp`` (n, 1, 1) is the number of pixels in a unit of the coordinates.
    """

    def __init__(
        self, rgb: Tensor, sharp: Tensor, size: int, top: int = 0, left: int = 0, **fields: Tensor
    ) -> None:
        self.rgb, self.sharp, self.size, self.top, self.left = rgb, sharp, size, top, left
        self.fields = fields

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["fields"][name]
        except KeyError:
            raise AttributeError(f"the sheet has no field {name!r}") from None

    def rows(self, top: float, bottom: float) -> "Sheet":
        """Look at the rows between two heights; painting there paints here."""
        rows = self._inside(top, bottom, self.top, self.rgb.shape[2])
        fields = {name: field[:, rows] for name, field in self.fields.items()}
        rgb = self.rgb[:, :, rows]
        return Sheet(rgb, self.sharp, self.size, self.top + rows.start, self.left, **fields)

    def copy(self, index: Tensor | None = None, half: float = 1.0) -> "Sheet":
        """Copy some of the pictures, within a distance of the middle, to a sheet of its own."""
        chosen, columns = self._part(index, half)
        # contiguous: the kernels then run over whole pictures instead of row by row
        fields = {name: f[chosen][..., columns].contiguous() for name, f in self.fields.items()}
        rgb, left = self.rgb[chosen][..., columns].contiguous(), self.left + columns.start
        return Sheet(rgb, self.sharp[chosen], self.size, self.top, left, **fields)

    def put(self, part: "Sheet", index: Tensor | None = None, half: float = 1.0) -> None:
        """Put back what was copied with the same arguments and painted since."""
        chosen, columns = self._part(index, half)
        self.rgb[chosen, :, :, columns] = part.rgb

    def _part(self, index: Tensor | None, half: float) -> tuple[Tensor | slice, slice]:
        columns = self._inside(-half, half, self.left, self.rgb.shape[3])
        return slice(None) if index is None else index, columns

    def _inside(self, low: float, high: float, first: int, count: int) -> slice:
        start = math.floor((low + 1) * self.size / 2) - first
        stop = math.ceil((high + 1) * self.size / 2) - first
        return slice(max(0, start), min(count, stop))

    def cover(self, distance: Tensor) -> Tensor:
        """Turn a signed distance, negative inside, into the share of each pixel that is covered."""
        return distance.mul(-self.sharp).add_(0.5).clamp_(0, 1)

    def band(self, distance: Tensor, half: Tensor | float) -> Tensor:
        """Cover a line of a given half width around distance 0; thin ones keep their weight."""
        return self.cover(distance - half).sub_(self.cover(distance + half))

    def paint(self, alpha: Tensor, colour: Tensor, shade: Tensor | None = None) -> None:
        """Lay a colour (n, 3), times ``shade`` if given, over the sheet with opacity ``alpha``."""
        keep, light = 1 - alpha, alpha if shade is None else alpha * shade
        for channel in range(3):  # one at a time stays in a processor's cache
            self.rgb[:, channel].mul_(keep).add_(light * colour[:, channel, None, None])

    def paint_ramp(self, alpha: Tensor, dark: Tensor, light: Tensor, shade: Tensor) -> None:
        """Lay colours between ``dark`` and ``light``, at ``shade`` of 0 and 1, over the sheet."""
        keep, span = 1 - alpha, light - dark
        for channel in range(3):
            colour = (shade * span[:, channel, None, None]).add_(dark[:, channel, None, None])
            self.rgb[:, channel].mul_(keep).add_(colour.mul_(alpha))


def bump(r2: Tensor) -> Tensor:
    """Give a soft bump, 1 where the squared radius is 0 and 0 from 1 on."""
    height = (1 - r2).clamp_(min=0)
    return height.mul_(height)


def ellipse(u: Tensor, v: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Give the squared radius (u/a)² + (v/b)²."""
    p, q = u / a, v / b
    return p.mul_(p).add_(q.mul_(q))


def squircle(x: Tensor, y: Tensor, square: Tensor | float) -> Tensor:
    """Give the squared radius of a circle (``square`` 0) or of what leads to a square (1)."""
    xx, yy = x * x, y * y
    return xx + yy - xx.clamp(max=1).mul_(yy.clamp(max=1)).mul_(square)


def disc(u: Tensor, v: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Give about the signed distance from an ellipse that is not too flat."""
    return ellipse(u, v, a, b).sqrt_().sub_(1).mul_((a + b) / 2)


def wave(t: Tensor) -> Tensor:
    """Give a smooth wave of period 1 between -1 and 1, with -1 at whole numbers."""
    triangle = (t - t.floor()).mul_(2).sub_(1).abs_()
    return (triangle * triangle).mul_(triangle.mul_(-2).add_(3)).mul_(-2).add_(1)


def ramp(t: Tensor) -> Tensor:
    """Rise smoothly from 0 at 0 to 1 at 1."""
    t = t.clamp(0, 1)
    return (t * t).mul_(3 - 2 * t)


def between(anchors: Tensor, place: Tensor) -> Tensor:
    """Interpolate colours (k, 3) at ``place`` (n,) in [0, 1]."""
    at = place * (len(anchors) - 1)
    low = at.floor().clamp(0, len(anchors) - 2)
    share = (at - low)[:, None]
    index = low.long()
    return anchors[index] + (anchors[index + 1] - anchors[index]) * share
