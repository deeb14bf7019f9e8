"""Functions beside a recipe: found by name, and whatever they raise is told as theirs."""

import traceback
from pathlib import Path

import pytest

from fogline_models import hooks
from fogline_models.errors import BadInput


def load(folder: Path, text: str, name: str = "nets.py:edge"):
    (folder / "nets.py").write_text(text, encoding="utf-8")
    return hooks.load(folder, name, "source.torch")


def refusal(folder: Path, text: str, name: str = "nets.py:edge") -> str:
    with pytest.raises(BadInput) as caught:
        load(folder, text, name)
    said = str(caught.value)
    assert said.startswith("source.torch: ")
    assert "\n" not in said
    return said


def test_a_function_is_found_and_may_use_the_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text("SIDE = 8\n")
    assert load(tmp_path, "from . import data\ndef edge(): return data.SIDE\n")() == 8


def test_families_that_are_called_alike_are_kept_apart(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        folder = tmp_path / name / "digits"
        folder.mkdir(parents=True)
        found.append(load(folder, f"def edge(): return {name!r}\n")())
    assert found == ["a", "b"]


@pytest.mark.parametrize(
    "name", ["nets.py", "nets:edge", "../nets.py:edge", "nets.py:", "nets.py:a b", "a.b.py:edge"]
)
def test_a_name_that_names_no_function_is_refused(tmp_path: Path, name: str) -> None:
    assert "must name a function as file.py:function" in refusal(tmp_path, "", name)


def test_a_file_and_a_function_that_are_not_there_are_named(tmp_path: Path) -> None:
    assert "there is no hub.py beside the recipe" in refusal(tmp_path, "", "hub.py:edge")
    assert "nets.py has no function edge" in refusal(tmp_path, "edge = 1\n")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import nowhere_at_all\n", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def edge(:\n", "SyntaxError: "),
        ("x = 1\ny = x / 0\n", "ZeroDivisionError: division by zero (nets.py, line 2)"),
    ],
)
def test_a_file_that_cannot_be_imported_is_told_with_its_line(
    tmp_path: Path, text: str, says: str
) -> None:
    assert f"nets.py cannot be imported: {says}" in refusal(tmp_path, text)


def test_what_a_function_raises_is_told_with_its_line_and_kept_as_the_cause(
    tmp_path: Path,
) -> None:
    hook = load(tmp_path, "def edge(epochs):\n    raise ValueError('too few\\nepochs')\n")
    with pytest.raises(BadInput) as caught:
        hook(epochs=1)
    said = str(caught.value)
    assert said == "source.torch: nets.py:edge raised ValueError: too few (nets.py, line 2)"
    assert isinstance(caught.value.__cause__, ValueError)
    assert 'nets.py", line 2' in "".join(traceback.format_exception(caught.value.__cause__))


def test_an_exception_without_words_is_told_too(tmp_path: Path) -> None:
    hook = load(tmp_path, "def edge():\n    raise KeyError\n")
    with pytest.raises(BadInput, match=r"raised KeyError: without a message \(nets.py, line 2\)"):
        hook()


def test_what_a_function_refuses_in_our_own_words_stays_as_it_is(tmp_path: Path) -> None:
    hook = load(
        tmp_path,
        "from fogline_models.errors import BadInput\ndef edge(): raise BadInput('no items left')\n",
    )
    with pytest.raises(BadInput, match=r"^no items left$"):
        hook()


def test_arguments_that_a_function_does_not_take_are_named_before_it_runs(tmp_path: Path) -> None:
    hook = load(tmp_path, "def edge(splits, progress, *, width):\n    raise SystemExit\n")
    with pytest.raises(
        BadInput, match=r"is called with \(\.\.\., \.\.\., wide=\.\.\.\): missing .*'width'"
    ):
        hook({}, None, wide=3)
    with pytest.raises(BadInput, match=r"edge\(splits, progress, \*, width\) is called with not"):
        hook()
    named = hooks.load(tmp_path, "nets.py:edge", "source.torch", passed=("splits", "progress"))
    with pytest.raises(
        BadInput, match=r"is called with \(splits, progress, wide=\.\.\.\): missing"
    ):
        named({}, None, wide=3)


def test_a_changed_file_has_another_digest(tmp_path: Path) -> None:
    load(tmp_path, "def edge(): return 1\n")
    before = hooks.digests(tmp_path)
    (tmp_path / "nets.py").write_text("def edge(): return 2\n")
    assert before.keys() == hooks.digests(tmp_path).keys() == {"nets.py"}
    assert before != hooks.digests(tmp_path)


def test_files_that_functions_read_are_found_by_name_pattern_and_folder(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    for name in ("a.csv", "b.csv", "weights/w.pt"):
        (tmp_path / name).write_text(name)
    found = hooks.reads(tmp_path, ["*.csv", "weights"])
    assert list(found) == ["a.csv", "b.csv", "weights/w.pt"]
    assert list(hooks.reads(tmp_path, [str(tmp_path / "a.csv")])) == ["a.csv"]
    with pytest.raises(BadInput, match=r"reads: there is no file '\*\.txt' in "):
        hooks.reads(tmp_path, ["*.txt"])


def test_code_is_that_of_the_folder_and_of_the_packages_in_it(tmp_path: Path) -> None:
    for name in ("nets.py", "parts/__init__.py", "parts/deep/__init__.py", "out/left.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "parts" / "again").symlink_to(tmp_path / "parts")  # which would lead back
    assert list(hooks.files(tmp_path)) == ["nets.py", "parts/__init__.py", "parts/deep/__init__.py"]


def test_code_that_was_edited_is_the_code_that_runs(tmp_path: Path) -> None:
    for answer in (1, 2):
        (tmp_path / "data.py").write_text(f"def make():\n    return {answer}\n")
        assert hooks.load(tmp_path, "data.py:make", "data.make")() == answer
