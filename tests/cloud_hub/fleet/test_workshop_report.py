from collections.abc import Callable
from pathlib import Path

import pytest

from cloud_hub.fleet import workshop_report
from cloud_hub.fleet.workshop_report import DOCUMENT, MAX_DOCUMENT_BYTES, MAX_PAGE_BYTES, PAGE


def test_what_lies_beside_a_bundle_is_kept_as_it_came(tmp_path: Path) -> None:
    (tmp_path / DOCUMENT).write_text('{ "figures": 1}')
    (tmp_path / PAGE).write_text("<p>\N{SNOWMAN}</p>")
    found = workshop_report.read(tmp_path)
    assert (found.document, found.notes) == ('{ "figures": 1}', ())
    assert found.page.decode() == "<p>\N{SNOWMAN}</p>"
    assert workshop_report.parse(found.document) == {"figures": 1}


def test_a_bundle_needs_no_report(tmp_path: Path) -> None:
    found = workshop_report.read(tmp_path)
    assert (found.document, found.page, found.notes) == ("", b"", ())
    assert workshop_report.parse("") == {}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"[1]", "it is a list"),
        (b'{"a":', "Expecting value"),
        (b'{"a": NaN}', "JSON has no NaN"),
        (b'{"a": -Infinity}', "JSON has no -Infinity"),
        (b'{"a": 1e999}', "JSON has no 1e999"),
        (b'{"a": "\xff"}', "invalid start byte"),
        (b'{"a":' * 100_000, "recursion"),
        (b'{"a": ' + b"1" * 5000 + b"}", "digits"),
        (b" " * (MAX_DOCUMENT_BYTES + 1), "larger than 1 MiB"),
    ],
)
def test_a_document_that_is_no_report_is_left_out_with_the_reason(
    tmp_path: Path, data: bytes, why: str
) -> None:
    (tmp_path / DOCUMENT).write_bytes(data)
    (tmp_path / PAGE).write_text("page")
    found = workshop_report.read(tmp_path)
    assert (found.document, found.page) == ("", b"page")
    (note,) = found.notes
    assert note.startswith("report.json was left out: ")
    assert why in note
    assert len(note) < 250


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: path.write_bytes(b"x" * (MAX_PAGE_BYTES + 1)), "larger than 4 MiB"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "not UTF-8"),
        (lambda path: path.symlink_to("/etc/hostname"), "not a regular file"),
        (lambda path: path.mkdir(), "not a regular file"),
    ],
)
def test_a_page_that_cannot_be_kept_is_left_out_with_the_reason(
    tmp_path: Path, make: Callable[[Path], object], why: str
) -> None:
    make(tmp_path / PAGE)
    found = workshop_report.read(tmp_path)
    assert found.page == b""
    (note,) = found.notes
    assert note.startswith("report.html was left out: ")
    assert why in note


def test_a_page_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    pages = workshop_report.ReportPages(tmp_path / "reports")
    assert pages.read("a" * 64) == b""
    pages.keep("a" * 64, b"page")
    assert pages.read("a" * 64) == b"page"
    with pytest.raises(ValueError, match="not a SHA-256"):
        pages.path("../../etc/passwd")
