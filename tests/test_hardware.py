"""What ``dtype: auto`` comes to on hardware of every kind, as torch describes it."""

from __future__ import annotations

import platform
from types import SimpleNamespace

import pytest
import torch

from distprune.hardware import compute_dtype

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
#: What torch says of CPUs: whether oneDNN has kernels for bfloat16 and for float16, and AVX-512 instructions and tiles
#: for bfloat16.
CPUS = {
    "AVX2": (False, False, False, False),
    "AVX-512 without bfloat16": (True, False, False, False),
    "AVX-512 with bfloat16": (True, False, True, False),
    "AMX": (True, True, False, True),
}


@pytest.fixture
def on_cpu(monkeypatch):
    def pretend(cpu: str, machine: str = "x86_64") -> None:
        bf16, fp16, avx512, amx = CPUS[cpu]
        kernels = {"_is_mkldnn_bf16_supported": lambda: bf16, "_is_mkldnn_fp16_supported": lambda: fp16}
        monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**kernels))
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        monkeypatch.setattr(platform, "machine", lambda: machine)

    return pretend


@pytest.fixture
def on_gpus(monkeypatch):
    def pretend(*capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")

    return pretend


@pytest.mark.parametrize(
    ("cpu", "of_bfloat16", "of_float16"),
    [
        ("AVX2", FP32, FP32),
        ("AVX-512 without bfloat16", FP32, FP32),
        ("AVX-512 with bfloat16", BF16, FP32),
        ("AMX", BF16, FP16),
    ],
)
def test_a_cpu_computes_in_16_bits_if_it_has_units_for_that(on_cpu, cpu, of_bfloat16, of_float16):
    on_cpu(cpu)
    assert compute_dtype(BF16, "cpu").dtype == of_bfloat16
    assert compute_dtype(FP16, "cpu").dtype == of_float16


def test_of_a_cpu_that_is_not_x86_onednn_knows(on_cpu):
    on_cpu("AVX-512 without bfloat16", machine="aarch64")
    assert compute_dtype(BF16, "cpu").dtype == BF16


@pytest.mark.parametrize("stored", [BF16, FP16])
def test_a_torch_without_onednn_computes_in_float32(on_cpu, monkeypatch, stored):
    on_cpu("AMX")
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert compute_dtype(stored, "cpu").dtype == FP32


def test_a_torch_that_can_be_asked_for_no_instructions_is_taken_at_onednn_s_word(on_cpu, monkeypatch):
    on_cpu("AVX2")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert compute_dtype(BF16, "cpu").dtype == BF16


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 0)])
@pytest.mark.parametrize(("capability", "of_bfloat16"), [((7, 5), FP32), ((8, 0), BF16), ((12, 0), BF16)])
def test_a_gpu_computes_in_bfloat16_from_ampere_on_and_in_float16_always(on_gpus, device, capability, of_bfloat16):
    on_gpus(capability)
    assert compute_dtype(BF16, device).dtype == of_bfloat16
    assert compute_dtype(FP16, device).dtype == FP16


def test_of_several_gpus_all_must_have_units_for_it_unless_one_is_named(on_gpus):
    on_gpus((8, 0), (7, 0))
    assert compute_dtype(BF16, "cuda").dtype == compute_dtype(BF16, "cuda:1").dtype == FP32
    assert compute_dtype(BF16, "cuda:0").dtype == BF16


@pytest.mark.parametrize("stored", [FP32, torch.float64, torch.float8_e4m3fn])
def test_what_is_not_in_16_bits_is_computed_in_float32(on_cpu, stored):
    on_cpu("AMX")
    assert compute_dtype(stored, "cpu").dtype == FP32


def test_the_reason_names_the_machine_and_what_it_lacks(on_cpu, on_gpus):
    on_cpu("AVX2")
    on_gpus((7, 0))
    lacks = (
        "Forward passes are in float32: the checkpoint is in bfloat16, for which {} of "
        + platform.node()
        + " has no units."
    )
    assert str(compute_dtype(BF16, "cpu")) == lacks.format("the CPU")
    assert str(compute_dtype(BF16, "cuda")) == lacks.format("the GPU 0")
    on_cpu("AMX")
    assert str(compute_dtype(BF16, "cpu")) == "Forward passes are in bfloat16: the checkpoint's own dtype."
