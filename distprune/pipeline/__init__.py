"""A pipeline for schedulers: calibrate, prune at several sparsities, evaluate, judge and publish what is good enough.

Each step is done again only where something that it depends on has changed, and resumes where it was ended.
"""

from distprune.pipeline.running import run_pipeline
from distprune.pipeline.settings import PipelineConfig, load_pipeline
from distprune.pipeline.summary import PipelineSummary

__all__ = ["PipelineConfig", "PipelineSummary", "load_pipeline", "run_pipeline"]
