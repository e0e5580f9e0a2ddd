"""A source of its own process, for tests that cut its link: prints its address and serves until it is ended."""

import asyncio
import sys

from tests.transports.sources import MIB, Held, accept_good_token, pattern

from hotweights.transports.pace import Pace
from hotweights.transports.tcp import TcpTransport


async def main(listen: str, mib: int, bytes_s: float) -> None:
    server = await TcpTransport(pace=Pace(bytes_s)).serve(Held(pattern(mib * MIB)), listen, check=accept_good_token)
    print(server.address, flush=True)
    await asyncio.sleep(600)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
