"""The objectives' own random numbers: Philox's published words, the normal law, and no dependence on the batch."""

import pytest
import torch
from scipy import stats

from limbeck.trainer.objectives.randomness import normal, philox, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Salmon et al. 2011, the known answers published with Random123
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ONES] * 4, (ONES, ONES), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_words_are_those_of_the_authors(counter, key, words):
    assert [int(word) for word in philox([torch.tensor([word]) for word in counter], key)] == words


def test_normals_are_normal_and_uncorrelated():
    found = normal(3, "eps", torch.arange(20_000), (7,))
    assert found.shape == (20_000, 7)
    assert stats.kstest(found.flatten().numpy(), "norm").pvalue > 1e-3
    assert (torch.corrcoef(found.T) - torch.eye(7)).abs().max() < 4 / 20_000**0.5
    assert stats.kstest(uniform(3, "t", torch.arange(20_000)).numpy(), "uniform").pvalue > 1e-3


def test_a_number_depends_on_its_seed_purpose_and_position_alone():
    positions = torch.tensor([5, 2**40 + 1, 17])
    whole = normal(1, "eps", positions, (2, 3))
    assert torch.equal(whole[1:], normal(1, "eps", positions[1:], (2, 3)))
    for other in (normal(2, "eps", positions, (2, 3)), normal(1, "z", positions, (2, 3)), whole.roll(1, 0)):
        assert not torch.isclose(whole, other).any()
