"""Every Triton kernel × shipped configuration, compiled ahead of time for sm_80, sm_90, sm_100: that needs no GPU.

Every dtype and index type that a public operator launches is among them; those that differ from another configuration
in a dtype, an index type or a flag only ("variants") are compiled for sm_90 alone, to keep this short.

What is asserted: it compiles, no stack bytes (a spill or an indexed local array), shared memory within the
architecture's limit, the architecture's own matrix instruction where a GEMM runs on tensor cores, and 16-byte reads
in the kernels that gather rows.
"""

import importlib.util
import itertools
import re

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (Linux only)"
)

CAPABILITIES = (80, 90, 100)


def test_every_configuration_of_every_kernel_was_compiled(compiled):
    from refusal_kernels.triton_kernels import (
        adam,
        backward,
        backward_csr,
        decode,
        encode,
        encode_csr,
        grouped_encode,
        int8_rounding,
        int8_screen,
        lora_projection,
        lora_projection_lagged,
        projected_adam,
        projection,
        registry,
        sae_adam,
    )
    from refusal_kernels.triton_kernels.aot import SHARED_LIMIT, VARIANT_CAPABILITY

    labels = [configuration.label for configuration in registry.configurations()]
    assert len(set(labels)) == len(labels)
    wanted = [
        (configuration.label, capability)
        for configuration in registry.configurations()
        for capability in ((VARIANT_CAPABILITY,) if configuration.variant else CAPABILITIES)
    ]
    assert sorted((k["label"], k["capability"]) for k in compiled) == sorted(wanted)
    assert set(CAPABILITIES) == set(SHARED_LIMIT)
    # Every kernel of the package is in the registry: one without a configuration would never be compiled here.
    registered = {configuration.kernel.__name__ for configuration in registry.configurations()}
    written = {
        name
        for module in (
            encode, encode_csr, grouped_encode, int8_rounding, int8_screen, decode, backward, backward_csr, adam,
            sae_adam, projection, lora_projection, lora_projection_lagged, projected_adam,
        )
        for name in vars(module)
        if name.endswith("_kernel")
    }  # fmt: skip
    assert registered == written


def test_nothing_spills(compiled):
    assert [k for k in compiled if k["stack"] != 0] == []


def test_registers_and_shared_memory_fit(compiled):
    from refusal_kernels.triton_kernels.aot import SHARED_LIMIT

    assert [k for k in compiled if k["shared"] > SHARED_LIMIT[k["capability"]] or k["registers"] > 255] == []


def test_gemm_runs_on_tensor_cores(compiled):
    from refusal_kernels.triton_kernels.aot import INTEGER_INSTRUCTION, MATRIX_INSTRUCTION
    from refusal_kernels.triton_kernels.registry import configurations

    expected = {configuration.label for configuration in configurations() if configuration.tensor_cores}
    integer = [k for k in compiled if k["label"] == "int8.product"]
    assert len(integer) == len(CAPABILITIES)
    assert all(k["matrix_instruction"] == INTEGER_INSTRUCTION[k["capability"]] for k in integer)
    expected.remove("int8.product")
    gemms = [k for k in compiled if k["label"] in expected]
    # encode.gemm in two dtypes; encode.group with two keys and with three, in one and as a variant in another.
    assert len(gemms) == 2 * len(CAPABILITIES) + 2 * (len(CAPABILITIES) + 1)
    assert all(k["matrix_instruction"] == MATRIX_INSTRUCTION[k["capability"]] for k in gemms)
    # fp32 must not: "ieee" keeps all 24 bits, which tf32 tensor cores do not.
    exact = [k for k in compiled if k["label"] in ("encode.gemm[fp32]", "encode.group[fp32]")]
    assert len(exact) == 2 * len(CAPABILITIES)
    assert not any(k["matrix_instruction"] for k in exact)


def test_rows_are_read_16_bytes_at_a_time(compiled):
    gathers = [k for k in compiled if k["label"].startswith(("decode[", "backward.latent[", "backward.rows[", "adam."))]
    assert gathers
    assert [k["label"] for k in gathers if not k["wide_loads"]] == []


def test_nothing_passes_the_counts_of_the_lagged_projection():
    """Its programs hand partial sums and their total to one another; no tool without a GPU sees a load that is moved
    before the count it waits for, so the order of the PTX's own words is asserted."""
    from refusal_kernels.triton_kernels import aot, lora_projection_lagged

    [configuration] = [c for c in lora_projection_lagged.configurations() if c.label.endswith("[fp32,64]")]
    words = {
        "store": r"st\.global\.v4", "barrier": r"bar\.sync", "load": r"ld\.global\.cg",
        "count": r"atom\.global\S*\.acq_rel", "release": r"red\.global\S*\.release|atom\.global\S*\.release",
        "acquire": r"ld\.global\S*\.acquire|atom\.global\S*\.acquire",
    }  # fmt: skip
    found = [
        name
        for line in aot.build(configuration, 90).asm["ptx"].splitlines()
        for name, pattern in words.items()
        if re.search(pattern, line)
    ]
    assert found.count("load") == 2 * (lora_projection_lagged.SIZES[64].together + 1)  # 16 bytes each, by 128 threads
    said = " ".join(name for name, _ in itertools.groupby(found))
    for order in ("store barrier count barrier load", "store barrier release", "acquire barrier load"):
        assert order in said
    assert [said.count(name) for name in ("count", "release", "acquire", "load")] == [1, 1, 1, 2]
