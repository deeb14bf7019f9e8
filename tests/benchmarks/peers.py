"""The servers we are measured against, each in an environment of its own.

Environments and the models served lie in the user's cache folder, made on first use. A peer's
interpreter is also the only one with the package ``onnx``, so it writes the models.
"""

import hashlib
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent
PYTRITON = ("nvidia-pytriton==0.7.0", "onnxruntime==1.32.0", "onnx>=1.23,<1.24")


def pytriton() -> Path:
    """Return the interpreter of an environment with PyTriton, installed on first use."""
    folder = _cache() / f"pytriton-0.7.0-py{sysconfig.get_python_version()}"

    def install(made: Path) -> None:
        print(f"installing {' '.join(PYTRITON)} into {folder} (once)", file=sys.stderr, flush=True)
        _quietly([sys.executable, "-m", "venv", str(made)])
        pip = (str(made / "bin" / "python"), "-m", "pip", "--disable-pip-version-check")
        _quietly([*pip, "install", *PYTRITON])

    _once(folder, install)
    # Never a script beside it: those name the path that the environment was made at.
    return folder / "bin" / "python"


def environment() -> Mapping[str, str]:
    """Return the variables with which PyTriton's server finds the interpreter's library."""
    return {**os.environ, "LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR"))}


def models() -> Path:
    """Return the folder with ``tiny.onnx`` and ``mid_u8.onnx``, written on first use."""
    script = HERE / "onnx_models.py"
    # Named after the script's content: another model never hides behind an old file.
    digest = hashlib.sha256(script.read_bytes()).hexdigest()[:12]
    folder = _cache() / f"benchmark-models-{digest}"

    def write(made: Path) -> None:
        made.mkdir()
        _quietly([str(pytriton()), str(script), str(made)])

    _once(folder, write)
    return folder


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fogline"


def _quietly(command: Sequence[str]) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nfailed: {' '.join(command)}")


def _once(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder of the cache if it is not there."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        make(made)
        made.rename(folder)  # in one step: whoever finds it finds all of it
