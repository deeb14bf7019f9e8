"""The fake hub of these tests keeps the contract of a fetch."""

import asyncio
from dataclasses import dataclass, replace

import pytest

from tests.edge_agent.update.contracts import FetchContract, Source
from tests.edge_agent.update.fakes import CopyFetch, Shelf


@dataclass(slots=True)
class ShelfSource(Source):
    copy: CopyFetch

    def cut(self) -> None:
        self.copy.reachable = False

    def restore(self) -> None:
        self.copy.reachable = True

    def hold(self) -> asyncio.Event:
        self.copy.gate.clear()
        return self.copy.waiting

    def release(self) -> None:
        self.copy.gate.set()


class TestCopyFetch(FetchContract):
    @pytest.fixture
    def source(self, tmp_path_factory: pytest.TempPathFactory) -> Source:
        shelf = Shelf(tmp_path_factory.mktemp("shelf"))
        target = shelf.put(1, "1.0.0")
        path = shelf.certify(target, 1)
        content = {f"certificates/{path.rpartition('/')[2]}": (shelf.folder / path).read_bytes()}
        target = replace(target, certificate_targets=(path,))
        folder = shelf.folder / "doubler/1"
        needed = ("bundle.json", "selftest.npz", "README.md", "variants/int8.onnx")
        copy = CopyFetch(shelf)
        return ShelfSource(
            copy,
            target,
            shelf.target(9, "9.0.0"),
            content | {name: (folder / name).read_bytes() for name in needed},
            copy,
        )
