"""A strict reader of our pages: tags that close, ids that are one, pictures with a text."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link", "hr", "input", "source"}


class Reader(HTMLParser):
    """Collects the text of a page and what is wrong with it."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.faults, self.links, self.text = [], [], [], [], []
        self.labels = []  # of boxes, and of what unfolds

    def handle_startendtag(self, tag, attrs):  # <polyline />
        pass

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag == "img" and not attrs.get("alt"):
            self.faults.append("a picture without a text")
        if tag == "svg" and not attrs.get("aria-label"):
            self.faults.append("a drawing without a label")
        if tag == "script" or any(name.startswith("on") for name in attrs):
            self.faults.append("a script")
        if tag == "div" and "tabindex" in attrs:
            self.labels.append(attrs["aria-label"])
        if tag == "a":
            self.links.append(attrs["href"])
        if tag == "th" and "scope" not in attrs:
            self.faults.append("a heading of nothing")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes something else")

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "summary":
            self.labels.append(data)


def read_page(page: str) -> str:
    """The text of a page, which must be sound."""
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open and not reader.faults, (reader.open, reader.faults)
    assert len(reader.ids) == len(set(reader.ids))
    assert len(reader.labels) == len(set(reader.labels)) and all(reader.labels)
    assert "<th scope=col></th>" not in page and "<th scope=row></th>" not in page
    assert all(link[1:] in reader.ids for link in reader.links if link.startswith("#"))
    assert page.count("<main>") == page.count("<h1>") == 1
    assert "http" not in page and "src='data:" in page
    return "".join(reader.text)
