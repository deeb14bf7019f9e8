"""The family of text: what goes into which split, and that its nets can be taken in.

Nothing here depends on what is installed on the machine, and no training lasts.
"""

import dataclasses
import gzip
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fogline_models.data import Items, check_disjoint
from fogline_models.errors import BadInput
from phrases import data
from phrases.data import KINDS, Snippet

FAMILY = Path(data.__file__).parent


def snippet(package: str, kind: str, text: str) -> Snippet:
    lines = frozenset(line for line in text.splitlines() if len(line) >= data.SHARED_LINE)
    return Snippet(text, kind, package, lines)


SNIPPETS = st.lists(
    st.builds(
        snippet,
        st.sampled_from([f"package-{n}" for n in range(40)]),
        st.sampled_from(KINDS),
        st.lists(
            st.sampled_from([f"line {n} of a file that was copied around" for n in range(30)]),
            min_size=1,
            max_size=3,
        ).map("\n".join),
    )
)


@settings(deadline=None)
@given(SNIPPETS)
def test_no_package_and_no_line_of_training_is_in_another_split(snippets: list[Snippet]) -> None:
    splits = data.assigned(snippets)
    owners = {name: {each.package for each in split} for name, split in splits.items()}
    assert not owners["training"] & (owners["calibration"] | owners["evaluation"])
    assert not owners["calibration"] & owners["evaluation"]
    seen = {line for each in splits["training"] for line in each.lines}
    for name in ("calibration", "evaluation"):
        assert not any(each.lines & seen for each in splits[name])
    check_disjoint({name: data.items(split) for name, split in splits.items() if split})


@settings(deadline=None)
@given(SNIPPETS)
def test_a_snippet_is_nowhere_twice(snippets: list[Snippet]) -> None:
    texts = [each.text for split in data.assigned(snippets).values() for each in split]
    assert len(texts) == len(set(texts))


@settings(deadline=None)
@given(st.text(max_size=2000), st.integers(0, 2**48 - 1))
def test_snippets_of_a_text_are_few_and_short_and_the_same_again(text: str, seed: int) -> None:
    found = list(data.cut(text, "guide", "package", seed))
    assert len(found) <= data.SNIPPETS
    assert all(len(each.text) <= data.CHARACTERS for each in found)
    assert found == list(data.cut(text, "guide", "package", seed))


@settings(deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=60), st.integers(0, 2**48 - 1))
def test_no_line_is_in_two_snippets_of_a_text(lengths: list[int], seed: int) -> None:
    text = "\n".join(f"line{n}".ljust(length, "x") for n, length in enumerate(lengths))
    found = list(data.cut(text, "guide", "package", seed))
    lines = [line[:7] for each in found for line in each.text.splitlines() if len(line) > 6]
    assert len(lines) == len(set(lines))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("/usr/include/zlib.h", "c-c++"),
        ("numpy/linalg/_linalg.py", "python"),
        ("/usr/share/man/man1/tar.1.gz", "manual"),
        ("/usr/share/doc/zlib1g/changelog.Debian.gz", "changelog"),
        ("/usr/share/doc/git/README.emacs", "guide"),
        ("numpy-2.4.6.dist-info/METADATA", "guide"),
        ("/usr/share/perl/5.36/CPAN.pm", "perl"),
        ("/usr/share/zoneinfo/Europe/Paris", None),
        ("/usr/bin/absent", None),
    ],
)
def test_what_a_file_is_is_told_by_its_name(name: str, kind: str | None) -> None:
    assert data.kind_of(name, f"/nowhere{name}") == kind


def test_what_a_program_is_is_told_by_its_first_line(tmp_path: Path) -> None:
    for first, kind in (
        (b"#!/bin/sh -e\n", "shell"),
        (b"#!/usr/bin/env bash\n", "shell"),
        (b"#!/usr/bin/perl -w\n", "perl"),
        (b"#!/usr/bin/awk -f\n", None),
        (b"\x7fELF\x02\xff\xfe\n", None),
    ):
        (tmp_path / "program").write_bytes(first)
        assert data.kind_of("/usr/bin/program", str(tmp_path / "program")) == kind


def test_debian_and_python_agree_on_a_package() -> None:
    assert data.canonical("python3-Pygments") == data.canonical("pygments") == "pygments"
    assert data.canonical("ruamel.yaml_clib") == "ruamel-yaml-clib"


def test_files_that_are_no_text_are_passed_over(tmp_path: Path) -> None:
    files = []
    for name, content in (
        ("binary.h", b"\0" * 1000),
        ("latin.h", "é".encode("latin-1") * 1000),
        ("short.h", b"int a;\n"),
        ("damaged.gz", gzip.compress(b"x" * 1000)[:-20]),
    ):
        (tmp_path / name).write_bytes(content)
        files.append(data.File("package", name, str(tmp_path / name)))
    files.append(data.File("package", "absent.h", str(tmp_path / "absent.h")))
    assert list(data.drawn("c-c++", files)) == []


def test_a_machine_with_too_little_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "DPKG", tmp_path)  # nothing of Debian's is installed
    with pytest.raises(BadInput, match=r"kind .* from \d installed packages, 8 are needed: this"):
        data.make()


def made_up(count: int = 64) -> Items:
    words = (
        "import os",
        "int main()",
        "my $x = 1;",
        "set -e",
        "<p>text</p>",
        ".SH NAME",
        "* New",
        "A",
    )
    texts = [f"{words[n % len(words)]}\n    {n % 7}" for n in range(count)]
    return Items(
        {}, np.arange(count) % len(KINDS), raw={"text": np.array(texts)}, scenes=np.arange(count)
    )


@pytest.mark.workshop
def test_the_same_snippets_give_the_same_net(tmp_path: Path) -> None:
    need_transformers()
    from phrases import nets

    told: list[tuple[int, int, str]] = []
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        splits = {"training": made_up()}
        nets.edge(splits, lambda *line: told.append(line), tmp_path / name, epochs=2)
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert written[0] == written[1]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= written[0].keys()
    assert told[0] == told[2]
    assert told[1][:2] == (2, 2)


@pytest.mark.workshop
def test_an_application_gets_the_inputs_as_the_readme_says(tmp_path: Path) -> None:
    need_transformers()
    from fogline_models import huggingface, recipe, sources

    family = recipe.read(FAMILY)
    release = family.release[-1]
    quick = dataclasses.replace(release.source, arguments={"epochs": 1})
    release = dataclasses.replace(release, source=quick)
    splits = {"training": made_up(), "self_test": made_up(8)}
    huggingface.make(family, release, splits, tmp_path, lambda line: None)

    (block,) = re.findall(r"```python\n(.*?)```", (FAMILY / "README.md").read_text(), re.DOTALL)
    application: dict[str, Any] = {}
    exec(block, application)
    found = application["tokens"](
        tmp_path / sources.FILES, splits["self_test"].raw["text"].tolist()
    )
    golden = np.load(tmp_path / sources.GOLDEN)
    assert {f"input.{name}" for name in found} == {n for n in golden if n.startswith("input.")}
    for name, array in found.items():
        np.testing.assert_array_equal(array, golden[f"input.{name}"])


def need_transformers() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    pytest.importorskip("torch", reason="needs torch: pip install 'fogline[models]'")
    pytest.importorskip("transformers", reason="needs transformers: pip install 'fogline[hf]'")
    pytest.importorskip("optimum.onnxruntime", reason="needs optimum: pip install 'fogline[hf]'")
