"""Markdown as TensorBoard shows it."""

from html.parser import HTMLParser


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._open = False

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._open = True
        elif tag == "br" and self._open:
            self.rows[-1][-1] += "\n"
        else:
            assert not self._open, f"text was taken for <{tag}>"

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._open = False

    def handle_data(self, data):
        if self._open:
            self.rows[-1][-1] += data


def shown_table(markdown: str) -> list[list[str]]:
    """The text in the cells of a Markdown table after TensorBoard has rendered it, header first."""
    from tensorboard.plugin_util import markdown_to_safe_html

    parser = _Cells()
    parser.feed(markdown_to_safe_html(markdown))
    return parser.rows
