"""SAETrainer: one SAE per layer from one stream of activations; a killed run continues from its checkpoint bit for bit.

    trainer = SAETrainer(config, batches)          batches yields {layer: x [batch_tokens, d_in]}
    saes = trainer.train()                         {layer: TopKSAE}

A step costs no host synchronisation: losses and firing counts stay on the device and are read every `log_every` steps.

A checkpoint `step_<n>/` holds
    training.json            format version, step, the whole TrainConfig, library versions
    layer_<l>/               the SAE as `TopKSAE.save_pretrained` writes it, so every checkpoint opens by itself
    state.pt                 optimisers, dead-latent counters, position in the data; read with weights_only
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

import refusal_kernels as rk
from refusal_kernels.backends import Request, requested_backend, select

from .checkpoint import CheckpointFolder, write_json
from .interrupt import Interruptible
from .resume import (
    CHECKPOINT_FORMAT_VERSION,
    HEADER_FILE,
    METRICS,
    PARAMETERS,
    STATE_FILE,
    check_resumable,
    layer_folder,
    read_saes,
    read_state,
)
from .sae import TopKSAE, TopKSAEConfig, all_finite
from .train_config import DTYPES, TrainConfig
from .train_log import LOG_FILE, TrainLog

__all__ = ["ActivationSource", "DataEnded", "SAETrainer", "TrainConfig", "TrainingDiverged", "TrainingInterrupted"]


class ActivationSource(Protocol):
    """What the trainer needs of its data; `ActivationBuffer` is one, a test's generator another.

    Iterating yields dicts {layer: x [batch_tokens, d_in]} without end or until the data is used up. `state_dict` must
    hold only tensors, numbers, strings, lists, tuples, dicts and None, because checkpoints are read with weights_only.
    """

    def __iter__(self) -> Iterator[dict[int, Tensor]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainingInterrupted(Exception):
    """Ctrl-C or SIGTERM: the step was finished and a checkpoint written.

    Attributes: step, total_steps, checkpoint (its folder).
    """

    def __init__(self, step: int, total_steps: int, checkpoint: Path) -> None:
        super().__init__(f"interrupted after step {step} of {total_steps}; checkpoint in {checkpoint}")
        self.step = step
        self.total_steps = total_steps
        self.checkpoint = checkpoint


class TrainingDiverged(RuntimeError):
    """The loss, the weights or the optimiser's state are no longer finite; the checkpoints written before all are."""


class DataEnded(RuntimeError):
    """The activations ended before the tokens asked for."""


class SAETrainer:
    """Trains one TopK SAE per layer.

    Args:
        config: the settings; `config.layers` may be empty, then the layers of the first batch are taken.
        batches: the activations, raw scale, any float dtype, on any device.
        provenance: per layer, extra fields for TopKSAEConfig (hook_name, model_name).
        progress: show a progress bar on stderr.
        tracker_log: called as f(values, step) with every log line; `accelerate_tracker` makes one.

    The SAEs are initialised from the first batches (at least 16 384 tokens where the source has them), which are then
    trained on like all others.
    """

    def __init__(
        self,
        config: TrainConfig,
        batches: ActivationSource,
        *,
        provenance: dict[int, dict[str, Any]] | None = None,
        progress: bool = True,
        tracker_log: Any = None,
    ) -> None:
        self.config = config
        self.batches = batches
        self.provenance = provenance or {}
        self.progress = progress
        self.tracker_log = tracker_log
        self.device = config.resolved_device()
        self.out = Path(config.out)
        self.checkpoints = CheckpointFolder(self.out / "checkpoints", config.keep_checkpoints)
        self.step = 0
        self.saes: dict[int, TopKSAE] = {}
        self.optimizers: dict[int, rk.SAEAdam] = {}
        self.dead: dict[int, rk.DeadLatents] = {}
        self._sums: dict[int, Tensor] = {}
        self._summed_steps = 0
        self._first: list[dict[int, Tensor]] = []
        self._source: Iterator[dict[int, Tensor]] | None = None

    # -- building -----------------------------------------------------------------------------------------------------

    def _add_layer(self, layer: int, sae: TopKSAE) -> None:
        config = self.config
        n_latents = sae.config.n_latents
        self.saes[layer] = sae
        self.optimizers[layer] = rk.SAEAdam(
            sae.W_enc,
            sae.b_enc,
            sae.W_dec,
            sae.b_dec,
            lr=config.peak_lr(n_latents),
            betas=config.betas,
            eps=config.eps,
            max_grad_norm=config.max_grad_norm,
            moment_dtype=DTYPES[config.moments],
            copy_dtype=torch.bfloat16 if self._autocast else None,
            backend=config.backend,
        )
        self._check_backend(sae)
        self.dead[layer] = rk.DeadLatents(n_latents, config.dead_after_tokens, device=self.device)
        self._sums[layer] = torch.zeros(len(METRICS), dtype=torch.float64, device=self.device)

    def _check_backend(self, sae: TopKSAE) -> None:
        """BackendError for kernels that cannot run this: now, and not after the files of an earlier run are gone."""
        rows = torch.bfloat16 if self._autocast else sae.W_enc.dtype
        for op, dtype, k in (("sae_step", rows, sae.config.k), ("sae_adam", sae.W_enc.dtype, 0)):
            request = Request(self.device.type, dtype, n_latents=sae.config.n_latents, d=sae.config.d_in, k=k)
            select(op, request, requested_backend(self.config.backend))

    @property
    def _autocast(self) -> bool:
        return self.device.type == "cuda" and self.config.dtype == "bfloat16"

    def prepare(self) -> None:
        """Builds the SAEs from the first batches, unless that is done; `train` does it by itself.

        Everything that can be refused is refused here (k, the kernels, data without text or with activations that are
        not finite) and nothing is written, so a caller can wait for it before an earlier run's files are removed.
        """
        if not self.saes:
            self._source = iter(self.batches)
            self._initialise(self._source)

    def _initialise(self, source: Iterator[dict[int, Tensor]]) -> None:
        """Builds the SAEs from the first batches of the source."""
        n_tokens = 0
        while n_tokens < 16_384:
            batch = next(source, None)
            if batch is None:
                break
            self._first.append(batch)
            n_tokens += next(iter(batch.values())).shape[0]
        if n_tokens == 0:
            raise ValueError("the data gave no activations at all; is the data set or file empty?")
        for layer in self.config.layers or sorted(self._first[0]):
            sample = torch.cat([batch[layer] for batch in self._first])[:32_768]
            d_in = sample.shape[1]
            n_latents = self.config.n_latents(d_in)
            if self.config.k > n_latents:
                raise ValueError(f"k must be at most the number of latents = {n_latents}; got {self.config.k}")
            sae_config = TopKSAEConfig(d_in, n_latents, self.config.k, layer=layer, **self.provenance.get(layer, {}))
            sae = TopKSAE(sae_config, device=self.device, seed=self.config.seed + layer)
            sae.init_from_data(sample.to(self.device))
            self._add_layer(layer, sae)

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self) -> dict[int, TopKSAE]:
        """Runs to `config.total_steps`, writes the last checkpoint, returns the SAEs.

        Raises TrainingInterrupted after Ctrl-C or SIGTERM (a second Ctrl-C stops at once), TrainingDiverged when
        something is no longer finite, at a log line or where a checkpoint is due, and DataEnded when the data ends
        before the tokens asked for.
        """
        config = self.config
        total = config.total_steps
        self.prepare()
        log = TrainLog(self.out / LOG_FILE, keep_until=self.step)
        source = iter(self.batches) if self._source is None else self._source
        bar = tqdm(
            total=total * config.batch_tokens,
            initial=self.step * config.batch_tokens,
            unit="tok",
            unit_scale=True,
            desc="training",
            disable=not self.progress,
            dynamic_ncols=True,
            # A terminal redraws one line; a log file would gain a line per update.
            mininterval=0.2 if sys.stderr.isatty() else 15.0,
        )
        with contextlib.closing(bar), contextlib.closing(log), Interruptible() as interrupt:
            # Its own counter: after a resume the first line averages steps that another process took.
            clock, clocked_step = time.perf_counter(), self.step
            while self.step < total:
                batch = self._first.pop(0) if self._first else next(source, None)
                if batch is None:
                    raise DataEnded(
                        f"the data ended after {self.step * config.batch_tokens:,} of {config.tokens:,} tokens; "
                        "give more text or ask for fewer tokens"
                    )
                self._train_step(batch)
                bar.update(config.batch_tokens)
                if self.step % config.log_every == 0 or self.step == total:
                    now = time.perf_counter()
                    line = self._log_line((self.step - clocked_step) / max(now - clock, 1e-9))
                    clock, clocked_step = now, self.step
                    log.write(line)
                    if self.tracker_log is not None:
                        self.tracker_log(line, self.step)
                    bar.set_postfix_str(_postfix(line, list(self.saes)))
                if interrupt.requested:
                    raise TrainingInterrupted(self.step, total, self.save_checkpoint())
                if config.checkpoint_every and self.step % config.checkpoint_every == 0 and self.step < total:
                    self.save_checkpoint()
            if not (self.checkpoints.path(total) / HEADER_FILE).is_file():
                self.save_checkpoint()
        for layer, sae in self.saes.items():
            sae.config.metadata = {
                "training_tokens": total * config.batch_tokens,
                "data": config.data,
                "context_length": config.context_length,
                "dead_fraction": self.dead_fraction(layer),
                "dead_after_tokens": config.dead_after_tokens,
            }
        return self.saes

    def _train_step(self, batch: dict[int, Tensor]) -> None:
        config = self.config
        factor = config.lr_factor(self.step)
        for layer, sae in self.saes.items():
            optimizer = self.optimizers[layer]
            for group in optimizer.param_groups:
                group["lr"] = config.peak_lr(sae.config.n_latents) * factor
            x = sae.scale_input(batch[layer].to(self.device, non_blocking=True))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
                out = rk.sae_step(
                    x,
                    sae.W_enc,
                    sae.b_enc,
                    sae.W_dec,
                    sae.b_dec,
                    sae.config.k,
                    dead=self.dead[layer].rows if config.aux_alpha > 0 else None,
                    k_aux=config.k_aux,
                    aux_alpha=config.aux_alpha,
                    optimizer=optimizer,
                    backend=config.backend,
                )
            self.dead[layer].update(out.fire_counts, x.shape[0])
            self._sums[layer] += torch.stack([getattr(out, name).detach().double() for name in METRICS])
        self._summed_steps += 1
        self.step += 1

    def dead_fraction(self, layer: int) -> float:
        """Share of the latents that did not fire in the last `dead_after_tokens` tokens, as of the last refresh."""
        return self.dead[layer].fraction

    def _log_line(self, steps_per_second: float) -> dict[str, float]:
        """Means over the steps since the last line. This is the one place that waits for the device."""
        config, steps = self.config, max(self._summed_steps, 1)
        line: dict[str, float] = {
            "step": self.step,
            "tokens": self.step * config.batch_tokens,
            "tokens_per_second": steps_per_second * config.batch_tokens,
            "lr_factor": config.lr_factor(self.step - 1),
        }
        for layer, sums in self._sums.items():
            means = [total / steps for total in sums.tolist()]
            line |= {f"layer_{layer}/{name}": value for name, value in zip(METRICS, means, strict=True)}
            line[f"layer_{layer}/explained_variance"] = 1 - line[f"layer_{layer}/fvu"]
            line[f"layer_{layer}/dead_fraction"] = self.dead_fraction(layer)
            sums.zero_()
            if not math.isfinite(means[0]):
                raise self._diverged(f"the loss of layer {layer} is {means[0]}")
        self._summed_steps = 0
        return line

    def _diverged(self, what: str) -> TrainingDiverged:
        latest = self.checkpoints.latest()
        kept = "no checkpoint was written before" if latest is None else f"the last good checkpoint is {latest}"
        return TrainingDiverged(
            f"{what} at step {self.step}; {kept}. Lower the learning rate, clip the gradient (max_grad_norm), or check "
            "that the model's activations are finite in this dtype"
        )

    def _check_finite(self) -> None:
        """TrainingDiverged for the first thing that is not finite of what a checkpoint would hold."""
        for layer, sae in self.saes.items():
            if not math.isfinite(loss := float(self._sums[layer][0])):
                raise self._diverged(f"the loss of layer {layer} is {loss}")
            tensors = sae.state_dict()
            for name in PARAMETERS:
                moments = self.optimizers[layer].state[getattr(sae, name)]
                tensors |= {f"Adam's {moment} of {name}": tensor for moment, tensor in moments.items()}
            for name, tensor in tensors.items():
                if not all_finite(tensor):
                    raise self._diverged(f"{name} of layer {layer} is not finite")

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> Path:
        """Writes `step_<step>` atomically, moves `latest`, drops old ones; returns its folder.

        TrainingDiverged, and nothing written or dropped, when the weights, Adam's state or the loss are not finite.
        """
        self._check_finite()  # between log lines nobody has looked, and each checkpoint pushes an older one out
        return self.checkpoints.save(self.step, self._write_checkpoint)

    def _write_checkpoint(self, folder: Path) -> None:
        for layer, sae in self.saes.items():
            sae.save_pretrained(layer_folder(folder, layer))
        state = {
            "optimizers": {layer: optimizer.state_dict() for layer, optimizer in self.optimizers.items()},
            "dead": {layer: dead.state_dict() for layer, dead in self.dead.items()},
            "batches": self.batches.state_dict(),
            "first": self._first,
            "sums": self._sums,
            "summed_steps": self._summed_steps,
            "torch_rng": torch.get_rng_state(),
        }
        torch.save(state, folder / STATE_FILE)
        write_json(
            folder / HEADER_FILE,
            {
                "format_version": CHECKPOINT_FORMAT_VERSION,
                "step": self.step,
                "layers": list(self.saes),
                "config": self.config.to_dict(),
                "versions": {"torch": torch.__version__, "refusal_kernels": rk.__version__},
            },
        )

    def load_checkpoint(self, folder: Path) -> SAETrainer:
        """Takes over everything from a checkpoint.

        The continuation is bit for bit the uninterrupted run on the same machine, libraries and thread count.

        Raises ValueError or FileNotFoundError in one line: settings that may not change and do, other data, or a file
        that is missing, damaged, or holds something of another shape or dtype or something that is not finite.
        """
        header = check_resumable(self.config, folder)
        saes = read_saes(self.config, folder, header["layers"], self.device)
        state = read_state(self.config, folder, saes)
        for layer, sae in saes.items():
            self._add_layer(layer, sae)
            # Adam's settings are those of the config, which check_resumable has compared; the file's are not read.
            own = self.optimizers[layer].state_dict() | {"state": state["optimizers"][layer]["state"]}
            self.optimizers[layer].load_state_dict(own)
            self.dead[layer].load_state_dict(state["dead"][layer])
            self._sums[layer].copy_(state["sums"][layer])
        self._summed_steps = state["summed_steps"]
        self._first = state["first"]
        try:
            self.batches.load_state_dict(state["batches"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"cannot resume {folder}: {error}") from error
        torch.set_rng_state(state["torch_rng"])
        self.step = header["step"]
        return self


def _postfix(line: dict[str, float], layers: list[int]) -> str:
    def span(name: str, form: str) -> str:
        values = [line[f"layer_{layer}/{name}"] for layer in layers]
        low, high = format(min(values), form), format(max(values), form)
        return low if low == high else f"{low}..{high}"

    return f"FVU {span('fvu', '.3f')}, L0 {span('l0', '.1f')}, dead {span('dead_fraction', '.1%')}"
