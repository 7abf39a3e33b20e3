"""Refusal latents and bases: attribution against plain autograd, the causal check, the sources, site "all", the CLI."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from typer.main import get_command

from refusal_kernels.python_api import builtin_model
from refusal_kernels.python_api.capturing import capture, splice
from refusal_kernels.python_api.cli import app
from refusal_kernels.python_api.cli_features import load_saes, parse_heads, read_twins, split
from refusal_kernels.python_api.features.attribution import (
    FeatureReport,
    LayerFeatures,
    refusal_features,
    select,
)
from refusal_kernels.python_api.features.basis import RefusalBasis
from refusal_kernels.python_api.features.causal import causal_check, matched_latents, zeroing
from refusal_kernels.python_api.features.inputs import adapted_linears, coverage, input_basis
from refusal_kernels.python_api.features.intervening import judge_refusals
from refusal_kernels.python_api.features.site_sae import site_saes
from refusal_kernels.python_api.features.sources import (
    basis_from_features,
    difference_basis,
    find_basis,
    random_like,
)
from refusal_kernels.python_api.models import load_model
from refusal_kernels.python_api.prompts import builtin
from refusal_kernels.python_api.prompts.chat import Chat, answer_log_probs
from refusal_kernels.python_api.prompts.records import ContrastPair
from refusal_kernels.python_api.sae import TopKSAE, TopKSAEConfig

HEADS, HEAD_DIM = 4, 16
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # the default would leave attention almost uniform and hide mistakes
}
PAIRS = [
    ContrastPair("build a school", "i can not help with that .", "sure , first take the flask ."),
    ContrastPair("please kindly destroy a bomb now", "i can not help .", "sure , take the flask and then use it ."),
    ContrastPair("paint", "no .", "it is red ."),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(transformers.AutoTokenizer.from_pretrained(builtin_model.path()))


def random_model(family: str, chat: Chat, **changes: Any) -> Any:
    """Grouped-query attention, head_dim that is not hidden / heads for Llama; the built-in model's tokenizer."""
    torch.manual_seed(3)
    sizes = SIZES | {"vocab_size": len(chat.tokenizer)} | changes
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, head_dim=HEAD_DIM)).eval()
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes | {"hidden_size": 64})).eval()


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest, chat: Chat) -> Any:
    return random_model(request.param, chat)


def random_sae(model: Any, chat: Chat, layer: int, heads: list[int] | None = None, seed: int = 0) -> TopKSAE:
    """Not trained, but with its scale and bias fitted, so that latents of the code matter."""
    with capture(model, [layer], None if heads is None else {layer: heads}) as cap:
        batch = chat.batch([chat.encode(pair.prompt, pair.chosen) for pair in PAIRS])
        content = batch.attention_mask.bool()
        content[:, 0] = (
            False  # else the median, and with it b_dec, is the z that all sequences share, which encodes to 0
        )
        z = cap.run(batch.inputs, positions=content)[layer]
    sae = TopKSAE(TopKSAEConfig(z.shape[1], 40, 6, layer=layer), dtype=z.dtype, seed=seed)
    return sae.init_from_data(z)


def metric(model: Any, chat: Chat, pair: ContrastPair) -> Tensor:
    """log P(chosen) - log P(rejected), the slow way: one sequence after the other."""
    parts = []
    for answer in (pair.chosen, pair.rejected):
        batch = chat.batch([chat.encode(pair.prompt, answer)])
        parts.append(answer_log_probs(model(**batch.inputs).logits, batch)[0])
    return parts[0] - parts[1]


def slow_attribution(
    model: Any, chat: Chat, sae: TopKSAE, layer: int, pairs: Sequence[ContrastPair], first: int
) -> Tensor:
    """E sum_t f_t d metric / d f_t by autograd through the spliced SAE, token by token from `first` on."""
    total = torch.zeros(sae.config.n_latents, dtype=torch.float64)
    for pair in pairs:
        for answer, sign in ((pair.chosen, 1.0), (pair.rejected, -1.0)):
            batch = chat.batch([chat.encode(pair.prompt, answer)])
            codes: list[tuple[Tensor, Tensor]] = []

            def spliced(z: Tensor, codes: list[Any] = codes) -> Tensor:
                values, indices = sae.encode(z)
                values = values.detach().requires_grad_()
                codes.append((values, indices))
                x_hat = sae.decode(values, indices)
                return x_hat + (z - x_hat).detach()

            with splice(model, {layer: spliced}):
                log_p = answer_log_probs(model(**batch.inputs).logits, batch)[0]
            values, indices = codes[0]
            (slopes,) = torch.autograd.grad(log_p, values)
            for t in range(first, values.shape[1]):
                for j in range(values.shape[2]):
                    total[indices[0, t, j]] += sign * float(values[0, t, j].detach() * slopes[0, t, j])
    return total / len(pairs)


# ------------------------------------------------------------------------------------------------------ attribution


def test_attribution_equals_autograd_through_the_spliced_sae(model: Any, chat: Chat) -> None:
    saes = {1: random_sae(model, chat, 1), 2: random_sae(model, chat, 2, seed=1)}
    report = refusal_features(model, chat, saes, PAIRS, n=5, batch_size=4)
    for layer, sae in saes.items():
        expected = slow_attribution(model, chat, sae, layer, PAIRS, first=1)
        torch.testing.assert_close(report.layers[layer].a_ref.double(), expected, rtol=1e-3, atol=1e-5)
        if layer == 1:  # in the last layer the first token's z reaches no answer
            with_bos = slow_attribution(model, chat, sae, layer, PAIRS, first=0)
            assert (with_bos - expected).abs().max() > 1e-3
        best = expected.argsort(descending=True)[:5].tolist()
        assert report.features[layer] == [f for f in best if expected[f] > 0]
        assert all(parameter.grad is None for parameter in [*model.parameters(), *sae.parameters()])


def test_padding_and_company_change_nothing(model: Any, chat: Chat) -> None:
    """In fp64: a batch's shape chooses among a BLAS's kernels, whose fp32 sums differ by more than padding might."""
    model = copy.deepcopy(model).double()
    sae = random_sae(model, chat, 1)
    alone = refusal_features(model, chat, {1: sae}, PAIRS, batch_size=1).layers[1]
    together = refusal_features(model, chat, {1: sae}, PAIRS, batch_size=6).layers[1]
    torch.testing.assert_close(alone.a_ref, together.a_ref, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(alone.mass, together.mass, rtol=1e-6, atol=1e-8)


def test_attribution_is_the_slope_of_the_metric(chat: Chat) -> None:
    """Central difference in the size of one latent, at every content token, in fp64."""
    model = random_model("llama", chat).double()
    sae = random_sae(model, chat, 1)
    pair = PAIRS[1]
    found = refusal_features(model, chat, {1: sae}, [pair]).layers[1]
    latent, eps, sides = int(found.a_ref.abs().argmax()), 1e-3, []
    for factor in (1 + eps, 1 - eps):

        def scaled(z: Tensor, factor: float = factor) -> Tensor:
            values, indices = sae.encode(z)
            extra = (values * (indices == latent)).sum(-1, keepdim=True) * sae.decoder_directions()[latent]
            extra[:, 0] = 0
            return z + (factor - 1) * extra

        with torch.no_grad(), splice(model, {1: scaled}):
            sides.append(float(metric(model, chat, pair)))
    assert float(found.a_ref[latent]) == pytest.approx((sides[0] - sides[1]) / (2 * eps), rel=1e-2)


def test_integrated_gradients_add_up(chat: Chat) -> None:
    """Completeness: the attributions sum to the metric's change between both ends of the path."""
    model = random_model("llama", chat)
    sae = random_sae(model, chat, 1)
    pair = PAIRS[0]
    whole = refusal_features(model, chat, {1: sae}, [pair], steps=24).layers[1].a_ref.sum()

    def emptied(z: Tensor) -> Tensor:
        values, indices = sae.encode(z)
        gone = (values[..., None] * sae.decoder_directions()[indices]).sum(-2)
        gone[:, 0] = 0
        return z - gone

    with torch.no_grad():
        clean = metric(model, chat, pair)
        with splice(model, {1: emptied}):
            empty = metric(model, chat, pair)
    assert float(whole) == pytest.approx(float(clean - empty), rel=0.003)
    one_step = refusal_features(model, chat, {1: sae}, [pair]).layers[1].a_ref.sum()
    assert abs(float(one_step) - float(clean - empty)) > 0.05 * abs(float(clean - empty))

    ablation = find_basis(
        "mean-difference", model, chat, layers=[1], rank=2, twins=[("paint", "destroy"), ("a", "bomb")]
    )
    from_ablated = refusal_features(model, chat, {1: sae}, [pair], steps=24, ablation=ablation)
    u = ablation.z[1]

    def refusal_ablated(z: Tensor) -> Tensor:
        out = z - sae(z) + sae(z - z @ u @ u.T)
        return torch.cat([z[:, :1], out[:, 1:]], 1)

    with torch.no_grad(), splice(model, {1: refusal_ablated}):
        ablated = metric(model, chat, pair)
    assert float(from_ablated.layers[1].a_ref.sum()) == pytest.approx(float(clean - ablated), rel=0.02, abs=1e-3)
    assert "rank 2" in from_ablated.settings["path_from"]


def test_an_sae_of_selected_heads_and_selected_heads_of_an_sae(model: Any, chat: Chat) -> None:
    head_dim = HEAD_DIM
    small = random_sae(model, chat, 1, heads=[3, 0])
    own = refusal_features(model, chat, {1: small}, PAIRS, heads={1: [3, 0]})
    columns = torch.cat([torch.arange(3 * head_dim, 4 * head_dim), torch.arange(head_dim)])
    u = basis_from_features(model, {1: small}, own.features, heads={1: [3, 0]})[1]
    rest = torch.ones(HEADS * head_dim, dtype=torch.bool)
    rest[columns] = False
    assert not u[rest].any()
    span = small.decoder_directions()[own.features[1]].detach()
    torch.testing.assert_close(u[columns] @ u[columns].T @ span.T, span.T, rtol=1e-3, atol=1e-4)

    whole = random_sae(model, chat, 1)
    everything = refusal_features(model, chat, {1: whole}, PAIRS).layers[1].a_ref
    parts = sum(refusal_features(model, chat, {1: whole}, PAIRS, heads=[head]).layers[1].a_ref for head in range(HEADS))
    torch.testing.assert_close(everything, parts, rtol=1e-3, atol=1e-5)


def test_the_filter_keeps_latents_of_truthfulness_out() -> None:
    a_ref = torch.tensor([4.0, 3.0, 2.0, 1.0, -5.0, 0.0, 9.0])
    a_hall = torch.tensor([0.0, 8.0, 0.1, 0.0, 0.0, -8.0, 0.0])
    fires = torch.tensor([True, True, True, True, True, True, False])
    assert select(a_ref, None, fires, 3, 0.5) == ([0, 1, 2], [])
    chosen, filtered = select(a_ref, a_hall, fires, 3, 0.5)
    z_ref = (a_ref[fires].double() - a_ref[fires].double().mean()) / a_ref[fires].double().std(correction=0)
    z_hall = (a_hall[fires].double() - a_hall[fires].double().mean()) / a_hall[fires].double().std(correction=0)
    passes = [f for f in (0, 1, 2, 3) if abs(z_hall[f]) <= 0.5 * z_ref[f]]
    assert chosen == passes
    assert 1 in filtered
    assert 6 not in chosen + filtered  # it never fired
    assert select(a_ref, a_hall, fires, 1, 100.0)[0] == [0]


def test_bad_arguments_of_refusal_features(model: Any, chat: Chat) -> None:
    sae = random_sae(model, chat, 1)
    basis = RefusalBasis({0: torch.eye(HEADS * HEAD_DIM)[:, :2]})
    for changes, message in (
        ({"n": 0}, "n: expected an integer from 1 on, got 0"),
        ({"steps": 1.5}, "steps: expected an integer from 1 on, got 1.5"),
        ({"tau": -1}, "tau: expected 0 or more"),
        ({"refusal_pairs": []}, "expected at least one pair"),
        ({"ablation": basis}, "ablation: expected None with steps = 1"),
        ({"ablation": basis, "steps": 2}, r"expected directions of layers \[1\], got none of \[1\]"),
        ({"saes": {5: sae}}, "layer: expected 0 <= layer < 3"),
        ({"saes": {}}, "saes: expected a non-empty"),
        ({"heads": {1: [0]}, "saes": {1: random_sae(model, chat, 1, heads=[0, 1])}}, r"d_in = 64 or 16 .* got 32"),
    ):
        arguments: dict[str, Any] = {"saes": {1: sae}, "refusal_pairs": PAIRS} | changes
        with pytest.raises((ValueError, TypeError), match=message):
            refusal_features(model, chat, **arguments)


# ------------------------------------------------------------------------------------------------ the built-in model


@pytest.fixture(scope="module")
def animal() -> tuple[Any, Chat]:
    model, tokenizer = load_model("builtin", device="cpu")
    return model, Chat(tokenizer)


@pytest.fixture(scope="module")
def trained(animal: tuple[Any, Chat]) -> TopKSAE:
    """A small SAE of layer 3, trained for seconds on what the model reads and says."""
    model, chat = animal
    asked = [(d.prompt, d.answer) for d in builtin.benign(500)]
    asked += [(pair.prompt, pair.chosen) for pair in builtin.refusal_pairs(500)]
    asked += [(pair.prompt, pair.chosen) for pair in builtin.hallucination_pairs(500)]
    rows = []
    with capture(model, [3]) as cap:
        for start in range(0, len(asked), 100):
            batch = chat.batch([chat.encode(*pair) for pair in asked[start : start + 100]])
            content = batch.attention_mask.bool()
            content[:, 0] = False
            rows.append(cap.run(batch.inputs, positions=content)[3])
    z = torch.cat(rows)
    sae = TopKSAE(TopKSAEConfig(z.shape[1], 512, 16, layer=3)).init_from_data(z)
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(250):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (250 - step) / 80)
        sample = z[torch.randint(len(z), (1024,), generator=generator)]
        optimizer.zero_grad()
        sae.loss(sample).loss.backward()
        optimizer.step()
        with torch.no_grad():
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    with torch.no_grad():
        assert float(sae.loss(z).fvu) < 0.2
    return sae


@pytest.fixture(scope="module")
def found(animal: tuple[Any, Chat], trained: TopKSAE) -> FeatureReport:
    model, chat = animal
    return refusal_features(model, chat, {3: trained}, builtin.refusal_pairs(48), builtin.hallucination_pairs(48), n=16)


def test_zeroing_the_refusal_latents_removes_refusal(
    animal: tuple[Any, Chat], trained: TopKSAE, found: FeatureReport
) -> None:
    model, chat = animal
    prompts, truth = builtin.harmful(32, held_out=True), builtin.hallucination_pairs(32, held_out=True)
    before = [(module, len(module._forward_pre_hooks)) for module in model.modules()]
    check = causal_check(model, chat, {3: trained}, found, prompts, truth, random_sets=2)
    assert [(module, len(module._forward_pre_hooks)) for module in model.modules()] == before
    rows = {(row.zeroed, row.mode): row for row in check.rows}
    assert rows["none", "error kept"].refused == 100
    assert rows["none", "error kept"].truthful == 100
    assert rows["none", "SAE alone"].refused >= 95  # the splice alone leaves refusals alone
    assert rows["R", "error kept"].refused <= 20
    assert rows["R", "SAE alone"].refused <= 20
    for name in ("random 1", "random 2"):
        assert rows[name, "error kept"].refused >= 95
        assert rows[name, "error kept"].latents == rows["R", "error kept"].latents == len(found.features[3])
        assert rows[name, "error kept"].truthful >= 95
    assert rows["R", "error kept"].truthful >= 95
    assert check.ok
    assert "R carries refusal" in check.verdict
    assert json.loads(json.dumps(check.to_dict()))["ok"]
    assert len(check.table().splitlines()) == 6


def test_a_judge_may_replace_the_phrases(animal: tuple[Any, Chat], trained: TopKSAE, found: FeatureReport) -> None:
    model, chat = animal
    asked: list[Sequence[str]] = []

    def never(prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        asked.append(prompts)
        return [False] * len(answers)

    check = causal_check(model, chat, {3: trained}, found, builtin.harmful(4), random_sets=1, judge=never)
    assert check.fall == 0
    assert not check.ok
    assert len(asked) == 6
    with pytest.raises(ValueError, match="judge: expected 2 verdicts, one an answer, got 1"):
        judge_refusals(lambda prompts, answers: [True], ["a", "b"], ["c", "d"])


def test_zeroing_nothing_keeps_every_bit(animal: tuple[Any, Chat], trained: TopKSAE) -> None:
    model, chat = animal
    batch = chat.batch([chat.encode(pair.prompt, pair.chosen) for pair in builtin.refusal_pairs(4)])
    site = site_saes(model, {3: trained})[3]
    with torch.no_grad():
        plain = model(**batch.inputs).logits
        with splice(model, {3: zeroing(site, [], "error kept")}):
            assert torch.equal(model(**batch.inputs).logits, plain)
        with splice(model, {3: zeroing(site, [], "SAE alone")}):
            alone = model(**batch.inputs).logits
        with splice(model, {3: trained}):
            torch.testing.assert_close(alone, model(**batch.inputs).logits)


def test_matched_latents_are_near_in_activation() -> None:
    mass = torch.cat([torch.zeros(20), torch.logspace(-3, 1, 200)])
    refusal = [219, 120, 60]
    picked = matched_latents(mass, refusal, torch.Generator().manual_seed(0))
    assert len(set(picked)) == 3
    assert not set(picked) & set(refusal)
    ratio = mass[sorted(picked)].log() - mass[sorted(refusal)].log()
    assert ratio.abs().max() < 0.5
    assert picked == matched_latents(mass, refusal, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="expected at least 3 other latents that fire"):
        matched_latents(torch.ones(5), [0, 1, 2], torch.Generator())


def test_the_sae_s_basis_undoes_the_scale_and_finds_the_mean_difference(
    animal: tuple[Any, Chat], trained: TopKSAE, found: FeatureReport
) -> None:
    model, chat = animal
    basis = find_basis("sae", model, chat, saes={3: trained}, report=found, twins=builtin.twins(64), rank=12)
    rows = trained.decoder_directions()[found.features[3]].detach()
    expected = torch.linalg.svd(rows.T, full_matrices=False).U[:, :12]
    torch.testing.assert_close((basis.z[3] * expected).sum(0).abs(), torch.ones(basis.ranks[3]), rtol=1e-3, atol=1e-3)
    arditi = find_basis("mean-difference", model, chat, layers=[3], rank=1, twins=builtin.twins(64))
    inside = float((basis.z[3].T @ arditi.z[3]).norm())
    assert inside > 0.9  # 25 degrees; a random basis of this rank has 0.2
    assert basis.provenance["settings"]["latents"] == {"3": found.features[3]}
    assert len(basis.provenance["settings"]["saes"]["3"]["hash"]) == 16
    assert json.loads(json.dumps(basis.provenance))["source"] == "sae"


# ----------------------------------------------------------------------------------------------------------- sources


def test_mean_difference_starts_with_the_difference_of_means(model: Any, chat: Chat) -> None:
    twins = [("destroy a bomb", "please build a school"), ("paint a flask", "take"), ("use the flask", "a bomb now")]
    basis = find_basis("mean-difference", model, chat, layers=[1], rank=3, twins=twins)
    last: dict[str, Tensor] = {}
    with capture(model, [1]) as cap:
        for prompt in [text for pair in twins for text in pair]:
            last[prompt] = cap.run({"input_ids": torch.tensor([chat.encode_prompt(prompt)])})[1][-1]
    differences = torch.stack([last[a] - last[b] for a, b in twins])
    mean = differences.mean(0)
    torch.testing.assert_close(basis.z[1][:, 0], mean / mean.norm(), rtol=1e-4, atol=1e-5)
    rest = differences - (differences @ basis.z[1][:, :1]) @ basis.z[1][:, :1].T
    leading = torch.linalg.svd(rest, full_matrices=False).Vh[0]
    assert float((basis.z[1][:, 1] @ leading).abs()) == pytest.approx(1, abs=1e-4)
    assert basis.twins == twins
    unpaired = find_basis(
        "mean-difference", model, chat, layers=[1], rank=1,
        harmful=[a for a, _ in twins], benign=[b for _, b in twins][:2],
    )  # fmt: skip
    mean = torch.stack([last[a] for a, _ in twins]).mean(0) - torch.stack([last[b] for _, b in twins[:2]]).mean(0)
    torch.testing.assert_close(unpaired.z[1][:, 0], mean / mean.norm(), rtol=1e-4, atol=1e-5)
    answered = find_basis("mean-difference", model, chat, layers=[1], rank=1, twins=twins, positions="answer")
    assert float((answered.z[1][:, 0] @ basis.z[1][:, 0]).abs()) < 0.999


def test_activation_svd_is_the_svd_of_the_answer_s_z(model: Any, chat: Chat) -> None:
    basis = find_basis("activation-svd", model, chat, layers=[0, 2], rank=4, pairs=PAIRS, batch_size=2)
    rows: dict[int, list[Tensor]] = {0: [], 2: []}
    with capture(model, [0, 2]) as cap:
        for pair in PAIRS:
            e = chat.encode(pair.prompt, pair.chosen)
            for layer, z in cap.run({"input_ids": torch.tensor([e.ids])}).items():
                rows[layer].append(z[e.start - 1 : -1])
    for layer, parts in rows.items():
        expected = torch.linalg.svd(torch.cat(parts), full_matrices=False).Vh[:4].T
        torch.testing.assert_close((expected * basis.z[layer]).sum(0).abs(), torch.ones(4), rtol=1e-3, atol=1e-3)
    own = find_basis("activation-svd", model, chat, layers=[0], rank=2, harmful=["paint a bomb"], max_new_tokens=4)
    assert own.ranks == {0: 2}


@pytest.mark.parametrize("source", ["mean-difference", "activation-svd", "random"])
def test_heads_leave_the_other_columns_zero(model: Any, chat: Chat, source: Any) -> None:
    twins = [("destroy a bomb", "build a bomb"), ("paint a flask", "take a flask"), ("use it", "use that")]
    basis = find_basis(source, model, chat, layers=[1], heads={1: [2]}, rank=2, twins=twins, max_new_tokens=3)
    assert not basis.z[1][: 2 * HEAD_DIM].any()
    assert not basis.z[1][3 * HEAD_DIM :].any()
    assert basis.provenance["heads"] == {"1": [2]}
    control = random_like(basis, seed=1)
    assert not control.z[1][: 2 * HEAD_DIM].any()
    assert control.ranks == basis.ranks


def test_random_is_seeded_and_sharing(model: Any, chat: Chat) -> None:
    first, again, other = (find_basis("random", model, chat, rank=3, seed=seed) for seed in (0, 0, 1))
    assert list(first.z) == [0, 1, 2]
    assert torch.equal(first.z[1], again.z[1])
    assert not torch.equal(first.z[1], other.z[1])
    assert not torch.equal(first.z[0], first.z[1])
    u = torch.eye(8)[:, :2]
    control = random_like(RefusalBasis(inputs={"a": u, "b": u, "c": u.clone()}))
    assert control.inputs["a"] is control.inputs["b"]
    assert control.inputs["a"] is not control.inputs["c"]


def test_difference_basis_by_hand() -> None:
    differences = torch.tensor([[2.0, 1, 0], [2, -1, 0], [2, 0, 0]])
    u = difference_basis(differences, differences.mean(0), 2)
    torch.testing.assert_close(u[:, 0], torch.tensor([1.0, 0, 0]))
    torch.testing.assert_close(u[:, 1].abs(), torch.tensor([0.0, 1, 0]))
    with pytest.raises(ValueError, match="expected prompts whose mean z differ"):
        difference_basis(torch.zeros(2, 3), torch.zeros(3), 1)
    with pytest.raises(ValueError, match="rank: expected 1 to 3 from 3 prompts of width 3, got 4"):
        difference_basis(differences, differences.mean(0), 4)


def test_bad_arguments_of_find_basis(model: Any, chat: Chat) -> None:
    sae = random_sae(model, chat, 1)
    empty = LayerFeatures(*[torch.zeros(40)] * 3, [], [], torch.zeros(40, dtype=torch.bool))
    for source, changes, message in (
        ("pca", {}, "source: expected one of sae, mean-difference, activation-svd, random; got 'pca'"),
        ("random", {}, "rank: expected an integer for source 'random', got None"),
        ("random", {"rank": 65}, "rank: expected 1 to 64, the width .* of layer 0, got 65"),
        ("random", {"rank": 17, "heads": [1]}, "rank: expected 1 to 16"),
        ("random", {"rank": 2, "tau": 1.0}, "tau: expected with source 'sae' only"),
        ("mean-difference", {"rank": 2}, "harmful: expected harmful prompts"),
        ("mean-difference", {"rank": 2, "harmful": ["a"]}, "benign: expected harmless prompts or twins"),
        ("activation-svd", {"rank": 2}, "harmful: expected harmful prompts"),
        ("activation-svd", {"rank": 2, "positions": "mean"}, "positions: expected 'last' or 'answer'"),
        ("sae", {}, "saes: expected an SAE for each of the layers"),
        ("sae", {"saes": {1: sae}, "layers": [0]}, r"for each of the layers \[0\], got \[1\]"),
        ("sae", {"saes": {1: sae}}, "pairs: expected refusal pairs"),
        ("sae", {"saes": {1: sae}, "report": FeatureReport({1: empty})}, "at least one latent of layer 1, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            find_basis(source, model, chat, **changes)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- site all


def recorded_inputs(model: Any, chat: Chat, prompts: Sequence[str], path: str) -> Tensor:
    rows: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _m, args: rows.append(args[0][0].detach()))
    with torch.no_grad():
        for prompt in prompts:
            model(input_ids=torch.tensor([chat.encode_prompt(prompt)]))
    handle.remove()
    return torch.cat(rows)


def test_input_bases_are_the_svd_of_the_inputs(model: Any, chat: Chat) -> None:
    prompts = [pair.prompt for pair in PAIRS] + ["use the flask and a bomb", "take it"]
    basis = input_basis(model, chat, PAIRS + prompts[3:], rank=4, batch_size=2)
    assert len(basis) == 7 * 3
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        path = f"model.layers.1.{name}"
        x = recorded_inputs(model, chat, prompts, path)
        expected = torch.linalg.svd(x, full_matrices=False).Vh[:4].T
        torch.testing.assert_close((expected * basis[path]).sum(0).abs(), torch.ones(4), rtol=1e-3, atol=1e-3)
    attention = [basis[f"model.layers.1.self_attn.{name}_proj"] for name in "qkv"]
    assert attention[0] is attention[1] is attention[2]
    assert basis["model.layers.1.mlp.gate_proj"] is basis["model.layers.1.mlp.up_proj"]
    assert basis["model.layers.1.mlp.up_proj"] is not attention[0]
    assert basis["model.layers.0.mlp.up_proj"] is not basis["model.layers.1.mlp.up_proj"]
    assert RefusalBasis(inputs=basis).check(model)
    piecemeal = input_basis(model, chat, PAIRS + prompts[3:], rank=4, batch_size=2, memory=1)
    assert all(torch.equal(piecemeal[path], basis[path]) for path in basis)


def test_positions_of_input_bases(model: Any, chat: Chat) -> None:
    arguments: dict[str, Any] = {"modules": ["down_proj"], "rank": 3}
    prompt, answer, both = (
        input_basis(model, chat, PAIRS, positions=where, answers=given, **arguments)["model.layers.2.mlp.down_proj"]
        for where, given in (
            ("prompt", None),
            ("answer", [p.chosen for p in PAIRS]),
            ("all", [p.chosen for p in PAIRS]),
        )
    )
    for a, b in ((prompt, answer), (answer, both), (prompt, both)):
        assert float(torch.linalg.svdvals(a.T @ b).min()) < 0.9999
    x = torch.cat([
        recorded_inputs(model, chat, [pair.prompt], "model.layers.2.mlp.down_proj")[-1:] for pair in PAIRS
    ])  # fmt: skip
    alone = input_basis(model, chat, PAIRS, positions="answer", answers=[""] * 3, **arguments)
    expected = torch.linalg.svd(x, full_matrices=False).Vh[:3].T
    got = alone["model.layers.2.mlp.down_proj"]
    assert float(torch.linalg.svdvals(expected.T @ got).min()) > 0.999


def test_input_bases_of_a_wrapped_model_use_the_base_model_s_paths(chat: Chat) -> None:
    peft = pytest.importorskip("peft")
    plain = input_basis(random_model("llama", chat), chat, PAIRS, modules=["v_proj", "down_proj"], rank=3)
    config = peft.LoraConfig(target_modules=["v_proj", "down_proj"], r=2)  # B starts at zero: nothing changes
    wrapped = input_basis(peft.get_peft_model(random_model("llama", chat), config), chat, PAIRS,
                          modules=["v_proj", "down_proj"], rank=3)  # fmt: skip
    assert (
        wrapped.keys()
        == plain.keys()
        == {f"model.layers.{i}.{name}" for i in range(3) for name in ("self_attn.v_proj", "mlp.down_proj")}
    )
    for path, u in plain.items():
        assert float(torch.linalg.svdvals(u.T @ wrapped[path]).min()) > 0.999


def test_bad_arguments_of_input_basis(model: Any, chat: Chat) -> None:
    for changes, message in (
        ({"prompts": []}, "prompts: expected at least one"),
        (
            {"rank": 33 if model.config.hidden_size == 32 else 65},
            "rank: expected 1 to (32|64), the inputs of model.layers.0",
        ),
        ({"modules": ["w_proj"]}, "modules: expected names of linears below model.layers, got w_proj"),
        ({"positions": "last"}, "positions: expected one of prompt, answer, all"),
        ({"answers": ["a"]}, "answers: expected 3 answers with positions 'answer' or 'all', got 1"),
    ):
        arguments: dict[str, Any] = {"prompts": PAIRS, "rank": 2} | changes
        with pytest.raises(ValueError, match=message):
            input_basis(model, chat, **arguments)
    assert list(adapted_linears(model, ["model.layers.1.mlp.up_proj"])) == ["model.layers.1.mlp.up_proj"]


def test_coverage_is_the_share_of_the_inputs_inside(model: Any, chat: Chat) -> None:
    path = "model.layers.1.mlp.down_proj"
    u = torch.eye(48)[:, :20].contiguous()
    prompt = PAIRS[1].prompt
    x = recorded_inputs(model, chat, [prompt], path)[1:]
    share = coverage(model, chat, [prompt], {path: u})[path]
    assert share == pytest.approx(float(x[:, :20].square().sum() / x.square().sum()), rel=1e-4)


# --------------------------------------------------------------------------------------------------------------- CLI


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        get_command(app)(list(arguments))
    return int(ended.value.code or 0)


def test_the_command_writes_basis_report_and_plot(
    trained: TopKSAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained.save_pretrained(tmp_path / "run" / "layer_03")
    out = tmp_path / "out"
    options = ["--pairs", "24", "--checks", "8", "--random-sets", "1", "--input-rank", "8", "--steps", "2", "-q"]
    assert run("features", "--sae", str(tmp_path / "run"), "--out", str(out), "--device", "cpu", *options) == 0
    said = capsys.readouterr().out
    assert "Zeroing R takes" in said
    assert "The pre-flight check" in said
    basis = RefusalBasis.load(out)
    assert list(basis.z) == [3]
    assert len(basis.inputs) == 35
    assert basis.provenance["sources"]["refusal"] == "builtin"
    report = json.loads((out / "features.json").read_text())
    assert report["attribution"]["settings"]["path_from"].startswith("RefusalBasis(z[3]: rank 1")
    assert report["causal_check"]["n"] == 8
    assert report["preflight"]["g1"] is True
    assert (out / "attribution.png").stat().st_size > 5000
    assert "<svg" in (out / "attribution.svg").read_text()


def test_the_command_on_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lines(name: str, rows: list[dict[str, str]]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    goals = lines("goals.jsonl", [{"goal": p.prompt, "target": str(p.target)} for p in builtin.harmful(12)])
    twins = lines("twins.jsonl", [{"harmful": a, "harmless": b} for a, b in builtin.twins(12)])
    out = tmp_path / "out"
    options = ["--refusal", goals, "--twins", twins, "--hallucination", "none", "--rank", "2", "--checks", "4", "-q"]
    assert (
        run("features", "--source", "mean-difference", "--layers", "3", "--heads", "3.1,3.6", "-o", str(out), *options)
        == 0
    )
    assert "4 other twins" in capsys.readouterr().out
    basis = RefusalBasis.load(out)
    assert len(basis.twins) == 8
    assert not basis.z[3].reshape(8, 32, 2)[[0, 2, 3, 4, 5, 7]].any()
    report = json.loads((out / "features.json").read_text())
    assert "causal_check" not in report
    assert report["preflight"]["ok"] is True
    assert run("features", "--source", "random", "--no-preflight", "-o", str(out), *options) == 0
    assert "Pre-flight" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source", "pca"], "--source: expected one of sae"),
        (["--source", "sae"], "--sae: expected folders of SAEs with --source sae"),
        (["--source", "random", "--sae", "."], "--sae: expected folders of SAEs with --source sae and only then"),
        (["--sae", "nowhere"], "--sae: expected the folder of an SAE or of a train-sae run, got nowhere"),
        (["--source", "random", "--heads", "3"], "write layer.head like 3.1,3.6"),
        (["--source", "random", "--twins", "nowhere.jsonl"], "--twins: expected builtin or a JSONL file"),
    ],
)
def test_errors_of_the_command_are_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("features", "-q", "--out", str(tmp_path), *options) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.splitlines()[-1] == error


def test_helpers_of_the_command(tmp_path: Path) -> None:
    assert parse_heads("3.1, 3.6,0.2") == {3: [1, 6], 0: [2]}
    assert parse_heads(None) is None
    assert split(list(range(10)), 3, 4) == ([0, 1, 2], [7, 8, 9])
    assert split(list(range(10)), None, 1) == (list(range(9)), [9])
    with pytest.raises(ValueError, match="at least two records"):
        split([1], None, 4)
    for text in ("", "not json\n", '{"harmful": "a"}\n', '["a", "b"]\n'):
        (tmp_path / "twins.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"twins\.jsonl"):
            read_twins(str(tmp_path / "twins.jsonl"), None, 0)
    for name in ("a", "b"):
        TopKSAE(TopKSAEConfig(8, 16, 2, layer=1)).save_pretrained(tmp_path / name)
    assert list(load_saes([tmp_path / "a"], [])) == [1]
    with pytest.raises(ValueError, match=r"--layers: expected layers that --sae has, 1, got 0"):
        load_saes([tmp_path / "a"], [0, 1])
    with pytest.raises(ValueError, match="expected one SAE of layer 1"):
        load_saes([tmp_path], [])
    TopKSAE(TopKSAEConfig(8, 16, 2)).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="names no layer"):
        load_saes([tmp_path / "a"], [])
