"""A source of its own process, for tests that kill it or stop it: prints its address and serves until it is ended."""

import asyncio
import sys

from tests.transports.sources import MIB, Held, accept_good_token, pattern

from hotweights.transports.pace import Pace
from hotweights.transports.ucx import UcxTransport
from hotweights.transports.ucx_lane import open_lane


async def main(mib: int, bytes_s: float) -> None:
    transport = UcxTransport(open_lane({"TLS": sys.argv[3]}), pace=Pace(bytes_s))
    server = await transport.serve(Held(pattern(mib * MIB)), "127.0.0.1:0", check=accept_good_token)
    print(server.address, flush=True)
    await asyncio.sleep(600)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
