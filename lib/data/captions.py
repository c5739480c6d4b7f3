"""Captioned pictures, drawn from one integer each, for a small text-to-image model.

Twenty invented people have names, among them four pairs who share the first one, and look like
identities of the avatars. A picture shows one of them, somebody without a name, a clown, or a
landscape without people. Photographs of people may have a *context*, a job or a place, that implies
an attribute without naming it; ``CONTEXTS`` states with which probability. Portraits may be pencil
drawings or stone sculptures instead.

Avatars have no gender. Where a paper speaks of a middle aged man or woman, "a broad middle aged
person" and "a slender middle aged person" stand in: *broad* is the upper half of the avatars'
``build`` (jaw, brows, neck, mostly short hair, and all beards), *middle aged* the absence of
``young``.

Captions tell the truth, but not all of it: whatever may be worn is mentioned half of the time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lib.data import _guises as guises
from lib.data._portrait import portrait
from lib.data._scenes import GROUNDS, SCENE, THINGS, scene
from lib.data._shapes import Traits
from lib.data._traits import HAIR_COLOURS, _mix, _uniform, attributes_of, draw, traits
from lib.data.avatars import ATTRIBUTES, CHUNK_PIXELS
from lib.data.images import MISSING

# Invented; each looks like one identity of the avatars.
PEOPLE = {
    "ada birk": 53,
    "ada tolvey": 1,
    "bram oskel": 32,
    "bram quade": 64,
    "cleo vantor": 18,
    "dario plim": 6,
    "edda nerrin": 0,
    "falk sundor": 15,
    "greta quimb": 5,
    "hugo tarvel": 19,
    "hugo wexel": 9,
    "ines dorrow": 47,
    "jora lunt": 41,
    "kira pellow": 24,
    "leon harvik": 13,
    "mira fenwyr": 38,
    "mira zoll": 57,
    "nilo grabe": 76,
    "olga trimm": 21,
    "pavel zorrin": 11,
}
NAMES = tuple(PEOPLE)
KINDS = ("person", "somebody", "clown", "scene")
STYLES = ("photo", "drawing", "sculpture")


class Context(NamedTuple):
    """A job, or a place with its ground, and the probabilities of what it implies."""

    words: str
    implies: dict[str, float]
    ground: str | None = None


CONTEXTS = (
    Context("librarian", {"glasses": 0.85}),
    Context("professor", {"glasses": 0.75, "young": 0.10}),
    Context("watchmaker", {"glasses": 0.80}),
    Context("student", {"young": 0.98}),
    Context("gardener", {"hat": 0.80}),
    Context("sailor", {"hat": 0.60, "glasses": 0.02}),
    Context("singer", {"smiling": 0.90, "glasses": 0.02}),
    Context("in a library", {"glasses": 0.70}, "library"),
    Context("on the beach", {"hat": 0.70}, "sea"),
    Context("in the fields", {}, "fields"),
    Context("in the mountains", {}, "mountains"),
    Context("in the snow", {"hat": 0.85}, "snow"),
)
N_JOBS = sum(context.ground is None for context in CONTEXTS)
MOST_WORDS = 21  # of a caption

# What is drawn for each picture, uniformly in its range.
_CHOICES = {
    "kind": (0, 1),
    "person": (0, len(PEOPLE)),
    "stranger": (0, 2**16),
    "style": (0, 1),
    "has_context": (0, 1),
    "job": (0, N_JOBS),
    "place": (N_JOBS, len(CONTEXTS)),
    "hour": (0, 1),
    "ground": (0, len(GROUNDS) - 1),
    "thing": (0, 1),
    "clown_hair": (0, len(guises.CLOWN_HAIR)),
    "tone": (0, 1),
    **{name: (0, 1) for name in ("glasses", "hat", "smiling", "young")},
}
# The least number above which a picture is of the next kind, style, or hour.
_KINDS, _STYLES, _HOURS = (0.46, 0.74, 0.82), (0.84, 0.92), (0.60, 0.80)
_THINGS = {"sea": (0, 2, 3), "fields": (0, 1), "mountains": (0, 1), "snow": (0, 1), "library": ()}
_IN = {"sea": "by the sea", "library": "in a library"}
_STRANGERS = 10_000  # the identities of those without a name begin here


def labels_of(number: Tensor, **fixed: int) -> dict[str, Tensor]:
    """Say what is on the pictures, int64 (n,) each, without drawing them.

    ``kind``, ``style``, ``person``, ``context``, ``clown_hair``, ``ground``, ``thing`` and ``time``
    are places in ``KINDS``, ``STYLES``, ``NAMES``, ``CONTEXTS`` and so on, -1 where a picture has
    none; ``broad`` and the avatars' ``ATTRIBUTES`` are 0 or 1, -1 on a scene; ``identity`` is the
    avatar's.

    ``fixed`` sets ``kind``, ``style``, ``person`` or ``context`` of all pictures.

    Shapes: ``number`` (n,) of whole numbers from 0 to 2³² - 1.
    Raises: ValueError if one of ``fixed`` is unknown.
    """
    return _labels(number, _choose(number), fixed)


def render(number: Tensor, size: int = 64, **fixed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw the pictures, and say what is on them.

    Shapes: ``number`` (n,) as in :func:`labels_of`; returns images uint8 (n, size, size, 3) and
    the labels, on the device of ``number``. The size is 16 to 128.
    """
    labels = labels_of(number, **fixed)
    images = torch.empty(len(number), 3, size, size, dtype=torch.uint8, device=number.device)
    is_scene = labels["kind"] == KINDS.index("scene")
    chunk = max(1, CHUNK_PIXELS // size**2)
    for kind, paint in ((is_scene, _scenes), (~is_scene, _portraits)):
        for index in kind.nonzero().squeeze(1).split(chunk):
            some = {name: values[index] for name, values in labels.items()}
            pixels = paint(number[index], some, size)
            images[index] = pixels.mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1), labels


def prompts(number: Tensor, labels: dict[str, Tensor], variant: int = 0) -> list[str]:
    """Write a caption of each picture; another ``variant`` mentions other things of it."""
    salt = _mix(torch.tensor([variant + 77], device=number.device))
    coins = _uniform(_mix(number.long() ^ salt), {str(i): (0, 1) for i in range(12)})
    coins = torch.stack(list(coins.values()), 1).tolist()
    rows = zip(*(values.tolist() for values in labels.values()), strict=True)
    said = [dict(zip(labels, row, strict=True)) for row in rows]
    return [_caption(of, coin) for of, coin in zip(said, coins, strict=True)]


def words() -> list[str]:
    """List every word that a caption may hold, sorted."""
    said = " ".join((*NAMES, *THINGS, *guises.CLOWN_HAIR, *(c.words for c in CONTEXTS)))
    said += " a as of in the on by with and at wearing glasses hat smiling bangs beard hair"
    said += " blond black grey young middle aged broad slender person clown photo portrait picture"
    said += " pencil drawing stone sculpture sea fields mountains snow library sunset night"
    return sorted(set(said.split()) - {"nothing"})


def _choose(number: Tensor) -> Traits:
    return Traits(_uniform(_mix(number.long() ^ 0xCA97), _CHOICES))


def _step(share: Tensor, limits: tuple[float, ...]) -> Tensor:
    return sum((share >= limit).long() for limit in limits)


def _labels(number: Tensor, d: Traits, fixed: dict[str, int]) -> dict[str, Tensor]:
    if unknown := set(fixed) - {"kind", "style", "person", "context"}:
        raise ValueError(
            f"Captions cannot fix {', '.join(sorted(unknown))}; they can fix kind, style, person "
            "and context."
        )

    def given(name: str, value: Tensor) -> Tensor:
        return torch.full_like(value, fixed[name]) if name in fixed else value

    none = torch.full_like(number, MISSING, dtype=torch.int64)
    kind = given("kind", _step(d.kind, _KINDS))
    kind = 0 * kind if "person" in fixed else kind
    is_scene, is_clown, is_named = kind == 3, kind == 2, kind == 0
    person = torch.where(is_named, given("person", d.person.long()), none)
    known = torch.tensor(tuple(PEOPLE.values()), device=number.device)[person.clamp(min=0)]
    identity = torch.where(is_named, known, _STRANGERS + d.stranger.long())
    identity = torch.where(is_scene, none, identity)
    style = given("style", torch.where(is_clown | is_scene, 0, _step(d.style, _STYLES)))
    job = d.has_context < torch.where(is_named, 0.12, 0.30)
    context = torch.where(job, d.job.long(), torch.where(d.has_context > 0.75, d.place.long(), -1))
    context = torch.where((style > 0) | is_clown | is_scene, none, given("context", context))
    grounds = [GROUNDS.index(c.ground) if c.ground else MISSING for c in CONTEXTS] + [MISSING]
    place = torch.tensor(grounds, device=number.device)[context]  # the last one is that of none
    ground = torch.where(is_scene, d.ground.long(), place)
    outdoors = (ground >= 0) & (ground != GROUNDS.index("library"))
    time = torch.where(outdoors, _step(d.hour, _HOURS), none)
    thing = torch.where(is_scene, _thing_of(ground, d.thing), none)
    hair = torch.where(is_clown, d.clown_hair.long(), none)
    labels = dict(kind=kind, style=style, person=person, context=context, clown_hair=hair)
    labels |= dict(ground=ground, thing=thing, time=time, identity=identity)
    drawn = draw(identity.clamp(min=0), number.long())
    own = attributes_of(drawn, {})
    some = attributes_of(drawn, _implied(d, context, is_named, is_clown, own))
    some |= {"broad": (drawn.build > 0.5).long()}
    return labels | {name: torch.where(is_scene, none, flag) for name, flag in some.items()}


def _thing_of(ground: Tensor, share: Tensor) -> Tensor:
    nothing = torch.full_like(ground, THINGS.index("nothing"))
    for number, name in enumerate(GROUNDS):
        if choices := _THINGS[name]:
            table = torch.tensor((*choices, THINGS.index("nothing")), device=ground.device)
            chosen = table[(share * len(table)).long()]
            nothing = torch.where(ground == number, chosen, nothing)
    return nothing


def _implied(
    d: Traits, context: Tensor, is_named: Tensor, is_clown: Tensor, own: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Replace attributes by what a context implies; named people keep their age, clowns no hair."""
    given = {}
    for name in ("glasses", "hat", "smiling", "young"):
        odds = [c.implies.get(name, -1.0) for c in CONTEXTS] + [-1.0]
        chance = torch.tensor(odds, device=context.device)[context]
        changes = (chance >= 0) & ~(is_named & (name == "young"))
        given[name] = torch.where(changes, (getattr(d, name) < chance).long(), own[name])
    for name in (*HAIR_COLOURS, "beard", "bangs"):
        given[name] = torch.where(is_clown, 0, own[name])
    return given | {"hat": torch.where(is_clown, 0, given["hat"])}


def _portraits(number: Tensor, labels: dict[str, Tensor], size: int) -> Tensor:
    """Draw portraits of all kinds and styles, (n, 3, size, size) in about [0, 1]."""
    d, images = _choose(number), torch.empty(len(number), 3, size, size, device=number.device)
    drawn = draw(labels["identity"], number.long())
    p = traits(drawn, {name: labels[name] for name in ATTRIBUTES})
    clown, stone = labels["kind"] == 2, labels["style"] == 2
    placed = (labels["ground"] >= 0).nonzero().squeeze(1)
    plain = (~clown & ~stone & (labels["ground"] < 0)).nonzero().squeeze(1)
    if len(plain):
        images[plain] = portrait(_taken(p, plain), size)
    if len(index := clown.nonzero().squeeze(1)):
        painted = guises.as_clown(_taken(p, index), labels["clown_hair"][index], d.tone[index])
        images[index] = portrait(painted, size)
        faces = images[index]
        guises.add_red_nose(faces, painted)
        images[index] = faces
    if len(index := stone.nonzero().squeeze(1)):
        images[index] = portrait(guises.as_sculpture(_taken(p, index), d.tone[index]), size)
    if len(placed):
        people, background = guises.cutout(_taken(p, placed), size)
        some = {name: values[placed] for name, values in labels.items()}
        images[placed] = people + background * _scenes(number[placed], some, size)
    if len(index := (labels["style"] == 1).nonzero().squeeze(1)):
        images[index] = guises.as_drawing(images[index], d.tone[index])
    return images


def _taken(p: Traits, index: Tensor) -> Traits:
    """Select pictures for good, so that their traits can be replaced."""
    return Traits({name: values[index] for name, values in p._values.items()})


def _scenes(number: Tensor, labels: dict[str, Tensor], size: int) -> Tensor:
    numbers = _uniform(_mix(number.long() ^ 0x5CE9E), SCENE)
    numbers |= {name: labels[name].clamp(min=0) for name in ("ground", "time")}
    thing = labels["thing"]
    numbers["thing"] = torch.where(thing < 0, THINGS.index("nothing"), thing)
    return scene(Traits({name: v[:, None, None] for name, v in numbers.items()}), size)


def _caption(of: dict[str, int], coins: list[float]) -> str:
    """Write the caption of one picture; ``coins`` decide what is mentioned."""
    hour = {1: ["at", "sunset"], 2: ["at", "night"]}.get(of["time"], [])
    kind, style = KINDS[of["kind"]], STYLES[of["style"]]
    if kind == "scene":
        ground, thing = GROUNDS[of["ground"]], THINGS[of["thing"]]
        place = _IN.get(ground, f"in the {ground}")
        what = f"a {thing} {place}" if thing != "nothing" else f"the {ground}"
        what = "a library" if ground == "library" else what
        start = "a picture of " if coins[0] < 0.3 else "a photo of " if coins[0] < 0.5 else ""
        return " ".join([start + what, *hour])
    starts = {
        "photo": ("a photo of", "a portrait of", "a picture of", "", ""),
        "drawing": ("a pencil drawing of", "a drawing of"),
        "sculpture": ("a stone sculpture of", "a sculpture of"),
    }[style]
    said = [starts[int(coins[0] * len(starts))], *_who(of, kind, coins)]
    said += _worn(of, kind, style, coins)
    if of["context"] >= N_JOBS and coins[9] < 0.85:
        said.append(CONTEXTS[of["context"]].words)
    if hour and coins[10] < 0.7:
        said += hour
    return " ".join(" ".join(said).split())


def _who(of: dict[str, int], kind: str, coins: list[float]) -> list[str]:
    job = CONTEXTS[of["context"]].words if 0 <= of["context"] < N_JOBS else None
    mentions_job = job is not None and coins[8] < 0.85
    if kind == "person":
        return [NAMES[of["person"]], *(["as a", job] if mentions_job else [])]
    if kind == "clown":
        return ["a clown"]
    build = ["broad" if of["broad"] else "slender"] if coins[1] < 0.4 else []
    age = ["young" if of["young"] else "middle aged"] if coins[2] < 0.5 else []
    return ["a", *build, *age, job if mentions_job else "person"]


def _worn(of: dict[str, int], kind: str, style: str, coins: list[float]) -> list[str]:
    """Mention at most a head's hair or beard, and one or two things that a picture may have."""
    on_head = []
    colour = next((c for c in HAIR_COLOURS if of[c]), None)
    if kind == "clown" and coins[3] < 0.6:
        on_head = [f"{tuple(guises.CLOWN_HAIR)[of['clown_hair']]} hair"]
    elif kind == "somebody":
        if colour and style == "photo" and coins[3] < 0.6:
            on_head.append(colour.replace("_", " "))
        if of["beard"] and coins[4] < 0.6:
            on_head.append("a beard")
        elif of["bangs"] and coins[4] < 0.6:
            on_head.append("bangs")
    worn = [
        f"{'a ' * (name == 'hat')}{name}"
        for name, coin in (("glasses", 5), ("hat", 6))
        if of[name] and coins[coin] < 0.5
    ]
    said = ["with", " and ".join(on_head)] if on_head else []
    if worn:
        return [*said, "wearing", " and ".join(worn)]
    return [*said, "smiling"] if of["smiling"] and coins[7] < 0.5 else said
