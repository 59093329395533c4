import random
import sys
import threading
from types import ModuleType

import pytest

from grpo_lightning.envs.own_random import drawing_from, isolate

SOURCE = """
import random

def seed(value):
    random.seed(value)

def draw():
    return [random.random() for _ in range(50)]

def other():
    return random.Random(5).random()
"""


@pytest.fixture
def dice(monkeypatch):
    """A package that draws from the global generator, in one of its modules."""
    package, module = ModuleType("dice_package"), ModuleType("dice_package.rolls")
    exec(SOURCE, vars(module))
    monkeypatch.setitem(sys.modules, "dice_package", package)
    monkeypatch.setitem(sys.modules, "dice_package.rolls", module)
    isolate("dice_package")
    return module


def test_draws_come_from_the_generator_that_was_given(dice):
    with drawing_from(random.Random(3)):
        drawn = dice.draw()
    own = random.Random(3)
    assert drawn == [own.random() for _ in range(50)]


def test_seeding_within_leaves_the_global_generator_alone(dice):
    random.seed(1)
    before = random.getstate()
    with drawing_from(random.Random(3)):
        dice.seed(7)
        drawn = dice.draw()
    assert random.getstate() == before
    assert drawn[0] == random.Random(7).random()


def test_outside_it_is_the_global_generator(dice):
    random.seed(1)
    expected = [random.random() for _ in range(50)]
    dice.seed(1)
    assert dice.draw() == expected


def test_what_a_generator_does_not_have_is_the_modules(dice):
    with drawing_from(random.Random(3)):
        assert dice.other() == random.Random(5).random()


def test_threads_do_not_share_a_generator(dice):
    drawn = {}
    together = threading.Barrier(16)

    def play(seed):
        with drawing_from(random.Random(seed)):
            together.wait()
            drawn[seed] = dice.draw() + dice.draw()

    threads = [threading.Thread(target=play, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(16):
        own = random.Random(seed)
        assert drawn[seed] == [own.random() for _ in range(100)]


def test_only_modules_of_the_package_are_changed(dice, monkeypatch):
    neighbour = ModuleType("dice_package_2")
    exec(SOURCE, vars(neighbour))
    monkeypatch.setitem(sys.modules, "dice_package_2", neighbour)
    isolate("dice_package")
    assert vars(neighbour)["random"] is random
