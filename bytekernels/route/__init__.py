"""Where chunks end (or start), which chunk each byte belongs to, and the rows that are handed to the core."""

from bytekernels.route.op import Routing, chunk_layout, gather_chunks, route, routing_of

__all__ = ["Routing", "chunk_layout", "gather_chunks", "route", "routing_of"]
