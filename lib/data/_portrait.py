"""Draw portraits from their traits: one function a layer, called back to front.

Coordinates of the head: u to the right, v down, the eyes near (0, 0), the chin near (0, 0.62). The
features turn with the head on a curved face, so they have coordinates of their own, fu and fv.
Each layer is painted within bounds that no pose leaves.
"""

import torch
from torch import Tensor

from lib.data._shapes import Sheet, Traits, bump, disc, ellipse, ramp, squircle, wave

TOP = 0.60  # from the middle of the face to the top of the skull
FACE_V = 0.04  # height of the face's middle
HAIR_V = -0.06  # height of the hair's middle


def portrait(p: Traits, size: int) -> Tensor:
    """Draw n portraits as colours in [0, 1], (n, 3, size, size)."""
    n, device = len(p.skin), p.skin.device
    centres = (torch.arange(size, device=device) * 2 + 1) / size - 1
    y, x = centres[:, None] - p.shift_y - 0.1, centres - p.shift_x
    lean = (1 - p.tilt * p.tilt).sqrt() / p.zoom, p.tilt / p.zoom
    canvas = Sheet(
        torch.empty(n, 3, size, size, device=device),
        size / 2 * p.zoom,
        size,
        u=x * lean[0] + y * lean[1],
        v=y * lean[0] - x * lean[1] + 0.1,
        x=((centres - 0.6 * p.shift_x) / p.zoom).expand(n, size, size),
        y=((centres[:, None] - 0.6 * p.shift_y - 0.1) / p.zoom + 0.1).expand(n, size, size),
    )
    background(canvas, p)
    _where(canvas, p, p.long | p.big, -1, 1, hair_behind)
    torso(canvas.rows(0.3, 1), p)
    _where(canvas, p, ~p.covered_ears, -0.4, 0.45, ears, half=0.75)
    patch = canvas.rows(-0.78, 0.85).copy(half=0.66)
    head(patch, p)
    canvas.rows(-0.78, 0.85).put(patch, half=0.66)
    _where(canvas, p, ~p.long, -1, 0.75, hair, half=0.85)
    _where(canvas, p, p.long, -1, 1, hair)
    _where(canvas, p, p.hat, -1, 0.1, hat)
    return canvas.rgb.mul_(p.tone[:, :, None, None])


def _where(sheet, p, flag, top, bottom, layer, half=1.0) -> None:
    """Draw a layer on the pictures with a flag alone."""
    index = _those(flag)
    if len(index):
        rows = sheet.rows(top, bottom)
        part = rows.copy(index, half)
        layer(part, p.take(index))
        rows.put(part, index, half)


def _those(flag: Tensor) -> Tensor:
    return flag.reshape(-1).nonzero().squeeze(1)


def background(s: Sheet, p: Traits) -> None:
    """Fill the canvas: a gradient from one colour to another and a soft patch of light."""
    light = s.x * p.back_x + s.y * p.back_y + 0.5
    light += p.glow * bump(ellipse(s.x - p.glow_x, s.y - p.glow_y, 0.9, 0.9))
    edge = (p.back_light - p.back_dark)[:, :, None, None]
    torch.add(light.clamp_(0, 1).unsqueeze(1) * edge, p.back_dark[:, :, None, None], out=s.rgb)


def hair_behind(s: Sheet, p: Traits) -> None:
    """Draw the hair that falls behind the neck."""
    outer, _ = _hair_outline(s, p, 0.02)
    ends = s.v - p.hair_length + 0.9 * s.u * s.u
    alpha = s.cover(torch.maximum(outer, ends))
    s.paint_ramp(alpha, p.hair_dark, p.hair, 0.35 + 0.10 * wave(s.u * 5 + p.phase))


def torso(s: Sheet, p: Traits) -> None:
    """Draw neck and shoulders, and clothes with a neckline over them."""
    side = s.x.abs()
    slope = (side - p.neck).clamp_(min=0)
    shoulder = 0.80 - s.y + slope * (0.42 - 0.22 * slope) - 0.10 * bump(slope * 3)
    neck = side - p.neck - 0.5 * (s.y - 0.72).clamp_(min=0)
    skin = torch.minimum(shoulder, torch.maximum(neck, 0.35 - s.y))
    # the jaw's shadow falls on the neck, and light leaves its sides
    shade = 0.62 + 0.22 * p.light_x * s.x - 0.9 * s.x * s.x
    shade -= 0.75 * bump(ellipse(s.x, s.y - p.chin - 0.02, 0.42, 0.22))
    s.paint_ramp(s.cover(skin), p.skin_dark, p.skin_light, shade.clamp_(0, 1))
    cut = 0.03 - p.neckline * 0.9 * side
    low = disc(s.x, s.y - 0.76 - cut.clamp(max=0), p.neck + 0.05, 0.09 + p.neckline * 0.16)
    cloth = torch.maximum(shoulder - 0.012, -low)
    shade = 0.80 + 0.20 * p.light_x * s.x - 0.30 * bump(low * 5) - 0.25 * side * side
    shade += 0.05 * wave(side * 2.3 + s.y * 1.5 + p.phase)
    s.paint(s.cover(cloth), p.cloth, shade)
    s.paint(s.cover(cloth) * s.band(low - 0.035, 0.035), p.collar, shade * 1.05)


def ears(s: Sheet, p: Traits) -> None:
    """Draw both ears, with their hollows."""
    out = s.u.abs() - p.face_width - 0.005
    alpha = s.cover(disc(out, s.v - 0.05 - 0.15 * out, 0.065 * p.ear, 0.13 * p.ear))
    hollow = bump(ellipse(out - 0.012, s.v - 0.03, 0.05 * p.ear, 0.10 * p.ear))
    shade = 0.55 + 0.3 * p.light_x * s.u - 0.5 * hollow
    s.paint_ramp(alpha, p.skin_dark, p.skin_light, shade.clamp_(0, 1))


def head(s: Sheet, p: Traits) -> None:
    """Draw the face and everything on it."""
    curved = 1 - ellipse(s.u, s.v, 0.75, 0.95)
    s.fields["fu"] = s.u - p.turn * curved
    s.fields["fv"] = s.v - p.nod * curved
    s.fields["side"] = s.fu.abs()
    s.fields["near"] = (s.fu > 0).to(s.fu.dtype).mul_(2).sub_(1)
    skin(s, p)
    _where(s, p, p.beard, -0.2, 0.85, beard)
    mouth(s.rows(0.14, 0.66), p)
    nostrils(s.rows(0.05, 0.50), p)
    eyes(s.rows(-0.27, 0.27), p)
    brows(s.rows(-0.42, 0.15), p)
    _where(s, p, p.glasses, -0.35, 0.35, glasses)


def _face(s: Sheet, p: Traits, chin: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the face's own coordinates, about -1 to 1 each, and its squared radius."""
    v = s.v - FACE_V
    below, above = v.clamp(min=0), v.clamp_(max=0)
    below = below / (p.chin - FACE_V + chin)
    narrow = 1 - p.taper * below * below
    fx = (s.u - 0.25 * p.turn) / (p.face_width * narrow)
    fy = below + above / TOP
    return fx, fy, squircle(fx, fy, p.square)


def skin(s: Sheet, p: Traits) -> None:
    """Draw the face, all of whose light and shadow is one field ``shade`` between two colours."""
    fx, fy, r2 = _face(s, p)
    depth = (1 - r2).clamp_(min=0).sqrt_()
    shade = 0.34 + 0.42 * depth + 0.30 * p.light_x * fx + p.light_y * fy
    opening = _hairline(s, p)
    shade -= 0.55 * ramp(1 + opening / 0.10)  # under the hair
    cheek = bump(ellipse(s.side - 0.25, s.fv - 0.20 + 0.03 * p.smile, 0.17, 0.15))
    shade += (0.05 + 0.09 * p.smile) * cheek
    socket = bump(ellipse(s.side - p.eye_x, s.fv - p.eye_v + 0.045, 0.17, 0.125))
    shade -= p.socket * socket
    _nose_shade(s, p, shade)
    lips = p.mouth_v + 0.03
    shade -= 0.22 * bump(ellipse(s.fu, s.fv - lips - 0.085, 0.13, 0.05))  # under the lower lip
    shade += 0.10 * bump(ellipse(s.fu, s.fv - p.chin + 0.11, 0.13, 0.09))
    # the fold from nose to mouth: deep in the old, and in a smile
    bow = s.fv - p.nose_v
    fold = s.side - p.nose_width - 0.035 - 0.42 * bow + 0.35 * bow * bow
    reach = bump(((bow - 0.09) / 0.16).square_())
    shade -= (p.fold + 0.22 * p.smile) * bump((fold / 0.035).square_()) * reach
    _age(s, p, shade)
    alpha = s.cover((r2.sqrt() - 1) * 0.5)
    s.fields["face"] = alpha
    s.paint_ramp(alpha, p.skin_dark, p.skin_light, shade.clamp_(0, 1))
    s.paint(cheek * alpha * p.blush, p.blush_colour)


def _nose_shade(s: Sheet, p: Traits, shade: Tensor) -> None:
    part = s.rows(-0.3, 0.5)
    shade = shade[:, part.top - s.top : part.top - s.top + part.u.shape[1]]
    along = (part.fv - p.eye_v) / (p.nose_v - p.eye_v)
    width = 0.035 + (p.nose_width - 0.035) * ramp(along)
    q = part.fu / width
    length = ramp(along * 2.2 + 0.3) * ramp((1.16 - along) * 5)
    flank = bump((q.abs() - 1.05).square_() * 1.6) * length
    lit = p.light_x * torch.sign(q) * 0.5
    shade -= (p.bridge - 0.20 * lit) * flank
    shade += 0.10 * bump((q / 0.9).square_()) * length
    tip = part.fv - p.nose_v
    shade -= 0.48 * bump(ellipse(part.fu, tip - 0.045, p.nose_width * 1.35, 0.042))
    shade += 0.20 * bump(ellipse(part.fu, tip + 0.02, p.nose_width * 0.6, 0.05))


def _age(s: Sheet, p: Traits, shade: Tensor) -> None:
    """Line the foreheads, eyes and jowls of those who are not young."""
    old = _those(~p.young)
    if not len(old):
        return
    p, fv, side = p.take(old), s.fv[old], s.side[old]
    brow = fv - p.eye_v + 0.27 + 0.25 * side * side
    lines = bump((brow / 0.016).square_()) + bump(((brow + 0.075) / 0.016).square_())
    change = lines * bump((side / 0.30).square_()) * 0.36
    bag = fv - p.eye_v - 0.088 + 0.9 * (side - p.eye_x).square()
    change += 0.42 * bump((bag / 0.022).square_()) * bump(((side - p.eye_x) / 0.14).square_())
    hollow = ellipse(side - 0.27 + 0.25 * (fv - 0.35), fv - 0.37, 0.10, 0.19)
    change += 0.36 * bump(hollow)
    corner = side - p.eye_x - p.eye_width - 0.045
    feet = bump((((fv - p.eye_v).abs() - 0.5 * corner - 0.012) / 0.012).square_())
    change += 0.35 * feet * bump((corner / 0.05).square_())
    shade[old] -= change


def beard(s: Sheet, p: Traits) -> None:
    """Draw a beard and moustache that leave the lips free."""
    _, _, r2 = _face(s, p, 0.05)
    edge = (r2.sqrt() - 1) * 0.5 - 0.012
    cheek = p.mouth_v - 0.10 - 1.15 * (s.side - 0.17).clamp_(min=0) * s.side / p.face_width - s.fv
    # bare: between moustache and cheek beard, and under the lower lip
    bare = disc(s.fu, s.fv - p.mouth_v - 0.012, p.mouth_width + 0.02, 0.075 + 0.02 * p.smile)
    shape = torch.maximum(torch.maximum(edge, cheek), -bare)
    goatee = torch.maximum(s.side - p.mouth_width - 0.10, p.nose_v + 0.05 - s.fv)
    shape = torch.where(p.goatee, torch.maximum(shape, goatee), shape)
    soft = ramp(0.5 - shape / 0.05)
    shade = 0.42 + 0.30 * p.light_x * s.u + 0.12 * wave(s.u * p.strands * 1.5 + p.phase)
    shade -= 0.35 * bump(ellipse(s.fu, s.fv - p.mouth_v - 0.09, 0.15, 0.05))
    s.paint_ramp(soft * p.beard_cover, p.hair_dark, p.hair, shade.clamp_(0, 1))


def mouth(s: Sheet, p: Traits) -> None:
    """Draw the lips, and teeth between them where the mouth is open."""
    t = s.fu / p.mouth_width
    t2 = t * t
    arch = 1 - t2
    line = s.fv - p.mouth_v + p.curl * (t2 - 0.35)
    gap = p.gap * arch
    inside = s.cover(s.side - p.mouth_width)
    bow = p.lip_upper * arch * (1 - 0.30 * bump(t2 * 9))
    upper = s.cover(-(line + bow)) * s.cover(line) * inside
    full = p.lip_lower * (1 - t2 * t2)
    lower = s.cover(gap - line) * s.cover(line - gap - full) * inside
    between = s.cover(-line) * s.cover(line - gap) * inside
    s.paint(between, p.mouth_dark)
    teeth = s.cover(line - 0.72 * gap) * between
    s.paint(teeth, p.teeth, 1 - 0.35 * t2)
    s.paint(upper, p.lip, 0.82 + 0.06 * p.light_x * t)
    sheen = bump(ellipse(t, line - gap - 0.45 * full, 0.6, 0.022))
    s.paint(lower, p.lip, 1 + 0.14 * sheen - 0.10 * t2)
    s.paint(s.band(line, 0.008) * inside * (0.9 - 0.5 * t2), p.mouth_dark)
    corner = bump(ellipse(s.side - p.mouth_width, s.fv - p.mouth_v + 0.65 * p.curl, 0.035, 0.03))
    s.paint(corner * 0.35, p.skin_deep)


def nostrils(s: Sheet, p: Traits) -> None:
    """Draw nostrils and the wings of the nose."""
    out, down = s.side - 0.50 * p.nose_width, s.fv - p.nose_v - 0.022
    hole = bump(ellipse(out, down + 0.25 * out, 0.45 * p.nose_width, 0.022))
    s.paint(hole * 0.75, p.skin_deep)
    wing = disc(s.side - 0.70 * p.nose_width, down + 0.018, 0.42 * p.nose_width, 0.045)
    lower = ramp((out - 0.1 * p.nose_width) / 0.03)
    s.paint(s.band(wing, 0.009) * lower * 0.45, p.skin_deep)


def eyes(s: Sheet, p: Traits) -> None:
    """Draw both eyes: white, iris, pupil, glint, lids and lashes."""
    e = s.side - p.eye_x
    ey = s.fv - p.eye_v + p.slant * e
    t = e / p.eye_width
    arch = 1 - t * t
    top = ey + p.lid_upper * arch  # 0 on the upper lid, positive below
    bottom = ey - p.lid_lower * arch  # 0 on the lower lid, negative above
    inside = s.cover(-top) * s.cover(bottom)
    s.paint(inside, p.white, 1 - 0.45 * ramp(1 - top / 0.045) - 0.12 * t * t)
    ix, iy = e - p.gaze_x * s.near, ey - p.gaze_y
    r2 = ellipse(ix, iy, p.iris_size, p.iris_size)
    r = r2.sqrt()
    iris = s.cover((r - 1) * p.iris_size) * inside
    glow = 0.75 + 0.45 * iy / p.iris_size - 0.35 * ramp((r - 0.7) * 3.3)
    s.paint(iris, p.iris, glow)
    s.paint(s.cover((r - 0.45) * p.iris_size) * inside, p.pupil)
    glint = disc(ix + 0.02 * s.near, iy + 0.02, p.iris_size * 0.24, p.iris_size * 0.24)
    s.paint(s.cover(glint) * inside * 0.9, p.white)
    reach = s.cover(e.abs() - p.eye_width - 0.008)
    lash = s.band(top + 0.004, p.lash * (1.15 + 0.45 * t)) * reach
    s.paint(lash * 0.92, p.lash_colour)
    crease = s.band(top + p.crease - 0.02 * t, 0.010) * reach
    s.paint(crease * 0.5, p.skin_deep)
    s.paint(s.band(bottom, 0.007) * reach * 0.38, p.skin_deep)


def brows(s: Sheet, p: Traits) -> None:
    """Draw both brows, thick inside and thin outside."""
    t = (s.side - p.eye_x - 0.015) / p.brow_width
    line = s.fv - p.brow_v + p.brow_arch * (1 - (t - 0.25).square()) + p.brow_slope * t
    thick = p.brow_thick * (1 - 0.45 * t)
    alpha = s.band(line, thick) * ramp((1 - t.abs()) * 4)
    s.paint(alpha * 0.88, p.brow_colour)


def glasses(s: Sheet, p: Traits) -> None:
    """Draw glasses: two rims, round to square, with a bridge, temples and a glint."""
    e, ey = s.side - p.eye_x - 0.005, s.fv - p.eye_v - 0.015
    r = squircle(e / p.rim_width, ey / p.rim_height, p.rim_square).sqrt_()
    rim = (r - 1) * (0.5 * (p.rim_width + p.rim_height))
    lens = s.cover(rim)
    s.paint(lens * p.lens_cover, p.lens)
    streak = bump(((e * s.near - 0.7 * ey - 0.01) / 0.03).square_())
    s.paint(lens * streak * 0.22, p.white)
    shadow = s.band(rim - 0.02, 0.03) * s.cover(-ey) * s.face
    s.paint(shadow * 0.22, p.skin_deep)
    bridge = s.band(ey + 0.03 - 2 * s.side * s.side, 0.016) * s.cover(
        s.side - p.eye_x + p.rim_width
    )
    arm = s.band(ey + 0.035 - 0.05 * e, 0.016) * s.cover(p.rim_width - e) * s.face
    frame = torch.maximum(s.band(rim, p.rim), torch.maximum(bridge, arm))
    s.paint(frame, p.frame, 1 + 0.25 * bump(ellipse(e + 0.05, ey + p.rim_height, 0.06, 0.03)))


def _hair_outline(s: Sheet, p: Traits, grow: float) -> tuple[Tensor, Tensor]:
    """Return about the signed distance from the hair's outline, and the squared radius."""
    v = s.v - HAIR_V
    wide = p.face_width + p.volume + grow + p.flow * v.clamp(min=0)
    x, up = s.u / wide, v.clamp(max=0) / (p.hair_top + grow)
    r2 = x * x + up * up
    return (r2.sqrt() - 1) * 0.5 + p.curl_size * _curls(s, p), r2


def _curls(s: Sheet, p: Traits) -> Tensor:
    """Return a field of lumps, each about a lock, on curly hair and 0 on straight."""
    if "curls" not in s.fields:
        s.fields["curls"] = torch.zeros_like(s.u)
        if len(index := _those(p.curly)):
            phase, su, sv = p.take(index).phase, s.u[index], s.v[index]
            u = su * 2.7 + 0.30 * wave(sv * 1.9 + phase)  # bent, to have no rows and columns
            v = sv * 2.9 + 0.30 * wave(su * 2.1 - phase)
            fine = wave(2 * u + v + phase) * wave(2 * v - u)
            s.curls[index] = 0.6 * wave(u) * wave(v) + 0.4 * fine
    return s.curls


def _hairline(s: Sheet, p: Traits) -> Tensor:
    """Return about the signed distance from the hair's opening for the face, negative in it."""
    u = s.u - 0.7 * p.turn
    part = u - p.parting
    height = p.hairline - p.sweep * u - p.notch * bump((part / 0.16).square_())
    height += p.fringe * wave(u * 7.3 + p.phase)
    y = (s.v - 0.05).clamp_(max=0) / (0.05 - height)
    x = u / (p.opening + p.open_flow * (s.v - 0.1).clamp_(min=0))
    return (squircle(x, y, p.open_square).sqrt_() - 1) * 0.42


def hair(s: Sheet, p: Traits) -> None:
    """Draw the hair in front: a cap with an opening for the face, down to its ends."""
    outer, r2 = _hair_outline(s, p, 0.0)
    opening = _hairline(s, p)
    ends = s.v - p.hair_ends + 0.9 * s.u * s.u
    shape = torch.maximum(outer, torch.maximum(-opening, ends))
    shape = torch.where(p.hat, torch.maximum(shape, p.band_v - 0.05 - s.v), shape)
    alpha = s.cover(shape)
    # strands run from the parting; light catches the crown in a bow
    depth = (1 - r2).clamp_(min=0).sqrt_()
    strand = (s.u - p.parting) / (s.v + 1.25).clamp_(min=0.3)
    lines = wave(strand * p.strands + p.phase) + wave(strand * p.strands * 0.37)
    lumps = torch.where(p.curly, 0.11 * _curls(s, p), 0.045 * lines)
    sheen = bump(((r2 - 0.50 - 0.10 * p.light_x * s.u) / 0.30).square_())
    shade = 0.22 + 0.28 * depth + 0.24 * p.light_x * s.u - 0.10 * s.v
    shade += p.sheen * sheen * (1 - 0.55 * s.v.clamp(min=0) / 0.5).clamp_(min=0)
    fine = ((s.sharp - 12) / 24).clamp(0, 1)  # strands are finer than the pixels of a small picture
    shade += fine * lumps
    shade -= 0.28 * bump((opening / 0.10).square_())
    s.paint_ramp(alpha, p.hair_dark, p.hair_light, shade.clamp_(0, 1))


def hat(s: Sheet, p: Traits) -> None:
    """Draw a beanie, a brimmed hat or a cap, and the shadow under it."""
    bend = s.v - p.band_v - 0.10 * s.u * s.u  # 0 on the hat's lower edge
    face = s.cover(s.u.abs() - p.face_width)
    s.paint(ramp(1 - bend / 0.10) * s.cover(-bend) * face * 0.30, p.skin_deep)
    r2 = squircle(s.u / p.crown_width, (s.v - p.band_v + 0.07) / p.crown_height, p.crown_square)
    crown = torch.maximum((r2.sqrt() - 1) * 0.45, bend)
    depth = (1 - r2).clamp_(min=0)
    shade = 0.58 + 0.42 * depth.sqrt_() + 0.22 * p.light_x * s.u
    knit = wave(s.u * 14 / (1.2 + 0.6 * s.v.clamp(min=-1))) * p.knit
    s.paint(s.cover(crown), p.hat_colour, shade + knit)
    stripe = s.cover(torch.maximum(crown, p.band_v - p.stripe - s.v + 0.10 * s.u * s.u))
    s.paint(stripe, p.stripe_colour, shade + 2 * knit)
    side = s.u - 0.6 * p.turn
    brim = disc(side, bend + 0.01 + 0.05 * side * side, p.brim_width, p.brim_height)
    light = 0.80 + 0.20 * p.light_x * s.u - 3.0 * bend.clamp(-0.06, 0.08)
    s.paint(s.cover(brim), p.brim_colour, light)
