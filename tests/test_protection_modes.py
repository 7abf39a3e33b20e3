"""The four modes under optimizers, scalers, autocast, checkpointing and compilation; what protect refuses and names."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import refusal_kernels as rk
from refusal_kernels.python_api.features.basis import RefusalBasis
from refusal_kernels.python_api.models import load_model
from refusal_kernels.python_api.prompts import builtin
from refusal_kernels.python_api.prompts.chat import Chat
from refusal_kernels.python_api.protection.audit import audit
from refusal_kernels.python_api.protection.projected import ProjectedLinear
from refusal_kernels.python_api.protection.protect import Protection, protect
from refusal_kernels.python_api.protection.stepping import ProtectionWarning

pytestmark = pytest.mark.filterwarnings(
    "ignore:protect:refusal_kernels.python_api.protection.stepping.ProtectionWarning"
)

VOCAB, Z = 61, 32
TARGETS = ["q_proj", "v_proj", "o_proj"]
EXACT = ["forward", "update", "weight"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def directions(rows: int, rank: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, rank, generator=torch.Generator().manual_seed(seed)))[0]


BASIS = RefusalBasis(z={1: directions(Z, 3), 2: directions(Z, 2, 1)})


def build(**changes: Any) -> Any:
    torch.manual_seed(1)
    config = transformers.Qwen2Config(
        vocab_size=VOCAB, hidden_size=Z, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, **changes,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config)


def adapted(base: Any | None = None, **options: Any) -> Any:
    torch.manual_seed(2)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options})
    return get_peft_model(base if base is not None else build(), config)


def ids(seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (4, 10), generator=torch.Generator().manual_seed(seed))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def step(model: Any, optimizer: Any, seed: int = 0) -> float:
    batch = ids(seed)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(model: Any, protection: Protection, steps: int = 20, make: Any = None) -> list[float]:
    optimizer = make(trainable(model)) if make else torch.optim.AdamW(trainable(model), lr=1e-2)
    protection.attach(optimizer)
    return [step(model, optimizer, i % 3) for i in range(steps)]


@torch.no_grad()
def logits(model: Any, seed: int = 5) -> Tensor:
    training = model.training
    out = model.eval()(input_ids=ids(seed)).logits
    model.train(training)
    return out


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


class Lion(torch.optim.Optimizer):
    """sign(b1 m + (1 - b1) g), decoupled decay (Chen et al. 2302.06675): no step that keeps to a subspace."""

    def __init__(self, params: Any, lr: float = 3e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - 0.01 * group["lr"]).sub_(group["lr"] * (0.9 * m + 0.1 * p.grad).sign())
                m.mul_(0.99).add_(p.grad, alpha=0.01)


# ------------------------------------------------------------------------------------------------ the leak, by mode


@pytest.fixture(scope="module")
def animal() -> tuple[Any, Any]:
    return load_model("builtin", device="cpu")


def animal_leak(animal: tuple[Any, Any], mode: str, make: Any, steps: int = 12) -> tuple[float, list[float], list[str]]:
    base, tokenizer = animal
    chat = Chat(tokenizer)
    model = adapted(copy.deepcopy(base), r=8, lora_alpha=8)
    basis = RefusalBasis(z={layer: directions(256, 8, layer) for layer in (2, 3)})
    protection = protect(model, basis, mode=mode, preflight=False)
    optimizer = make(trainable(model)) if make else protection.optimizer(lr=3e-3)
    protection.attach(optimizer)
    dialogues = builtin.benign(16)
    batch = chat.batch([chat.encode(d.prompt, d.answer) for d in dialogues])
    losses = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ProtectionWarning)
        for _ in range(steps):
            loss = model(**batch.inputs, labels=batch.labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return protection.leak(), losses, [str(w.message) for w in caught if w.category is ProtectionWarning]


@pytest.mark.parametrize("mode", EXACT)
def test_exact_modes_do_not_leak_under_adamw(animal: tuple[Any, Any], mode: str) -> None:
    leak, losses, said = animal_leak(animal, mode, lambda p: torch.optim.AdamW(p, lr=3e-3))
    assert leak < 1e-6
    assert losses[-1] < losses[0]
    assert said == []


def test_an_optimizer_that_projects_itself_does_not_leak(animal: tuple[Any, Any]) -> None:
    """`optimizer` against the hooks of mode "update" around AdamW: the same losses, and no leak either."""
    leak, losses, said = animal_leak(animal, "update", None)
    assert rk.last_backend("projected_adam") == "cpu"
    assert leak < 1e-6
    assert losses[-1] < losses[0]
    assert said == []
    hooked = animal_leak(animal, "update", lambda p: torch.optim.AdamW(p, lr=3e-3))[1]
    assert losses == pytest.approx(hooked, rel=1e-4)


def test_an_optimizer_that_projects_itself_gets_no_hooks() -> None:
    """It is taken as it is where it does what the protection would, and refused where it would do something else."""
    model = adapted()
    protection = protect(model, BASIS, mode="update", preflight=False)
    optimizer = protection.optimizer(1e-2, weight_decay=0.1)
    protection.attach(optimizer)
    assert not protection._steppers
    assert not optimizer._optimizer_step_post_hooks
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in trainable(model)]
    factors = protection._factors()
    assert all(optimizer.held(f.parameter) is not None for f in factors)
    for i in range(5):
        step(model, optimizer, i)
    assert protection.leak() < 1e-6
    entries = [f.entry(f.parameter) for f in factors]
    turned = (factors[0].parameter, factors[0].U.flip(0).contiguous(), factors[0].dim)
    for bases, options, words in (
        (entries[1:], {}, f"does not hold {re.escape(factors[0].name)}"),
        ([turned, *entries[1:]], {}, "holds in another subspace"),
        (entries, {"strength": 0.5}, "with strength 0.5"),
    ):
        with pytest.raises(ValueError, match=words):
            protection.attach(rk.ProjectedAdamW(trainable(model), bases, **options))
    protection.attach(rk.ProjectedAdamW(trainable(model), []))  # holds nothing: any optimizer
    assert len(protection._steppers) == 1
    weight = protect(adapted(), BASIS, mode="weight", preflight=False)
    with pytest.raises(ValueError, match="mode 'update'"):
        weight.optimizer()
    entries = [f.entry(f.parameter) for f in weight._factors()]
    with pytest.raises(ValueError, match="got mode 'weight'"):
        weight.attach(rk.ProjectedAdamW(trainable(weight.model), entries))


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
@pytest.mark.parametrize("mode", EXACT)
def test_exact_modes_do_not_leak_under_8_bit_optimizers(animal: tuple[Any, Any], mode: str, name: str) -> None:
    """States in 8 bits, in blocks of 256 numbers: small tensors would keep theirs in 32."""
    optim = pytest.importorskip("bitsandbytes").optim
    made = []

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(getattr(optim, name)(parameters, lr=3e-4, min_8bit_size=256))
        return made[0]

    leak, losses, said = animal_leak(animal, mode, make)
    assert any(state["state1"].dtype == torch.uint8 for state in made[0].state.values())
    assert leak < 1e-6
    assert losses[-1] < losses[0]
    assert said == []


def test_gradient_mode_is_exact_under_sgd_and_warns_of_its_leak_under_adamw(animal: tuple[Any, Any]) -> None:
    leak, losses, said = animal_leak(animal, "gradient", lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9))
    assert leak < 1e-6
    assert losses[-1] < losses[0]
    assert said == []
    leak, _, said = animal_leak(animal, "gradient", lambda p: torch.optim.AdamW(p, lr=3e-3), steps=10)
    assert leak > 0.05
    [message] = said
    assert f"the leak is {leak:.3f}" in message
    assert "under AdamW: after 10 steps" in message


def test_without_projecting_the_start_even_sgd_leaks() -> None:
    leaks = {}
    for start in (True, False):
        model = adapted()
        protection = protect(model, BASIS, mode="gradient", sites="o_proj", project_start=start, preflight=False)
        train(model, protection, 8, lambda p: torch.optim.SGD(p, lr=0.1))
        leaks[start] = protection.leak()
    assert leaks[True] < 1e-6
    assert leaks[False] > 0.05


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize(
    "make", [Lion, lambda p: torch.optim.RMSprop(p, lr=3e-3), lambda p: torch.optim.SGD(p, lr=0.1)]
)
def test_exact_modes_hold_under_every_optimizer(mode: str, make: Any) -> None:
    model = adapted(lora_dropout=0.1)
    protection = protect(model, BASIS, mode=mode, preflight=False)
    losses = train(model, protection, 30, make)
    assert losses[-1] < losses[0]
    assert protection.leak() < 1e-6


def test_rounding_does_not_add_up_over_many_steps() -> None:
    parameter, U = nn.Parameter(torch.randn(4, Z)), directions(Z, 3)
    from refusal_kernels.python_api.protection.stepping import Factor, StepProjector

    parameter.data -= parameter.data @ U @ U.T
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    StepProjector(optimizer, [Factor("p", parameter, U, 1)], "update", 1.0, True, lambda: 0.0)
    for _ in range(2000):
        parameter.grad = torch.randn(4, Z)
        optimizer.step()
    assert (parameter @ U).norm() / parameter.norm() < 3e-7


@pytest.mark.parametrize("mode", ["update", "weight", "gradient"])
def test_strength_scales_what_a_step_moves_inside_the_span(mode: str) -> None:
    """One SGD step: the part inside span U is (1 - s) of the free step's, the rest is the free step's."""
    steps = {}
    for strength in (0.0, 0.25, 1.0):
        model = adapted()
        layer = model.base_model.model.model.layers[1].self_attn.v_proj
        protection = protect(model, BASIS, mode=mode, sites="v_proj", strength=strength, preflight=False)
        train(model, protection, 1, lambda p: torch.optim.SGD(p, lr=0.1))
        steps[strength] = layer.lora_B["default"].weight.detach().clone()
    U = next(c.U for c in protection.constraints if "layers.1" in c.module)
    inside = {s: U @ (U.T @ b) for s, b in steps.items()}
    assert relative(inside[0.25], 0.75 * inside[0.0]) < 1e-5
    assert inside[1.0].norm() < 1e-6 * inside[0.0].norm()
    for strength in (0.25, 1.0):
        assert relative(steps[strength] - inside[strength], steps[0.0] - inside[0.0]) < 1e-5


# ------------------------------------------------------------- forward mode: what is saved and merged is what ran


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_saved_weights_compute_the_same_in_plain_peft(tmp_path: Path, strength: float) -> None:
    model = adapted(use_rslora=True, r=6)
    protection = protect(model, BASIS, strength=strength, preflight=False)
    train(model, protection)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(build(), str(tmp_path))
    assert not any(isinstance(m, ProjectedLinear) for m in plain.modules())
    assert relative(logits(plain), logits(model)) < 1e-6
    keys = set(plain.state_dict())
    assert keys == set(model.state_dict())
    # Back into a protected model: what is loaded is what runs, and what would be saved again.
    again = adapted(use_rslora=True, r=6)
    protect(again, BASIS, strength=strength, preflight=False)
    again.load_adapter(str(tmp_path), "default")
    assert relative(logits(again), logits(model)) < 1e-6
    for key, value in model.state_dict().items():
        if strength == 1:
            assert torch.equal(again.state_dict()[key], value) or "lora" not in key
        assert torch.allclose(again.state_dict()[key], value, atol=1e-6)


def test_saving_leaves_the_training_alone_and_folding_the_forward() -> None:
    model = adapted()
    protection = protect(model, BASIS, preflight=False)
    train(model, protection)
    free = {name: p.detach().clone() for name, p in model.named_parameters()}
    saved = model.state_dict()
    assert all(torch.equal(p, free[name]) for name, p in model.named_parameters())
    moved = [name for name, p in free.items() if not torch.equal(saved[name], p)]
    assert {name.split(".")[6] + name[-17:] for name in moved} == {
        "o_proj_A.default.weight", "v_proj_B.default.weight",
    }  # fmt: skip
    before = logits(model)
    protection.fold_()
    assert relative(logits(model), before) < 1e-6
    folded = {name: p.detach().clone() for name, p in model.named_parameters()}
    protection.fold_()
    assert all(torch.equal(p, folded[name]) for name, p in model.named_parameters())
    assert all(torch.equal(value, folded[name]) for name, value in model.state_dict().items() if name in folded)


@pytest.mark.parametrize("mode", EXACT)
def test_merging_computes_the_same(mode: str) -> None:
    model = adapted(lora_dropout=0.1)
    train(model, protect(model, BASIS, mode=mode, preflight=False))
    before = logits(model)
    model.merge_adapter()
    assert relative(logits(model), before) < 1e-6
    model.unmerge_adapter()
    assert relative(logits(model), before) < 1e-6
    plain = model.merge_and_unload()
    assert relative(logits(plain), before) < 1e-6
    assert not any(isinstance(m, ProjectedLinear) for m in plain.modules())


def test_removing_gives_plain_layers_that_compute_the_same() -> None:
    model = adapted()
    with protect(model, BASIS, preflight=False) as protection:
        train(model, protection)
        before = logits(model)
    assert not any(isinstance(m, ProjectedLinear) for m in model.modules())
    assert relative(logits(model), before) < 1e-6
    factor = model.base_model.model.model.layers[1].self_attn.o_proj.lora_A["default"]
    assert type(factor) is nn.Linear
    assert not [name for name in vars(factor) if "refusal" in name]
    for name in ("fold_", "callback"):
        with pytest.raises(ValueError, match=f"{name}: this protection was removed"):
            getattr(protection, name)()
    protect(model, BASIS, preflight=False).remove()


def test_hooks_leave_with_the_protection() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with protect(model, BASIS, mode="weight", preflight=False) as protection:
        protection.attach(optimizer)
        protection.attach(optimizer)
        assert len(optimizer._optimizer_step_post_hooks) == 1
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_base_weights_are_untouched_in_value_and_dtype() -> None:
    base = build().to(torch.bfloat16)
    before = {name: p.clone() for name, p in base.named_parameters()}
    model = adapted(base)
    protection = protect(model, BASIS, preflight=False)
    train(model, protection)
    after = {name.replace(".base_layer", ""): p for name, p in base.named_parameters() if "lora" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], p) and after[name].dtype == p.dtype for name, p in before.items())
    assert protection.leak() < 1e-6


def test_moving_and_casting_the_model_keeps_the_basis_exact() -> None:
    model = adapted()
    protect(model, BASIS, preflight=False)
    model.to(torch.bfloat16).to(torch.float32)
    factor = model.base_model.model.model.layers[1].self_attn.o_proj.lora_A["default"]
    assert torch.equal(factor._refusal_basis, next(c.U for c in protectless(model)))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert relative(logits(copied), logits(model)) == 0
    del factor._refusal_basis
    with pytest.raises(RuntimeError, match="projected weight could not be computed"):
        _ = factor.weight


def protectless(model: Any) -> list[Any]:
    from refusal_kernels.python_api.protection.sites import constraints_for

    return constraints_for(model.get_base_model(), ["model.layers.1.self_attn.o_proj"], BASIS, "o_proj")


# ----------------------------------------------------------------------------------- the machinery around training


@pytest.mark.parametrize("mode", EXACT)
def test_grad_scaler_skips_and_scales(mode: str) -> None:
    model = adapted()
    protection = protect(model, BASIS, mode=mode, preflight=False)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    protection.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(6):
        loss = model(input_ids=ids(i), labels=ids(i)).loss
        scaler.scale(loss).backward()
        before = [p.detach().clone() for p in trainable(model)]
        if i == 3:
            trainable(model)[0].grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        same = all(torch.equal(a, b) for a, b in zip(before, trainable(model), strict=True))
        assert same == (i == 3)
    assert protection.leak() < 1e-6


@pytest.mark.parametrize("mode", EXACT)
def test_bf16_autocast(mode: str) -> None:
    model = adapted()
    protection = protect(model, BASIS, mode=mode, preflight=False)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    protection.attach(optimizer)
    for i in range(10):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids(i % 2), labels=ids(i % 2)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert protection.leak() < 1e-6


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        model = adapted().train()
        protect(model, BASIS, preflight=False)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        train_batch = ids()
        model(input_ids=train_batch, labels=train_batch).loss.backward()
        grads.append([p.grad for p in trainable(model)])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))
    assert any(g.abs().sum() > 0 for g in grads[1])


def test_a_compiled_model_trains_the_same() -> None:
    ends = []
    for compiled in (False, True):
        model = adapted()
        protection = protect(model, BASIS, preflight=False)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        losses = [step(run, optimizer) for _ in range(4)]
        assert protection.leak() < 1e-6
        ends.append(losses)
    assert torch.allclose(*map(torch.tensor, ends), atol=1e-4)
    with pytest.raises(TypeError, match="protect the model first, then compile it"):
        protect(torch.compile(adapted()), BASIS)


def test_every_active_adapter_is_held_and_only_these() -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    protection = protect(model, BASIS, preflight=False)
    assert protection.adapters == ("default", "second")
    train(model, protection)
    assert protection.leak() < 1e-6
    before = logits(model)
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    assert relative(logits(model), before) < 1e-5
    protection.remove()
    model.set_adapter("second")
    only = protect(model, BASIS, adapter="default", preflight=False)
    assert only.adapters == ("default",)
    layer = model.base_model.model.model.layers[1].self_attn.o_proj
    assert isinstance(layer.lora_A["default"], ProjectedLinear)
    assert not isinstance(layer.lora_A["second"], ProjectedLinear)
    with pytest.raises(ValueError, match=r"adapter: expected one of .*'default'.* got \['third'\]"):
        protect(model, BASIS, adapter="third")


# ---------------------------------------------------------------------------------------- what is refused and named


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=TARGETS, use_dora=True), "uses DoRA"),
        (LoraConfig(target_modules=TARGETS, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (LoraConfig(target_modules=TARGETS, init_lora_weights="olora"), "init_lora_weights='olora'"),
        (LoraConfig(target_modules=TARGETS, lora_bias=True), "lora_bias adds a trained constant"),
        (LoraConfig(target_modules=TARGETS, bias="lora_only"), "base layer's bias of .*v_proj is trainable"),
        (LoraConfig(target_modules=TARGETS, alora_invocation_tokens=[3]), "variant ALoraLinearVariant"),
        (LoHaConfig(target_modules=TARGETS), "is LOHA; only LoRA"),
        (AdaLoraConfig(target_modules=TARGETS, total_step=10, target_r=2, init_r=4), "is ADALORA; only LoRA"),
        (LoraConfig(target_modules=["q_proj"]), "constrain no adapted module; adapter default touches model.layers"),
    ],
)
@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
def test_what_cannot_be_exact_is_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        protect(get_peft_model(build(), config), BASIS, preflight=False)


def test_arguments_are_checked() -> None:
    model = adapted()
    for wrong, message in [
        ({"mode": "other"}, "mode: expected one of forward, update, weight, gradient; got 'other'"),
        ({"strength": 1.5}, "strength: expected a number from 0 to 1, got 1.5"),
        ({"project_start": False}, "project_start: can be False for mode 'update' or 'gradient' only"),
    ]:
        with pytest.raises(ValueError, match=message):
            protect(model, BASIS, preflight=False, **wrong)
    with pytest.raises(TypeError, match=r"expected a peft.PeftModel \(peft.get_peft_model\), got Qwen2ForCausalLM"):
        protect(build(), BASIS)
    protection = protect(model, BASIS, mode="weight", preflight=False)
    with pytest.raises(ValueError, match="constrained adapter weights are not among its parameters"):
        protection.attach(torch.optim.SGD(trainable(model)[:2], lr=1))
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer, got object"):
        protection.attach(object())
    protection.remove()
    protect(model, BASIS, preflight=False)
    with pytest.raises(ValueError, match="is protected already"):
        protect(model, BASIS, preflight=False)


@pytest.mark.filterwarnings("default")
def test_one_warning_names_what_is_not_held() -> None:
    base = build(tie_word_embeddings=False)
    model = adapted(base, modules_to_save=["lm_head"], target_modules=[*TARGETS, "embed_tokens"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        protection = protect(model, BASIS)
    [message] = [str(w.message) for w in caught if w.category is ProtectionWarning]
    assert "model.layers.{0-2}.self_attn.q_proj, model.layers.0.self_attn.{v_proj,o_proj}" in message
    assert "model.embed_tokens" in message
    assert "trained without any constraint: lm_head.modules_to_save.default.weight" in message
    assert "the pre-flight check did not run, for the basis has no twins" in message
    assert "model.layers.1.self_attn.q_proj" in protection.unconstrained
    assert "model.layers.1.self_attn.o_proj" not in protection.unconstrained


@pytest.mark.filterwarnings("default")
def test_an_adapter_that_already_leaks_is_projected_and_said_to_be() -> None:
    model = adapted(init_lora_weights=False)
    with pytest.warns(ProtectionWarning, match=r"already holds an update of leak 0\.\d+, which is projected out now"):
        protection = protect(model, BASIS, mode="weight", preflight=False)
    assert protection.leak() < 1e-6


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("mode", ["forward", "update"])
def test_another_adapter_that_is_trained_is_named(mode: str) -> None:
    model = adapted()
    protection = protect(model, BASIS, mode=mode, preflight=False)
    assert protection.unheld() == ""
    model.add_adapter("two", LoraConfig(r=4, target_modules=TARGETS))
    model.set_adapter("two")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    words = r"adapter two is trained and not held by this protection, which is of default"
    refused = pytest.raises(ValueError, match="or another adapter is active") if mode == "update" else nullcontext()
    with refused, pytest.warns(ProtectionWarning, match=f"attach: {words}"):
        protection.attach(optimizer)
    with pytest.warns(ProtectionWarning, match=f"audit: {words}"):
        audit(protection)
    model.set_adapter("default")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ProtectionWarning)
        audit(protection)


def test_a_write_that_reaches_no_parameter_is_said_to_be_lost() -> None:
    model = adapted(init_lora_weights=False)
    protection = protect(model, BASIS, preflight=False)
    layer = model.get_base_model().model.layers[1].self_attn.v_proj
    layer.reset_lora_parameters("default", True)
    with pytest.raises(RuntimeError, match="in-place write to the weight of a protected LoRA factor was lost"):
        logits(model)
    logits(model)  # once for every write
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    with pytest.raises(RuntimeError, match="was lost"):
        protection.remove()
    with torch.no_grad():
        layer.lora_B["default"].free.zero_()
    assert not layer.lora_B["default"].weight.any()
    copy.deepcopy(model)


@pytest.mark.filterwarnings("default")
def test_16_bit_adapters_are_said_to_leak() -> None:
    model = get_peft_model(build().bfloat16(), LoraConfig(r=4, target_modules=TARGETS), autocast_adapter_dtype=False)
    with pytest.warns(ProtectionWarning, match=r"the adapter's weights are torch.bfloat16, and rounding them leaves"):
        protect(model, BASIS, preflight=False)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"strength": "1"}, ValueError, "strength: expected a number from 0 to 1, got '1'"),
        ({"strength": True}, ValueError, "strength: expected a number from 0 to 1, got True"),
        ({"sites": 3}, TypeError, "sites: expected names out of o_proj, v_proj, residual, all; got 3"),
        ({"sites": [1]}, TypeError, "sites: expected names out of"),
        ({"basis": {0: torch.eye(4)}}, TypeError, "basis: expected a RefusalBasis, got dict"),
    ],
)
def test_arguments_of_another_kind_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"basis": BASIS, "preflight": False, **changes}
    with pytest.raises(error, match=re.escape(message)):
        protect(adapted(), arguments.pop("basis"), **arguments)
