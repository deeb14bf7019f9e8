"""A process with both doors and one memory, so that what it takes can be read from outside."""

import asyncio
import collections
import contextlib
import json
import sys
from pathlib import Path

from fogline_protocol.door_memory import Memory
from tests.protos.echo import EchoServer, rest_door
from tests.protos.raw_peer import Methods, opened

LARGEST_BODY = 8 << 20


class Process:
    """The running process: where its doors are, and the most memory that it ever had."""

    def __init__(self, pid, addresses):
        self.pid = pid
        self.address = addresses["grpc"]
        self.http = addresses["http"]

    def peak_bytes(self):
        for line in Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
        raise AssertionError("no VmHWM")


@contextlib.asynccontextmanager
async def started(limit):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.protos.memory_process", str(limit),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield Process(process.pid, json.loads(await process.stdout.readline()))
    finally:
        process.kill()
        await process.wait()


async def main():
    memory, server = Memory(int(sys.argv[1])), EchoServer()
    server.calls = collections.deque(maxlen=0)  # it remembers nothing
    async with (
        opened(Methods(), memory=memory) as door,
        rest_door(server, max_bytes=LARGEST_BODY, memory=memory) as http,
    ):
        print(json.dumps({"grpc": door.address, "http": http}), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
