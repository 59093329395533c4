"""Scores of reasoning-gym."""

from typing import Any


class ReasoningGymReward:
    """The dataset's own score of the extracted answer.

    The answer is taken from its tags first: reasoning-gym gives partial credit to any text that contains the
    right answer, so a completion that lists every number would earn it.

    Args:
        tag: Name of the tag around the answer.
    """

    def __init__(self, tag: str = "answer") -> None:
        self._tag = tag

    def __call__(self, completion: str, reasoning_gym_entry: dict[str, Any]) -> float:
        """Score in [0, 1]; 0 without an answer in tags."""
        from reasoning_gym import get_score_answer_fn
        from reasoning_gym.utils import extract_answer

        answer = extract_answer(completion, tag_name=self._tag)
        if answer is None:
            return 0.0
        score = get_score_answer_fn(reasoning_gym_entry["metadata"]["source_dataset"])
        return float(score(answer, reasoning_gym_entry))
