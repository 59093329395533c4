"""What stands around a picture: its title, what a healthy run looks like, and why it is empty if it is."""

import html
from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """One picture with its words.

    Attributes:
        title: What it shows.
        healthy: What a healthy run looks like there, in one line.
        picture: SVG; empty if there is no data.
        empty: Why there is none.
    """

    title: str
    healthy: str
    picture: str = ""
    empty: str = ""

    def html(self) -> str:
        """The panel as HTML."""
        body = self.picture or f'<p class="empty">{html.escape(self.empty)}</p>'
        return (
            f'<figure class="panel"><h3>{html.escape(self.title)}</h3>{body}'
            f"<figcaption>Healthy: {html.escape(self.healthy)}</figcaption></figure>"
        )
