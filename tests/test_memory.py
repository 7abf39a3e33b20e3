"""Memory of a real run: model, token stream with its thread, activation buffer, trainer and its checkpoints."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from refusal_kernels.python_api import builtin_model
from refusal_kernels.python_api.buffer import ActivationBuffer
from refusal_kernels.python_api.tokens import TokenStream
from refusal_kernels.python_api.trainer import SAETrainer, TrainConfig

BATCH = 64


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_no_growth_over_500_steps_of_a_real_run(tmp_path: Path, one_thread: None) -> None:
    """Steps 300 to 800: the first 256 batches are drawn ahead for the initialisation and freed one by one."""
    model = AutoModelForCausalLM.from_pretrained(builtin_model.path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(builtin_model.path())
    config = TrainConfig(
        layers=[1],
        out=str(tmp_path),
        k=4,
        latents=256,
        tokens=800 * BATCH,
        batch_tokens=BATCH,
        dead_after_tokens=2000,
        checkpoint_every=100,
        log_every=50,
    )
    process, resident = psutil.Process(), []

    def note(line: dict[str, float], step: int) -> None:
        if step >= 300:
            gc.collect()
            resident.append(process.memory_info().rss)

    # Few documents an epoch, so that the stream turns over several times.
    with TokenStream("builtin", tokenizer, 64, 4, n_documents=300) as stream:
        buffer = ActivationBuffer(model, stream, config.layers, BATCH, 2 * BATCH)
        SAETrainer(config, buffer, progress=False, tracker_log=note).train()
    assert len(resident) == 11
    # 0.02 MiB measured. 500 steps that kept only their batches would hold 500 x 64 KiB = 31 MiB more.
    assert max(resident[-3:]) - resident[0] < 6 * 2**20, [round(r / 2**20, 1) for r in resident]
