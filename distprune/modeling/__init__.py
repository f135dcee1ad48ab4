"""What pruned checkpoints carry: small modules that stand in for others, and the classes that build models with them."""
