"""The page: self-contained, escaped, and showing the numbers of the summary; pictures are drawn."""

from __future__ import annotations

import base64
import html.parser
from xml.etree import ElementTree

import pytest

from dvi_jax.evaluate.report import render_report
from dvi_jax.evaluate.runner import TOO_LONG, Skipped
from dvi_jax.evaluate.summary import summarise

SETTINGS = {
    "questions_file": "<q>.jsonl",
    "drafter": "exit_head",
    "exit_layer": 2,
    "plan": "chain:3",
    "row_class": "1x4",
    "num_layers": 30,
    "device": "cpu",
    "draft_steps": 3,
}


class Page(html.parser.HTMLParser):
    """Collects tags, sources and table rows."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.links, self.rows, self.images = set(), [], [], []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attributes = dict(attrs)
        self.links += [value for key, value in attrs if key in ("href", "src", "srcset", "action", "data")]
        if tag in ("img", "source"):
            self.images.append(attributes.get("src") or attributes["srcset"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th", "table")

    def handle_data(self, data):
        if self.in_cell:
            self.rows[-1][-1] += data.strip()


@pytest.fixture
def page_of(make_turn):
    def make(**options) -> tuple[str, Page]:
        turns = [
            make_turn([(3, 4), (3, 1)], question_id=1, category="<i>odd</i>", seconds=(4, 2)),
            make_turn([(3, 2)], question_id=2, category="qa", seconds=(1, 2), **options),
        ]
        skipped = [Skipped(3, 0, TOO_LONG)]
        text = render_report(summarise(turns, skipped, 3, SETTINGS), turns)
        return text, Page(text)

    return make


def test_the_page_needs_nothing_from_outside(page_of):
    text, page = page_of()
    assert page.links
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert not page.tags & {"script", "link", "iframe", "object", "embed"}
    assert "http" not in text
    assert "url(" not in text


def test_every_picture_is_drawn(page_of):
    """Twice: vector graphics with lines, bars and letters on them, of a size to be read at."""
    _, page = page_of()
    assert len(set(page.images)) == 2 * 4
    for source in page.images:
        picture = ElementTree.fromstring(base64.b64decode(source.split(",", 1)[1]))
        assert min(float(picture.get(side).removesuffix("pt")) for side in ("width", "height")) > 150
        drawn = [element for element in picture.iter() if element.tag.endswith(("}path", "}use"))]
        assert len(drawn) > 30


def test_rows_show_the_numbers(page_of):
    _, page = page_of()
    by_label = {row[0]: row for row in page.rows[::-1]}  # the first table wins
    # 5 tokens in 2 rounds; 3 of 3 and 0 of 1 judged drafts accepted.
    assert by_label["<i>odd</i>"][1:4] == ["1", "2.50", "75.0%"]
    # 2 tokens in 1 s against 2 s; with the prefills 3 in 1.5 s against 2.5 s.
    assert by_label["qa"][-6:] == ["0.50x", "0.50x", "2.0", "0.50x", "0.60x", "1 of 1"]
    assert by_label["overall"][1:4] == ["2", "2.33", "66.7%"]


def test_text_from_files_is_escaped(page_of):
    text, page = page_of()
    assert "<i>odd" not in text
    assert "<q>" not in text
    assert "i" not in page.tags


def test_differences_and_skipped_turns_are_shown(page_of):
    text, _ = page_of()
    assert "2 of 2" in text
    assert "Answers that differ" not in text
    assert TOO_LONG.replace("'", "&#39;") in text
    text, page = page_of(plain_ids=[0, 8, 8])
    assert "Answers that differ" in text
    assert ["2", "1", "1"] in page.rows  # question 2, turn 1, new token 1
    assert "1 of 2" in text
