"""A parser with which tests look at HTML pages."""

from html.parser import HTMLParser


class Tags(HTMLParser):
    """The tags and the text of a page.

    Asserts that every tag is closed, in the right order.
    """

    VOID = {"meta", "br"}  # elements without an end tag

    def __init__(self, page: str):
        super().__init__()
        self.tags = []  # (name, attributes) of every start tag
        self.open = []  # names of the elements that enclose the current position
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
