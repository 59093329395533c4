"""Runs under the doctor with one part alone, and values that no constructor would make."""

import copy

from grpo_lightning.callbacks import RunDoctor


class PartDoctor(RunDoctor):
    """The doctor with one part beside its founding checks, that keeps all its verdicts.

    Args:
        part: The part.
    """

    def __init__(self, part, **settings):
        self.part = part
        self.said = []
        super().__init__(max_mismatch=100, **settings)

    def _further_parts(self):
        return (self.part,)

    def _conclude(self, run, verdicts):
        self.said += verdicts
        super()._conclude(run, verdicts)


def forged(value, **changes):
    """A copy of a frozen dataclass with other fields, past its checks."""
    made = copy.copy(value)
    for name, change in changes.items():
        object.__setattr__(made, name, change)
    return made
