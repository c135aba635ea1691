"""torchrun whose store listens on one address: `python -m rloop_mcore.platform.torchrun`, options as torchrun's.

A store asks for no key, and whoever writes to it has the ranks in hand. torch's listen on every interface, and that of
`--standalone` is unpickled by torchrun itself.
"""

from __future__ import annotations

import sys

from rloop_mcore.platform.process import importing

with importing():
    from torch.distributed import run
    from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousParameters, rendezvous_handler_registry
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    from rloop_mcore.platform.process_group import host_store

BACKEND = "one_address"  # as --rdzv-backend

_TIMEOUT_S = 900  # for the nodes to come; torchrun's own


class OneAddress(StaticTCPRendezvous):
    """Ranks follow the nodes' numbers; the store is node 0's, on the address of the endpoint. Port 0: any free one."""

    def get_backend(self) -> str:
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """As torch's, which makes a store where there is none."""
        if self.rank == 0 and self._store is None:
            store = host_store(self.master_addr, self.timeout.total_seconds(), self.master_port)
            self._store, self.master_port = store, store.port
        return super().next_rendezvous()


def _rendezvous(asked: RendezvousParameters) -> OneAddress:
    address, port = parse_rendezvous_endpoint(asked.endpoint, 0)
    return OneAddress(address, port, int(asked.get("rank")), asked.max_nodes, asked.run_id, _TIMEOUT_S)


rendezvous_handler_registry.register(BACKEND, _rendezvous)

if __name__ == "__main__":
    alone = ["--rdzv-endpoint", "127.0.0.1:0", "--rdzv-conf", "rank=0"]  # where nothing else is said
    run.main(["--rdzv-backend", BACKEND, *alone, *sys.argv[1:]])
