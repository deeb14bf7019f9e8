"""What is given by hand serves once it has proven itself, and does not do so at every start."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from edge_agent.errors import ReleaseRefused
from edge_agent.runtime import providers
from edge_agent.update import by_hand
from edge_agent.update.by_hand import MEMORY, MOST_REMEMBERED, ByHand
from edge_agent.update.lifecycle import StepEnded, StepFailed
from edge_agent.update.selftest import ChildSelfTest
from fogline_protocol.release import BundleDirectory
from tests.edge_agent import bundles


class Counting:
    """A self-test that ends as a test says."""

    def __init__(self, failure: StepEnded | None = None) -> None:
        self.failure = failure
        self.ran: list[tuple[str, str, str]] = []

    async def run(
        self, candidate: BundleDirectory, variant: str, provider: str
    ) -> Mapping[str, float]:
        self.ran.append((candidate.bundle.version, variant, provider))
        if self.failure is not None:
            raise self.failure
        return {"agreement": 1.0}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def test_a_bundle_proves_itself_once_and_later_starts_say_when(tmp_path: Path) -> None:
    path = bundles.make(tmp_path / "bundle").path
    test = Counting()
    with capture_logs() as logs:
        for _ in range(3):
            release = await ByHand(tmp_path, test).load(path)
            assert (release.label, release.choice.variant.name) == ("double@1.0.0", "fp32")
            release.engine.close()
    assert test.ran == [("1.0.0", "fp32", "CPUExecutionProvider")]
    first, *later = logs
    assert (first["event"], first["agreement"]) == ("self-test passed", 1.0)
    (kept,) = json.loads((tmp_path / MEMORY).read_text()).values()
    assert [(line["event"], line["at"]) for line in later] == [
        ("self-test passed earlier", kept["at"])
    ] * 2


async def test_whatever_the_verdict_depends_on_is_tested_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = Counting()
    both = bundles.make(tmp_path / "both", variants=("int8", "fp32"), certified=False)
    other = bundles.make(tmp_path / "other", version="2.0.0")
    given = ByHand(tmp_path, test)
    for path in (both.path, other.path, both.path, other.path):
        (await given.load(path)).engine.close()
    assert [ran[:2] for ran in test.ran] == [("1.0.0", "int8"), ("2.0.0", "fp32")]
    bundles.add_certificate(both, "fp32")  # now another variant is the better choice
    (await given.load(both.path)).engine.close()
    assert test.ran[2][:2] == ("1.0.0", "fp32")
    monkeypatch.setattr(providers, "runtime_version", lambda: "1.99.1")
    for _ in range(2):
        (await given.load(other.path)).engine.close()
    assert [ran[0] for ran in test.ran[3:]] == ["2.0.0"]


async def test_a_failure_is_refused_with_its_sentence_and_tried_again_at_the_next_start(
    tmp_path: Path,
) -> None:
    path = bundles.make(tmp_path / "bundle").path
    test = Counting(StepFailed("self-test/memory", "it took 9 MiB of memory, 8 MiB are allowed"))
    for _ in range(2):
        with pytest.raises(ReleaseRefused) as refused:
            await ByHand(tmp_path, test).load(path)
        assert str(refused.value) == (
            f"bundle {path}: fp32 failed its self-test on CPUExecutionProvider: it took 9 MiB of "
            "memory, 8 MiB are allowed [self-test/memory]"
        )
    assert refused.value.exit_code == 4
    assert len(test.ran) == 2
    test.failure = None
    (await ByHand(tmp_path, test).load(path)).engine.close()


async def test_wrong_answers_are_found_by_the_child_that_runs_the_real_model(
    tmp_path: Path,
) -> None:
    given = ByHand(tmp_path, ChildSelfTest())
    with pytest.raises(ReleaseRefused, match=r"stray from the reference by up to 15 .*deviation"):
        await given.load(bundles.make(tmp_path / "wrong", factor=-1.0).path)
    assert not (tmp_path / MEMORY).exists()
    text = bundles.make(tmp_path / "text", onnx="text.onnx", scored=False)
    (await given.load(text.path)).engine.close()


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'{"key": 1}',
        b'{"key": {"at": "", "figures": {"a": "b"}}}',
        b"\xff",
        b'{"key": {"at": "", "figures": {"a": 1%s}}}' % (b"0" * 400),
    ],
)
async def test_a_damaged_memory_costs_a_test_and_nothing_else(
    tmp_path: Path, damage: bytes
) -> None:
    path = bundles.make(tmp_path / "bundle").path
    (tmp_path / MEMORY).write_bytes(damage)
    test = Counting()
    for _ in range(2):
        (await ByHand(tmp_path, test).load(path)).engine.close()
    assert len(test.ran) == 1


async def test_a_disk_that_takes_nothing_costs_a_test_at_every_start(tmp_path: Path) -> None:
    path = bundles.make(tmp_path / "bundle").path
    (tmp_path / MEMORY).mkdir()
    (tmp_path / MEMORY / "something").touch()
    test = Counting()
    with capture_logs() as logs:
        for _ in range(2):
            (await ByHand(tmp_path, test).load(path)).engine.close()
    assert len(test.ran) == 2
    assert [line["log_level"] for line in logs] == ["info", "warning"] * 2
    assert names_in(tmp_path) == {"bundle", MEMORY}, "a full disk must not grow fuller"


async def test_what_passed_since_the_start_is_not_tested_again_whatever_the_disk_takes(
    tmp_path: Path,
) -> None:
    """A way back has ten seconds, and a self-test may take all of them."""
    path = bundles.make(tmp_path / "bundle").path
    (tmp_path / MEMORY).mkdir()
    test = Counting()
    given = ByHand(tmp_path, test)
    with capture_logs() as logs:
        for _ in range(2):
            (await given.load(path)).engine.close()
    assert len(test.ran) == 1
    assert [line["event"] for line in logs] == [
        "self-test passed",
        "the self-test will be run again at the next start",
        "self-test passed earlier",
    ]


async def test_what_passed_is_remembered_once_the_disk_takes_it(tmp_path: Path) -> None:
    first, second = (
        bundles.make(tmp_path / version, version=version).path for version in ("1.0.0", "2.0.0")
    )
    (tmp_path / MEMORY).mkdir()
    test = Counting()
    given = ByHand(tmp_path, test)
    (await given.load(first)).engine.close()
    (tmp_path / MEMORY).rmdir()
    (await given.load(second)).engine.close()
    for path in (first, second):
        (await ByHand(tmp_path, test).load(path)).engine.close()
    assert len(test.ran) == 2


def test_only_the_newest_are_remembered(tmp_path: Path) -> None:
    file = tmp_path / MEMORY
    passed = {str(n): by_hand.Passed("then", {"n": float(n)}) for n in range(MOST_REMEMBERED + 9)}
    by_hand._remember(file, passed)
    kept = by_hand._remembered(file)
    assert list(kept) == list(passed)[9:]
    assert kept[str(MOST_REMEMBERED)] == passed[str(MOST_REMEMBERED)]
