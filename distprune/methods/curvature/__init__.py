"""Curvature-aware pruning with one budget for the whole model: the default method.

- `method.py`: the method from beginning to end; read it first.
- `curves.py`: what a dense layer's modules would lose, from activations and gradients.
- `menus.py`: what a module may become, and which choice of all modules costs least.
- `stock.py`: the choice where all layers are to be alike.
"""

from distprune.methods.curvature.method import Curvature

__all__ = ["Curvature"]
