"""Evaluation by splicing: SAEs whose quality is known beforehand get the figures they must get."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from refusal_kernels.python_api.evaluate import content_positions, evaluate, format_table, next_tokens
from refusal_kernels.python_api.sae import TopKSAE, TopKSAEConfig

BOS = 1


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        initializer_range=0.5,  # attention that matters, without training
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def batches(model: LlamaForCausalLM) -> list[dict[str, torch.Tensor]]:
    """Text the model writes itself, so that it predicts it well and damage shows as a higher loss."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(2):
        ids = torch.cat([torch.full((4, 1), BOS), torch.randint(3, 50, (4, 2), generator=generator)], dim=1)
        while ids.shape[1] < 12:
            with torch.no_grad():
                logits = model(ids).logits[:, -1, 3:]
            ids = torch.cat([ids, 3 + logits.argmax(-1, keepdim=True)], dim=1)
        ids[2, 5] = BOS
        mask = torch.ones_like(ids)
        mask[1, 8:] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def identity(d: int = 48) -> TopKSAE:
    """relu(x) - relu(-x) = x: latents for both signs of every coordinate, as many active as there are coordinates."""
    sae = TopKSAE(TopKSAEConfig(d, 2 * d, d))
    with torch.no_grad():
        both = torch.cat([torch.eye(d), -torch.eye(d)])
        sae.W_enc.copy_(both)
        sae.W_dec.copy_(both)
        sae.input_scale.fill_(3.0)
    return sae


def silent(d: int = 48) -> TopKSAE:
    """Reconstructs nothing."""
    sae = identity(d)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    return sae


def test_a_perfect_sae_loses_nothing(model, batches) -> None:
    report = evaluate(model, {1: identity(), 2: identity()}, batches, bos_token_id=BOS)
    for figures in report["layers"].values():
        assert figures["fvu"] == pytest.approx(0, abs=1e-10)
        assert figures["explained_variance"] == pytest.approx(1)
        assert figures["cosine"] == pytest.approx(1)
        assert figures["l0"] == pytest.approx(48)
        assert figures["ce_spliced"] == pytest.approx(figures["ce_clean"], abs=1e-5)
        assert figures["ce_zero"] > figures["ce_clean"] + 0.1
        assert figures["loss_recovered"] == pytest.approx(1, abs=1e-3)
    assert "all_layers" in report


def test_a_silent_sae_loses_what_zeroing_loses(model, batches) -> None:
    report = evaluate(model, {1: silent()}, batches, bos_token_id=BOS)
    figures = report["layers"]["1"]
    assert figures["fvu"] >= 1
    assert figures["l0"] == 0
    assert figures["silent_fraction"] == 1
    assert figures["ce_spliced"] == pytest.approx(figures["ce_zero"], abs=1e-6)
    assert figures["loss_recovered"] == pytest.approx(0, abs=1e-4)
    assert "all_layers" not in report


def test_the_figures_are_the_formulas(model, batches) -> None:
    """Against plain transformers and plain tensors: own hook, own loss, own sums."""
    torch.manual_seed(3)
    sae = TopKSAE(TopKSAEConfig(48, 96, 5, metadata={"dead_fraction": 0.25}), seed=2)
    kept = [content_positions(batch, BOS) for batch in batches]
    seen: list[torch.Tensor] = []

    def loss(edit: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        nats, count = 0.0, 0
        for batch, positions in zip(batches, kept, strict=True):
            handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
                lambda module, args, positions=positions: (edit(args[0], positions),)
            )
            with torch.no_grad():
                logits = model(**batch).logits
            handle.remove()
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
            nats += float(torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="sum"))
            count += int((labels != -100).sum())
        return nats / count

    def untouched(z: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        seen.append(z[positions])
        return z

    clean = loss(untouched)
    spliced = loss(lambda z, positions: torch.where(positions[..., None], sae(z), z))
    zeroed = loss(lambda z, positions: torch.where(positions[..., None], 0.0, z))
    x = torch.cat(seen)
    assert zeroed - clean > 0.1  # or the ratio below would prove nothing
    before = [hook for module in model.modules() for hook in module._forward_pre_hooks]
    report = evaluate(model, {1: sae}, batches, bos_token_id=BOS)
    assert [hook for module in model.modules() for hook in module._forward_pre_hooks] == before
    figures = report["layers"]["1"]
    assert report["tokens"] == len(x) == 2 * (4 * 12 - 4 - 4 - 1)
    with torch.no_grad():
        error, (values, indices) = x - sae(x), sae.encode(x)
    assert figures["fvu"] == pytest.approx(float(error.square().sum() / (x - x.mean(0)).square().sum()), rel=1e-4)
    assert figures["l0"] == pytest.approx(float((values > 0).sum(1).float().mean()))
    fired = indices[values > 0].unique().numel()
    assert figures["silent_fraction"] == pytest.approx(1 - fired / 96)
    assert figures["dead_fraction"] == 0.25
    assert figures["ce_clean"] == pytest.approx(clean, rel=1e-5)
    assert figures["ce_spliced"] == pytest.approx(spliced, rel=1e-5)
    assert figures["ce_zero"] == pytest.approx(zeroed, rel=1e-5)
    assert figures["loss_recovered"] == pytest.approx((zeroed - spliced) / (zeroed - clean), rel=1e-2)
    table = format_table(report)
    assert f"{figures['fvu']:.4f}" in table
    assert f"{figures['loss_recovered']:.1%}" in table


def test_which_tokens_count() -> None:
    ids = torch.tensor([[BOS, 7, 9, 8, 8, BOS, 7, 7, 9, 8, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    assert content_positions(batch, BOS).long().tolist() == [[0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0]]
    assert next_tokens(batch).tolist() == [[7, 9, 8, 8, BOS, 7, 7, 9, 8, -100]]
    # After token 9 only, and a BOS closes what an earlier document opened.
    assert next_tokens(batch, BOS, 9).tolist() == [[-100, -100, 8, 8, BOS, -100, -100, -100, 8, -100]]
    left_padded = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}
    assert content_positions(left_padded)[0, :3].tolist() == [False, False, True]


def test_nothing_to_evaluate(model, batches) -> None:
    with pytest.raises(ValueError, match="at least one SAE and one batch; got 0 SAEs"):
        evaluate(model, {}, batches)
    with pytest.raises(ValueError, match="0 batches"):
        evaluate(model, {1: identity()}, [])
