"""distprune: distributed, offline structured pruning of large language models on Ray."""
