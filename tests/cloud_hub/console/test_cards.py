import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.console import cards

TAG = re.compile(r"<[^>]*>")


def body(text: str) -> str:
    return str(cards.read(text.encode()).body)


def test_a_card_is_read_as_markdown_below_the_headings_of_the_page() -> None:
    found = cards.read(
        b"---\nlicense: mit\n---\n\n# digits 1.0.0\n\n*Clean*, `code`.\n\n## Data\n\n"
        b"| a | b |\n|---|--:|\n| 1 | 2 |\n"
    )
    assert found.head == "license: mit"
    assert not found.cut
    text = str(found.body)
    for said in (
        "<h3>digits 1.0.0</h3>",
        "<h4>Data</h4>",
        "<em>Clean</em>",
        "<code>code</code>",
        '<td class="number">2</td>',
    ):
        assert said in text, said
    assert "style" not in text


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[a](javascript:alert(1))",
        "[a](JaVaScRiPt:alert(1))",
        "[a](data:text/html,<script>alert(1)</script>)",
        "[a](/deploy?release=digits@1&to=all)",
        "[a](//elsewhere.example/x)",
        "<javascript:alert(1)>",
        "![a](https://elsewhere.example/pixel.png)",
        '[a]: javascript:alert(1)\n\n[a] <b onclick="x">',
        "```<script>\n</code><script>alert(1)</script>\n```",
        '---\nx: <script>alert(1)</script>\n---\n<iframe src="//x">',
        "<style>* { display: none }</style>",
        '| a |\n|---|\n| <td style="x"> |',
    ],
)
def test_nothing_in_a_card_runs_fetches_or_leads_into_the_console(text: str) -> None:
    for tag in TAG.findall(body(text)):
        name = re.match(r"</?(\w+)", tag)
        assert name is not None, tag
        assert name[1] not in ("script", "img", "iframe", "style", "form", "b"), tag
        assert not re.search(r"\s(href|src|style|on\w+)=", tag), tag


def test_links_to_the_web_say_nothing_of_where_they_were_followed() -> None:
    text = body("[paper](https://example.org/a?b=1&c=2)")
    assert text == (
        '<p><a href="https://example.org/a?b=1&amp;c=2" rel="noopener noreferrer nofollow">'
        "paper</a></p>\n"
    )


@given(st.text(max_size=300) | st.text("[]()!*_`<>#|-~:\\ \nab", max_size=300))
def test_any_text_is_a_card_without_tags_of_its_own(text: str) -> None:
    for tag in TAG.findall(body(text)):
        assert re.match(
            r"</?(p|h[345]|em|strong|s|code|pre|ul|ol|li|blockquote|hr|br|table|thead|tbody|tr|th"
            r"|td|a|span)\b",
            tag,
        ), tag


@pytest.mark.parametrize("data", [b"\xff\xfe# \x00\x80", b"", b"---\n---", b"---\n", b"\r\n" * 9])
def test_bytes_that_are_no_card_are_shown_all_the_same(data: bytes) -> None:
    assert cards.read(data).cut is False


@pytest.mark.parametrize("part", ["![", "[a](", "> ", "*a_ ", "|a" * 50 + "\n", "- ", "`"])
def test_a_card_made_to_be_slow_is_cut_and_read_soon(part: str) -> None:
    began = time.process_time()
    found = cards.read((part * (1 << 20))[: 1 << 20].encode())
    assert found.cut
    assert len(found.body) < 40 * cards.LONGEST_CARD
    assert time.process_time() - began < 5.0  # 0.6 s where this was written
