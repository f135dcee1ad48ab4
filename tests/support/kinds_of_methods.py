"""Methods by what they prune."""

from distprune.methods import METHODS

#: Those that prune models without mixtures of experts, and those that remove nothing but experts, or of them.
OF_ALL_MODELS = [name for name, method in METHODS.items() if method.removes != ("experts",)]
OF_MIXTURES = [name for name in METHODS if name not in OF_ALL_MODELS]

#: Options with which a method that learns step by step soon has.
BRIEF = {"flop": {"steps": 4}}

#: Options with which no layer is to stay whole, by the method.
ALL_LAYERS = {
    "llm-pruner": {"first_layers": 0, "last_layers": 0},
    "mini-llm": {"first_layers": 0, "last_layers": 0},
    "slimgpt": {"first_layer": 1.0},
}
