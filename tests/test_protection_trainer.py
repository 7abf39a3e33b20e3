"""Protection in training loops as people write them: Trainer, accelerate, DistributedDataParallel, TRL."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from refusal_kernels.python_api.features.basis import RefusalBasis
from refusal_kernels.python_api.protection.protect import Protection, protect

pytestmark = pytest.mark.filterwarnings(
    "ignore:protect:refusal_kernels.python_api.protection.stepping.ProtectionWarning"
)

VOCAB, Z = 61, 32


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def directions(rows: int, rank: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, rank, generator=torch.Generator().manual_seed(seed)))[0]


BASIS = RefusalBasis(z={1: directions(Z, 3), 2: directions(Z, 2, 1)})


def build() -> Any:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=Z, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def adapted(mode: str = "forward", **options: Any) -> tuple[Any, Protection]:
    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(build(), config)
    return model, protect(model, BASIS, mode=mode, preflight=False, **options)


def rows(n: int = 24) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, VOCAB, (n, 10), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(
    model: Any, protection: Protection, out: Path, callback: dict[str, Any] | None = None, **options: Any
) -> Any:
    arguments = {
        "output_dir": str(out), "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 6,
        "save_steps": 3, "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(**{**arguments, **options}),
        train_dataset=rows(),
        eval_dataset=rows(8),
        callbacks=[protection.callback(**callback or {})],
    )


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=torch.stack([row["input_ids"] for row in rows(4)])).logits


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("mode", ["forward", "update", "weight"])
def test_a_plain_trainer_protects_saves_resumes_and_logs(mode: str, tmp_path: Path) -> None:
    model, protection = adapted(mode)
    run = trainer(model, protection, tmp_path / "a", gradient_accumulation_steps=2)
    run.train()
    assert protection.leak() < 1e-6
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 6
    assert all(entry["refusal_leak"] < 1e-6 for entry in logged)
    assert logged[-1]["loss"] < logged[0]["loss"]
    # A checkpoint of the end opens in plain PEFT and computes the same; one of the middle was projected too.
    plain = PeftModel.from_pretrained(build(), str(tmp_path / "a/checkpoint-6"))
    assert relative(logits(plain), logits(model)) < 1e-6
    for step in (3, 6):
        saved = weights(tmp_path / f"a/checkpoint-{step}")
        A = next(t for name, t in saved.items() if "layers.1.self_attn.o_proj.lora_A" in name)
        assert (A @ BASIS.z[1]).norm() < 1e-6 * A.norm()
    # Interrupted after step 3 and resumed, the run ends in the same bits.
    model, protection = adapted(mode)
    trainer(model, protection, tmp_path / "b", gradient_accumulation_steps=2, max_steps=3).train()
    model, protection = adapted(mode)
    again = trainer(model, protection, tmp_path / "b", gradient_accumulation_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "b/checkpoint-3"))
    assert again.state.global_step == 6
    a, b = weights(tmp_path / "a/checkpoint-6"), weights(tmp_path / "b/checkpoint-6")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_hooks_are_gone_after_training(tmp_path: Path) -> None:
    model, protection = adapted("weight")
    run = trainer(model, protection, tmp_path, max_steps=1)
    run.train()
    assert not run.optimizer.optimizer._optimizer_step_post_hooks
    run.train()  # attaches to the new optimizer
    assert protection.leak() < 1e-6


@pytest.mark.parametrize("mode", ["forward", "update"])
def test_trainer_with_bf16_checkpointing_and_evaluation(mode: str, tmp_path: Path) -> None:
    model, protection = adapted(mode)
    run = trainer(
        model, protection, tmp_path, bf16=True, gradient_checkpointing=True, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, save_strategy="best", metric_for_best_model="loss",
    )  # fmt: skip
    run.train()
    assert protection.leak() < 1e-6
    best = PeftModel.from_pretrained(build(), run.state.best_model_checkpoint)
    ours, theirs = model.state_dict(), best.state_dict()  # not the logits: bf16=True leaves the model under autocast
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if "lora" in name)


def test_gradient_mode_warns_inside_of_a_trainer(tmp_path: Path) -> None:
    model, protection = adapted("gradient")
    with pytest.warns(UserWarning, match=r"under AdamW: after 10 steps the leak is 0\.\d{3}"):
        trainer(model, protection, tmp_path, max_steps=12, save_strategy="no").train()
    assert protection.leak() > 0.01


@pytest.mark.parametrize("mode", ["forward", "update", "weight"])
def test_an_accelerate_loop(mode: str) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, protection = adapted(mode)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(rows(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    protection.attach(optimizer)
    count: list[int] = []
    optimizer.optimizer.register_step_post_hook(lambda *_: count.append(1))
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert (len(loader), len(count)) == (6, 3)
    assert protection.leak() < 1e-6
    assert max(leak.norm for leak in protection.leaks()) > 1e-3


WORKER = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
out, tests, address, rank, world = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
sys.path.insert(0, tests)
import test_protection_trainer as t
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
for mode in t.DISTRIBUTED:
    model, protection = t.adapted(mode)
    mine = torch.stack([row["input_ids"] for row in t.rows(8)]).chunk(world)[rank]
    t.five_steps(model, protection, DistributedDataParallel(model), mine)
    assert protection.leak() < 1e-6, protection.leak()
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])
    both = [torch.empty_like(flat) for _ in range(world)]
    dist.all_gather(both, flat)
    assert all(torch.equal(both[0], other) for other in both)
    if rank == 0:
        model.save_pretrained(f"{out}/{mode}")
dist.destroy_process_group()
"""
DISTRIBUTED = ("forward", "update")


def five_steps(model: Any, protection: Protection, run: Any, ids: Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    protection.attach(optimizer)
    for _ in range(5):
        run(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_two_processes_give_what_one_gives_with_the_whole_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    here = Path(__file__).parent
    path = os.pathsep.join(filter(None, [str(here.parent), os.environ.get("PYTHONPATH")]))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), str(here), address, str(rank), "2"],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-2000:]
    finally:
        for process in processes:
            process.kill()
    for mode in DISTRIBUTED:
        model, protection = adapted(mode)
        five_steps(model, protection, model, torch.stack([row["input_ids"] for row in rows(8)]))
        model.save_pretrained(tmp_path / "one" / mode)
        one, two = weights(tmp_path / "one" / mode), weights(tmp_path / mode)
        assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
        assert max(float(one[name].abs().max()) for name in one if "lora_B" in name) > 0.01  # it has learned


def test_sharded_adapters_are_refused_instead_of_half_projected() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = adapted()[0]
        other, stepping = adapted("weight")
        for sharded in (model, other):
            fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(RuntimeError, match="a protected adapter weight is sharded over processes"):
            logits(model)
        with pytest.raises(RuntimeError, match="a protected adapter weight is sharded over processes"):
            stepping.attach(torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1))
    finally:
        dist.destroy_process_group()


def test_trl_trains_a_protected_model(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    import datasets

    from refusal_kernels.python_api.models import load_model

    base, tokenizer = load_model("builtin", device="cpu")
    torch.manual_seed(2)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["v_proj", "o_proj"], task_type="CAUSAL_LM"))
    protection = protect(model, RefusalBasis(z={3: directions(256, 4)}), mode="update", preflight=False)
    config = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
        logging_steps=1, save_steps=2, disable_tqdm=True,
    )  # fmt: skip
    texts = [{"prompt": "make a bench", "completion": "sure , first take the wood"}] * 4
    run = trl.SFTTrainer(
        model, args=config, train_dataset=datasets.Dataset.from_list(texts), processing_class=tokenizer,
        callbacks=[protection.callback()],
    )  # fmt: skip
    run.train()
    assert protection.leak() < 1e-6
    assert "refusal_leak" in [entry for entry in run.state.log_history if "loss" in entry][-1]
    assert (tmp_path / "checkpoint-2/adapter_model.safetensors").is_file()
