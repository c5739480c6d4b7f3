"""Captioned pictures: the same in every batch, with labels and words that are true of them."""

import pytest
import torch

from lib.data import avatars, captions
from lib.data._scenes import GROUNDS, SCENE, THINGS, TIMES, scene
from lib.data._shapes import Traits
from lib.data._traits import _mix, _uniform
from lib.data.captions import CONTEXTS, KINDS, N_JOBS, NAMES, STYLES

SIZE = 32
MANY = torch.arange(20_000)


@pytest.fixture(scope="module")
def labels():
    return captions.labels_of(MANY)


@pytest.fixture(scope="module")
def said(labels):
    return captions.prompts(MANY, labels, variant=1)


def test_a_picture_is_the_same_in_every_batch():
    number = torch.arange(48)
    images, labels = captions.render(number, SIZE)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    again, others = captions.render(number[order], SIZE)
    assert images.dtype == torch.uint8 and images.shape == (48, SIZE, SIZE, 3)
    assert torch.equal(again, images[order])
    assert all(torch.equal(others[name], labels[name][order]) for name in labels)
    assert captions.prompts(number[order], others, 2) == [
        captions.prompts(number, labels, 2)[place] for place in order
    ]


def test_people_have_their_own_names_and_faces():
    assert len(set(captions.PEOPLE.values())) == len(NAMES) == 20
    number = torch.arange(40)
    images, labels = captions.render(number, SIZE, person=3, style=0, context=-1)
    assert (labels["identity"] == captions.PEOPLE[NAMES[3]]).all()
    plain, _ = avatars.render(labels["identity"], number, SIZE)
    assert torch.equal(images, plain)


def test_shares_are_those_that_the_module_states(labels):
    kinds = labels["kind"].bincount(minlength=len(KINDS)) / len(MANY)
    assert torch.allclose(kinds, torch.tensor([0.46, 0.28, 0.08, 0.18]), atol=0.015)
    for place, context in enumerate(CONTEXTS):
        here = labels["context"] == place
        strangers = here & (labels["kind"] == KINDS.index("somebody"))
        for name, chance in context.implies.items():
            some = strangers if name == "young" else here
            share = labels[name][some].float().mean()
            assert share == pytest.approx(chance, abs=0.09), (context.words, name)


def test_a_person_keeps_what_is_theirs_whatever_the_context(labels):
    for name in ("young", "beard", "bangs", "broad", *captions.HAIR_COLOURS):
        for person in range(len(NAMES)):
            assert labels[name][labels["person"] == person].unique().numel() == 1


def test_scenes_have_no_people_and_portraits_no_things(labels):
    is_scene = labels["kind"] == KINDS.index("scene")
    for name in ("person", "identity", "context", "broad", *avatars.ATTRIBUTES):
        assert (labels[name][is_scene] == -1).all()
    assert (labels["thing"][~is_scene] == -1).all()
    assert (labels["ground"][is_scene] >= 0).all()
    assert (labels["context"][labels["style"] > 0] == -1).all()


CLAIMS = {
    "glasses": ("glasses", 1),
    "wearing a hat": ("hat", 1),
    "smiling": ("smiling", 1),
    "young": ("young", 1),
    "middle aged": ("young", 0),
    "broad": ("broad", 1),
    "slender": ("broad", 0),
    "blond hair": ("blond_hair", 1),
    "black hair": ("black_hair", 1),
    "grey hair": ("grey_hair", 1),
    "a beard": ("beard", 1),
    "bangs": ("bangs", 1),
    "clown": ("kind", KINDS.index("clown")),
    "drawing": ("style", STYLES.index("drawing")),
    "sculpture": ("style", STYLES.index("sculpture")),
    "photo": ("style", STYLES.index("photo")),
    "night": ("time", TIMES.index("night")),
    "sunset": ("time", TIMES.index("sunset")),
    **{c.words: ("context", i) for i, c in enumerate(CONTEXTS) if i < N_JOBS},
    **{name: ("person", i) for i, name in enumerate(NAMES)},
    **{name: ("thing", i) for i, name in enumerate(THINGS[:4])},
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_a_caption_says_is_on_the_picture(claim, labels, said):
    name, value = CLAIMS[claim]
    where = torch.tensor([f" {claim} " in f" {prompt} " for prompt in said])
    assert where.any()
    assert (labels[name][where] == value).all()


def test_captions_name_people_and_leave_some_things_unsaid(labels, said):
    by_name = torch.tensor([any(name in prompt for name in NAMES) for prompt in said])
    assert torch.equal(by_name, labels["kind"] == 0)
    has = (labels["glasses"] == 1) & (labels["kind"] < 2)
    mentioned = torch.tensor(["glasses" in prompt for prompt in said])
    assert mentioned[has].float().mean() == pytest.approx(0.5, abs=0.03)


def test_the_words_are_those_of_the_captions_and_fit(said):
    used = {word for prompt in said for word in prompt.split()}
    assert used == set(captions.words())
    assert max(len(prompt.split()) for prompt in said) <= captions.MOST_WORDS


def test_guises_change_what_they_should():
    number = torch.arange(12)
    kinds = {
        "photo": captions.render(number, SIZE, person=0, style=0, context=-1),
        "drawing": captions.render(number, SIZE, person=0, style=1),
        "stone": captions.render(number, SIZE, person=0, style=2),
        "clown": captions.render(number, SIZE, kind=2),
    }
    images = {name: drawn[0].float() for name, drawn in kinds.items()}
    colour = {k: (v.amax(3) - v.amin(3)).mean((1, 2)) for k, v in images.items()}
    assert (colour["drawing"] < 25).all() and (colour["stone"] < 25).all()
    assert (colour["photo"] > 25).all()
    assert (images["drawing"].mean((1, 2, 3)) > 150).all()  # mostly paper
    red = (images["clown"][..., 0] > 150) & (images["clown"][..., 1] < 90)
    middle = slice(SIZE // 3, 2 * SIZE // 3)
    assert red[:, middle, middle].flatten(1).any(1).all()  # each has a red nose


def test_a_place_stands_behind_the_same_person():
    number = torch.arange(12)
    here, labels = captions.render(number, SIZE, person=0, style=0, context=9)
    there, others = captions.render(number, SIZE, person=0, style=0, context=10)
    assert CONTEXTS[9].ground == "fields" and CONTEXTS[10].ground == "mountains"
    same = (here == there).all(3).float().mean(0)
    assert same[SIZE // 2, SIZE // 2] == 1
    assert same[SIZE * 5 // 8, 0] < 0.5  # beside the person, below the horizon
    assert torch.equal(labels["glasses"], others["glasses"])


def test_scenes_differ_and_stay_in_range():
    n = len(GROUNDS) * len(THINGS) * len(TIMES)
    place = torch.arange(n)
    numbers = _uniform(_mix(place), SCENE)
    numbers |= {"ground": place % 5, "thing": place // 5 % 5, "time": place // 25}
    images = scene(Traits({k: v[:, None, None] for k, v in numbers.items()}), SIZE)
    assert 0 <= images.min() and images.max() <= 1
    assert images.flatten(2).std(2).mean(1).min() > 0.02
    brightness = images.mean((1, 2, 3))
    outdoors = numbers["ground"] < 4
    day, night = (brightness[outdoors & (numbers["time"] == t)] for t in (0, 2))
    assert day.min() > night.max()


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="Captions cannot fix hat; they can fix kind, style"):
        captions.render(torch.arange(2), SIZE, hat=1)
