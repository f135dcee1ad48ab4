"""Distillation: pruned layers learn what the dense model does, each alone or all together."""
