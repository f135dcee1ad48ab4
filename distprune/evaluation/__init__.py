"""How good a model is: perplexity on a text, lm-eval's tasks, speed, and sentences to read."""

from distprune.evaluation.answering import Answering, Loading
from distprune.evaluation.generation import generate_sentence
from distprune.evaluation.perplexity import PerplexityResult, evaluate_perplexity, perplexity_of_model
from distprune.evaluation.printed import read_evaluations
from distprune.evaluation.side_by_side import EvaluationOptions, ModelEvaluation, evaluate_models
from distprune.evaluation.speed import BatchSpeed, Speed, SpeedOptions

__all__ = [
    "Answering",
    "BatchSpeed",
    "EvaluationOptions",
    "Loading",
    "ModelEvaluation",
    "PerplexityResult",
    "Speed",
    "SpeedOptions",
    "evaluate_models",
    "evaluate_perplexity",
    "generate_sentence",
    "perplexity_of_model",
    "read_evaluations",
]
