import pytest
from games import Echo, Picky

from grpo_lightning.envs.kinds import as_environments, factory_for
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Task


@pytest.mark.parametrize("environment", [Echo(), {"": Echo()}])
def test_an_environment_is_made_anew_for_each_episode(environment):
    with pytest.raises(
        ConfigurationError, match=r"environment '' to be a class or a function .*, but got <games\.Echo"
    ):
        as_environments(environment)


def test_one_environment_is_for_all_tasks():
    assert factory_for(as_environments(Echo), Task("t", env="anything")) is Echo


def test_several_are_chosen_by_name():
    environments = as_environments({"echo": Echo, "picky": Picky})
    assert factory_for(environments, Task("t", env="picky")) is Picky
    with pytest.raises(ConfigurationError, match=r"task 't': .* but it is 'chess' and there are 'echo', 'picky'; add"):
        factory_for(environments, Task("t", env="chess"))
