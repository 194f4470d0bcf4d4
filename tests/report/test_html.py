"""rm.report.html: text from data is escaped, pages are self-contained, values are formatted for reading."""

from rm.report import html
from tests.html_tags import Tags

MARKUP = '<script>alert(1)</script> & "quotes" </div></details> <img src=x onerror=alert(1)>'


def test_html_functions_escape_markup_in_text():
    parts = [
        html.heading(MARKUP),
        html.note(MARKUP),
        html.table([MARKUP], [[MARKUP]]),
        html.turn(MARKUP, MARKUP),
        html.details(MARKUP, html.note(MARKUP)),
    ]
    page = Tags(html.page(MARKUP, parts))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.text.count(MARKUP) == 10


def test_html_page_has_no_external_resources():
    page = html.page("t", [html.table(["a"], [[1]])])
    assert not any(word in page for word in ("http", "src=", "<link", "@import", "url("))


def test_html_turn_keeps_beginning_and_end_of_a_very_long_message():
    turn = html.turn("user", "a" * 500_000 + "b" * 500_000)
    assert len(turn) < 7000 and "994,000 characters omitted" in turn and "aaab" not in turn


def test_format_value_formats_each_type_of_value():
    assert [html.format_value(value) for value in (None, 1234, 0.5, (0.25, 1.0), 1e-5, "x")] == [
        "–",
        "1,234",
        "0.5000",
        "0.2500 to 1.0000",
        "1.00e-05",
        "x",
    ]


def test_text_table_aligns_its_columns():
    assert html.text_table(["set", "n"], [["long name", 5], ["b", 1000]]) == [
        "set            n",
        "long name      5",
        "b          1,000",
    ]
