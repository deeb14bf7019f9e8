"""The hub's own broker: Mosquitto as a child process, started, watched and stopped here.

The broker remembers nothing on disk: the database is the truth, and ``link.py`` publishes
again whatever a broker has forgotten. Without Mosquitto the hub serves inference as before;
only its devices hear nothing new.

The child must not outlive the hub, not even after ``kill -9``. The kernel's parent-death
signal cannot promise that: it is cleared when the process changes its user, which Mosquitto
does when root starts it, it fires when the *thread* that forked ends, and setting it means
running Python between fork and exec. A file with the process id promises it only until the
next start, and may name a stranger by then. So a shell of twenty lines stands between: it
holds a pipe from the hub, and when that ends, for whatever reason, it ends the broker. (So
a child of the hub that is forked without exec would keep the broker alive: start workers by
spawning.)

Started by root, Mosquitto becomes another user after it has read its configuration; nothing in
that names a file which the other user would have to read, so the directory may stay private.

It listens on loopback only, where it lets everybody in; a fleet that is not on this machine
needs a broker with certificates (``--mqtt URL``).
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path

from fogline_protocol.mqtt import MAX_PACKET_BYTES, Backoff, BrokerAddress

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
_NAME = "mosquitto"
# Debian puts daemons where an ordinary user's PATH does not lead.
_BESIDE_PATH = ("/usr/sbin", "/usr/local/sbin")
_READY_WITHIN_S = 10.0  # it takes 25 ms; a loaded machine takes longer
_STOPPED_WITHIN_S = 5.0
_PORTS_TRIED = 3

# $0 is Mosquitto, $1 its configuration. File 3 ends when the hub has gone. The loops are
# there because "wait" returns early on a signal, and a broker may be slow to end.
_KEEPER = """
exec 3<&0 </dev/null
"$0" -c "$1" 3<&- &
broker=$!
{
  read -r _ <&3
  kill "$broker"
  for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    kill -0 "$broker" || exit
    sleep 0.1
  done
  kill -9 "$broker"
} >/dev/null 2>&1 &
watcher=$!
exec 3<&-
trap 'kill "$broker"' HUP INT TERM
wait "$broker"
code=$?
while kill -0 "$broker" 2>/dev/null; do
  wait "$broker"
  code=$?
done
kill "$watcher" 2>/dev/null
exit "$code"
"""

# A CONNECT of MQTT 3.1.1 without a client id, clean session, keep alive 10 s.
_CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x0a\x00\x00"
_ACCEPTED = b"\x20\x02\x00\x00"
_DISCONNECT = b"\xe0\x00"


# Its first words at every start. Two limits are meant: see ``configuration``.
_ADVICE = "It is recommended to replace `message_size_limit` with `max_packet_size`."


class MosquittoMissing(Exception):
    """There is no Mosquitto on this machine. Serve without devices, and say what to install."""


class MosquittoFailed(Exception):
    """Mosquitto did not start. The message holds its own last words."""


def configuration(port: int) -> str:
    """Return Mosquitto's configuration, right for 2.0.11 and later."""
    return f"""\
# Written by fogline at every start of the broker; changes made here are lost.
log_dest stderr
log_timestamp false
log_type error
log_type warning
connection_messages false

listener {port} {HOST}
allow_anonymous true

# The database is the truth. What is lost here is published again.
persistence false

# 0 is no limit. Any limit drops messages without a word to either side.
max_queued_messages 0
max_inflight_messages 1000

# The first is answered with a reason code; the second ends the connection of whoever would
# fill our memory with one packet, so it must leave room for the first.
message_size_limit {MAX_PACKET_BYTES}
max_packet_size {2 * MAX_PACKET_BYTES}

set_tcp_nodelay true
sys_interval 0
"""


def find_executable() -> Path:
    """Return where Mosquitto is installed.

    Raises:
        MosquittoMissing: nowhere; the message says how to change that.
    """
    found = shutil.which(_NAME) or shutil.which(_NAME, path=os.pathsep.join(_BESIDE_PATH))
    if found is None:
        raise MosquittoMissing(_how_to_install(f"no {_NAME!r} in PATH, {', '.join(_BESIDE_PATH)}"))
    return Path(found)


def _how_to_install(found: str) -> str:
    return (
        f"Mosquitto, the broker between hub and devices, is missing ({found}): install it with "
        "`apt-get install mosquitto`, or name another broker with --mqtt URL; inference is "
        "served without it"
    )


class Mosquitto:
    """One broker of our own, on one port for as long as the hub lives.

    ``start`` it, run ``watch`` beside the rest of the hub, ``stop`` it in the end.
    """

    def __init__(
        self,
        directory: Path,
        *,
        port: int = 0,
        executable: Path | None = None,
        wait: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._directory = directory
        self._executable = executable
        self._wait = wait
        self._port = port  # 0 until one is chosen
        self._port_is_given = port != 0
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._lifeline: int | None = None  # our end of the keeper's pipe
        self._last_words: deque[str] = deque(maxlen=20)
        self.restarts = 0

    def __repr__(self) -> str:
        state = "running" if self.running else "not running"
        return f"<Mosquitto {self.address}: {state}, {self.restarts} restarts>"

    @property
    def address(self) -> BrokerAddress:
        """Where it listens. The port is 0 before the first start."""
        return BrokerAddress(HOST, self._port, tls=False)

    @property
    def running(self) -> bool:
        """Whether the child process lives."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> BrokerAddress:
        """Start the broker; return its address once it accepts connections.

        Raises:
            MosquittoMissing: it is not installed.
            MosquittoFailed: it ended at once, or does not answer.
        """
        executable = self._executable or find_executable()
        if not os.access(executable, os.X_OK):
            raise MosquittoMissing(_how_to_install(f"{executable} cannot be run"))
        self._executable = executable
        for attempt in range(_PORTS_TRIED):
            if not self._port_is_given:
                self._port = self._choose_port(remembered=attempt == 0)
            try:
                await self._spawn(executable)
                break
            except MosquittoFailed:
                # Between our choice and its start somebody else may have taken the port.
                if self._port_is_given or attempt == _PORTS_TRIED - 1:
                    raise
        (self._directory / "port").write_text(f"{self._port}\n", encoding="ascii")
        return self.address

    async def watch(self) -> None:
        """Start the broker again whenever it ends, until cancelled.

        Raises:
            MosquittoMissing: it has been uninstalled meanwhile.
        """
        # No jitter: there is one broker and one who starts it.
        backoff = Backoff(lambda: 1.0, base_s=0.1, max_s=60.0)
        while True:
            began = time.monotonic()
            if self._process is not None:
                code = await self._process.wait()
                await self._bury()
                log.warning("mosquitto ended with code %d: %s", code, self._words())
            backoff.held(time.monotonic() - began)
            await self._wait(backoff.next_wait_s())
            self.restarts += 1
            try:
                await self._spawn(self._executable or find_executable())
            except MosquittoFailed as error:
                log.warning("%s", error)

    async def stop(self) -> None:
        """End the broker and wait until it has gone. Cancel ``watch`` before."""
        await self._bury()

    def _choose_port(self, *, remembered: bool) -> int:
        """Return a free port: the last one if possible, so that devices find us again."""
        candidates = [0]
        if remembered:
            with contextlib.suppress(OSError, ValueError):
                last = int((self._directory / "port").read_text(encoding="ascii"))
                candidates = [last, 0]
        for candidate in candidates:
            with socket.socket() as probe, contextlib.suppress(OSError, OverflowError):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((HOST, candidate))
                port: int = probe.getsockname()[1]
                return port
        raise MosquittoFailed(f"no free port on {HOST}")

    async def _spawn(self, executable: Path) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        file = self._directory / "mosquitto.conf"
        file.write_text(configuration(self._port), encoding="ascii")
        self._last_words.clear()
        # Pipes of our own: with asyncio's, waiting for the keeper would also wait until the
        # broker lets go of them, and a keeper that was killed alone would go unnoticed.
        keepers_end, self._lifeline = os.pipe()
        our_end, words_end = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                "/bin/sh",
                "-c",
                _KEEPER,
                str(executable),
                str(file),
                stdin=keepers_end,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=words_end,
                # Ctrl-C in a terminal is for the hub, which ends its broker when it is done.
                start_new_session=True,
            )
        except OSError as error:
            os.close(our_end)
            self._let_go()
            raise MosquittoFailed(f"mosquitto could not be started: {error}") from None
        finally:
            os.close(keepers_end)
            os.close(words_end)
        self._process = process
        self._reader = asyncio.create_task(self._read_words(our_end), name="mosquitto-stderr")
        try:
            async with asyncio.timeout(_READY_WITHIN_S):
                while not await _accepts_connections(self._port):
                    if process.returncode is not None:
                        break
                    await asyncio.sleep(0.01)
            ready = process.returncode is None
        except TimeoutError:
            ready = False
        except asyncio.CancelledError:
            await self._bury()
            raise
        if not ready:
            code = process.returncode
            await self._bury()
            ended = "does not answer" if code is None else f"ended with code {code}"
            raise MosquittoFailed(f"mosquitto on port {self._port} {ended}: {self._words()}")
        log.info("mosquitto listens at %s", self.address)

    async def _bury(self) -> None:
        """End the process, if it has not, and wait until the broker itself has gone."""
        process, reader = self._process, self._reader
        if process is None or reader is None:
            return
        self._let_go()
        # The broker holds its stderr to the end, so this waits for it even if its keeper was
        # killed; only then is the port free.
        done, _ = await asyncio.wait({reader}, timeout=_STOPPED_WITHIN_S)
        if not done:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.wait({reader}, timeout=_STOPPED_WITHIN_S)
        await process.wait()
        self._process = self._reader = None

    def _let_go(self) -> None:
        """Tell the keeper that nobody needs the broker any more."""
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    async def _read_words(self, end: int) -> None:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(end, "rb", buffering=0)
        )
        try:
            async for line in reader:
                words = line.decode(errors="replace").strip()
                if words.endswith(_ADVICE):
                    continue
                self._last_words.append(words)
                grave = words.startswith(("Error", "Warning"))
                log.log(logging.WARNING if grave else logging.INFO, "mosquitto: %s", words)
        finally:
            transport.close()

    def _words(self) -> str:
        return " / ".join(self._last_words) or "it said nothing"


async def _accepts_connections(port: int) -> bool:
    """Whether somebody on ``port`` answers CONNECT with a yes: an open port is not a broker."""
    try:
        reader, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return False
    try:
        writer.write(_CONNECT)
        answer = await reader.readexactly(len(_ACCEPTED))
        writer.write(_DISCONNECT)
        return answer == _ACCEPTED
    except (OSError, asyncio.IncompleteReadError):
        return False
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
