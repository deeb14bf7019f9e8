"""A step is made once from the same facts, whole or not at all, whoever else is building."""

import errno
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fogline_models.errors import BadInput, TooLittle
from fogline_models.steps import CACHE, RECORD, Say, Steps, default_cache


class Bench:
    """Steps over one cache, what they said, and how often the work was done."""

    def __init__(self, cache: Path, *again: str) -> None:
        self.said: list[str] = []
        self.done = 0
        self.steps = Steps(cache, self.said.append, again=frozenset(again), clock=lambda: 0.0)

    def work(self, into: Path, say: Say) -> None:
        self.done += 1
        say("working")
        (into / "deep").mkdir()
        (into / "deep" / "result.txt").write_text("42")

    def make(self, facts: dict[str, object] | None = None, do: object = None) -> Path:
        work: Callable[[Path, Say], None] = do or self.work  # type: ignore[assignment]
        return self.steps.make("digits 1.0.0", "export", facts or {"a": 1}, work)


def kept(cache: Path) -> list[str]:
    """What lies in the step's folder besides locks."""
    return sorted(path.name for path in (cache / "export").iterdir() if path.suffix != ".lock")


def test_the_same_facts_are_not_worked_on_again_in_another_build(tmp_path: Path) -> None:
    first, second = Bench(tmp_path), Bench(tmp_path)
    made = first.make({"b": [1, 2], "a": {"x": None}})
    assert second.make({"a": {"x": None}, "b": [1, 2]}) == made
    assert (first.done, second.done) == (1, 0)
    assert (made / "deep" / "result.txt").read_text() == "42"
    assert second.said == ["[1/1] digits 1.0.0: export: done before"]
    assert json.loads((made / RECORD).read_text())["facts"]["b"] == [1, 2]


@pytest.mark.parametrize("facts", [{"a": 2}, {"a": "1"}, {"a": 1, "b": None}, {}])
def test_other_facts_are_another_step(tmp_path: Path, facts: dict[str, object]) -> None:
    bench = Bench(tmp_path)
    assert bench.make({"a": 1}) != bench.make({"step": "export", **facts})
    assert bench.done == 2


def test_steps_say_which_one_of_how_many_they_are(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.steps.expect(["export", "run"])
    bench.make()
    assert bench.said == [
        "[1/2] digits 1.0.0: export",
        "[1/2] digits 1.0.0: export: working",
        "[1/2] digits 1.0.0: export: 0.0 s",
    ]


def test_a_silent_step_is_said_to_be_at_it_and_one_that_speaks_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = threading.Event()
    said: list[str] = []

    def hear(line: str) -> None:
        said.append(line)
        if re.fullmatch(r"\[1/1\] digits 1.0.0: export: exporting, \d+ s so far", line):
            heard.set()

    def work(into: Path, say: Say) -> None:
        say("exporting")
        assert heard.wait(20)  # in silence

    with monkeypatch.context() as impatient:
        impatient.setattr("fogline_models.steps.SILENCE_S", 0.01)
        Steps(tmp_path, hear).make("digits 1.0.0", "export", {}, work)
    assert "[1/1] digits 1.0.0: export: exporting" in said
    assert not any(thread.name == "progress" for thread in threading.enumerate())
    quick = Bench(tmp_path / "quick")
    quick.make()
    assert not any("so far" in line for line in quick.said)


def test_a_step_that_is_asked_for_again_is_worked_on_again(tmp_path: Path) -> None:
    made = Bench(tmp_path).make()
    (made / "deep" / "result.txt").write_text("41")
    again = Bench(tmp_path, "export")
    assert again.make() == made
    assert again.done == 1
    assert (made / "deep" / "result.txt").read_text() == "42"
    assert kept(tmp_path) == [made.name]


def test_a_step_that_there_is_not_cannot_be_asked_for_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "exprot")
    with pytest.raises(BadInput, match=r"no step 'exprot' in this build, only data, export$"):
        bench.steps.expect(["data", "export", "export"])


@pytest.mark.parametrize("stop", [BadInput, TooLittle, KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_step_leaves_nothing_and_is_made_by_the_next_build(
    tmp_path: Path, stop: type[BaseException]
) -> None:
    def half(into: Path, say: Say) -> None:
        (into / "half.txt").write_text("half")
        raise stop("enough")

    with pytest.raises(stop):
        Bench(tmp_path).make(do=half)
    assert kept(tmp_path) == []
    bench = Bench(tmp_path)
    made = bench.make()
    assert kept(tmp_path) == [made.name]
    assert bench.done == 1


def test_what_goes_wrong_in_a_step_names_release_and_step_once(tmp_path: Path) -> None:
    def bad(words: str) -> Callable[[Path, Say], None]:
        def do(into: Path, say: Say) -> None:
            raise BadInput(words) from ValueError("the cause")

        return do

    for words, says in (
        ("no labels", "digits 1.0.0: export: no labels"),
        ("export: no labels", "digits 1.0.0: export: no labels"),
    ):
        with pytest.raises(BadInput) as caught:
            Bench(tmp_path).make(do=bad(words))
        assert str(caught.value) == says
        assert isinstance(caught.value.__cause__, ValueError)


def test_what_a_killed_build_left_is_cleared_away(tmp_path: Path) -> None:
    made = Bench(tmp_path).make()
    left = made.with_name(f".{made.name}.killed")
    left.mkdir()
    (left / "half.txt").write_text("half")
    Bench(tmp_path, "export").make()
    assert kept(tmp_path) == [made.name]


def damage_content(made: Path) -> None:
    (made / "deep" / "result.txt").write_text("43")


def damage_by_removal(made: Path) -> None:
    (made / "deep" / "result.txt").unlink()


def damage_by_addition(made: Path) -> None:
    (made / "more.npz").write_text("")


def damage_record(made: Path) -> None:
    (made / RECORD).write_text("{")


def damage_shape(made: Path) -> None:
    (made / RECORD).write_text("[]")


def damage_by_removal_of_record(made: Path) -> None:
    (made / RECORD).unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_content, "deep/result.txt has changed"),
        (damage_by_removal, "deep/result.txt is missing"),
        (damage_by_addition, "more.npz was added"),
        (damage_record, "step.json: "),
        (damage_shape, "step.json: "),
        (damage_by_removal_of_record, "step.json is missing"),
    ],
)
def test_what_was_kept_and_is_damaged_is_made_again_and_said(
    tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    made = Bench(tmp_path).make()
    damage(made)
    bench = Bench(tmp_path)
    assert bench.make() == made
    assert bench.done == 1
    assert says in bench.said[0]
    assert "made again" in bench.said[0]
    assert sorted(path.name for path in made.rglob("*")) == ["deep", "result.txt", RECORD]
    assert kept(tmp_path) == [made.name]


def test_of_two_builds_at_once_one_works_and_the_other_waits_for_it(tmp_path: Path) -> None:
    first, second = Bench(tmp_path), Bench(tmp_path)
    working, waiting = threading.Event(), threading.Event()
    said = second.said

    def slow(into: Path, say: Say) -> None:
        working.set()
        assert waiting.wait(30)
        first.work(into, say)

    def heard(line: str) -> None:
        said.append(line)
        if "waiting" in line:
            waiting.set()

    second.steps = Steps(tmp_path, heard)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(first.make(do=slow))),
        threading.Thread(target=lambda: found.append(second.make())),
    ]
    threads[0].start()
    assert working.wait(30)
    threads[1].start()
    for thread in threads:
        thread.join(30)
    assert found[0] == found[1]
    assert (first.done, second.done) == (1, 0)
    assert [line.rpartition(": ")[2] for line in said] == [
        "another build is at it, waiting", "done meanwhile",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_with_what_to_do_and_nothing_remains(
    tmp_path: Path, number: int
) -> None:
    def full(into: Path, say: Say) -> None:
        (into / "half.txt").write_text("half")
        raise OSError(number, os.strerror(number), str(into / "fp32.onnx"))

    with pytest.raises(BadInput) as caught:
        Bench(tmp_path).make(do=full)
    assert str(caught.value).startswith("export: ")
    assert "fp32.onnx: " in str(caught.value)
    assert "free some space, or name another place with --cache" in str(caught.value)
    assert kept(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput, match=r"export: .*file.*: (Not a directory|File exists)"):
        Bench(tmp_path / "file").make()


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv(CACHE, raising=False)
    assert default_cache() == Path("/somewhere/fogline-models")
    monkeypatch.setenv(CACHE, "/elsewhere")
    assert default_cache() == Path("/elsewhere")
