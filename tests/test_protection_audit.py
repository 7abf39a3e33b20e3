"""The audit: leak and drift of protected, plainly trained, merged and fully fine-tuned models; the pre-flight check."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from refusal_kernels.python_api.capturing import capture
from refusal_kernels.python_api.features.basis import RefusalBasis
from refusal_kernels.python_api.models import load_model
from refusal_kernels.python_api.prompts import builtin
from refusal_kernels.python_api.prompts.chat import Chat
from refusal_kernels.python_api.protection.audit import Audit, Drift, audit
from refusal_kernels.python_api.protection.leak import Leak
from refusal_kernels.python_api.protection.protect import protect
from refusal_kernels.python_api.protection.stepping import ProtectionWarning
from refusal_kernels.python_api.sae import TopKSAE, TopKSAEConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:protect:refusal_kernels.python_api.protection.stepping.ProtectionWarning"
)

Z = 256  # 8 heads of 32
PROMPTS = [p.prompt for p in builtin.harmful(12)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def directions(rows: int, rank: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, rank, generator=torch.Generator().manual_seed(seed)))[0]


BASIS = RefusalBasis(z={2: directions(Z, 6, 2), 3: directions(Z, 8, 3)})


@pytest.fixture(scope="module")
def animal() -> tuple[Any, Chat]:
    base, tokenizer = load_model("builtin", device="cpu")
    return base, Chat(tokenizer)


def adapted(animal: tuple[Any, Chat], targets: Any = ("q_proj", "v_proj", "o_proj"), **options: Any) -> Any:
    torch.manual_seed(2)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=list(targets), **options)
    return get_peft_model(copy.deepcopy(animal[0]), config)


def train(model: Any, chat: Chat, steps: int = 12, optimizer: Any = None) -> None:
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    batch = chat.batch([chat.encode(d.prompt, d.answer) for d in builtin.poison(16)])
    for _ in range(steps):
        model(**batch.inputs, labels=batch.labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def plain(animal: tuple[Any, Chat]) -> Any:
    """Trained without protection."""
    model = adapted(animal)
    train(model, animal[1])
    return model


def test_leak_is_the_share_of_the_update_that_breaks_the_promise(plain: Any, animal: tuple[Any, Chat]) -> None:
    found = audit(plain, BASIS)
    assert len(found.leaks) == 4
    for leak in found.leaks:
        layer = plain.get_base_model().get_submodule(leak.module)
        dW = layer.get_delta_weight("default").detach().double()
        number = int(leak.module.split(".")[2])
        assert leak.norm == pytest.approx(float(dW.norm()), rel=1e-5)
        if leak.side == "input":
            assert leak.rho == pytest.approx(float((dW @ BASIS.z[number].double()).norm() / dW.norm()), rel=1e-4)
            assert 0.05 < leak.rho < 0.5
    assert found.leak == max(leak.rho for leak in found.leaks)
    assert "model.layers.4.self_attn.o_proj" in found.unconstrained
    assert audit(plain, BASIS, sites="residual").leak > 0.01


def test_leak_is_zero_where_nothing_moved(animal: tuple[Any, Chat]) -> None:
    found = audit(adapted(animal), BASIS)
    assert [(leak.norm, leak.rho) for leak in found.leaks] == [(0.0, 0.0)] * 4


def test_drift_is_the_features_change_relative_to_their_size(plain: Any, animal: tuple[Any, Chat]) -> None:
    base, chat = animal
    found = audit(plain, BASIS, chat=chat, prompts=PROMPTS, batch_size=5)
    batch = chat.prompt_batch(PROMPTS)
    with capture(plain, [2, 3]) as seen:
        after = seen.run(batch)
    with capture(base, [2, 3]) as seen:
        before = seen.run(batch)
    for drift in found.drifts:
        f, g = before[drift.layer] @ BASIS.z[drift.layer], after[drift.layer] @ BASIS.z[drift.layer]
        assert drift.scale == pytest.approx(f.abs().mean().item(), rel=1e-4)
        assert drift.ratio == pytest.approx(((g - f).abs().mean() / f.abs().mean()).item(), rel=1e-3)
        assert drift.ratio > 0.05
    assert found.drift == max(d.ratio for d in found.drifts)


def test_drift_of_sae_latents(plain: Any, animal: tuple[Any, Chat]) -> None:
    base, chat = animal
    sae = TopKSAE(TopKSAEConfig(d_in=Z, n_latents=512, k=8))
    chosen = [3, 100, 511]
    [drift] = audit(plain, BASIS, chat=chat, prompts=PROMPTS, latents={3: (sae, range(512))}).drifts
    assert (drift.layer, drift.features) == (3, 512)
    batch = chat.prompt_batch(PROMPTS)
    with capture(base, [3]) as seen:
        dense = sae.dense(*sae.encode(seen.run(batch)[3]))
    assert drift.scale == pytest.approx(dense.mean().item(), rel=1e-4)
    [few] = audit(plain, BASIS, chat=chat, prompts=PROMPTS, latents={3: (sae, chosen)}).drifts
    assert few.scale == pytest.approx(dense[:, chosen].mean().item(), rel=1e-4, abs=1e-9)


def test_a_protected_model_keeps_the_promise_and_may_drift_all_the_same(animal: tuple[Any, Chat]) -> None:
    model = adapted(animal)
    protection = protect(model, BASIS, preflight=False)
    train(model, animal[1])
    found = audit(protection, chat=animal[1], prompts=PROMPTS)
    assert found.leak < 1e-6
    assert found.drift is not None
    assert found.drift > 0.02  # other modules change what flows into the basis
    assert found.unconstrained == protection.unconstrained
    assert audit(protection, sites="o_proj").leak < 1e-6
    assert audit(protection, RefusalBasis(z={3: directions(Z, 8, 99)})).leak > 0.05  # not another basis' promise


def test_models_without_adapters_are_compared_with_a_reference(animal: tuple[Any, Chat]) -> None:
    base, chat = animal
    model = adapted(animal)
    protection = protect(model, BASIS, preflight=False)
    train(model, chat)
    inside = audit(protection, chat=chat, prompts=PROMPTS)
    for candidate in (model, copy.deepcopy(model).merge_and_unload()):
        found = audit(candidate, BASIS, reference=base, chat=chat, prompts=PROMPTS)
        assert [(a.module, a.side, a.rank) for a in found.leaks] == [(a.module, a.side, a.rank) for a in inside.leaks]
        assert found.leak < 1e-4  # W + dW is rounded to fp32, and dW is small beside W
        for a, b in zip(found.leaks, inside.leaks, strict=True):
            assert a.norm == pytest.approx(b.norm, rel=1e-3)
        assert found.drift == pytest.approx(inside.drift, rel=1e-3)
        assert sorted(found.unconstrained) == sorted(inside.unconstrained)
    full = copy.deepcopy(base).requires_grad_(True)
    train(full, chat, 2, torch.optim.AdamW(full.parameters(), lr=1e-3))
    assert audit(full, BASIS, reference=base).leak > 0.05
    with pytest.raises(ValueError, match="hold none of the trained modules, of which there are none"):
        audit(copy.deepcopy(base), BASIS, reference=base)


def test_an_audit_reads_as_text_and_json(plain: Any, animal: tuple[Any, Chat]) -> None:
    found = audit(plain, BASIS, chat=animal[1], prompts=PROMPTS[:4])
    lines = found.table().splitlines()
    assert lines[0].split() == ["module", "side", "sites", "rank", "|dW|", "leak"]
    assert lines[1].split()[:4] == ["model.layers.2.self_attn.o_proj", "input", "o_proj", "6"]
    assert lines[6].split() == ["layer", "features", "E|f|", "E|f'", "-", "f|", "drift"]
    assert "trained without a constraint: model.layers.{0-4}.self_attn.q_proj" in lines[-1]
    data = json.loads(json.dumps(found.to_dict()))
    assert data["refusal_leak"] == found.leak
    assert data["leaks"][0]["rho"] == found.leaks[0].rho
    assert data["drifts"][1]["ratio"] == found.drifts[1].ratio
    assert found.logs() == {"refusal_leak": found.leak, "refusal_drift": found.drift}
    assert Audit([Leak("m", "input", ("all",), 1, 0.0, 0.0)]).logs() == {"refusal_leak": 0.0}
    assert Drift(0, 1, 0.0, 1.0).ratio == float("inf")
    assert Drift(0, 1, 0.0, 0.0).ratio == 0


def test_arguments_belong_together(plain: Any, animal: tuple[Any, Chat]) -> None:
    with pytest.raises(ValueError, match="basis: needed, unless the model is a Protection"):
        audit(plain)
    with pytest.raises(TypeError, match=r"model: expected a peft.PeftModel .*got LlamaForCausalLM"):
        audit(animal[0], BASIS)
    with pytest.raises(ValueError, match="drift needs chat and at least one prompt"):
        audit(plain, BASIS, prompts=PROMPTS)
    with pytest.raises(ValueError, match="drift needs chat and at least one prompt"):
        audit(plain, BASIS, chat=animal[1])
    with pytest.raises(ValueError, match=r"hold none of the trained modules, model\.layers"):
        audit(adapted(animal, ["q_proj"]), BASIS)
    protection = protect(adapted(animal), BASIS, preflight=False)
    with pytest.raises(ValueError, match="chat and prompts belong together"):
        protection.callback(chat=animal[1])


def test_the_callback_logs_drift(animal: tuple[Any, Chat], tmp_path: Path) -> None:
    import transformers

    chat = animal[1]
    model = adapted(animal)
    protection = protect(model, BASIS, preflight=False)
    encoded = [chat.encode(d.prompt, d.answer) for d in builtin.poison(8)]
    rows = [{"input_ids": torch.tensor(e.ids[-12:]), "labels": torch.tensor(e.ids[-12:])} for e in encoded]
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "max_steps": 3}
    run = transformers.Trainer(
        model,
        transformers.TrainingArguments(str(tmp_path), learning_rate=1e-2, save_strategy="no", **options),
        train_dataset=rows,
        callbacks=[protection.callback(chat=chat, prompts=PROMPTS[:4])],
    )
    run.train()
    drifts = [entry["refusal_drift"] for entry in run.state.log_history if "loss" in entry]
    assert len(drifts) == 3
    assert drifts[-1] > 0.01
    assert drifts[-1] == pytest.approx(audit(protection, chat=chat, prompts=PROMPTS[:4]).drift)


def test_the_preflight_check_runs_and_speaks_in_the_one_warning(animal: tuple[Any, Chat]) -> None:
    module = pytest.importorskip("refusal_kernels.python_api.features.preflight")
    model = adapted(animal)
    basis = RefusalBasis(z={1: directions(Z, 2, 1)}, twins=builtin.twins(8))  # random directions carry no refusal
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        protection = protect(model, basis)  # the tokenizer comes from the folder that the model was loaded from
    assert isinstance(protection.preflight, module.Preflight)
    assert not protection.preflight.ok
    [message] = [str(w.message) for w in caught if w.category is ProtectionWarning]
    assert "the pre-flight check failed" in message


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_quantised_base_weights_are_left_alone(animal: tuple[Any, Chat], tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from refusal_kernels.python_api import builtin_model

    def load() -> Any:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return AutoModelForCausalLM.from_pretrained(builtin_model.path(), quantization_config=config, device_map="cpu")

    quantised = load()
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"])
    model = get_peft_model(prepare_model_for_kbit_training(quantised), config)
    o_proj = model.get_base_model().model.layers[3].self_attn.o_proj
    assert isinstance(o_proj.base_layer, bitsandbytes.nn.Linear4bit)
    before = o_proj.base_layer.weight.detach().clone()
    protection = protect(model, BASIS, sites=("o_proj", "v_proj", "residual"), preflight=False)
    train(model, animal[1], 4)
    assert torch.equal(o_proj.base_layer.weight, before)
    assert o_proj.base_layer.weight.dtype == torch.uint8
    assert protection.leak() < 1e-6
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(), str(tmp_path))
    batch = animal[1].prompt_batch(PROMPTS[:4])
    with torch.no_grad():
        a, b = model.eval()(**batch).logits, again.eval()(**batch).logits
    assert float((a - b).norm() / b.norm()) < 1e-2
