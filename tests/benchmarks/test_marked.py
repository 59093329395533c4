"""Text between marks."""

import pytest

from benchmarks.marked import inserted, marks


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("a\n<!-- trl -->\nold\n<!-- /trl -->\nb\n", "a\n<!-- trl -->\nnew\n<!-- /trl -->\nb\n"),
        ("a\n<!-- trl --><!-- /trl -->", "a\n<!-- trl -->\nnew\n<!-- /trl -->"),
        ("a <!-- trl -->old<!-- /trl --> b", "a <!-- trl -->\nnew\n<!-- /trl --> b"),
        ("no marks\n", "no marks\n"),
        ("<!-- trl --> no end\n", "<!-- trl --> no end\n"),
        ("<!-- /trl --> no begin\n", "<!-- /trl --> no begin\n"),
        ("<!-- sync -->\nold\n<!-- /sync -->\n", "<!-- sync -->\nold\n<!-- /sync -->\n"),
    ],
)
def test_text_stands_between_its_marks(page, expected):
    assert inserted(page, "trl", "new") == expected
    assert inserted(inserted(page, "trl", "x"), "trl", "new") == expected


def test_marks():
    assert marks("trl") == ("<!-- trl -->", "<!-- /trl -->")
