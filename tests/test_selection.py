"""Simulated users mark what they are told to, and marks find their latents."""

import pytest
import torch

from lib.methods.selection import marks_of, simulated_user, simulated_users


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n_pictures", [50, 500])
@pytest.mark.parametrize("error_rate", [0.0, 0.05, 0.1, 0.2])
def test_a_simulated_user_errs_as_often_as_told(n_pictures, error_rate):
    labels = torch.rand(1000, generator=seeded()) < 0.1
    marks = simulated_user(labels, n_pictures, error_rate, seeded(1))
    shown = torch.cat((marks.positives, marks.negatives))
    assert len(shown.unique()) == n_pictures
    wrong = (~labels[marks.positives]).sum() + labels[marks.negatives].sum()
    assert wrong == round(error_rate * n_pictures)
    again = simulated_user(labels, n_pictures, error_rate, seeded(1))
    assert (again.positives == marks.positives).all()
    other = simulated_user(labels, n_pictures, error_rate, seeded(2))
    assert other.negatives.tolist() != marks.negatives.tolist()


def test_simulated_users_differ_only_in_what_is_varied():
    labels = torch.rand(600, generator=seeded()) < 0.2
    users = {(n, error): marks for n, error, marks in simulated_users(labels)}
    assert len(users) == 16

    def shown(marks):
        return set(torch.cat((marks.positives, marks.negatives)).tolist())

    def wrong(marks):
        missed = marks.negatives[labels[marks.negatives]]
        return set(missed.tolist()) | set(marks.positives[~labels[marks.positives]].tolist())

    assert shown(users[50, 0.0]) < shown(users[200, 0.2]) < shown(users[500, 0.05])
    assert set() == wrong(users[200, 0.0]) < wrong(users[200, 0.05]) < wrong(users[200, 0.2])


def test_marks_split_latents_in_their_order():
    z = torch.arange(5.0).unsqueeze(1)
    positive, negative = marks_of(torch.tensor([False, True, False, True, False])).split(z)
    assert (positive.flatten().tolist(), negative.flatten().tolist()) == ([1, 3], [0, 2, 4])


ONES, MARKED = torch.ones(3, 2), torch.tensor([True, False, True])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: marks_of(torch.zeros(3).bool()).split(ONES), "No picture is marked"),
        (lambda: marks_of(torch.ones(3).bool()).split(ONES), "All pictures are marked"),
        (lambda: marks_of(MARKED).split(ONES[:2]), "Picture 2 has no latent, got 2"),
        (lambda: simulated_user(torch.ones(9), 10, 0.0, seeded()), "look at 10 of 9 pictures"),
        (lambda: simulated_user(torch.ones(9), 5, 0.6, seeded()), "error rate is 0.6"),
        (lambda: simulated_user(torch.full((9,), 2), 5, 0.1, seeded()), "other values than 0 and"),
    ],
)
def test_bad_input_is_named_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
