"""Ready-made rewards for tasks with a known answer."""

import re

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def last_number_correct(completion: str, answer: str | float) -> float:
    """1 if the last number in the completion is the answer, else 0.

    >>> last_number_correct("3 + 4 = 7.", answer="7")
    1.0
    >>> last_number_correct("It is 8, not 7, so 8", answer="7")
    0.0
    """
    numbers = _NUMBER.findall(completion.replace(",", ""))
    return float(bool(numbers) and float(numbers[-1]) == float(str(answer).replace(",", "")))
