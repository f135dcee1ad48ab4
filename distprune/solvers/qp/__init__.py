"""Quadratic programs over boxes with a budget, solved by accelerated projected gradients."""
