"""Rewards for how an answer is given, whatever it says."""


def overlong_penalty(length: int, *, max_length: int, buffer: int) -> float:
    """DAPO's soft overlong punishment: nothing, then falling to -1 over the last tokens that are allowed.

        0                                         length <= max_length - buffer
        (max_length - buffer - length) / buffer   up to max_length
        -1                                        beyond

    It is added to the reward of the answer.

    Source: DAPO, equation 13, https://arxiv.org/abs/2503.14476
    Peers: TRL (`get_soft_overlong_punishment`), verl (`overlong_buffer_cfg`)
    Departs: verl multiplies it with a factor and, beyond max_length, lets it fall on below -1.
    Use: where answers are cut off at max_length: a hard penalty for those would punish good answers that are a little
        too long as much as bad ones.

    Args:
        length: Tokens of the answer.
        max_length: Most tokens that are allowed.
        buffer: Tokens before that over which the penalty grows, from 0 (none) to max_length.

    Returns:
        From -1 to 0.

    Raises:
        ValueError: If length is negative, max_length not positive, or buffer not from 0 to max_length.
    """
    if length < 0 or max_length < 1:
        raise ValueError(f"expected length >= 0 and max_length >= 1, but got {length} and {max_length}")
    if not 0 <= buffer <= max_length:
        raise ValueError(f"expected a buffer from 0 to max_length = {max_length}, but got {buffer}")
    free = max_length - buffer
    if length <= free:
        return 0.0
    return (free - length) / buffer if length <= max_length else -1.0
