from pathlib import Path

import pytest
from trainmaster.api.config import Model, Optimizer, ParameterGroup
from trainmaster.api.errors import ConfigError
from trainmaster.api.experiments.base import PlacedModel
from trainmaster.system.cluster import check_groups

GROUPS = tuple(ParameterGroup(parameters=pattern, learning_rate=1e-3) for pattern in ("embed", "hed", "norm"))


def placed(optimizer: Optimizer | None) -> PlacedModel:
    return PlacedModel(model=Model(path=Path("none")), field="actor", optimizer=optimizer)


def test_a_group_that_no_stage_has_a_parameter_of_is_named():
    message = r"optimizer\.groups\[1\]\.parameters = 'hed': none of actor's parameters is in it: no name matches"
    with pytest.raises(ConfigError, match=message):
        check_groups(placed(Optimizer(groups=GROUPS)), {0, 2})


def test_groups_that_some_stage_has_are_taken():
    check_groups(placed(Optimizer(groups=GROUPS)), {0, 1, 2})
    check_groups(placed(Optimizer()), set())
    check_groups(placed(None), set())
