"""How good a model is: perplexity on a text, and sentences to read."""

from distprune.evaluation.generation import generate_sentence
from distprune.evaluation.perplexity import PerplexityResult, evaluate_perplexity, perplexity_of_model

__all__ = ["PerplexityResult", "evaluate_perplexity", "generate_sentence", "perplexity_of_model"]
