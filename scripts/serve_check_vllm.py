"""Serves checkpoints that `serve_check_models.py` wrote with vLLM, and compares greedy tokens with transformers'.

    python scripts/serve_check_vllm.py FOLDER [NAME ...]

Runs in an environment that has vLLM and not distprune. Each model is asked through its OpenAI-compatible API.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PORT = int(os.environ.get("PORT", "8123"))
ADDRESS = f"http://127.0.0.1:{PORT}"
MINUTES = 10
#: Layouts that vLLM is known not to take, and what it says.
REFUSED = {"without_attention": "does not dispatch through the Transformers attention interface"}


def main(folder: Path, *names: str) -> None:
    results = {name: check(folder / name) for name in names or sorted(path.name for path in folder.iterdir())}
    for name, result in results.items():
        print(f"{name:30} {result}")
    sys.exit(any(result not in ("same tokens", "refused, as expected") for result in results.values()))


def check(model: Path) -> str:
    expected = json.loads((model / "expected.json").read_text())
    reason = next((reason for layout, reason in REFUSED.items() if model.name.endswith(layout)), None)
    log = model / "serving.log"
    try:
        with serving(model, log):
            found = [complete(model, prompt, len(tokens)) for prompt, tokens in zip(*expected.values(), strict=True)]
    except RuntimeError:
        return "refused, as expected" if reason and reason in log.read_text() else f"not served, see {log}"
    return "same tokens" if found == expected["tokens"] else f"other tokens: {found} and not {expected['tokens']}"


@contextmanager
def serving(model: Path, log: Path) -> Iterator[None]:
    """While open, the model is served."""
    # What `vllm serve` runs; the command itself asks for a package that is called vllm, and the one for CPUs is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(PORT)]
    command += ["--trust-remote-code", "--enforce-eager", "--dtype", "float32", "--max-model-len", "256"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as server:
        try:
            wait_for(server)
            yield
        finally:
            server.terminate()


def wait_for(server: subprocess.Popen) -> None:
    for _ in range(MINUTES * 60):
        if server.poll() is not None:
            raise RuntimeError("the server has ended")
        try:
            urllib.request.urlopen(f"{ADDRESS}/health")
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    raise RuntimeError(f"the server was not up after {MINUTES} minutes")


def complete(model: Path, prompt: list[int], count: int) -> list[int]:
    body = {"model": str(model), "prompt": prompt, "max_tokens": count, "temperature": 0, "return_token_ids": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{ADDRESS}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
