"""Tables in the documentation that commands write: each stands between two comments."""


def marks(name: str) -> tuple[str, str]:
    """The comments before and behind the text of a name."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def inserted(page: str, name: str, text: str) -> str:
    """A page with the text of a name in place of what it had; as it was if it has no place for it."""
    first, last = marks(name)
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    return f"{before}{begin}\n{text}\n{end}{after}" if end else page
