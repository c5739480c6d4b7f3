"""The numbers behind an avatar: hashed from identity and picture, then turned into measures.

Lengths are in the head's coordinates of ``_portrait.py``; colours are sRGB from 0 to 1.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lib.data._shapes import Traits, between

HAIR_COLOURS = ("blond_hair", "black_hair", "grey_hair")  # kinds 1 to 3 of the colours below

# What is drawn for each identity and each picture, uniformly in its range.
IDENTITY = {
    "is_young": (0, 1),
    "has_bangs": (0, 1),
    "has_beard": (0, 1),
    "hair_kind": (0, 1),
    "build": (0, 1),  # up to here: what the attributes follow from
    "hair_tint": (0, 1),
    "skin_tone": (0, 1),
    "undertone": (-1, 1),
    "face_width": (0.405, 0.47),
    "taper": (0.10, 0.26),
    "square": (0.05, 0.45),
    "chin": (0.58, 0.66),
    "ear": (0.80, 1.05),
    "eye_x": (0.178, 0.208),
    "eye_v": (-0.02, 0.03),
    "eye_width": (0.098, 0.122),
    "lid": (0.044, 0.060),
    "slant": (-0.10, 0.16),
    "iris_size": (0.047, 0.055),
    "iris_tone": (0, 1),
    "crease": (0.014, 0.034),
    "brow_lift": (0.105, 0.145),
    "brow_width": (0.115, 0.145),
    "brow_arch": (0.0, 0.035),
    "brow_slope": (-0.008, 0.014),
    "brow_weight": (0, 1),
    "nose_length": (0.215, 0.275),
    "nose_width": (0.062, 0.100),
    "bridge": (0.06, 0.20),
    "mouth_drop": (0.135, 0.175),
    "mouth_width": (0.125, 0.170),
    "lip_upper": (0.018, 0.042),
    "lip_lower": (0.030, 0.058),
    "lip_tone": (0, 1),
    "hair_long": (0, 1),
    "hair_curl": (0, 1),
    "hair_extent": (0, 1),
    "hair_volume": (0, 1),
    "hair_part": (-0.22, 0.22),
    "hair_sweep": (0, 1),
    "hair_line": (-0.36, -0.28),
    "hair_phase": (0, 1),
}
PICTURE = {
    "wears_glasses": (0, 1),
    "smiles": (0, 1),
    "wears_hat": (0, 1),  # up to here: what the attributes follow from
    "turn": (-0.09, 0.09),
    "nod": (-0.03, 0.03),
    "tilt": (-0.09, 0.09),
    "shift_x": (-0.05, 0.05),
    "shift_y": (-0.035, 0.035),
    "zoom": (1.06, 1.20),
    "light_x": (-1, 1),
    "light_y": (-0.16, 0.04),
    "brightness": (0.92, 1.10),
    "warmth": (-0.02, 0.05),
    "joy": (0, 1),
    "open_eyes": (0.85, 1.12),
    "gaze_x": (-0.020, 0.020),
    "gaze_y": (-0.010, 0.008),
    "brow_raise": (-0.012, 0.018),
    "back_tone": (0, 1),
    "back_value": (0.80, 1.18),
    "back_x": (-0.4, 0.4),
    "back_y": (-0.4, 0.2),
    "glow": (-0.35, 0.55),
    "glow_x": (-0.9, 0.9),
    "glow_y": (-0.9, 0.3),
    "cloth_tone": (0, 1),
    "cloth_value": (0.75, 1.10),
    "neckline": (0, 1),
    "collar": (0, 1),
    "rim_style": (0, 1),
    "rim_tone": (0, 1),
    "hat_style": (0, 1),
    "hat_tone": (0, 1),
    "hat_height": (0, 1),
}

_SKIN = (
    (0.29, 0.19, 0.15),
    (0.38, 0.25, 0.19),
    (0.50, 0.34, 0.25),
    (0.63, 0.44, 0.32),
    (0.75, 0.55, 0.41),
    (0.84, 0.65, 0.51),
    (0.91, 0.75, 0.63),
    (0.95, 0.83, 0.75),
)
_HAIR = (
    ((0.25, 0.16, 0.11), (0.36, 0.23, 0.14), (0.44, 0.28, 0.16), (0.52, 0.24, 0.12)),
    ((0.74, 0.56, 0.29), (0.83, 0.70, 0.45), (0.90, 0.80, 0.60)),
    ((0.055, 0.05, 0.055), (0.10, 0.085, 0.085)),
    ((0.56, 0.56, 0.57), (0.70, 0.70, 0.71), (0.84, 0.84, 0.85)),
)
_IRIS = (
    (0.20, 0.12, 0.08),
    (0.30, 0.18, 0.10),
    (0.38, 0.25, 0.13),
    (0.36, 0.34, 0.18),
    (0.30, 0.42, 0.40),
    (0.34, 0.48, 0.62),
)
_BACKS = (
    (0.80, 0.74, 0.66),
    (0.74, 0.60, 0.52),
    (0.66, 0.46, 0.44),
    (0.52, 0.42, 0.50),
    (0.36, 0.40, 0.54),
    (0.44, 0.58, 0.68),
    (0.40, 0.58, 0.58),
    (0.52, 0.60, 0.48),
    (0.72, 0.70, 0.50),
    (0.66, 0.66, 0.66),
    (0.34, 0.34, 0.36),
)
_CLOTHS = (
    (0.90, 0.89, 0.86),
    (0.72, 0.62, 0.48),
    (0.76, 0.54, 0.20),
    (0.62, 0.28, 0.18),
    (0.46, 0.12, 0.18),
    (0.30, 0.18, 0.32),
    (0.14, 0.17, 0.32),
    (0.24, 0.38, 0.56),
    (0.16, 0.40, 0.42),
    (0.28, 0.36, 0.22),
    (0.20, 0.20, 0.22),
    (0.55, 0.57, 0.60),
)
_FRAMES = ((0.07, 0.07, 0.08), (0.25, 0.13, 0.08), (0.36, 0.08, 0.10), (0.10, 0.16, 0.30))


def _mix(x: Tensor) -> Tensor:
    """Hash 32-bit numbers in int64; no product reaches 2⁶³. Constants: hash-prospector, triple."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


def _uniform(key: Tensor, ranges: Mapping[str, tuple[float, float]]) -> dict[str, Tensor]:
    """Draw one number a range, each from a stream that its place fixes; a beginning costs less."""
    streams = torch.arange(1, len(ranges) + 1, device=key.device)
    hashed = _mix(_mix(key[:, None] ^ _mix(streams)) + streams & 0xFFFFFFFF)
    share = (hashed >> 8).to(torch.float32) * 2.0**-24
    low, high = torch.tensor(tuple(ranges.values()), dtype=torch.float32, device=key.device).T
    return dict(zip(ranges, (low + (high - low) * share).unbind(1), strict=True))


def draw(identity: Tensor, picture: Tensor, labels_only: bool = False) -> Traits:
    """Draw what fixes a picture, (n,) each; with ``labels_only`` what fixes its attributes."""
    who = _mix(identity ^ 0x5EED)
    which = _mix(_mix(who + 0x9E37 & 0xFFFFFFFF) ^ _mix(picture ^ 0xCA5E))
    first = (5, 3) if labels_only else (None, None)
    ranges = (dict(list(r.items())[:k]) for r, k in zip((IDENTITY, PICTURE), first, strict=True))
    return Traits(_uniform(who, next(ranges)) | _uniform(which, next(ranges)))


def attributes_of(d: Traits, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tell the attributes, int64 (n,) each, after those that are given."""
    grey = torch.where(d.is_young < 0.60, 0.04, 0.32)
    place = (d.hair_kind - grey) / (1 - grey)
    kind = torch.where(place < 0, 3, torch.where(place < 0.22, 1, torch.where(place < 0.57, 2, 0)))
    for number, name in enumerate(HAIR_COLOURS, start=1):
        if name in given:
            kind = torch.where(given[name] == 1, number, torch.where(kind == number, 0, kind))
    some = {
        "glasses": d.wears_glasses < 0.15,
        "smiling": d.smiles < 0.45,
        "hat": d.wears_hat < 0.12,
        "bangs": d.has_bangs < 0.18,
        "beard": (d.has_beard < 0.30) & (d.build > 0.5),
        "young": d.is_young < 0.60,
    }
    some = {name: given.get(name, flag).long() for name, flag in some.items()}
    colours = {name: (kind == k).long() for k, name in enumerate(HAIR_COLOURS, start=1)}
    return some | colours


def traits(d: Traits, some: Mapping[str, Tensor]) -> Traits:
    """Turn what was drawn and the attributes into measures (n, 1, 1) and colours (n, 3)."""
    on = {name: flag == 1 for name, flag in some.items()}
    share = {name: flag.to(torch.float32) for name, flag in some.items()}
    measures = _face(d, share) | _hair(d, on, share) | _wear(d) | _scene(d)
    measures |= {name: on[name] for name in ("beard", "glasses", "hat", "young")}
    measures = {name: value[:, None, None] for name, value in measures.items()}
    return Traits(measures | _colours(d, on))


def _face(d: Traits, share: Mapping[str, Tensor]) -> dict[str, Tensor]:
    old, smile = 1 - share["young"], share["smiling"]
    smile = smile * (0.7 + 0.3 * d.joy)
    nose_v = d.eye_v + d.nose_length - 0.005
    mouth_v = nose_v + d.mouth_drop
    lips = 1 - 0.15 * old - 0.20 * smile
    opening = d.open_eyes * (1 - 0.10 * old)
    brow_v = d.eye_v - d.brow_lift
    return dict(
        face_width=d.face_width,
        taper=d.taper - 0.06 * d.build,
        square=d.square + 0.20 * d.build,
        chin=d.chin,
        neck=0.165 + 0.065 * d.build,
        ear=d.ear,
        eye_x=d.eye_x,
        eye_v=d.eye_v,
        eye_width=d.eye_width,
        lid_upper=d.lid * opening,
        lid_lower=(d.lid * 0.72) * (1 - 0.35 * smile) * opening,
        slant=d.slant,
        iris_size=d.iris_size,
        gaze_x=d.gaze_x,
        gaze_y=d.gaze_y - 0.004,
        crease=d.crease,
        lash=0.0115 - 0.0035 * d.build,
        socket=0.12 + 0.12 * d.build,
        brow_v=brow_v - d.brow_raise,
        brow_width=d.brow_width,
        brow_arch=d.brow_arch * (1.2 - 0.6 * d.build),
        brow_slope=d.brow_slope,
        brow_thick=0.011 + 0.009 * d.build + 0.008 * d.brow_weight,
        nose_v=nose_v,
        nose_width=d.nose_width,
        bridge=d.bridge,
        mouth_v=mouth_v,
        mouth_width=d.mouth_width * (1 + 0.22 * smile),
        curl=0.066 * smile + 0.012 * (1 - share["smiling"]) * (d.joy - 0.1),
        gap=0.068 * smile,
        smile=smile,
        lip_upper=d.lip_upper * lips,
        lip_lower=d.lip_lower * lips,
        fold=0.02 + 0.44 * old,
        blush=0.16 - 0.08 * old,
    )


def _hair(d: Traits, on: Mapping[str, Tensor], share: Mapping[str, Tensor]) -> dict[str, Tensor]:
    bangs = share["bangs"]
    long = d.hair_long < 0.95 - 0.80 * d.build
    curly = d.hair_curl < 0.30
    big = (d.hair_curl < 0.12) & ~(long & (d.hair_extent < 0.3))
    covered = (long | big).to(torch.float32)
    bulk = torch.where(big, 0.12, torch.where(long, 0.045, 0.012)) + 0.04 * d.hair_volume
    length = torch.where(long, 0.62 + 0.68 * d.hair_extent, 0.45 + 0.12 * d.hair_extent)
    ends = torch.where(long, length - 0.04, torch.where(big, 0.42, 0.17 + 0.10 * d.hair_extent))
    sweep = (2 * d.hair_sweep - 1) * torch.where(d.hair_sweep > 0.5, 0.32, 0.20)
    return dict(
        long=long,
        big=big,
        covered_ears=long | big,
        goatee=d.hair_extent > 0.72,
        volume=bulk,
        hair_top=0.57 + 0.08 * d.hair_volume + torch.where(big, 0.05, 0.0),
        flow=torch.where(long, 0.10 * d.hair_volume - 0.03, torch.where(big, 0.0, -0.22)),
        hair_length=length,
        hair_ends=ends,
        curl_size=torch.where(curly, torch.where(long | big, 0.022, 0.014), 0.0),
        curly=curly,
        hairline=torch.where(on["bangs"], -0.115, d.hair_line),
        parting=d.hair_part,
        sweep=sweep * (1 - 0.75 * bangs),
        notch=0.07 * (1 - bangs) * torch.where(curly, 0.0, 1.0),
        fringe=0.006 + 0.016 * bangs,
        opening=d.face_width - 0.002 - 0.045 * covered,
        open_flow=0.12 * covered * d.hair_volume,
        open_square=0.45 + 0.45 * bangs,
        strands=9 + 5 * d.hair_volume,
        phase=d.hair_phase,
        sheen=torch.where(curly, 0.08, 0.22),
        beard_cover=0.80 + 0.16 * d.brow_weight,
    )


def _wear(d: Traits) -> dict[str, Tensor]:
    beanie, brimmed = d.hat_style < 0.34, d.hat_style > 0.67
    return dict(
        neckline=(d.neckline > 0.45).to(torch.float32) * d.neckline,
        rim=0.012 + 0.010 * d.rim_style,
        rim_width=0.128 + 0.016 * d.rim_tone,
        rim_height=0.092 + 0.026 * d.rim_style,
        rim_square=0.15 + 0.65 * d.rim_tone,
        lens_cover=0.05 + 0.04 * d.rim_style,
        band_v=-0.32 - 0.03 * d.hat_height,
        crown_width=d.face_width + torch.where(beanie, 0.085, torch.where(brimmed, 0.045, 0.06)),
        crown_height=torch.where(brimmed, 0.33, 0.34) + 0.05 * d.hat_height,
        crown_square=torch.where(brimmed, 0.65, 0.25),
        knit=torch.where(beanie, 0.05, 0.0),
        stripe=torch.where(beanie, 0.13, torch.where(brimmed, 0.14, 0.0)),
        brim_width=torch.where(beanie, 0.001, torch.where(brimmed, 0.76, 0.45)),
        brim_height=torch.where(beanie, 0.001, torch.where(brimmed, 0.062, 0.085)),
    )


def _scene(d: Traits) -> dict[str, Tensor]:
    same = (
        "turn nod tilt shift_x shift_y zoom light_x light_y back_x back_y glow glow_x glow_y"
    ).split()
    return {name: getattr(d, name) for name in same}


def _colours(d: Traits, on: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = d.build.device

    def colour(*rgb: float) -> Tensor:
        return torch.tensor([rgb], device=device)

    def pick(anchors: tuple, place: Tensor) -> Tensor:
        return between(torch.tensor(anchors, device=device), place)

    skin = pick(_SKIN, d.skin_tone) * (1 + d.undertone[:, None] * colour(0.015, 0.0, -0.03))
    hair = pick(_HAIR[0], d.hair_tint)
    for number, name in enumerate(HAIR_COLOURS, start=1):
        hair = torch.where(on[name][:, None], pick(_HAIR[number], d.hair_tint), hair)
    light = 0.5 + 0.5 * skin  # lips and blush are nearer to the skin where that is dark
    rouge = d.lip_tone * (1.2 - d.build)
    lip = skin * colour(0.84, 0.64, 0.62) + rouge[:, None] * colour(0.02, -0.08, -0.04) * light
    back = pick(_BACKS, d.back_tone) * d.back_value[:, None]
    cloth = pick(_CLOTHS, d.cloth_tone) * d.cloth_value[:, None]
    hat = pick(_CLOTHS, d.hat_tone)
    beanie, cap = d.hat_style < 0.34, (d.hat_style >= 0.34) & (d.hat_style <= 0.67)
    n = len(skin)
    tone = d.brightness[:, None] * (1 + d.warmth[:, None] * colour(1.0, 0.1, -1.0))
    found = dict(
        skin=skin,
        skin_dark=skin * colour(0.56, 0.44, 0.41),
        skin_light=skin + (1 - skin) * skin * colour(0.42, 0.36, 0.30),
        skin_deep=skin * colour(0.36, 0.24, 0.22),
        blush_colour=skin * colour(0.98, 0.70, 0.66),
        hair=hair,
        hair_dark=hair * colour(0.42, 0.38, 0.37),
        hair_light=hair + (1 - hair) * colour(0.26, 0.24, 0.22),
        brow_colour=hair * 0.62 + skin * colour(0.10, 0.07, 0.06),
        lip=lip.clamp(0, 1),
        mouth_dark=skin * colour(0.28, 0.13, 0.13),
        teeth=colour(0.95, 0.93, 0.89).expand(n, 3),
        white=colour(0.92, 0.91, 0.89).expand(n, 3),
        pupil=colour(0.03, 0.025, 0.03).expand(n, 3),
        iris=pick(_IRIS, d.iris_tone * d.iris_tone),
        lash_colour=hair * 0.10 + colour(0.07, 0.05, 0.05),
        frame=pick(_FRAMES, d.rim_tone),
        lens=colour(0.80, 0.88, 0.92).expand(n, 3),
        cloth=cloth,
        collar=torch.where((d.collar > 0.6)[:, None], cloth * 0.5 + 0.45, cloth * 0.88),
        hat_colour=hat,
        brim_colour=torch.where(cap[:, None], hat * 0.6, hat),
        stripe_colour=torch.where(beanie[:, None], hat * 0.9 + 0.06, hat * 0.45),
        back_light=back,
        back_dark=back * colour(0.52, 0.52, 0.56),
        tone=tone,
    )
    return found
