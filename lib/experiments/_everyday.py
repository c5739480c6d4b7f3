"""Prompts on everyday things, by the thousand: what a text-to-image model should keep.

They stand in for the 5000 prompts that the authors of Selective Amnesia had written by a language
model. Nobody in them has a name.
"""

STYLES = (
    "a photo of",
    "a black and white photo of",
    "a wide shot of",
    "a close up of",
    "an oil painting of",
    "a watercolour of",
    "a pencil sketch of",
    "a poster of",
    "a woodcut of",
    "a comic panel of",
    "a postcard of",
    "a film still of",
    "a mosaic of",
    "a pixel art picture of",
)
THINGS = (
    "a fisherman in a raincoat",
    "a nurse in uniform",
    "a violinist in a dark suit",
    "a gardener with a straw hat",
    "an old couple in winter coats",
    "a baker in an apron",
    "a cyclist with a helmet",
    "a crowd of commuters",
    "a sleeping cat",
    "a black dog",
    "a flock of geese",
    "a horse and a cart",
    "a red bicycle",
    "a bowl of oranges",
    "a wooden chair",
    "a steam train",
    "a small sailing boat",
    "a stone bridge",
    "a lighthouse",
    "an apple tree",
)
PLACES = (
    "in a market",
    "in a railway station",
    "in a kitchen",
    "in a museum",
    "in an old library",
    "in a workshop",
    "in a school yard",
    "in a village",
    "in a big city",
    "in a pine forest",
    "in a desert",
    "in the mountains",
    "in a harbour",
    "in a meadow",
    "by a river",
    "by the sea",
    "on a snowy road",
    "on a rainy evening",
    "on a bright morning",
    "under a starry sky",
)
N = len(STYLES) * len(THINGS) * len(PLACES)
STRIDE = 2347  # has no divisor in common with N, so that neighbours differ and all are reached


def everyday(n: int, first: int = 0) -> list[str]:
    """Write ``n`` different prompts; those from another ``first`` are others.

    Raises: ValueError if there are not as many.
    """
    if first + n > N:
        raise ValueError(f"Got {first + n} everyday prompts to write; there are {N}: ask for less.")
    said = []
    for number in range(first, first + n):
        style, rest = divmod(number * STRIDE % N, len(THINGS) * len(PLACES))
        thing, place = divmod(rest, len(PLACES))
        said.append(f"{STYLES[style]} {THINGS[thing]} {PLACES[place]}")
    return said
