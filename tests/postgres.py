"""A PostgreSQL of the tests' own: Debian's server, in a temporary folder, behind a Unix socket."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

USER = "postgres"  # the server refuses to run as root; Debian's package makes this user
HOME = Path("/usr/lib/postgresql")


def programs() -> Path | None:
    """Return the folder of the newest server that is installed."""
    found = sorted(HOME.glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return found[-1].parent if found else None


# In CI a missing server is a failure, not a reason to test less.
needs_postgres = pytest.mark.skipif(
    programs() is None and "CI" not in os.environ,
    reason="PostgreSQL is not installed: apt-get install postgresql",
)


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Run a server; yield the URL of its database without the database's name."""
    binaries = programs()
    assert binaries is not None, "PostgreSQL is not installed: apt-get install postgresql"
    # Not below pytest's folder, which other users may not enter; and a socket's path is short.
    folder = Path(tempfile.mkdtemp(prefix="fogline-pg-", dir="/tmp"))
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, USER)
        data, log = folder / "data", folder / "log"
        _run(folder, binaries / "initdb", "-D", data, "-U", "fogline", "-A", "trust", "-N",
             "--locale=C", "--encoding=UTF8")  # fmt: skip
        # Nobody cuts the power of a test, and many databases are made from the template.
        settings = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
        control = (binaries / "pg_ctl", "-D", data, "-w", "-t", "60")
        _run(folder, *control, "-l", log, "-o", settings, "start")
        try:
            yield f"postgresql://fogline@/DATABASE?host={folder}"
        finally:
            _run(folder, *control, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(folder: Path, *command: object) -> None:
    arguments = [str(word) for word in command]
    # Not to a pipe: the server inherits it, and its end would never come.
    with (folder.with_suffix(".out")).open("w+") as out:
        try:
            done = subprocess.run(
                arguments,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=120,
                check=False,
                user=USER if os.geteuid() == 0 else None,
                group=USER if os.geteuid() == 0 else None,
                extra_groups=[] if os.geteuid() == 0 else None,
            )
            out.seek(0)
            assert done.returncode == 0, f"{arguments}: {out.read()}"
        finally:
            folder.with_suffix(".out").unlink()
