"""Front processes: they speak gRPC with callers, the hub answers.

With ``--door grpcio`` most of what a small request costs is gRPC's machinery, which one process
cannot spread over cores. ``--front-processes N`` puts N processes on the hub's port that do that
part only; every call goes on to the one hub, so statistics, limits, batches and cache stay whole.
Our own door costs less than passing a call on, so with it fronts take more than they give.

    caller ─ gRPC ─► front ─ frames on a socket, large requests in shared memory ─► hub

fronts.py    the hub's side: starts the fronts, answers their calls
process.py   one front
relay.py     what both say to each other
arena.py     the pure rule for where a large request lies
"""
