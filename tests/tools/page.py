"""An HTML page as a browser without a network would have it."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """What a page shows, what it loads, and which elements it leaves open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.sources, self.open = "", list[str](), list[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
