"""RefusalBasis: what it refuses, its file, and whether it fits a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from refusal_kernels.python_api.features.basis import BASIS_FILE, RefusalBasis

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, head_dim=16)
    ),  # z is wider than 32
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
}


def directions(width: int, rank: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(width, rank, generator=torch.Generator().manual_seed(seed))).Q


def example() -> RefusalBasis:
    shared = directions(32, 4, 1)
    inputs = {
        "model.layers.1.self_attn.q_proj": shared,
        "model.layers.1.self_attn.k_proj": shared,
        "model.layers.1.mlp.down_proj": directions(40, 2, 2),
    }
    provenance = {"source": "sae", "heads": {"1": [0, 2]}, "seed": 0}
    return RefusalBasis(
        {1: directions(64, 5, 3), 0: directions(64, 3)}, inputs, [("build a bomb", "paint")], provenance
    )


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    basis = example()
    file = basis.save(tmp_path / "new" / "folder")
    assert file == tmp_path / "new" / "folder" / BASIS_FILE
    for loaded in (RefusalBasis.load(file), RefusalBasis.load(file.parent)):
        assert list(loaded.z) == [0, 1]
        assert all(torch.equal(loaded.z[layer], basis.z[layer]) for layer in basis.z)
        assert loaded.inputs.keys() == basis.inputs.keys()
        assert all(torch.equal(loaded.inputs[path], basis.inputs[path]) for path in basis.inputs)
        assert (loaded.twins, loaded.provenance) == (basis.twins, basis.provenance)
    again = basis.save(tmp_path / "other.safetensors")
    assert again.read_bytes() == file.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "other.safetensors"]  # nothing temporary is left


def test_shared_inputs_stay_shared(tmp_path: Path) -> None:
    loaded = RefusalBasis.load(example().save(tmp_path))
    assert len(loaded.inputs) == 3
    assert loaded.inputs["model.layers.1.self_attn.q_proj"] is loaded.inputs["model.layers.1.self_attn.k_proj"]
    with safe_open(tmp_path / BASIS_FILE, framework="pt") as file:
        assert len(list(file.keys())) == 4
    halved = loaded.truncate(2)
    assert halved.inputs["model.layers.1.self_attn.q_proj"] is halved.inputs["model.layers.1.self_attn.k_proj"]


def test_ranks_truncate_to_and_repr() -> None:
    basis = example()
    assert basis.ranks[1] == 5
    assert basis.ranks["model.layers.1.mlp.down_proj"] == 2
    less = basis.truncate(4)
    assert torch.equal(less.z[1], basis.z[1][:, :4])
    assert less.z[0].shape == (64, 3)
    assert less.provenance == basis.provenance
    assert less.twins == basis.twins
    assert basis.to("cpu").z[0].dtype == torch.float32
    assert repr(basis) == (
        "RefusalBasis(z[0]: rank 3 of 64, z[1]: rank 5 of 64, inputs of 3 modules: rank 2-4, 1 twins, source: sae)"
    )
    assert repr(RefusalBasis()) == "RefusalBasis(empty)"
    with pytest.raises(ValueError, match="n: expected an integer from 1 on, got 0"):
        basis.truncate(0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"z": {0: directions(8, 2) * 1.001}}, ValueError, r"z\[0\]: .*orthonormal.*\|\|U\^T U - I\|\| = 0.00283"),
        ({"z": {0: torch.ones(8, 2)}}, ValueError, r"\|\|U\^T U - I\|\| = 15"),
        ({"z": {0: torch.full((8, 2), float("nan"))}}, ValueError, r"= nan"),
        ({"z": {0: directions(8, 2).double()}}, TypeError, r"z\[0\]: expected a float32 tensor .*torch.float64"),
        ({"z": {0: [1.0]}}, TypeError, "got list"),
        ({"z": {0: torch.ones(8)}}, ValueError, r"expected shape \[width, r\].*got \[8\]"),
        ({"z": {0: torch.ones(2, 8)}}, ValueError, r"got \[2, 8\]"),
        ({"z": {0: torch.ones(8, 0)}}, ValueError, r"got \[8, 0\]"),
        ({"z": {"0": directions(8, 2)}}, TypeError, "z: expected layers as integers"),
        ({"inputs": {3: directions(8, 2)}}, TypeError, "inputs: expected module paths"),
        ({"inputs": {"a": torch.ones(8, 2)}}, ValueError, r"inputs\['a'\]: expected orthonormal"),
        ({"twins": [("one",)]}, TypeError, "twins: expected"),
        ({"provenance": "sae"}, TypeError, "provenance: expected a dict, got str"),
    ],
)
def test_bad_fields(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RefusalBasis(**changes)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got an empty basis"):
        RefusalBasis().save(tmp_path)
    with pytest.raises(ValueError, match="provenance: expected what JSON can hold"):
        RefusalBasis({0: directions(8, 2)}, provenance={"seed": torch.ones(1)}).save(tmp_path)
    basis = RefusalBasis({0: directions(8, 2)})
    basis.z[0] = basis.z[0] * 2
    with pytest.raises(ValueError, match="orthonormal"):
        basis.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    file = example().save(tmp_path)
    whole = file.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            RefusalBasis.load(file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)

    _flip(file, len(whole) - 4)  # the lowest bits of one number: still orthonormal
    refused("checksum")
    file.write_bytes(whole[: len(whole) // 2])
    refused("not a readable refusal basis")
    file.write_bytes(b"")
    refused("not a readable refusal basis")
    file.write_bytes(whole.replace(b"build a bomb", b"build a boat"))
    refused("checksum")
    file.write_bytes(whole.replace(b'format_version\\": 1', b'format_version\\": 9'))
    refused("format_version must be 1; got 9")
    save_file({"z.0": torch.eye(8)}, file)
    refused("no entry 'refusal_basis'")
    save_file({"z.0": torch.eye(8)}, file, metadata={"refusal_basis": json.dumps({"format_version": 1})})
    refused("the header lacks checksum, provenance, shared, twins")
    save_file({"z.0": torch.eye(8)}, file, metadata={"refusal_basis": "[1]"})
    refused("the header holds list")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        RefusalBasis.load(tmp_path / "nowhere")


@pytest.mark.parametrize("family", sorted(MODELS))
def test_check_against_a_model(family: str) -> None:
    model = MODELS[family]()
    width = 64 if family == "llama" else 32
    inputs = {"model.layers.1.mlp.down_proj": directions(40, 2)}
    basis = RefusalBasis({1: directions(width, 3)}, inputs)
    assert basis.check(model) is basis
    for bad, message in (
        (RefusalBasis(), "empty basis"),
        (RefusalBasis({2: directions(width, 3)}), "z does not fit this model: layer: expected 0 <= layer < 2"),
        (RefusalBasis({1: directions(width + 1, 3)}), rf"z\[1\] has {width + 1} rows, but the module reads {width}"),
        (RefusalBasis(inputs={"model.layers.1.mlp.down_proj": directions(32, 2)}), "has 32 rows.* reads 40 columns"),
        (RefusalBasis(inputs={"model.layers.9.mlp.down_proj": directions(40, 2)}), "has no module 'model.layers.9"),
        (RefusalBasis(inputs={"model.layers.1": directions(40, 2)}), "reads None columns"),
    ):
        with pytest.raises(ValueError, match=message):
            bad.check(model)


def test_check_sees_through_peft() -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(MODELS["llama"](), peft.LoraConfig(target_modules=["o_proj", "down_proj"], r=2))
    basis = RefusalBasis({1: directions(64, 3)}, {"model.layers.1.mlp.down_proj": directions(40, 2)})
    assert basis.check(wrapped) is basis
