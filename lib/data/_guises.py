"""What may become of a portrait: cut out of its background, a clown, a sculpture, a drawing.

A clown and a sculpture change the colours and measures before the avatar is drawn, a drawing the
picture after it. All is computed picture by picture, so a batch changes nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.data._portrait import portrait
from lib.data._shapes import Sheet, Traits, bump, disc, ellipse

# The colours of a clown's hair; their names are words of the captions.
CLOWN_HAIR = {
    "red": (0.88, 0.16, 0.12),
    "green": (0.18, 0.70, 0.28),
    "blue": (0.20, 0.38, 0.92),
    "purple": (0.62, 0.24, 0.80),
    "orange": (0.98, 0.56, 0.10),
}
_STONES = ((0.84, 0.82, 0.78), (0.72, 0.71, 0.70), (0.80, 0.74, 0.66))
_PAPER, _PENCIL = (0.97, 0.95, 0.90), (0.16, 0.16, 0.19)


def cutout(p: Traits, size: int) -> tuple[Tensor, Tensor]:
    """Draw portraits on nothing: colours (n, 3, size, size) and the share of background in each.

    The share has the colours' shape. Add it times another background to the colours.
    """
    black = torch.zeros_like(p.back_light)
    on_black = portrait(_with(p, back_light=black, back_dark=black), size)
    on_white = portrait(_with(p, back_light=black + 1, back_dark=black + 1), size)
    return on_black, ((on_white - on_black) / p.tone[:, :, None, None]).clamp_(0, 1)


def as_clown(p: Traits, hair: Tensor, tone: Tensor) -> Traits:
    """Paint faces white, lips and cheeks red, and give big curly hair.

    Shapes: ``hair`` (n,) of places in ``CLOWN_HAIR``, ``tone`` (n,) in [0, 1] for the clothes.
    """
    bright = torch.tensor(tuple(CLOWN_HAIR.values()), device=p.skin.device)
    colour = bright[hair]
    cloth = bright[(tone * len(bright)).long().clamp(max=len(bright) - 1)]

    def flat(*rgb: float) -> Tensor:
        return torch.tensor([rgb], device=p.skin.device).expand_as(p.skin)

    yes = torch.ones_like(p.big)
    return _with(
        p,
        skin=flat(0.93, 0.91, 0.89),
        skin_dark=flat(0.66, 0.63, 0.64),
        skin_light=flat(1.0, 0.99, 0.97),
        blush=torch.full_like(p.blush, 0.75),
        blush_colour=flat(0.95, 0.45, 0.45),
        lip=flat(0.86, 0.10, 0.12),
        lip_upper=p.lip_upper * 0.5 + 0.045,
        lip_lower=p.lip_lower * 0.5 + 0.055,
        mouth_width=p.mouth_width * 1.25,
        brow_colour=colour * 0.6,
        hair=colour,
        hair_dark=colour * 0.45,
        hair_light=colour + (1 - colour) * 0.35,
        long=~yes,
        big=yes,
        curly=yes,
        covered_ears=yes,
        volume=torch.full_like(p.volume, 0.17),
        hair_length=torch.full_like(p.hair_length, 0.50),
        hair_ends=torch.full_like(p.hair_ends, 0.42),
        curl_size=torch.full_like(p.curl_size, 0.028),
        sheen=torch.full_like(p.sheen, 0.08),
        opening=p.face_width - 0.03,
        cloth=cloth,
        collar=1 - 0.5 * cloth,
    )


def add_red_nose(images: Tensor, p: Traits) -> None:
    """Paint a clown's nose on portraits (n, 3, size, size) of these traits, in place."""
    size = images.shape[-1]
    centres = (torch.arange(size, device=images.device) * 2 + 1) / size - 1
    # the head's coordinates, as the portrait has them
    y, x = centres[:, None] - p.shift_y - 0.1, centres - p.shift_x
    upright, lean = (1 - p.tilt * p.tilt).sqrt() / p.zoom, p.tilt / p.zoom
    u, v = x * upright + y * lean, y * upright - x * lean + 0.1
    curved = 1 - ellipse(u, v, 0.75, 0.95)
    u, v = u - p.turn * curved, v - p.nod * curved - p.nose_v + 0.01
    sheet = Sheet(images, size / 2 * p.zoom, size)
    red = torch.tensor([[0.90, 0.10, 0.10]], device=images.device).expand(len(images), 3)
    shade = 1.08 - 2.2 * v - 0.5 * bump(ellipse(u, v - 0.11, 0.14, 0.06))
    sheet.paint(sheet.cover(disc(u, v, 0.105, 0.10)), red, shade)
    sheet.paint(bump(ellipse(u + 0.035, v + 0.045, 0.05, 0.04)) * 0.8, torch.ones_like(red))


def as_sculpture(p: Traits, tone: Tensor) -> Traits:
    """Give everything the colour of one stone, so that light alone shows the shapes.

    ``tone`` (n,) in [0, 1] chooses the stone.
    """
    stones = torch.tensor(_STONES, device=tone.device)
    stone = stones[(tone * len(stones)).long().clamp(max=len(stones) - 1)]
    light = stone + (1 - stone) * 0.55
    names = "skin lip hair brow_colour white iris pupil lash_colour frame lens cloth collar teeth"
    depth = dict(pupil=0.62, lash_colour=0.50, brow_colour=0.78, hair=0.88, iris=0.85, frame=0.55)
    depth |= dict(lip=0.90, cloth=0.92, collar=0.84)
    stony = {name: stone * depth.get(name, 1.0) for name in names.split()}
    stony |= dict(skin_dark=stone * 0.50, skin_light=light, skin_deep=stone * 0.42)
    stony |= dict(hair_dark=stone * 0.44, hair_light=light * 0.97, mouth_dark=stone * 0.40)
    stony |= dict(hat_colour=stone * 0.85, brim_colour=stone * 0.78, stripe_colour=stone * 0.70)
    stony |= dict(blush=torch.zeros_like(p.blush), sheen=torch.full_like(p.sheen, 0.25))
    wall = torch.tensor([[0.30, 0.32, 0.36]], device=tone.device).expand_as(stone)
    stony |= dict(back_light=wall * 1.5, back_dark=wall * 0.7)
    return _with(p, **stony)


def as_drawing(images: Tensor, phase: Tensor) -> Tensor:
    """Redraw pictures (n, 3, size, size) in pencil: lines where they change, hatching in the dark.

    ``phase`` (n,) in [0, 1] moves the hatching.
    """
    size, device = images.shape[-1], images.device
    weights = torch.tensor([0.30, 0.59, 0.11], device=device).reshape(1, 3, 1, 1)
    grey = (images * weights).sum(1, keepdim=True)
    # dodging: flat parts become white, whatever is darker than its surroundings a line
    lines = (1 - (grey + 0.02) / (_blur(grey, 2) + 0.02)).clamp(0, 1) * 2.6
    at = torch.arange(size, device=device) * (64 / size)
    strokes = torch.frac((at[:, None] + at) / 4.2 + phase[:, None, None])
    strokes = 0.55 + 0.45 * (4 * (strokes - 0.5).abs() - 1)
    tone = (0.62 - _blur(grey, 1)).clamp(min=0) * 1.15
    dark = (lines + tone * strokes[:, None]).clamp(0, 0.96)
    paper, pencil = (torch.tensor(c, device=device).reshape(1, 3, 1, 1) for c in (_PAPER, _PENCIL))
    return paper + (pencil - paper) * dark


def _blur(grey: Tensor, times: int) -> Tensor:
    for _ in range(times):
        grey = F.avg_pool2d(F.pad(grey, (2, 2, 2, 2), mode="replicate"), 5, 1)
    return grey


def _with(p: Traits, **values: Tensor) -> Traits:
    """Return the traits with some of them replaced."""
    return Traits(p._values | values)
