"""Many clusters: their catalogue, transactions over several, and the transfer of tasks.

This room works on whole databases, as `maintenance` does; each cluster is an ordinary `Database`.
"""

from openclaw_store.clusters.catalogue import ClusterInfo, Clusters
from openclaw_store.clusters.resolver import Resolved, resolve
from openclaw_store.clusters.server import Server
from openclaw_store.clusters.transactions import transaction
from openclaw_store.clusters.transfers import Transferred, transfer

__all__ = [
    "ClusterInfo",
    "Clusters",
    "Resolved",
    "Server",
    "Transferred",
    "resolve",
    "transaction",
    "transfer",
]
