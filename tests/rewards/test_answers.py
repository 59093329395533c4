import pytest

from grpo_lightning.rewards import last_number_correct


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("3 + 4 = 7.", "7", 1.0),
        ("7", "7", 1.0),
        ("The answer is 7, I think.", "7", 1.0),
        ("7 or 8", "7", 0.0),
        ("8, then 7", "7", 1.0),
        ("17", "7", 0.0),
        ("70", "7", 0.0),
        ("7.0", "7", 1.0),
        ("7.5", "7", 0.0),
        ("-7", "7", 0.0),
        ("-7", "-7", 1.0),
        ("It is 1,234.", "1234", 1.0),
        ("1,234,567", "1234567", 1.0),
        ("1,234", "234", 0.0),
        ("$12.50", "12.5", 1.0),
        ("007", "7", 1.0),
        ("", "7", 0.0),
        ("no number at all", "7", 0.0),
        ("seven", "7", 0.0),
        ("5 5 5\n\n7\n", "7", 1.0),
    ],
)
def test_last_number_decides(completion, answer, expected):
    result = last_number_correct(completion, answer=answer)
    assert result == expected
    assert type(result) is float


def test_answer_may_be_a_number():
    assert last_number_correct("= 7", answer=7) == 1.0
    assert last_number_correct("= 7", answer=8.0) == 0.0


def test_answer_may_have_thousands_separators_like_the_completion():
    assert last_number_correct("It is 1,234.", answer="1,234") == 1.0
    assert last_number_correct("It is 1234.", answer="1,234") == 1.0
    assert last_number_correct("It is 234.", answer="1,234") == 0.0
