"""HTML pages that need nothing else: no server, no network, no other file."""

import base64
import hashlib
import html
from collections.abc import Mapping


def filled(template: str, parts: Mapping[str, str]) -> str:
    """Put parts in the places ``{{ name }}`` of a template.

    One pass over the template: what is filled in is not searched for further places.

    Args:
        template: The page.
        parts: HTML by name.
    """
    pieces = template.split("{{")
    done = [pieces[0]]
    for piece in pieces[1:]:
        name, after = piece.split("}}", 1)
        done += [parts[name.strip()], after]
    return "".join(done)


def content_policy(*, style: str, script: str | None = None) -> str:
    """A content security policy, escaped for an attribute, under which only this style and this script count.

    Nothing remote loads, and nothing that a text smuggled in.

    Args:
        style: Content of the page's style element.
        script: Content of its script element; None if it has none.
    """
    scripts = "" if script is None else f"script-src '{_hash(script)}'; "
    return html.escape(f"default-src 'none'; {scripts}style-src '{_hash(style)}'; base-uri 'none'; form-action 'none'")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
