"""Many clusters of one location: their catalogue.

This room works on whole databases, as `maintenance` does; each cluster is an ordinary `Database`.
"""

from openclaw_store.clusters.catalogue import ClusterInfo, Clusters

__all__ = ["ClusterInfo", "Clusters"]
