"""rm.report.html: what comes from data is text, never markup."""

from html.parser import HTMLParser

from rm.report import html

EVIL = '<script>alert(1)</script> & "quotes" </div></details> <img src=x onerror=alert(1)>'


class Tags(HTMLParser):
    """The tags and the text of a page, and whether every tag is closed in its place."""

    VOID = {"meta", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.found, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_text_from_data_cannot_become_markup():
    parts = [
        html.heading(EVIL), html.note(EVIL), html.table([EVIL], [[EVIL]]), html.turn(EVIL, EVIL),
        html.details(EVIL, html.note(EVIL)),
    ]  # fmt: skip
    seen = Tags(html.page(EVIL, parts))
    assert not {"script", "img"} & {tag for tag, _ in seen.found}
    assert seen.text.count(EVIL) == 10


def test_a_page_takes_nothing_from_elsewhere():
    whole = html.page("t", [html.table(["a"], [[1]])])
    assert not any(word in whole for word in ("http", "src=", "<link", "@import", "url("))


def test_a_message_of_a_megabyte_shows_its_beginning_and_end():
    shown = html.turn("user", "a" * 500_000 + "b" * 500_000)
    assert len(shown) < 7000 and "994,000 characters left out" in shown and "aaab" not in shown


def test_values_as_people_read_them():
    assert [html.shown(v) for v in (None, 1234, 0.5, (0.25, 1.0), 1e-5, "x")] == [
        "–", "1,234", "0.5000", "0.2500 to 1.0000", "1.00e-05", "x",
    ]  # fmt: skip


def test_a_terminal_table_lines_up():
    assert html.text_table(["set", "n"], [["long name", 5], ["b", 1000]]).splitlines() == [
        "set            n",
        "long name      5",
        "b          1,000",
    ]
