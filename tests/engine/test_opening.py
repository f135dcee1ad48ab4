"""A result opens as its original does: by no question and no warning, in a process that knows nothing of distprune."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

# Run by a fresh interpreter: ORIGINAL, RESULT.
WITHOUT_THE_PACKAGE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "distprune":
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import transformers
from transformers import AutoConfig, AutoTokenizer, pipeline
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
original, result = sys.argv[1:]
for folder in (original, result):
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    print(type(tokenizer).__name__, tokenizer("The river runs.")["input_ids"], type(config).__name__, config.vocab_size)
base = transformers.AutoModelForCausalLM.from_pretrained(original).__class__
for model_class in (transformers.AutoModelForCausalLM, transformers.AutoModel, base):
    try:
        model_class.from_pretrained(result)
    except Exception as error:
        print(error)
speak = pipeline("text-generation", result, device="cpu", trust_remote_code=True)
print(type(speak.model).__name__, speak("The river", max_new_tokens=3, do_sample=False)[0]["generated_text"])
"""
WITH_THE_PACKAGE = """
import sys
import distprune
from transformers import AutoTokenizer, pipeline
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
speak = pipeline("text-generation", distprune.load(sys.argv[2]), tokenizer=tokenizer, device="cpu")
print(type(speak.model).__name__, speak("The river", max_new_tokens=3, do_sample=False)[0]["generated_text"])
"""
NO = "of a model pruned by distprune: open it with trust_remote_code=True, or with distprune.load"
#: Transformers remarks on every configuration whose layers differ, and in pipelines on every class that it hasn't.
REMARK = "[transformers]"
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {"head_dim": 16},
}
#: The tests of configurations open every family's in this process.
OTHERS = sorted(FAMILIES.keys() - {"llama"})


@pytest.fixture
def open_all(prune_here, save_model, tmp_path):
    """Prunes a model of a family, and runs code that can't be asked anything. Gives what it said."""

    def run(code: str, family: str) -> list[str]:
        model = save_model(family, num_hidden_layers=3, **FAMILIES[family])
        prune_here(tmp_path / "pruned", model, distill=False)
        environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", code, str(model), str(tmp_path / "pruned")]
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        told = [line for line in done.stderr.splitlines() if not line.startswith(REMARK)]
        assert (done.returncode, told) == (0, [])
        return done.stdout.splitlines()

    return run


@pytest.mark.parametrize("family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_result_opens_without_the_package_as_its_original_does(open_all, family):
    of_original, of_result, *refusals, spoken = open_all(WITHOUT_THE_PACKAGE, family)
    assert of_result == of_original
    assert len(refusals) == 3
    assert all(NO in refusal for refusal in refusals)
    assert spoken.startswith(f"Pruned{family.title()}ForCausalLM The river")


@pytest.mark.parametrize("family", ["mistral", pytest.param("llama", marks=pytest.mark.slow)])
def test_with_the_package_it_opens_without_trust(open_all, family):
    (spoken,) = open_all(WITH_THE_PACKAGE, family)
    assert spoken.startswith(f"Pruned{family.title()}ForCausalLM The river")


@pytest.mark.parametrize("trust", [True, False])
def test_a_tokenizer_with_code_of_its_own_keeps_it_where_it_is_trusted(prune_here, save_model, tmp_path, trust):
    model = shutil.copytree(save_model(num_hidden_layers=3), tmp_path / "model")
    code = "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    (model / "tokenization_own.py").write_text(code)
    config = json.loads((model / "tokenizer_config.json").read_text())
    named = config | {"auto_map": {"AutoTokenizer": [None, "tokenization_own.Own"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(named))
    prune_here(tmp_path / "pruned", model, distill=False, trust_remote_code=trust)
    opened = AutoTokenizer.from_pretrained(tmp_path / "pruned", trust_remote_code=True)
    assert (type(opened).__name__ == "Own") == trust
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", trust_remote_code=True).config.pruned_layers
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["auto_map"].keys() == {
        "AutoModel",
        "AutoModelForCausalLM",
    }
