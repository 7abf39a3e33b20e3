"""What each site promises, on the real model classes with grouped-query attention, and what is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

from refusal_kernels.python_api.capturing import capture
from refusal_kernels.python_api.features.basis import RefusalBasis
from refusal_kernels.python_api.protection.adapters import adapted_modules, compress_names
from refusal_kernels.python_api.protection.protect import protect
from refusal_kernels.python_api.protection.sites import Constraint, constraints_for

pytestmark = pytest.mark.filterwarnings("ignore::refusal_kernels.python_api.protection.stepping.ProtectionWarning")

VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 61, 3, 4, 2, 8, 32
Z = HEADS * HEAD_DIM
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # the default would leave attention almost uniform and hide mistakes
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(family: str = "llama", **changes: Any) -> Any:
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(1)
    model = model_class(config_class(**{**SIZES, **changes})).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # gains of one would hide that the residual site must count them
            parameter.data.uniform_(0.5, 1.5)
    return model


def directions(rows: int, rank: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, rank, generator=torch.Generator().manual_seed(seed)))[0]


def ids(rows: int = 4, tokens: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def adapted(base: Any, modules: list[str], **options: Any) -> Any:
    torch.manual_seed(2)
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=modules, **options))


def train(model: Any, protection: Any, steps: int = 25) -> tuple[float, float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    protection.attach(optimizer)
    losses = []
    for step in range(steps):
        batch = ids(seed=step % 3)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


def input_basis(base: Any, batch: Tensor, rank: int | None = None) -> dict[str, Tensor]:
    """An orthonormal basis of every linear's input activations on `batch`."""
    seen: dict[str, Tensor] = {}

    def note(path: str) -> Any:
        return lambda _module, args: seen.__setitem__(path, args[0].detach().reshape(-1, args[0].shape[-1]))

    names = [n for n, m in base.named_modules() if n.rsplit(".", 1)[-1] in LINEARS]
    handles = [base.get_submodule(n).register_forward_pre_hook(note(n)) for n in names]
    base(input_ids=batch)
    for handle in handles:
        handle.remove()
    return {path: torch.linalg.qr(x.double().T)[0][:, :rank].float() for path, x in seen.items()}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


MODES = pytest.mark.parametrize("mode", ["forward", "update", "weight"])
FAMILY = pytest.mark.parametrize("family", sorted(FAMILIES))


@MODES
@FAMILY
def test_o_proj_reads_the_features_as_before(family: str, mode: str) -> None:
    base = build(family)
    basis = RefusalBasis(z={1: directions(Z, 5), 2: directions(Z, 3, 1)})
    model = adapted(base, ["o_proj"])
    first, last = train(model, protect(model, basis, sites="o_proj", mode=mode))
    assert last < first - 0.3
    for layer, U in basis.z.items():
        o_proj = base.model.layers[layer].self_attn.o_proj
        with torch.no_grad():
            assert relative(o_proj(U.T), o_proj.base_layer(U.T)) < 1e-6
            other = directions(Z, 4, 9).T
            assert relative(o_proj(other), o_proj.base_layer(other)) > 1e-2  # elsewhere it has learned


@MODES
@FAMILY
def test_v_proj_writes_the_features_as_before(family: str, mode: str) -> None:
    """Only layer 1's values are trained, so attention is unchanged and the features u · z themselves must be."""
    base = build(family)
    basis = RefusalBasis(z={1: directions(Z, 3)})
    model = adapted(base, ["v_proj"], layers_to_transform=[1])
    train(model, protect(model, basis, sites="v_proj", mode=mode))
    with capture(model, [1]) as seen:
        after = seen.run(ids(seed=7))[1]
    with model.disable_adapter(), capture(model, [1]) as seen:
        before = seen.run(ids(seed=7))[1]
    assert relative(after @ basis.z[1], before @ basis.z[1]) < 1e-6
    assert relative(after, before) > 1e-2


@MODES
@FAMILY
def test_residual_neither_writes_nor_reads_the_lifted_features(family: str, mode: str) -> None:
    base = build(family)
    basis = RefusalBasis(z={1: directions(Z, 4)})
    lifted = torch.linalg.qr((base.model.layers[1].self_attn.o_proj.weight @ basis.z[1]).double())[0].float().detach()
    model = adapted(base, LINEARS)
    protection = protect(model, basis, sites="residual", mode=mode)
    train(model, protection)
    assert protection.leak() < 1e-6
    held = {(c.module.split(".", 2)[2], c.side) for c in protection.constraints}
    writers = {(f"{i}.{name}", "output") for i in (1, 2) for name in ("self_attn.o_proj", "mlp.down_proj")}
    readers = {(f"{i}.mlp.{name}", "input") for i in (1, 2) for name in ("gate_proj", "up_proj")}
    readers |= {(f"2.self_attn.{name}", "input") for name in ("q_proj", "k_proj", "v_proj")}
    assert held == writers | readers
    h = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(3))
    moved = h + 3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(4)) @ lifted.T

    def added(module: Any, x: Tensor) -> Tensor:
        return module(x) - module.base_layer(x)

    def rms(x: Tensor) -> Tensor:
        return (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    with torch.no_grad():
        for name, norm in (("self_attn.q_proj", "input_layernorm"), ("mlp.up_proj", "post_attention_layernorm")):
            layer = base.model.layers[2]
            before, after = (added(layer.get_submodule(name), getattr(layer, norm)(x)) * rms(x) for x in (h, moved))
            assert relative(after, before) < 1e-5  # only through the scalar rms
            assert before.norm() > 0.1
        writer = base.model.layers[2].mlp.down_proj
        x = torch.randn(6, 40, generator=torch.Generator().manual_seed(5))
        assert (added(writer, x) @ lifted).norm() < 2e-6 * added(writer, x).norm()


@MODES
@FAMILY
def test_all_inputs_leave_the_calibration_prompt_unchanged(family: str, mode: str) -> None:
    base = build(family)
    prompt = ids(1, 6, seed=11)
    basis = RefusalBasis(inputs=input_basis(base, prompt))
    logits = base(input_ids=prompt).logits.detach()
    model = adapted(base, LINEARS)
    first, last = train(model, protect(model, basis, sites="all", mode=mode))
    assert last < first - 0.3
    with torch.no_grad():
        assert relative(model(input_ids=prompt).logits, logits) < 1e-5


def test_a_grouped_value_head_carries_the_slices_of_all_its_query_heads() -> None:
    base = build()
    basis = RefusalBasis(z={0: directions(Z, 2)})
    basis.z[0][:HEAD_DIM] = 0  # query head 0 carries nothing, its kv head serves head 1 as well
    basis.z[0] = torch.linalg.qr(basis.z[0])[0]
    [found] = constraints_for(base, ["model.layers.0.self_attn.v_proj"], basis, "v_proj")
    assert found.side == "output"
    assert found.U.shape == (KV_HEADS * HEAD_DIM, 2 + 4)
    assert torch.allclose(found.U.T @ found.U, torch.eye(6), atol=1e-6)
    for head in range(HEADS):
        kv = head // 2
        slice_ = basis.z[0][head * HEAD_DIM : (head + 1) * HEAD_DIM]
        block = found.U[kv * HEAD_DIM : (kv + 1) * HEAD_DIM]
        assert torch.allclose(block @ (block.T @ slice_), slice_, atol=1e-6)


def test_a_value_head_that_would_be_frozen_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"layer 2 has rank 8 in key/value head 0, all of its 8 dimensions"):
        constraints_for(
            build(), ["model.layers.2.self_attn.v_proj"], RefusalBasis(z={2: directions(Z, 4)}), sites="v_proj"
        )


def test_overlapping_constraints_are_merged_to_the_union_of_their_spans() -> None:
    base = build()
    path = "model.layers.1.self_attn.o_proj"
    basis = RefusalBasis(z={1: directions(Z, 5)})
    extra = directions(Z, 3, 1)
    basis.inputs = {path: torch.linalg.qr(torch.cat([basis.z[1][:, :2], extra], 1))[0]}
    [found] = constraints_for(base, [path], basis, ("o_proj", "all"))
    assert isinstance(found, Constraint)
    assert (found.rank, found.sites) == (8, ("o_proj", "all"))
    both = torch.cat([basis.z[1], extra], 1)
    assert (found.U @ (found.U.T @ both) - both).abs().max() < 1e-5


def test_modules_are_named_in_few_words() -> None:
    paths = [f"model.layers.{i}.self_attn.{n}" for i in (0, 1, 2, 4) for n in ("q_proj", "k_proj")]
    assert compress_names([*paths, "lm_head"]) == "model.layers.{0-2,4}.self_attn.{q_proj,k_proj}, lm_head"
    assert compress_names(["model.layers.3.mlp.up_proj"]) == "model.layers.3.mlp.up_proj"


def spoilt(factor: float) -> RefusalBasis:
    """A basis whose directions were changed after it was checked."""
    basis = RefusalBasis(z={1: directions(Z, 2)})
    basis.z[1] = basis.z[1] * factor
    return basis


@pytest.mark.parametrize(
    ("basis", "sites", "message"),
    [
        (RefusalBasis(), "o_proj", "has no directions in z"),
        (RefusalBasis(z={1: directions(Z - 1, 2)}), "o_proj", rf"z\[1\] must be \[{Z}, r\]"),
        (spoilt(2), "o_proj", "orthonormal"),
        (spoilt(float("nan")), "o_proj", "orthonormal"),
        (RefusalBasis(z={9: directions(Z, 2)}), "o_proj", "expected 0 <= layer < 3"),
        (RefusalBasis(z={1: directions(Z, 2)}), "q_proj", "expected some of o_proj, v_proj, residual, all; got q_proj"),
        (RefusalBasis(z={1: directions(Z, 2)}), (), "got none"),
        (RefusalBasis(z={1: directions(Z, Z)}), "o_proj", "would freeze it"),
        (RefusalBasis(inputs={"model.layers.0.self_attn.o_proj": directions(Z, 2)}), "all", r"layers.\{1-2\}"),
        (RefusalBasis(inputs={f"model.layers.{i}.self_attn.o_proj": directions(9, 2) for i in range(3)}), "all", "wid"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(basis: RefusalBasis, sites: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        constraints_for(build(), [f"model.layers.{i}.self_attn.o_proj" for i in range(3)], basis, sites)


def test_the_residual_site_refuses_other_norms_than_one_rms_norm() -> None:
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**{**SIZES, "head_dim": HEAD_DIM})
    gemma2 = transformers.Gemma2ForCausalLM(config)
    with pytest.raises(ValueError, match="built otherwise"):
        constraints_for(
            gemma2, ["model.layers.2.self_attn.q_proj"], RefusalBasis(z={1: directions(Z, 2)}), sites="residual"
        )


def test_gemmas_gains_are_one_plus_the_weight() -> None:
    torch.manual_seed(0)
    gemma = transformers.GemmaForCausalLM(transformers.GemmaConfig(**{**SIZES, "head_dim": HEAD_DIM}))
    gemma.model.layers[2].input_layernorm.weight.data.uniform_(-0.3, 0.3)
    basis = RefusalBasis(z={1: directions(Z, 2)})
    [found] = constraints_for(gemma, ["model.layers.2.self_attn.q_proj"], basis, sites="residual")
    lifted = gemma.model.layers[1].self_attn.o_proj.weight @ basis.z[1]
    read = (1 + gemma.model.layers[2].input_layernorm.weight)[:, None] * lifted
    assert ((found.U @ (found.U.T @ read) - read).norm() / read.norm()) < 1e-5


def test_adapters_are_found_under_the_base_models_names() -> None:
    base = build()
    model = adapted(copy.deepcopy(base), ["o_proj", "embed_tokens"])
    found = adapted_modules(model, ["default"])
    assert list(found.linears) == [f"model.layers.{i}.self_attn.o_proj" for i in range(3)]
    assert found.others == {"model.embed_tokens": ("LoRA on an embedding", False)}
    assert adapted_modules(model, ["another"]).paths == []
