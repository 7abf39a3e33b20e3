"""SafeLoRA and SaLoRA against their formulas, written out on small dense matrices."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from refusal_kernels.python_api.baselines.safelora import (
    aligned_projection,
    apply_safelora,
    check_unaligned,
    lora_layers,
    product_cosine,
)
from refusal_kernels.python_api.baselines.salora import (
    SaLoRA,
    answer_inputs,
    find_starts,
    load_starts,
    module_start,
    save_starts,
)
from refusal_kernels.python_api.models import load_model
from refusal_kernels.python_api.prompts import builtin
from refusal_kernels.python_api.prompts.chat import Chat

OUT, IN, R = 12, 10, 3


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def adapted(model: nn.Module, r: int = R, alpha: int = 6, trained: bool = True) -> PeftModel:
    """With an adapter on q_proj and v_proj; `trained`: B is no longer 0."""
    peft_model = get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, target_modules=["q_proj", "v_proj"]))
    for _, layer in lora_layers(peft_model):
        if trained:
            nn.init.normal_(layer.lora_B["default"].weight)
    return peft_model.eval()


def update(layer: Any) -> Tensor:
    return layer.get_delta_weight("default").detach()


# ---- SafeLoRA ----


def test_published_projection_is_v_v_transposed_over_its_norm() -> None:
    v, b = torch.randn(OUT, IN), torch.randn(OUT, R)
    c = v @ v.T / torch.linalg.norm(v)
    torch.testing.assert_close(aligned_projection(b, v), c @ b)
    assert not torch.allclose(c @ c, c)  # what makes it no projector


def test_exact_projection_keeps_the_top_left_singular_vectors() -> None:
    v, b = torch.randn(OUT, IN), torch.randn(OUT, R)
    u = torch.linalg.svd(v).U[:, :R]
    got = aligned_projection(b, v, exact=True)
    torch.testing.assert_close(got, u @ u.T @ b)
    torch.testing.assert_close(aligned_projection(got, v, exact=True), got)


def test_the_cosine_is_that_of_the_products() -> None:
    a, b1, b2 = torch.randn(R, IN), torch.randn(OUT, R), torch.randn(OUT, R)
    expected = torch.cosine_similarity((b1 @ a).flatten(), (b2 @ a).flatten(), dim=0)
    assert product_cosine(b1, b2, a) == pytest.approx(float(expected), abs=1e-6)
    assert math.isnan(product_cosine(torch.zeros(OUT, R), b2, a))


@pytest.mark.parametrize("exact", [False, True])
def test_only_modules_at_or_below_the_threshold_are_projected(exact: bool) -> None:
    base, model = tiny(1), adapted(tiny(0))
    before = {name: (update(layer), layer.base_layer.weight.detach().clone()) for name, layer in lora_layers(model)}
    cosines = {row.module: row.cosine for row in apply_safelora(copy.deepcopy(model), base, exact=exact)}
    threshold = sorted(cosines.values())[1]
    rows = apply_safelora(model, base, threshold=threshold, exact=exact)
    assert [row.projected for row in rows] == [cosine <= threshold for cosine in cosines.values()]
    assert 0 < sum(row.projected for row in rows) < len(rows)
    for row, (name, layer) in zip(rows, lora_layers(model), strict=True):
        old, aligned = before[name]
        v = aligned - base.get_submodule(name).weight.detach()
        u = torch.linalg.svd(v).U[:, :R]
        c = u @ u.T if exact else v @ v.T / torch.linalg.norm(v)
        torch.testing.assert_close(update(layer), c @ old if row.projected else old, rtol=1e-4, atol=1e-5)
        expected = torch.cosine_similarity((c @ old).flatten(), old.flatten(), dim=0)
        assert (row.module, row.cosine) == (name, pytest.approx(float(expected), abs=1e-5))
        torch.testing.assert_close(layer.base_layer.weight, aligned, rtol=0, atol=0)


def test_a_number_of_modules_of_smallest_cosine() -> None:
    base, model = tiny(1), adapted(tiny(0))
    rows = apply_safelora(model, base, select="number", number=3)
    kept = [row.cosine for row in rows if not row.projected]
    assert sum(row.projected for row in rows) == 3
    assert max(row.cosine for row in rows if row.projected) <= min(kept)


def test_untrained_modules_have_no_cosine_and_stay() -> None:
    rows = apply_safelora(adapted(tiny(0), trained=False), tiny(1), threshold=1.0)
    assert all(math.isnan(row.cosine) and not row.projected for row in rows)


def test_base_models_that_cannot_serve_are_refused() -> None:
    model = adapted(tiny(0))
    with pytest.raises(ValueError, match=r"the same weights in model\.layers\.0\.self_attn\.q_proj"):
        check_unaligned(model, tiny(0))
    other = tiny(1)
    other.model.layers[1].self_attn.v_proj = nn.Linear(24, 8, bias=False)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj of shape \[16, 24\], got \[8, 24\]"):
        apply_safelora(model, other)


# ---- SaLoRA ----


def test_a_module_start_is_what_the_formulas_say() -> None:
    weight, x_s, x_t = torch.randn(OUT, IN), torch.randn(30, IN), torch.randn(20, IN)
    start = module_start(weight, x_s, x_t, R, 4, 5)
    v_s = torch.linalg.svd(x_s @ weight.T).Vh[:4].T
    v_d = torch.linalg.svd(x_t @ weight.T).Vh[:5].T
    u, s, vh = torch.linalg.svd(weight)
    root = s[:R].sqrt().diag()
    torch.testing.assert_close(start.v_s @ start.v_s.T, v_s @ v_s.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(start.b_0, v_d @ v_d.T @ u[:, :R] @ root, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(start.a_0, root @ vh[:R], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ((R, OUT, 4), "salora_safety_rank: expected less than the 12 outputs"),
        ((R, 8, 4), "salora_safety_rank: expected at most 6, for 6 tokens"),
        ((R, 4, 13), "salora_task_rank: expected at most 12"),
        ((11, 4, 4), "r: expected at most the 10 singular values"),
    ],
)
def test_ranks_that_fill_the_output_or_exceed_the_samples(ranks: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module_start(torch.randn(OUT, IN), torch.randn(6, IN), torch.randn(20, IN), *ranks)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(load_model("builtin", device="cpu")[1])


def builtin_model() -> Any:
    return load_model("builtin", device="cpu")[0]


def questions() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    refusals = [(pair.prompt, pair.chosen) for pair in builtin.refusal_pairs(12)]
    return refusals, [(item.prompt, item.dialogue().answer) for item in builtin.choices(16)]


def test_inputs_are_those_of_the_answers_tokens(chat: Chat) -> None:
    model, (refusals, _) = builtin_model(), questions()
    module = model.model.layers[2].self_attn.q_proj
    got = answer_inputs(model, chat, refusals, {"q": module}, batch_size=5)["q"]
    expected = []
    for prompt, answer in refusals:
        encoded = chat.encode(prompt, answer)
        seen: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0]))
        with torch.inference_mode():
            model(torch.tensor([encoded.ids]))
        handle.remove()
        expected.append(seen[0][encoded.start :])
    wanted = torch.cat(expected)
    assert got.shape == wanted.shape
    # Batches go by length, so rows are compared as sets: by their products with themselves.
    torch.testing.assert_close(got.T @ got, wanted.T @ wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("alpha", [4, 8])
def test_before_training_the_model_is_the_untouched_one(chat: Chat, alpha: int, tmp_path: Path) -> None:
    refusals, tasks = questions()
    ids = torch.tensor([chat.encode(*tasks[0]).ids])
    untouched = builtin_model()
    with torch.inference_mode():
        expected = untouched(ids).logits
    model = adapted(untouched, r=4, alpha=alpha, trained=False)
    starts = find_starts(model, chat, refusals, tasks, r=4, safety_rank=8, task_rank=8)
    save_starts(tmp_path / "starts.safetensors", starts)
    for name, start in load_starts(tmp_path / "starts.safetensors").items():
        assert torch.equal(start.v_s, starts[name].v_s)
        assert torch.equal(start.a_0, starts[name].a_0)
    weights = {name: layer.base_layer.weight.detach().clone() for name, layer in lora_layers(model)}
    salora = SaLoRA(model, starts)
    assert all(not torch.equal(layer.base_layer.weight, weights[name]) for name, layer in lora_layers(model))
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        deployed = salora.deploy()
        torch.testing.assert_close(deployed(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_deployed_it_computes_what_was_trained_and_leaves_safety_outputs_alone(chat: Chat, tmp_path: Path) -> None:
    refusals, tasks = questions()
    ids = torch.tensor([chat.encode(*tasks[0]).ids])
    model = adapted(builtin_model(), r=4, alpha=8, trained=False)
    starts = find_starts(model, chat, refusals, tasks, r=4, safety_rank=8, task_rank=8)
    untouched = {name: layer.base_layer.weight.detach().clone() for name, layer in lora_layers(model)}
    salora = SaLoRA(model, starts)
    for _, layer in lora_layers(model):  # as training leaves them
        nn.init.normal_(layer.lora_A["default"].weight, std=0.2)
        nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    parts = {
        name: (layer.lora_B["default"].weight.detach().clone(), layer.lora_A["default"].weight.detach().clone())
        for name, layer in lora_layers(model)
    }
    with torch.inference_mode():
        trained = model(ids).logits
    deployed = salora.deploy()
    with torch.inference_mode():
        torch.testing.assert_close(deployed(ids).logits, trained, rtol=1e-4, atol=1e-4)
    for name, layer in lora_layers(deployed):
        start, (b, a) = starts[name], parts[name]
        assert torch.equal(layer.base_layer.weight, untouched[name])
        c = torch.eye(len(start.v_s)) - start.v_s @ start.v_s.T
        torch.testing.assert_close(update(layer), 2 * (c @ b @ a - c @ start.b_0 @ start.a_0), rtol=1e-4, atol=1e-4)
        assert float((start.v_s.T @ update(layer)).norm() / update(layer).norm()) < 1e-5
    deployed.save_pretrained(tmp_path)
    reopened = PeftModel.from_pretrained(builtin_model(), tmp_path).eval()
    with torch.inference_mode():
        torch.testing.assert_close(reopened(ids).logits, trained, rtol=1e-4, atol=1e-4)
