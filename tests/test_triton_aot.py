"""Every Triton kernel × shipped configuration, compiled ahead of time for sm_80, sm_90, sm_100: that needs no GPU.

Whatever a public operator launches is among them (tests/test_triton_launches.py). Those that differ from another
configuration in a dtype, an index type or a flag only ("variants") are compiled here for sm_90 alone, to keep this
short; benches/kernels.md has all of them on all architectures, from the sources as they are (tests/test_gpu_status.py).

What is asserted: it compiles, no stack bytes (a spill or an indexed local array), shared memory within the
architecture's limit, the matrix instructions that a product is meant for and none elsewhere, 16-byte reads in the
kernels that gather rows, and that the committed table says the same.
"""

import importlib.util
import itertools
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (Linux only)"
)

ROOT = Path(__file__).resolve().parent.parent
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


def test_products_run_on_the_instruction_they_are_meant_for(compiled):
    from refusal_kernels.triton_kernels.aot import PRODUCTS, expected_instructions
    from refusal_kernels.triton_kernels.registry import configurations

    of = {configuration.label: configuration for configuration in configurations()}
    assert {c.kernel.__name__ for c in of.values() if "tl.dot(" in c.kernel.src} == set(PRODUCTS)
    assert all(expected_instructions(c, 90) for c in of.values() if c.tensor_cores)
    found = {(k["label"], k["capability"]): k["matrix_instruction"] for k in compiled}
    assert {at: name for at, name in found.items() if name != expected_instructions(of[at[0]], at[1])} == {}
    for label, expected in (
        ("encode.gemm[bf16]", ["HMMA", "HGMMA", "UTCHMMA"]),
        ("int8.product", ["IMMA", "IGMMA", "UTCIMMA"]),
        # U^T of 64 columns and more fills a warpgroup; a LoRA's 16 rows take the instruction of one warp.
        ("projected_adam.coefficients[128]", ["HMMA", "HGMMA", "UTCHMMA"]),
        ("lora_projection.coefficients[fp32,16]", ["HMMA", "HMMA", "HMMA"]),
        ("lora_projection.update[fp32,64]", ["HMMA", "HGMMA+HMMA", "HMMA+UTCHMMA"]),
        # fp32 must not: "ieee" keeps all 24 bits, which tf32 tensor cores do not.
        ("encode.gemm[fp32]", ["", "", ""]),
        ("encode.group[fp32]", ["", "", ""]),
        ("projection.update[64,32]", ["", "", ""]),
    ):
        assert [found[label, capability] for capability in CAPABILITIES] == expected, label


def test_the_committed_table_says_what_is_compiled_here(compiled):
    """It has every configuration on every architecture; here fewer are compiled, and must come out the same."""
    import triton

    sys.path.insert(0, str(ROOT))  # `benches` is not installed: it runs from the repository root
    from benches import kernels

    written = kernels.TABLE.read_text(encoding="utf-8")
    if f" Triton {triton.__version__}," not in written:
        pytest.skip(f"the table is of another Triton than {triton.__version__}")
    cells = kernels.cells(written)
    said = {(k["label"], k["capability"]): cells[k["label"]][kernels.TRITON.index(k["capability"])] for k in compiled}
    differ = {at: cell for k in compiled if (cell := said[at := (k["label"], k["capability"])]) != kernels.cell(k)}
    assert differ == {}


def test_rows_are_read_16_bytes_at_a_time(compiled):
    """But for rows of 128 numbers of 16 bits throughout, of which a warp's threads have 8 bytes each."""
    gathers = [k for k in compiled if k["label"].startswith(("decode[", "backward.latent[", "backward.rows[", "adam."))]
    short = re.compile(r"adam\.row\[128\S*\+(bf16|fp16)\]")
    assert {k["label"] for k in gathers if not k["wide_loads"]} == {
        k["label"] for k in gathers if short.fullmatch(k["label"])
    }


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
