"""Which layouts of a run fit a cluster's memory, and which of them is fastest: without a GPU, before anything runs."""
