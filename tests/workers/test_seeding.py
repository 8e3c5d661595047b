"""Seeds by what they are for."""

import torch
from trainmaster.workers.seeding import seed_of


def test_a_seed_is_that_of_its_purpose_and_fits_a_generator() -> None:
    purposes = [(seed, name, at) for seed in (0, 1) for name in ("a", "b.c") for at in range(20)]
    seeds = [seed_of(*each) for each in purposes]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [seed_of(*each) for each in purposes]
    assert seed_of(3, "model.norm") == 16_681_817_865_935_983_026, "in every process and version"
    assert max(seeds) > 2**63, "all of 64 bits"
    drawn = {float(torch.rand((), generator=torch.Generator().manual_seed(seed))) for seed in seeds}
    assert len(drawn) > len(seeds) - 2
