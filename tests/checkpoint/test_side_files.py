"""What travels with a model besides its weights, and what does not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from distprune.checkpoint import copy_side_files
from distprune.errors import InputError

COPIED = {
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "tekken.json"),
    *("special_tokens_map.json", "chat_template.jinja", "generation_config.json", "preprocessor_config.json"),
    *("LICENSE", "LICENSE.md", "LICENSE.txt", "Llama License.pdf", "USE_POLICY.md", "NOTICE"),
    *("additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja", "licences/third_party.txt"),
}
LEFT = {
    *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "a.pth", "a.gguf", "a.onnx", "params.json", "README_zh.md"),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json", "zero_to_fp32.py"),
    *(".gitattributes", ".cache/huggingface/tokenizer.json.lock", "__pycache__/x.pyc", "modeling_x.py"),
    *("checkpoint-500/tokenizer.json", "global_step500/notes.txt", "runs/events.out", "original/tokenizer.model"),
    *("onnx/model.onnx_data", "onnx/tokenizer.json"),
    *("step 7/model.safetensors", "step 7/tokenizer.json", "draft/config.json", "draft/tokenizer.json"),
    *("lora/adapter_config.json", "lora/tokenizer.json"),
}


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Two empty folders: where files are copied from, and where to."""
    for name in ("source", "destination"):
        (tmp_path / name).mkdir()
    return tmp_path / "source", tmp_path / "destination"


def write(folder: Path, name: str, content: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content)


def files_below(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_all_is_copied_but_weights_the_state_of_a_training_caches_and_other_models(folders, tmp_path):
    source, destination = folders
    for name in COPIED | LEFT:
        write(source, name, name)
    (source / "tokenizer.json").rename(tmp_path / "blob")
    (source / "tokenizer.json").symlink_to(tmp_path / "blob")  # as the hub's cache has it
    for name in ("large.idx", "figures/large.png"):
        write(source, name, "")
        os.truncate(source / name, 300_000_000)
    write(source, "README.md", "of the original")
    write(source, "ORIGINAL_README.md", "of what the original was made from")
    copy_side_files(source, destination)
    assert (destination / "ORIGINAL_README.md").read_text() == "of the original"
    (destination / "ORIGINAL_README.md").unlink()
    assert files_below(destination) == COPIED
    assert not (destination / "tokenizer.json").is_symlink()
    assert all((destination / name).read_text() == name for name in COPIED)


# ---------------------------------------------------------------- code that a file names

TOKENIZER = """
from transformers import PreTrainedTokenizerFast
from .spelling import MARK

class MarkingTokenizer(PreTrainedTokenizerFast):
    mark = MARK
"""


@pytest.fixture
def with_code(folders, tokenizer) -> tuple[Path, Path]:
    """The source has a tokenizer of its own class, whose module imports a module that imports another."""
    source, destination = folders
    tokenizer.save_pretrained(source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    auto_map = {"AutoTokenizer": [None, "tokenization_marking.MarkingTokenizer"]}
    write(source, "tokenizer_config.json", json.dumps(config | {"auto_map": auto_map}))
    write(source, "config.json", '{"model_type": "llama"}')
    write(source, "tokenization_marking.py", TOKENIZER)
    write(source, "spelling.py", "from .letters import MARK\n")
    write(source, "letters.py", 'MARK = "°"\n')
    write(source, "modeling_marking.py", "")
    return source, destination


def test_trusted_code_that_the_tokenizer_names_or_imports_is_copied_and_no_other(with_code):
    source, destination = with_code
    copy_side_files(source, destination, trust_remote_code=True)
    assert {name for name in files_below(destination) if name.endswith(".py")} == {
        "tokenization_marking.py",
        "spelling.py",
        "letters.py",
    }
    write(destination, "config.json", '{"model_type": "llama"}')
    found = AutoTokenizer.from_pretrained(destination, trust_remote_code=True)
    assert type(found).__name__ == "MarkingTokenizer"
    assert found.mark == "°"


def test_a_tokenizer_whose_code_is_not_trusted_opens_without_it(with_code, tokenizer):
    source, destination = with_code
    copy_side_files(source, destination)
    assert not [name for name in files_below(destination) if name.endswith(".py")]
    written = json.loads((destination / "tokenizer_config.json").read_text())
    original = json.loads((source / "tokenizer_config.json").read_text())
    assert "auto_map" not in written
    assert written.items() <= original.items()
    write(destination, "config.json", '{"model_type": "llama"}')
    for trust in (None, True):  # a later trust, in the result's own code, is none in this
        found = AutoTokenizer.from_pretrained(destination, trust_remote_code=trust)
        assert found("The river")["input_ids"] == tokenizer("The river")["input_ids"]


def test_code_of_another_repository_stays_named_and_a_list_will_do(with_code):
    source, destination = with_code
    config = json.loads((source / "tokenizer_config.json").read_text())
    elsewhere, listed = (
        {"AutoTokenizer": "org/code--tokenization.Other"},
        ["tokenization_marking.MarkingTokenizer", None],
    )
    for auto_map in (elsewhere, listed):
        write(source, "tokenizer_config.json", json.dumps(config | {"auto_map": auto_map}))
        copy_side_files(source, destination, trust_remote_code=True)
        assert json.loads((destination / "tokenizer_config.json").read_text())["auto_map"] == auto_map
        assert (destination / "tokenization_marking.py").is_file() == (auto_map is listed)


def test_named_code_that_is_not_there_is_refused_with_its_file(with_code):
    source, destination = with_code
    (source / "letters.py").unlink()
    with pytest.raises(InputError, match=r"source/tokenizer_config\.json names code that is not there .*letters\.py"):
        copy_side_files(source, destination, trust_remote_code=True)
