"""What a pruning run would take, from the checkpoint's headers alone: memory, bytes, FLOPs and time.

Pure arithmetic on shapes: no weight is read, no Ray is started, nothing is written.
"""

from distprune.planning.cluster import Cluster, describe_cluster
from distprune.planning.needs import worker_needs
from distprune.planning.rates import RATES, Rates
from distprune.planning.run import RunPlan, plan_run

__all__ = ["RATES", "Cluster", "Rates", "RunPlan", "describe_cluster", "plan_run", "worker_needs"]
