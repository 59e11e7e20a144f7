"""Units of the UNet that are meant for one value: which, how they are cut off, and that the hooks go."""

import pytest
import torch

from bakeout.builtin.shapes import architecture
from bakeout.builtin.shapes.routing import GROUPS, group_of, open_groups, routed, silenced
from bakeout.builtin.shapes.scenes import ATTRIBUTES


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return architecture.unet().eval()


def noise_prediction(unet, rows=3):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 8, 8, generator=generator).expand(rows, -1, -1, -1)
    text = torch.randn(1, 77, 96, generator=generator).expand(rows, -1, -1)
    with torch.no_grad():
        return unet(latents, 500, text).sample


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_every_value_and_the_empty_prompt_have_units_in_every_layer():
    assert len(GROUPS) == sum(map(len, ATTRIBUTES.values())) + 1
    for width in (256, 384):
        counts = torch.bincount(group_of(torch.arange(width)), minlength=len(GROUPS))
        assert width // len(GROUPS) <= counts.min() <= counts.max() <= width // len(GROUPS) + 1


def test_a_caption_opens_the_groups_that_it_mentions():
    opened = open_groups(["a red star with stripes", "a shape", ""])
    assert [{GROUPS[i] for i in row.nonzero().flatten()} for row in opened] == [{"red", "star", "striped"}, set(), {""}]


def test_a_routed_row_runs_through_its_groups_only(unet):
    groups = torch.zeros(3, len(GROUPS), dtype=torch.bool)
    groups[0] = True
    with routed(unet, groups, torch.tensor([True, True, False])) as spilled:
        everything, nothing, free = noise_prediction(unet)
    plain = noise_prediction(unet)[0]
    assert distance(everything, plain) < 1e-5
    assert distance(free, plain) < 1e-5
    assert distance(nothing, plain) > 1e-3
    assert len(spilled) == 21
    assert all(0.6 < share < 0.7 for share in map(float, spilled))  # two rows of three have none of their own
    assert torch.equal(noise_prediction(unet)[0], plain)


def test_a_silenced_group_is_what_cutting_it_off_gives(unet):
    star = GROUPS.index("star")
    groups = torch.ones(3, len(GROUPS), dtype=torch.bool)
    groups[:, star] = False
    with routed(unet, groups, torch.ones(3, dtype=torch.bool)):
        cut = noise_prediction(unet)
    with silenced(unet, torch.tensor([star, star, GROUPS.index("red")])):
        silent = noise_prediction(unet)
    assert distance(silent[:2], cut[:2]) < 1e-5
    assert distance(silent[2], cut[2]) > 1e-4
    assert distance(noise_prediction(unet), cut) > 1e-4
