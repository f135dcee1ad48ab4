"""Reading any Hugging Face checkpoint tensor by tensor, and writing one as its layers stream in.

Knows files and tensors only: no mathematics, no Ray, and no model family's tensor names.
"""

from distprune.checkpoint.disk import check_free_space
from distprune.checkpoint.durable import read_names, read_tensor, read_tensors, write_tensors, write_text
from distprune.checkpoint.gguf import import_gguf
from distprune.checkpoint.hub import HubFiles, HubModel, find_on_hub, open_on_hub
from distprune.checkpoint.hub_access import check_may_write
from distprune.checkpoint.infos import TensorInfo, describe, entry_of
from distprune.checkpoint.part_folder import PartFolder, WrittenFile
from distprune.checkpoint.publish import (
    hold_lock,
    is_locked,
    partial_directory,
    prepare_output,
    publish,
    published_mark,
)
from distprune.checkpoint.reader import Checkpoint
from distprune.checkpoint.remote import fetch_model
from distprune.checkpoint.side_files import MODEL_CARD, ORIGINAL_CARD, copy_side_files
from distprune.checkpoint.sources import is_hub_id, refuse_revision, resolve_model
from distprune.checkpoint.storage_failures import failures_explained
from distprune.checkpoint.tensors import TensorFiles, TensorSource, is_finite
from distprune.checkpoint.upload import (
    INDISPENSABLE,
    check_destination,
    check_hub_ignore,
    read_published,
    upload_folder,
)
from distprune.checkpoint.writer import ShardWriter

__all__ = [
    "INDISPENSABLE",
    "MODEL_CARD",
    "ORIGINAL_CARD",
    "Checkpoint",
    "HubFiles",
    "HubModel",
    "PartFolder",
    "ShardWriter",
    "TensorFiles",
    "TensorInfo",
    "TensorSource",
    "WrittenFile",
    "check_destination",
    "check_free_space",
    "check_hub_ignore",
    "check_may_write",
    "copy_side_files",
    "describe",
    "entry_of",
    "failures_explained",
    "fetch_model",
    "find_on_hub",
    "hold_lock",
    "import_gguf",
    "is_finite",
    "is_hub_id",
    "is_locked",
    "open_on_hub",
    "partial_directory",
    "prepare_output",
    "publish",
    "published_mark",
    "read_names",
    "read_published",
    "read_tensor",
    "read_tensors",
    "refuse_revision",
    "resolve_model",
    "upload_folder",
    "write_tensors",
    "write_text",
]
