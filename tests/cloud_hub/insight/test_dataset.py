"""A data set is what was exported, whole and readable by others, or there is none."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cloud_hub.insight import dataset
from cloud_hub.insight.dataset import DatasetRefused, NpzDataset, ParquetDataset
from cloud_hub.insight.example_codec import Example, Facts
from fogline_models.data import read

FACTS = Facts(
    "a" * 64, 1_790_000_000.25, "kiosk", "", "uncertain", 1.0, 0.25, "double@1.0.0", "e" * 64,
    "judge", "b" * 64, 3,
)  # fmt: skip


def example(number, **facts):
    x = np.array([number, 1, 2], np.float32)
    return Example(
        dataclasses.replace(FACTS, **facts), {"x": x}, {"logits": x * 2}, {"logits": x[::-1] * 3}
    )


def made(path: Path, examples, kind=NpzDataset):
    with kind(path) as out:
        for one in examples:
            out.add(one)
        out.finish(dataset.sampling("double", out.table.reasons))


def test_every_column_is_there_and_the_workshop_reads_it(tmp_path):
    made(
        tmp_path / "hard.npz",
        [
            example(1, source="cam"),
            example(2, device="other", source="cam"),
            example(5, source="cam", reason="audit", propensity=0.01, hub_sha256=""),
            example(7),
            example(8),
        ],
    )
    with np.load(tmp_path / "hard.npz") as file:
        found = dict(file)
    assert found["input.x"].tolist() == [[n, 1, 2] for n in (1, 2, 5, 7, 8)]
    assert found["edge_logits"][2].tolist() == [10, 2, 4]
    assert found["hub_logits"][2].tolist() == [6, 3, 15]
    assert found["edge_label"].tolist() == [2, 0, 0, 0, 0]
    assert found["label"].tolist() == [0, 0, 2, 2, 2]
    assert found["propensity"].tolist() == [1, 1, 0.01, 1, 1]
    assert found["reason"].tolist() == ["uncertain", "uncertain", "audit"] + ["uncertain"] * 2
    assert found["device"].tolist() == ["kiosk", "other", "kiosk", "kiosk", "kiosk"]
    assert found["source"].tolist() == ["cam", "cam", "cam", "", ""]
    assert found["scene"].tolist() == [0, 1, 0, 2, 3]  # without a source, each for itself
    assert found["hub_sha256"].tolist() == ["b" * 64] * 2 + [""] + ["b" * 64] * 2
    assert found["time"].tolist() == [FACTS.at] * 5
    assert found["count"].tolist() == [3] * 5
    assert found["edge_score"].dtype == np.float32
    assert {"edge_release", "edge_sha256", "hub_model", "sha256"} < found.keys()
    assert "by reason: audit 1, uncertain 4" in str(found["sampling"])
    data = read(tmp_path / "hard.npz")
    assert data.inputs["x"].shape == (5, 3)
    assert data.scenes.tolist() == [0, 1, 0, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["hard.npz"]


def test_equal_examples_make_equal_files(tmp_path):
    made(tmp_path / "a.npz", [example(1), example(2)])
    made(tmp_path / "b.npz", [example(1), example(2)])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_every_token_that_counts_has_a_label_of_its_own(tmp_path):
    def text(length, hub, **masks):
        edge = np.eye(3, dtype=np.float32)[[0, 2, 1, 0]]
        mask = (np.arange(4) < length).astype(np.int64)
        return Example(FACTS, {"attention_mask": mask, **masks}, {"logits": edge}, {"logits": hub})

    hub = np.eye(3, dtype=np.float32)[[1, 1, 1, 2]]
    made(tmp_path / "tokens.npz", [text(4, hub), text(2, hub), text(0, hub)])
    data = read(tmp_path / "tokens.npz")
    assert data.labels.tolist() == [[1, 1, 1, 2], [1, 1, -100, -100], [-100] * 4]
    assert data.extra["edge_label"].tolist()[1] == [0, 2, -100, -100]
    wide = Example(FACTS, {"x": np.zeros(2)}, {"logits": hub}, {"logits": hub[:1]})
    made(tmp_path / "wide.npz", [wide])
    with np.load(tmp_path / "wide.npz") as file:
        assert file["edge_label"].tolist() == [[1, 1, 1, 2]]  # no mask: all of them count
        assert file["label"].tolist() == [1]  # one row of classes is one answer


def test_texts_are_columns_of_their_longest(tmp_path):
    def text(*values):
        array = np.empty(len(values), dtype=object)
        array[:] = values
        return Example(FACTS, {"s": array}, {"logits": np.zeros(2)}, {"said": array})

    made(tmp_path / "t.npz", [text(b"a", b"\0b"), text(b"", "grün".encode())])
    with np.load(tmp_path / "t.npz") as file:
        assert file["input.s"].tolist() == [[b"a", b"\0b"], [b"", "grün".encode()]]
        assert "label" not in file  # the hub ranked nothing
    with pytest.raises(DatasetRefused, match=r"ends with a zero byte.*--format parquet"):
        made(tmp_path / "u.npz", [text(b"a\0", b"")])
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_answers_of_another_kind_are_refused_with_the_way_out(tmp_path):
    other = dataclasses.replace(
        example(2, release="double@2.0.0"), hub={"logits": np.zeros(4, np.float32)}
    )
    with pytest.raises(DatasetRefused) as caught:
        made(tmp_path / "m.npz", [example(1), other])
    assert "hub_logits is FP32[4] where release double@2.0.0" in str(caught.value)
    assert "FP32[3] before" in str(caught.value)
    assert "--since and --until" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_older_data_set_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "d.npz"
    made(path, [example(1)])
    before = path.read_bytes()
    with NpzDataset(path) as out:
        out.add(example(2))  # and there it ends
    assert path.read_bytes() == before
    made(path, [example(2)])
    assert path.read_bytes() != before
    assert [one.name for one in tmp_path.iterdir()] == ["d.npz"]


def test_a_disk_without_room_is_said_and_nothing_remains(tmp_path):
    """A limit on the size of files stands for the end of the disk."""
    program = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from pathlib import Path
from cloud_hub.insight.dataset import DatasetRefused
from tests.cloud_hub.insight.test_dataset import example, made
try:
    made(Path({str(tmp_path)!r}) / "x.npz", [example(n) for n in range(5000)])
except DatasetRefused as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "x.npz cannot be written: File too large; nothing of it remains" in done.stdout, done
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DatasetRefused, match="No such file or directory"):
        made(tmp_path / "absent" / "x.npz", [example(1)])


def test_memory_does_not_grow_with_the_data_set(tmp_path):
    program = f"""
import resource, sys
from pathlib import Path
import numpy as np
from cloud_hub.insight.dataset import NpzDataset
from cloud_hub.insight.example_codec import Example
from tests.cloud_hub.insight.test_dataset import FACTS
picture = np.zeros((3, 224, 224), np.float32)
one = Example(FACTS, {{"x": picture}}, {{"logits": np.zeros(10)}}, {{"logits": np.zeros(10)}})
with NpzDataset(Path({str(tmp_path)!r}) / "x.npz") as out:
    for n in range(int(sys.argv[1])):
        out.add(one)
    out.finish("")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    few, many = (
        int(
            subprocess.run(
                [sys.executable, "-c", program, n], capture_output=True, check=True
            ).stdout
        )
        for n in ("5", "300")  # 3 MB, 180 MB
    )
    assert many < few + 20_000  # kB


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DatasetRefused, match=r"pip install 'fogline\[parquet\]'.*--format npz"):
        ParquetDataset(tmp_path / "x.parquet")


def test_parquet_holds_the_same_columns(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    many = [example(n, source=f"s{n % 3}") for n in range(dataset.GROUP_ROWS + 10)]
    made(tmp_path / "x.npz", many)
    made(tmp_path / "x.parquet", many, ParquetDataset)
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    with np.load(tmp_path / "x.npz") as file:
        assert set(table.column_names) == set(file) - {"sampling"}
        for name in table.column_names:
            column = table[name].combine_chunks()
            values = (
                column.to_numpy_ndarray()
                if hasattr(column, "to_numpy_ndarray")
                else column.to_numpy(zero_copy_only=False)
            )
            assert values.tolist() == file[name].tolist(), name
        told = pyarrow.parquet.read_metadata(tmp_path / "x.parquet").metadata[b"sampling"]
        assert told.decode() == str(file["sampling"])
    assert sorted(os.listdir(tmp_path)) == ["x.npz", "x.parquet"]
    other = dataclasses.replace(example(2), hub={"logits": np.zeros(4, np.float32)})
    with pytest.raises(DatasetRefused, match="FP32"):
        made(tmp_path / "y.parquet", [example(1), other], ParquetDataset)
    assert sorted(os.listdir(tmp_path)) == ["x.npz", "x.parquet"]
