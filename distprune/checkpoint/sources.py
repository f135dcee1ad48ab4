"""From what a user calls a model to a local checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from distprune.checkpoint.gguf import import_gguf
from distprune.checkpoint.layout import require_checkpoint
from distprune.errors import InputError

# Python files are fetched, never run: only trust_remote_code does that.
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"]
HUB_EXTRAS = ["*/*", "consolidated*"]  # other formats' folders, and Mistral's second copy of the weights


def resolve_model(source: str, *, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """The local checkpoint folder for a folder, a .gguf file (imported once) or a hub id (downloaded).

    `revision` is a hub branch, tag or commit. `cache_dir` replaces the hub's cache and that of imported GGUF
    files. InputError: no such path or repository, or what is found is no safetensors checkpoint.
    """
    path = Path(source).expanduser()
    if _looks_local(source, path):
        folder = _resolve_local(path, revision, cache_dir)
    else:
        folder = _resolve_hub(source, revision, cache_dir)
    require_checkpoint(folder)
    return folder


def _looks_local(source: str, path: Path) -> bool:
    return path.exists() or source.startswith(("./", "../", "/", "~")) or source.count("/") > 1 or _is_gguf(path)


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def _resolve_local(path: Path, revision: str | None, cache_dir: Path | None) -> Path:
    if not path.exists():
        raise InputError(f"{path} does not exist. Give a checkpoint folder, a .gguf file or a Hugging Face hub id.")
    if revision is not None:
        raise InputError(f"{path} is local, so it has no revision {revision}. Leave the revision out.")
    return import_gguf(path, cache_dir) if _is_gguf(path) and path.is_file() else path


def _resolve_hub(repository: str, revision: str | None, cache_dir: Path | None) -> Path:
    folder = _download(repository, revision, cache_dir)
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{repository} holds no safetensors weights. Choose another release of the model, download a "
            ".gguf file and give its path, or convert its weights once with AutoModelForCausalLM's "
            "from_pretrained and save_pretrained."
        )
    return folder


def _download(repository: str, revision: str | None, cache_dir: Path | None) -> Path:
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=HUB_FILES,
                ignore_patterns=HUB_EXTRAS,
            )
        )
    except Exception as error:  # the hub's client and its transport share no base class
        at_revision = f" at revision {revision}" if revision else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{repository}{at_revision} could not be fetched from the Hugging Face hub. Check the name and "
            f"the network, and for a gated model log in with `hf auth login`. The hub's client says: {reason}"
        ) from error
