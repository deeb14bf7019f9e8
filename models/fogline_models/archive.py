"""npz files: the same arrays always give the same bytes, and reading never runs what it reads.

``np.savez`` stamps the time into its zip entries, which would give two identical builds
different digests.
"""

import io
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fogline_models.errors import BadInput
from fogline_protocol.tensors import Array

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip entry can carry


def to_bytes(arrays: Mapping[str, Array], *, compress: bool = False) -> bytes:
    """Return an npz archive of ``arrays``, sorted by name.

    Uncompressed by default: the output of a compressor depends on its version.
    """
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name in sorted(arrays):
            entry = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
            entry.compress_type = method
            entry.create_system = 3  # Unix, wherever this runs
            content = io.BytesIO()
            np.lib.format.write_array(content, arrays[name], version=(1, 0), allow_pickle=False)
            archive.writestr(entry, content.getvalue(), compresslevel=9)
    return target.getvalue()


def save(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write a compressed npz archive in one step, over an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(to_bytes(arrays, compress=True))
    os.replace(unfinished, path)


def read(path: Path) -> dict[str, Array]:
    """Return the arrays of the npz archive at ``path``.

    Raises:
        BadInput: there is no such file, or it is not an intact npz archive of plain arrays.
    """
    try:
        with path.open("rb") as file:  # numpy leaves a file that it refuses open
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise BadInput(f"{path}: one bare array, expected an .npz archive of named arrays")
            with archive:
                return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"{path}: not an intact .npz archive of plain arrays ({error})") from None
