"""Where a run trains: beside the service in processes of its own, in a thread of it, or in a cluster.

Worker and training processes share a folder (:mod:`.folder`) and nothing else, so that it makes no difference where the
processes are. The worker starts them and follows what they tell through a launcher (:mod:`.launcher`).
"""

AGENT_VARIABLE = "CODEGRAFT_AGENT_PID"
"""Environment variable that tells a rank which process must live as long as it does."""

STORE_OF_ITS_OWN = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Environment of torch elastic's agents. Without it a restarted group shares a store with the one before, finds that
one's addresses there, and more often than not fails to connect (https://github.com/pytorch/pytorch/issues/135712)."""
MAX_RESTARTS = 3
"""Of a group of processes, within one attempt at a run."""
