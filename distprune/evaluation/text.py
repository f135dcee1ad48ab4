"""The text that perplexity is taken on: all documents of a source, as one."""

from __future__ import annotations

import logging

from transformers import PreTrainedTokenizerBase

from distprune.calibration.chat import Rendered
from distprune.calibration.text_sources import TextSource

_LOGGER = logging.getLogger(__name__)
# As the rows of WikiText-2 are joined wherever perplexity on it is published; no tokenizer merges across a blank line.
BETWEEN_DOCUMENTS = "\n\n"


def whole_text(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> str:
    """Join the documents of a source with a blank line between them.

    The tokenizer's chat template writes out conversations; those that it refuses are left out, with a warning.

    Raises:
        InputError: there are conversations, and the tokenizer has no chat template.
    """
    written = Rendered(source.documents, tokenizer)
    texts = [
        text for text, document in zip(written, source.documents, strict=True) if text or isinstance(document, str)
    ]
    if written.refused:
        _LOGGER.warning("%s: the chat template refuses %s", source.name, written.refusals())
    return BETWEEN_DOCUMENTS.join(texts)
