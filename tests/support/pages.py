"""HTML pages, as tests look at them."""

from html.parser import HTMLParser


class Outline(HTMLParser):
    """Tags, what they refer to, the script, and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.policy = self.script = self.text = ""
        self._in = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._in = tag
        given = dict(attrs)
        self.references += [v or "" for k, v in attrs if k in ("href", "src", "action", "data")]
        assert not [k for k in given if k.startswith("on")]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.script += data
        elif self._in != "style":
            self.text += data
