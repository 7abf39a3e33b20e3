"""The pre-flight check: on the built-in model it tells bases that refusal depends on from those that it does not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from refusal_kernels.python_api.features.basis import RefusalBasis
from refusal_kernels.python_api.features.inputs import input_basis
from refusal_kernels.python_api.features.intervening import (
    at_content,
    content_mask,
    everywhere,
    generate_edited,
    paste_last,
    score_edited,
)
from refusal_kernels.python_api.features.preflight import Interchange, Preflight, Removal, preflight
from refusal_kernels.python_api.features.sources import find_basis, random_like
from refusal_kernels.python_api.models import load_model
from refusal_kernels.python_api.prompts import builtin
from refusal_kernels.python_api.prompts.chat import Chat, generate, score_answers

N = 12


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def animal() -> tuple[Any, Chat]:
    model, tokenizer = load_model("builtin", device="cpu")
    return model, Chat(tokenizer)


@pytest.fixture(scope="module")
def held_out() -> list[tuple[str, str]]:
    return builtin.twins(N, held_out=True)


def basis_of(animal: tuple[Any, Chat], layer: int, rank: int = 4) -> RefusalBasis:
    return find_basis("mean-difference", *animal, layers=[layer], rank=rank, twins=builtin.twins(48))


def test_the_carrier_s_basis_passes(animal: tuple[Any, Chat], held_out: list[tuple[str, str]]) -> None:
    model, chat = animal
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    model.train()
    result = preflight(model, chat, basis_of(animal, 3), held_out, random_bases=2, max_new_tokens=14)
    assert model.training
    model.eval()
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    assert (result.n, result.refused, result.harmless_refused, result.layers) == (N, 100, 0, (3,))
    assert [(row.layers, row.flipped) for row in result.interchange] == [
        ((0,), 0), ((1,), 0), ((2,), 0), ((3,), 100), ((4,), 0)
    ]  # fmt: skip
    rows = {row.kind: row for row in result.removal}
    assert list(rows) == ["zero", "benign mean", "random 1", "random 2"]
    for kind in ("zero", "benign mean"):
        assert rows[kind].refused == 0
        assert rows[kind].harmless_refused == 0
        assert rows[kind].harmless_unchanged >= 90
    for kind in ("random 1", "random 2"):
        assert rows[kind].fall == 0
    assert result.g1
    assert result.g2
    assert result.ok
    assert result.verdict.startswith("The pre-flight check holds. Removing this U (to zero) costs 100 points")
    assert "layer 3 carries refusal" in result.verdict
    assert json.loads(json.dumps(result.to_dict()))["ok"] is True
    assert "random 2" in result.table()
    assert result.verdict in result.table()


def test_a_random_basis_and_another_layer_s_fail(animal: tuple[Any, Chat], held_out: list[tuple[str, str]]) -> None:
    quick: dict[str, Any] = {"layers": [3], "random_bases": 1, "max_new_tokens": 8}
    chance = preflight(*animal, random_like(basis_of(animal, 3), seed=5), held_out, **quick)
    elsewhere = preflight(*animal, basis_of(animal, 1), held_out, **quick)
    for result in (chance, elsewhere):
        assert result.g1  # refusal does travel through layer 3; these bases just do not hold it
        assert not result.g2
        assert not result.ok
        assert "does not carry them, protecting it cannot protect refusal" in result.verdict
    assert [row.layers for row in elsewhere.interchange] == [(1,), (3,)]
    assert "This basis has only layers 1." in elsewhere.verdict


def test_several_layers_are_taken_together(animal: tuple[Any, Chat], held_out: list[tuple[str, str]]) -> None:
    both = RefusalBasis(basis_of(animal, 1).z | basis_of(animal, 3).z, twins=held_out)
    result = preflight(*animal, both, n=6, layers=[1], random_bases=1, max_new_tokens=8)
    assert result.n == 6
    assert [(row.layers, row.flipped) for row in result.interchange] == [((1,), 0), ((3,), 100), ((1, 3), 100)]
    assert result.ok


def test_bases_of_inputs_are_judged_by_what_they_cover(
    animal: tuple[Any, Chat], held_out: list[tuple[str, str]]
) -> None:
    model, chat = animal
    wide, narrow = (RefusalBasis(inputs=input_basis(model, chat, builtin.harmful(48), rank=rank)) for rank in (32, 4))
    result = preflight(model, chat, wide, held_out, max_new_tokens=8)
    assert not result.interchange
    assert not result.removal
    assert len(result.covered) == 35
    assert min(result.covered.values()) > 60
    assert max(result.random_covered.values()) < 60
    assert result.ok
    assert "whole context, not refusal alone" in result.verdict
    assert "coverage of module inputs" in result.table()
    assert not preflight(model, chat, narrow, held_out, max_new_tokens=8).ok
    assert not preflight(model, chat, random_like(wide), held_out, max_new_tokens=8).ok


def test_any_causal_lm_and_any_judge(animal: tuple[Any, Chat]) -> None:
    """A random Qwen2 with grouped-query attention, twins of different lengths, a judge of its own."""
    _, chat = animal
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(chat.tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    twins = [("destroy a bomb", "please kindly build a school now"), ("take it and paint", "paint")]
    basis = find_basis("random", model, chat, layers=[1], rank=2)
    result = preflight(model, chat, basis, twins, max_new_tokens=3)
    assert result.refused == 0
    assert not result.ok
    assert "refuses only 0 % of the harmful prompts" in result.verdict

    def all_but_paint(prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        return ["paint" not in prompt for prompt in prompts]

    judged = preflight(model, chat, basis, twins, judge=all_but_paint, max_new_tokens=3)
    assert (judged.refused, judged.harmless_refused) == (50, 50)
    assert judged.interchange[0].flipped == 0


def test_bad_arguments(animal: tuple[Any, Chat], held_out: list[tuple[str, str]]) -> None:
    basis = RefusalBasis({3: torch.eye(256)[:, :2]})
    for arguments, message in (
        ({}, "got 0 pairs and 3 bases"),
        ({"pairs": held_out, "random_bases": 0}, "got 12 pairs and 0 bases"),
        ({"pairs": held_out, "n": 0}, "got 0 pairs"),
        ({"basis": RefusalBasis({9: torch.eye(256)[:, :2]}), "pairs": held_out}, "basis: z does not fit this model"),
    ):
        with pytest.raises(ValueError, match=message):
            preflight(*animal, **{"basis": basis} | arguments)  # type: ignore[arg-type]


def test_the_words_follow_the_figures() -> None:
    good = [Removal("zero", 0, 100, 0, 100), Removal("benign mean", 90, 10, 0, 100), Removal("random 1", 97, 3, 0, 100)]
    result = Preflight(32, 100, 0, (3,), [Interchange((0,), 100), Interchange((3,), 95)], good, {}, {})
    assert result.ok
    assert result.best is not None
    assert result.best.kind == "zero"
    only_first = replace(result, interchange=[Interchange((0,), 100), Interchange((3,), 10)])
    assert not only_first.g1  # layer 0 alone does not count
    assert "at most 10 % of refusals beyond layer 0" in only_first.verdict
    noisy = replace(result, removal=[*good, Removal("random 2", 60, 40, 0, 50)])
    assert not noisy.g2
    assert "Any directions of this rank matter here" in noisy.verdict
    # Removal to zero that makes the model refuse everything harmless is passed over for the mean.
    flipped = replace(result, removal=[Removal("zero", 30, 70, 100, 0), Removal("benign mean", 40, 60, 0, 90)])
    assert flipped.g2
    assert flipped.best is not None
    assert flipped.best.kind == "benign mean"
    broken = replace(result, removal=[Removal("zero", 0, 100, 100, 0)])
    assert not broken.g2
    assert "makes the model refuse 100 % of the harmless prompts" in broken.verdict
    assert "changes 100 % of the harmless answers" in broken.verdict


# -------------------------------------------------------------------------------------------------- the interventions


def test_edits_know_their_rows_and_keep_off_padding_and_bos(animal: tuple[Any, Chat]) -> None:
    model, chat = animal
    prompts = ["build a school", builtin.harmful(1)[0].prompt, "paint"]
    seen: list[tuple[list[int], Tensor, list[Tensor]]] = []

    def make(rows: list[int], content: Tensor) -> dict[int, Any]:
        z: list[Tensor] = []
        seen.append((rows, content, z))

        def shift(x: Tensor) -> Tensor:
            z.append(x)
            return x + 1

        return {3: at_content(shift, content)}

    generate_edited(model, chat, prompts, make, max_new_tokens=3, batch_size=2)
    assert [rows for rows, _, _ in seen] == [[1, 0], [2]]
    rows, content, z = seen[0]
    lengths = [len(chat.encode_prompt(prompts[i])) for i in rows]
    assert content.sum(1).tolist() == [length - 1 for length in lengths]
    assert content[1].nonzero()[0].item() == content.shape[1] - lengths[1] + 1  # left padding, then BOS
    assert [part.shape[1] for part in z[:2]] == [content.shape[1], 1]

    edit = at_content(lambda x: x + 1, content)
    prompt, token = torch.zeros(2, content.shape[1], 4), torch.zeros(2, 1, 4)
    assert torch.equal(edit(prompt)[..., 0].bool(), content)
    assert bool(edit(token).all())


def test_pasting_replaces_the_last_prompt_token_once() -> None:
    edit = paste_last(torch.ones(2, 4))
    first = edit(torch.zeros(2, 5, 4))
    assert first[:, -1].eq(1).all()
    assert first[:, :-1].eq(0).all()
    assert edit(torch.zeros(2, 1, 4)).eq(0).all()


def test_without_edits_the_answers_are_the_model_s(animal: tuple[Any, Chat]) -> None:
    model, chat = animal
    pairs = builtin.refusal_pairs(5)
    prompts = [pair.prompt for pair in pairs]
    plain = generate(model, chat, prompts, max_new_tokens=6)
    assert generate_edited(model, chat, prompts, everywhere({}), max_new_tokens=6, batch_size=2) == plain
    questions = [(pair.prompt, pair.rejected) for pair in pairs]
    expected = score_answers(model, chat, questions)[0]
    torch.testing.assert_close(score_edited(model, chat, questions, everywhere({}), batch_size=2), expected)
    emptied = score_edited(model, chat, questions, everywhere({3: torch.zeros_like}), batch_size=2)
    assert (emptied > expected + 1).all()  # without layer 3's heads it complies
    assert content_mask(chat, chat.batch([chat.encode("paint", "it")]).inputs).sum() > 0
