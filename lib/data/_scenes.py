"""Landscapes and a library, drawn back to front with the avatars' tools; people may stand in them.

Canvas coordinates reach from -1 to 1, x to the right and y down. Everything about a picture is a
number of ``Traits``, (n, 1, 1) each, or a colour (n, 3).
"""

import torch
from torch import Tensor

from lib.data._shapes import Sheet, Traits, bump, disc, ellipse, ramp, wave

GROUNDS = ("sea", "fields", "mountains", "snow", "library")
THINGS = ("house", "tree", "boat", "lighthouse", "nothing")
TIMES = ("day", "sunset", "night")

# What is drawn for each scene, uniformly in its range.
SCENE = {
    "horizon": (0.02, 0.20),
    "phase": (0, 1),
    "tint": (0.90, 1.08),
    "sun_x": (-0.75, 0.75),
    "sun_y": (-0.80, -0.45),
    "cloud_x": (-0.8, 0.8),
    "cloud_y": (-0.72, -0.40),
    "thing_x": (-0.38, 0.38),
    "thing_size": (0.85, 1.20),
    "paint_tone": (0, 1),
    "stripe": (0, 1),
}
N_STARS = 16

_SKY = ((0.29, 0.55, 0.86), (0.26, 0.24, 0.50), (0.03, 0.05, 0.15))
_HAZE = ((0.80, 0.90, 0.97), (0.99, 0.63, 0.38), (0.14, 0.19, 0.36))
_LIGHT = ((1.0, 1.0, 1.0), (0.98, 0.74, 0.62), (0.30, 0.36, 0.54))
_SUN = ((1.0, 0.97, 0.80), (1.0, 0.84, 0.50), (0.96, 0.95, 0.86))
_WALLS = (
    (0.93, 0.90, 0.84),
    (0.90, 0.76, 0.50),
    (0.80, 0.42, 0.34),
    (0.55, 0.66, 0.72),
)
_ROOFS = ((0.58, 0.24, 0.20), (0.36, 0.28, 0.28), (0.30, 0.36, 0.46))


def scene(p: Traits, size: int) -> Tensor:
    """Draw n scenes as colours in [0, 1], (n, 3, size, size).

    ``p`` holds the numbers of ``SCENE`` and, as numbers from 0, ``ground``, ``thing``, ``time``.
    """
    n, device = len(p.phase), p.phase.device
    centres = (torch.arange(size, device=device) * 2 + 1) / size - 1
    s = Sheet(
        torch.zeros(n, 3, size, size, device=device),
        torch.full((n, 1, 1), size / 2, device=device),
        size,
        x=centres.expand(n, size, size),
        y=centres[:, None].expand(n, size, size),
    )
    indoors = p.ground == GROUNDS.index("library")
    _on(s, p, ~indoors, landscape)
    _on(s, p, indoors, shelves)
    return s.rgb.clamp_(0, 1)


def _on(s: Sheet, p: Traits, flag: Tensor, layer) -> None:
    """Draw a layer on the pictures with a flag alone."""
    index = flag.reshape(-1).nonzero().squeeze(1)
    if len(index):
        part = s.copy(index)
        layer(part, p.take(index))
        s.put(part, index)


def landscape(s: Sheet, p: Traits) -> None:
    """Draw sky, ground and what stands on it."""
    sky(s, p)
    for ground, layer in zip(GROUNDS, (sea, fields, mountains, snow), strict=False):
        _on(s, p, p.ground == GROUNDS.index(ground), layer)
    for thing, layer in zip(THINGS, (house, tree, boat, lighthouse), strict=False):
        _on(s, p, p.thing == THINGS.index(thing), layer)


def _by_time(p: Traits, colours: tuple) -> Tensor:
    return torch.tensor(colours, device=p.phase.device)[p.time.reshape(-1)]


def _lit(p: Traits, *rgb: float) -> Tensor:
    """Return a colour as the light of the hour shows it, (n, 3)."""
    light = _by_time(p, _LIGHT) * p.tint[:, :, 0]
    return light * torch.tensor(rgb, device=light.device)


def sky(s: Sheet, p: Traits) -> None:
    """Fill the canvas with the sky; draw sun or moon, stars and clouds."""
    height = ramp((s.y + 1) / (p.horizon + 1))
    s.paint_ramp(torch.ones_like(s.y), _by_time(p, _SKY), _by_time(p, _HAZE), height)
    night, sunset = p.time == 2, p.time == 1
    _on(s, p, night, stars)
    y = torch.where(sunset, p.horizon - 0.22, p.sun_y)
    radius = torch.where(sunset, 0.17, 0.12)
    glow = bump(ellipse(s.x - p.sun_x, s.y - y, 0.75, 0.75))
    s.paint(glow * torch.where(night, 0.18, 0.45), _by_time(p, _SUN))
    s.paint(s.cover(disc(s.x - p.sun_x, s.y - y, radius, radius)), _by_time(p, _SUN))
    _on(s, p, night, crescent)
    _on(s, p, ~night, clouds)


def crescent(s: Sheet, p: Traits) -> None:
    """Cover a part of the moon with the sky."""
    inside = s.cover(disc(s.x - p.sun_x - 0.055, s.y - p.sun_y + 0.02, 0.11, 0.11))
    height = ramp((s.y + 1) / (p.horizon + 1))
    s.paint_ramp(inside, _by_time(p, _SKY), _by_time(p, _HAZE), height)


def stars(s: Sheet, p: Traits) -> None:
    """Draw a few stars where the moon's glow is not."""
    white = torch.ones(len(s.x), 3, device=s.x.device)
    for star in range(N_STARS):
        # irrational steps spread the stars without rows
        x = torch.frac(p.phase + star * 0.618034) * 2 - 1
        y = torch.frac(p.phase * 3.7 + star * 0.754878) * 1.0 - 1
        s.paint(bump(ellipse(s.x - x, s.y - y, 0.045, 0.045)) * (0.45 + 0.05 * (star % 9)), white)


def clouds(s: Sheet, p: Traits) -> None:
    """Draw two clouds of soft puffs."""
    colour = 0.35 + 0.65 * _by_time(p, _HAZE)
    for side, scale in ((-0.5, 1.0), (0.6, 0.7)):
        x, y = s.x - p.cloud_x - side, s.y - p.cloud_y - 0.14 * side
        puffs = torch.zeros_like(s.x)
        for dx, dy, a, b in ((0, 0, 0.42, 0.15), (-0.2, 0.03, 0.3, 0.1), (0.2, 0.04, 0.34, 0.11)):
            puffs += bump(ellipse(x - dx * scale, y - dy * scale, a * scale, b * scale))
        s.paint(ramp(puffs * 1.4) * 0.85, colour)


def _land(s: Sheet, p: Traits, top: Tensor, near: Tensor, far: Tensor) -> None:
    """Cover everything below a line with a colour that changes from ``far`` to ``near``."""
    s.paint_ramp(s.cover(top - s.y), far, near, ramp((s.y - p.horizon + 0.1) / 1.0))


def sea(s: Sheet, p: Traits) -> None:
    """Draw the sea with the light's path on it, and the beach before it."""
    haze = _by_time(p, _HAZE)
    far = 0.40 * haze + _lit(p, 0.10, 0.32, 0.44) * 0.8
    _land(s, p, p.horizon, _lit(p, 0.10, 0.42, 0.55), far)
    below = (s.y - p.horizon).clamp(min=0)
    water = s.cover(p.horizon - s.y)
    waves = wave(below.sqrt() * 9 + 0.25 * wave(s.x * 1.7 + p.phase) + p.phase)
    s.paint(water * (0.10 + 0.10 * waves).clamp(min=0), haze)
    path = bump(((s.x - p.sun_x) / (0.10 + 0.35 * below)).square())
    s.paint(water * path * (0.30 + 0.30 * waves), _by_time(p, _SUN))
    shore = 0.62 + 0.06 * wave(s.x * 0.55 + p.phase) - 0.10 * s.x * torch.sign(p.sun_x)
    s.paint(s.cover(shore - 0.045 - s.y) * 0.75, _lit(p, 0.95, 0.97, 0.98))
    sand = 0.92 + 0.05 * wave(s.x * 2.3 + s.y * 5.1 + p.phase)
    s.paint(s.cover(shore - s.y), _lit(p, 0.90, 0.78, 0.56), sand)


def fields(s: Sheet, p: Traits) -> None:
    """Draw hills, one behind another, and a field with furrows."""
    haze = _by_time(p, _HAZE)
    for place, share in ((0.10, 0.55), (0.0, 0.25)):
        hills = p.horizon - place - 0.09 * wave(s.x * (0.35 + place) + p.phase * (1 + 9 * place))
        colour = haze * share + _lit(p, 0.36, 0.56, 0.28) * (1 - share)
        s.paint(s.cover(hills - s.y), colour, 1 - 0.12 * ramp((s.y - hills) * 3))
    top = p.horizon + 0.14 + 0.05 * wave(s.x * 0.4 - p.phase)
    furrows = wave(s.x / (0.16 + (s.y - p.horizon).clamp(min=0)) * 1.2 + p.phase)
    _land(s, p, top, _lit(p, 0.34, 0.56, 0.20), _lit(p, 0.66, 0.70, 0.34))
    s.paint(s.cover(top - s.y) * (0.16 + 0.16 * furrows), _lit(p, 0.30, 0.44, 0.16))


def _ridge(s: Sheet, p: Traits, pitch: float, height: float, shift: float) -> Tensor:
    """Return the height of a jagged line, (n, size, size)."""
    t = s.x * pitch + p.phase * 7 + shift
    jag = (t - t.floor() - 0.5).abs() + 0.35 * (2.7 * t - (2.7 * t).floor() - 0.5).abs()
    return p.horizon - height * (1 - 1.5 * jag)


def mountains(s: Sheet, p: Traits) -> None:
    """Draw two ranges of mountains with snow on top, and meadows before them."""
    haze = _by_time(p, _HAZE)
    for pitch, height, shift, share in ((0.75, 0.62, 0.3, 0.45), (0.55, 0.40, 0.0, 0.10)):
        top = _ridge(s, p, pitch, height, shift)
        t = s.x * pitch + p.phase * 7 + shift
        shade = 0.86 + 0.20 * torch.sign(t - t.floor() - 0.5) * torch.sign(p.sun_x)
        rock = haze * share + _lit(p, 0.42, 0.43, 0.50) * (1 - share)
        s.paint(s.cover(top - s.y), rock, shade)
        line = top + 0.26 * height + 0.05 * wave(s.x * 4.1 + p.phase)
        cap = s.cover(torch.maximum(top - s.y, s.y - line))
        s.paint(cap, haze * share + _lit(p, 0.95, 0.97, 1.0) * (1 - share), shade * 0.5 + 0.5)
    top = p.horizon + 0.12 + 0.05 * wave(s.x * 0.5 + p.phase)
    _land(s, p, top, _lit(p, 0.30, 0.48, 0.24), _lit(p, 0.44, 0.58, 0.36))


def snow(s: Sheet, p: Traits) -> None:
    """Draw snowy hills with a dark wood on the horizon, and flakes in the air."""
    wood = p.horizon + 0.02 - 0.10 * (0.5 + 0.5 * wave(s.x * 4.5 + p.phase))
    wood -= 0.05 * wave(s.x * 0.6 + p.phase)
    s.paint(s.cover(wood - s.y), 0.3 * _by_time(p, _HAZE) + _lit(p, 0.14, 0.24, 0.26))
    for drop, shade in ((0.06, 0.90), (0.34, 1.0)):
        top = p.horizon + drop + 0.07 * wave(s.x * 0.45 + p.phase + 3 * drop)
        light = shade - 0.16 * bump((s.y - top - 0.02) / 0.22)
        s.paint(s.cover(top - s.y), _lit(p, 0.93, 0.96, 1.0), light)
    white = torch.ones(len(s.x), 3, device=s.x.device)
    for flake in range(N_STARS):
        x = torch.frac(p.phase * 5.3 + flake * 0.618034) * 2 - 1
        y = torch.frac(p.phase * 2.9 + flake * 0.754878) * 2 - 1
        s.paint(bump(ellipse(s.x - x, s.y - y, 0.06, 0.06)) * 0.75, white)


def shelves(s: Sheet, p: Traits) -> None:
    """Fill the canvas with book shelves in warm light."""
    row = (s.y + 1) * 2.2 + p.phase
    place = s.x * 5.5 + row.floor() * 3.7 + p.phase * 11
    place = place + 0.22 * wave(place * 0.37)
    book, across = place.floor(), torch.frac(place + 64)
    tone = torch.frac(book * 0.618034 + row.floor() * 0.754878 + 64)
    tall = 0.16 + 0.20 * torch.frac(book * 0.414214 + 64)
    wood = torch.tensor([[0.34, 0.22, 0.14]], device=s.x.device).expand(len(s.x), 3)
    s.paint(torch.ones_like(s.x), wood * 0.42)
    inside = s.cover((torch.maximum(tall - torch.frac(row), 0.06 - across)) * 0.2)
    warm = torch.tensor([[0.66, 0.34, 0.22]], device=s.x.device).expand(len(s.x), 3)
    cold = torch.tensor([[0.24, 0.38, 0.42]], device=s.x.device).expand(len(s.x), 3)
    shade = 0.55 + 0.75 * (across * (1 - across)) * 2
    s.paint_ramp(inside, cold, warm, tone)
    s.paint(inside * (1 - shade).clamp(0, 1), wood * 0.3)
    s.paint(s.cover((torch.frac(row) - 0.10) * 0.4) * s.cover(-torch.frac(row)), wood)
    lamp = bump(ellipse(s.x - p.sun_x, s.y + 0.5, 1.5, 1.4))
    s.paint(lamp * 0.22, _by_time(p, ((1.0, 0.86, 0.62),) * 3))


def _stand(s: Sheet, p: Traits, drop: float) -> tuple[Tensor, Tensor]:
    """Return coordinates of a thing whose foot is ``drop`` below the horizon, y down from it."""
    return (s.x - p.thing_x) / p.thing_size, (s.y - p.horizon - drop) / p.thing_size


def _box(x: Tensor, y: Tensor, half: float, bottom: float, top: float) -> Tensor:
    return torch.maximum(x.abs() - half, torch.maximum(y - bottom, top - y))


def _pick(p: Traits, colours: tuple) -> Tensor:
    choice = (p.paint_tone.reshape(-1) * len(colours)).long().clamp(max=len(colours) - 1)
    return torch.tensor(colours, device=choice.device)[choice] * _lit(p, 1.0, 1.0, 1.0)


def house(s: Sheet, p: Traits) -> None:
    """Draw a house with a gable, a chimney, a door and windows that are lit at night."""
    x, y = _stand(s, p, 0.42)
    s.paint(bump(ellipse(x, y, 0.75, 0.10)) * 0.35, _lit(p, 0.05, 0.06, 0.08))
    shade = 0.93 + 0.12 * torch.sign(p.sun_x) * torch.sign(x - 0.12)
    s.paint(s.cover(_box(x - 0.24, y, 0.06, -0.45, -0.84)), _lit(p, 0.50, 0.30, 0.26))
    s.paint(s.cover(_box(x, y, 0.38, 0.0, -0.42)), _pick(p, _WALLS), shade)
    roof = torch.maximum(x.abs() * 0.75 - (y + 0.84) * 0.66, y + 0.40)
    s.paint(s.cover(roof), _pick(p, _ROOFS), shade)
    s.paint(s.cover(_box(x + 0.02, y, 0.075, 0.0, -0.25)), _lit(p, 0.32, 0.20, 0.16))
    glow = torch.tensor([[1.0, 0.84, 0.45]], device=s.x.device)
    pane = torch.where((p.time == 2)[:, :, 0], glow, _lit(p, 0.36, 0.48, 0.58))
    for side in (-0.23, 0.23):
        s.paint(s.cover(_box(x - side, y, 0.085, -0.14, -0.32)), _lit(p, 0.98, 0.97, 0.94))
        s.paint(s.cover(_box(x - side, y, 0.062, -0.16, -0.30)), pane)


def tree(s: Sheet, p: Traits) -> None:
    """Draw a fir in snow and mountains, else a tree with a round crown."""
    x, y = _stand(s, p, 0.52)
    s.paint(bump(ellipse(x, y, 0.60, 0.09)) * 0.35, _lit(p, 0.05, 0.06, 0.08))
    trunk = x.abs() - 0.055 - 0.05 * bump((y / 0.25).square())
    trunk = torch.maximum(trunk, torch.maximum(y, -0.7 - y))
    s.paint(s.cover(trunk), _lit(p, 0.38, 0.26, 0.18), 0.9 + 0.4 * x * torch.sign(p.sun_x))
    is_fir = (p.ground == GROUNDS.index("snow")) | (p.ground == GROUNDS.index("mountains"))
    fir = torch.full_like(x, 9.0)
    for top, wide in ((-1.15, 0.62), (-0.90, 0.70), (-0.62, 0.78)):
        fir = torch.minimum(fir, torch.maximum(x.abs() - (y - top) * wide, y - top - 0.44))
    crown = torch.full_like(x, 9.0)
    for u, v, a in ((0, -0.82, 0.34), (-0.27, -0.62, 0.26), (0.28, -0.64, 0.27), (0, -0.58, 0.3)):
        crown = torch.minimum(crown, disc(x - u, y - v, a, a * 0.86))
    crown = crown + 0.016 * wave(x * 7 + p.phase) * wave(y * 6)
    shape = torch.where(is_fir, fir * 0.8, crown)
    side = 0.5 + 0.75 * x * torch.sign(p.sun_x) - 0.45 * (y + 0.7) + 0.08 * wave(x * 9 + y * 7)
    autumn = (p.paint_tone[:, :, 0] > 0.78) & ~is_fir[:, :, 0]
    dark = torch.where(autumn, _lit(p, 0.56, 0.24, 0.08), _lit(p, 0.07, 0.24, 0.11))
    light = torch.where(autumn, _lit(p, 0.96, 0.62, 0.18), _lit(p, 0.42, 0.66, 0.24))
    s.paint_ramp(s.cover(shape), dark, light, side.clamp(0, 1))
    snowy = s.cover(shape) * (p.ground == GROUNDS.index("snow")) * ramp((side - 0.5) * 4)
    s.paint(snowy * 0.7, _lit(p, 0.95, 0.97, 1.0))


def boat(s: Sheet, p: Traits) -> None:
    """Draw a sailing boat and its reflection."""
    x, y = _stand(s, p, 0.24)
    s.paint(bump(ellipse(x, y - 0.09, 0.5, 0.12)) * 0.4, _lit(p, 0.05, 0.16, 0.22))
    s.paint(s.cover(_box(x + 0.02, y, 0.018, 0.0, -0.95)), _lit(p, 0.30, 0.22, 0.18))
    sail = torch.maximum(torch.maximum(x - 0.44 - 0.48 * y, 0.03 - x), y + 0.13) * 0.8
    jib = torch.maximum(torch.maximum(-x - 0.36 - 0.40 * y, x + 0.06), y + 0.17) * 0.8
    s.paint(s.cover(torch.maximum(sail, -0.92 - y)), _lit(p, 0.97, 0.95, 0.90), 1 - 0.25 * x)
    s.paint(s.cover(torch.maximum(jib, -0.86 - y)), _pick(p, _WALLS[1:]), 1 + 0.2 * x)
    hull = torch.maximum(torch.maximum(x.abs() - 0.46 + 0.75 * (y + 0.06), y - 0.10), -0.08 - y)
    s.paint(s.cover(hull), _pick(p, _ROOFS), 1.1 - 2 * (y + 0.08))


def lighthouse(s: Sheet, p: Traits) -> None:
    """Draw a striped tower with a lamp, whose beam shows at night."""
    x, y = _stand(s, p, 0.42)
    beam = ramp(1 - (y + 1.14).abs() / (0.03 + 0.22 * (x * torch.sign(p.phase - 0.5)).clamp(min=0)))
    dark = (p.time == 2) * bump((x / 1.4).square()) * (x * torch.sign(p.phase - 0.5) > 0)
    lamp = torch.tensor([[1.0, 0.90, 0.52]], device=s.x.device).expand(len(x), 3)
    s.paint(beam * dark * 0.6, lamp)
    s.paint(s.cover(disc(x, y - 0.02, 0.50, 0.13)), _lit(p, 0.40, 0.38, 0.38))
    wall = torch.maximum(x.abs() - 0.16 - 0.07 * y, torch.maximum(y, -1.02 - y))
    shade = 0.92 - 0.9 * x * torch.sign(-p.sun_x)
    s.paint(s.cover(wall), _lit(p, 0.95, 0.93, 0.90), shade)
    bands = s.cover(wall) * s.cover((wave(y * 2.0 + 0.25)) * 0.12)
    s.paint(bands, _lit(p, 0.74, 0.20, 0.18), shade)
    s.paint(s.cover(_box(x, y, 0.14, -1.0, -1.05)), _lit(p, 0.28, 0.24, 0.26))
    s.paint(s.cover(_box(x, y, 0.075, -1.05, -1.22)), lamp)
    cap = torch.maximum(x.abs() - (y + 1.40) * 0.62, y + 1.22)
    s.paint(s.cover(cap), _lit(p, 0.74, 0.20, 0.18))
