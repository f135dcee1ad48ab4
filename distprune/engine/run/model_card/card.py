"""From what a run has left in its result's folder to the model card beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from upath import UPath

from distprune.checkpoint import MODEL_CARD, ORIGINAL_CARD, write_text
from distprune.checkpoint.layout import CONFIG_FILE as MODEL_CONFIG
from distprune.config import PLACEMENT, PruneConfig, load_config
from distprune.engine.run.model_card.checkpoint_name import original_name, suggested_name
from distprune.engine.run.model_card.opening import Opening, opening
from distprune.engine.run.model_card.original_card import inherited
from distprune.engine.run.model_card.results import results_of
from distprune.engine.run.record import CONFIG_FILE, RunRecord, load_record
from distprune.evaluation import ModelEvaluation
from distprune.methods import METHODS

TEMPLATE = "model_card.md.jinja"


def write_card(folder: Path | UPath, evaluation: Sequence[ModelEvaluation] = (), base_model: str | None = None) -> None:
    """Write README.md into the result of a run, from what lies there. The same result gives the same card.

    Args:
        folder: of the checkpoint.
        evaluation: of the original, if that was evaluated too, and of the checkpoint.
        base_model: the original's id on the hub, where the run had it from elsewhere.

    Raises:
        InputError: the folder is not the result of a run, or the evaluation is of other models.
    """
    record = load_record(folder)
    config = load_config(folder / CONFIG_FILE, {})
    original = folder / ORIGINAL_CARD
    old_card = original.read_text(encoding="utf-8", errors="replace") if original.is_file() else None
    opened = opening(
        json.loads((folder / MODEL_CONFIG).read_text(encoding="utf-8")),
        record.layout,
        ((layer.dense, layer.pruned) for layer in record.layers),
    )
    base_model = base_model or (record.model if record.commit else None)
    card = ModelCard.from_template(
        metadata(record, config, opened, base_model, inherited(old_card)),
        template_str=files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"),
        name=suggested_name(record),
        base_model=base_model,
        original=original_name(record.model),
        original_card=ORIGINAL_CARD if old_card is not None else None,
        record=record,
        config=config,
        method=METHODS.get(record.method),
        opening=opened,
        results=results_of(evaluation, folder) if evaluation else None,
        settings=settings(record, config),
    )
    write_text(folder / MODEL_CARD, str(card).rstrip() + "\n")


def metadata(
    record: RunRecord, config: PruneConfig, opened: Opening, base_model: str | None, original: dict[str, Any]
) -> ModelCardData:
    """What the hub reads of a card.

    The hub knows adapters, merges, quantized models and finetunes. A pruned model is none of them, so that only one
    that was trained afterwards says what it is.
    """
    relation = {"base_model_relation": "finetune"} if base_model and config.distill else {}
    tags = ["distprune", "pruning", record.method, *(["distillation"] if config.distill else [])]
    own = {"base_model": base_model, "library_name": "transformers", "pipeline_tag": opened.pipeline_tag, "tags": tags}
    return ModelCardData(**own | original | relation)


def settings(record: RunRecord, config: PruneConfig) -> str:
    """The configuration that makes the same checkpoint again, as YAML, without paths of the machine that made it."""
    chosen = config.model_dump(mode="json", exclude=set(PLACEMENT), exclude_defaults=True)
    calibrations = [chosen, chosen.get("distill") or {}]
    for group in calibrations:
        if group.get("calibration"):
            group["calibration"] = PurePath(group["calibration"]).name
    chosen["model"] = record.model if record.commit else PurePath(record.model.rstrip("/")).name
    if record.commit:
        chosen["revision"] = record.commit
    first = {name: chosen.pop(name) for name in ("model", "revision") if name in chosen}
    return yaml.safe_dump({**first, "output": suggested_name(record), **chosen}, sort_keys=False).rstrip()
