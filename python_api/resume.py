"""Reading a trainer's checkpoint: what a file may hold is checked before any of it is used.

A checkpoint may be cut short, from another version, or from a stranger. Whatever is wrong with it is one ValueError
that names the file: what cannot be read, what is missing, shapes, dtypes, values that are not finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import read_json
from .sae import TopKSAE, all_finite
from .train_config import DTYPES, TrainConfig

CHECKPOINT_FORMAT_VERSION = 1
HEADER_FILE = "training.json"
STATE_FILE = "state.pt"
METRICS = ("loss", "mse", "aux_loss", "fvu", "l0")
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")  # in the order of SAEAdam's state


def layer_folder(folder: Path, layer: int) -> Path:
    """Where a checkpoint keeps the SAE of a layer."""
    return folder / f"layer_{layer:02d}"


def read_checkpoint_header(folder: Path) -> dict[str, Any]:
    """training.json of a checkpoint: its format version, step >= 0, layers and config checked."""
    path = folder / HEADER_FILE
    header = read_json(path)
    if header.get("format_version") != CHECKPOINT_FORMAT_VERSION:
        raise ValueError(
            f"{folder}: checkpoint format_version must be {CHECKPOINT_FORMAT_VERSION}; got "
            f"{header.get('format_version')!r}"
        )
    step, layers, config = (header.get(name) for name in ("step", "layers", "config"))
    if not _is_count(step):
        raise ValueError(f"{path}: step must be an integer of at least 0; got {step!r}")
    if not isinstance(layers, list) or not layers or not all(map(_is_count, layers)):
        raise ValueError(f"{path}: layers must be a list of layer numbers; got {layers!r}")
    if not isinstance(config, dict):
        raise ValueError(f"{path}: config must hold the settings of the run; got {config!r}")
    return header


def check_resumable(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """The header of a checkpoint that `config` can continue; ValueError names every setting that stands against it."""
    header = read_checkpoint_header(folder)
    if differences := config.differences(TrainConfig.from_dict(header["config"], str(folder / HEADER_FILE))):
        raise ValueError(
            f"cannot resume {folder} with other settings: {'; '.join(differences)}. Drop these arguments, or start "
            "a new run with another --out"
        )
    return header


def read_saes(config: TrainConfig, folder: Path, layers: list[int], device: torch.device) -> dict[int, TopKSAE]:
    """The SAEs of a checkpoint, of the sizes that `config` says, in fp32."""
    saes = {}
    for layer in layers:
        path = layer_folder(folder, layer)
        saes[layer] = sae = TopKSAE.from_pretrained(path, device=device)
        expected = (layer, config.n_latents(sae.config.d_in), config.k, torch.float32)
        got = (sae.config.layer, sae.config.n_latents, sae.config.k, sae.W_enc.dtype)
        if got != expected:
            raise ValueError(f"{path}: (layer, n_latents, k, dtype) must be {expected} in this run; got {got}")
    return saes


def read_state(config: TrainConfig, folder: Path, saes: Mapping[int, TopKSAE]) -> dict[str, Any]:
    """state.pt of a checkpoint, on the CPU, fit for these SAEs; ValueError names the file and what is wrong in it."""
    path = folder / STATE_FILE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except Exception as error:  # a damaged pickle can raise anything; torch's text advises to load it with code
        why = " ".join(str(error).split()).partition(". ")[0][:120]
        raise ValueError(f"{path} is damaged or no trainer's state: {type(error).__name__}: {why}") from error
    problem = next(_state_problems(config, state, saes), None)
    if problem is not None:
        raise ValueError(f"{path}: {problem}")
    return state


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _state_problems(config: TrainConfig, state: Any, saes: Mapping[int, TopKSAE]) -> Iterator[str]:
    layers = set(saes)
    if not isinstance(state, dict):
        yield f"must hold a dict; got {type(state).__name__}"
        return
    for name in ("optimizers", "dead", "sums"):
        part = state.get(name)
        if not isinstance(part, dict) or set(part) != layers:
            yield f"{name} must hold one entry for each of the layers {sorted(layers)}; got {_short(part)}"
            return
    for name in ("batches", "torch_rng", "first"):
        if name not in state:
            yield f"{name} is missing"
    if not _is_count(state.get("summed_steps")):
        yield f"summed_steps must be an integer of at least 0; got {_short(state.get('summed_steps'))}"
    random = torch.get_rng_state()
    yield from _tensor_problems("torch_rng", state.get("torch_rng"), random.dtype, tuple(random.shape))
    for layer, sae in saes.items():
        yield from _optimizer_problems(config, f"optimizers[{layer}]", state["optimizers"][layer], sae)
        yield from _dead_problems(f"dead[{layer}]", state["dead"][layer], sae.config.n_latents)
        # Not its values: the FVU of a batch of equal rows is no number, and training goes on all the same.
        sums = state["sums"][layer]
        yield from _tensor_problems(f"sums[{layer}]", sums, torch.float64, (len(METRICS),), finite=False)
    yield from _first_problems(state.get("first"), saes)


def _optimizer_problems(config: TrainConfig, name: str, state: Any, sae: TopKSAE) -> Iterator[str]:
    moments = state.get("state") if isinstance(state, dict) else None
    if not isinstance(moments, dict) or set(moments) != set(range(len(PARAMETERS))):
        yield f"{name} must hold Adam's state of {', '.join(PARAMETERS)}; got {_short(state)}"
        return
    for i, parameter in enumerate(PARAMETERS):
        own, weight = moments[i], getattr(sae, parameter)
        where = f"{name} of {parameter}"
        if not isinstance(own, dict) or set(own) != {"step", "exp_avg", "exp_avg_sq"}:
            yield f"{where} must hold step, exp_avg and exp_avg_sq; got {_short(own)}"
            return
        yield from _tensor_problems(f"{where}: step", own["step"], torch.float32, (), least=0)
        dtype, shape = DTYPES[config.moments] if weight.dim() == 2 else weight.dtype, tuple(weight.shape)
        yield from _tensor_problems(f"{where}: exp_avg", own["exp_avg"], dtype, shape)
        yield from _tensor_problems(f"{where}: exp_avg_sq", own["exp_avg_sq"], dtype, shape, least=0)


def _dead_problems(name: str, state: Any, n_latents: int) -> Iterator[str]:
    if not isinstance(state, dict) or not {"tokens_since_fired", "rows", "updates"} <= state.keys():
        yield f"{name} must hold tokens_since_fired, rows and updates; got {_short(state)}"
        return
    yield from _tensor_problems(
        f"{name}: tokens_since_fired", state["tokens_since_fired"], torch.int64, (n_latents,), least=0
    )
    rows = state["rows"]
    shape = tuple(rows.shape) if isinstance(rows, Tensor) and rows.dim() == 1 else (None,)
    problems = list(_tensor_problems(f"{name}: rows", rows, torch.int64, shape, least=0))
    yield from problems
    if not problems and rows.numel() and (int(rows.max()) >= n_latents or not bool((rows.diff() > 0).all())):
        yield f"{name}: rows must be ascending latents below {n_latents}"
    if not _is_count(state["updates"]):
        yield f"{name}: updates must be an integer of at least 0; got {_short(state['updates'])}"


def _first_problems(first: Any, saes: Mapping[int, TopKSAE]) -> Iterator[str]:
    if not isinstance(first, list) or not all(isinstance(batch, dict) for batch in first):
        yield f"first must be a list of batches; got {_short(first)}"
        return
    for batch in first:
        for layer, sae in saes.items():
            x = batch.get(layer)
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 2:
                yield f"first: layer {layer} must be floating-point rows [n, {sae.config.d_in}]; got {_short(x)}"
                return
            yield from _tensor_problems(f"first: layer {layer}", x, x.dtype, (x.shape[0], sae.config.d_in))


def _tensor_problems(
    name: str,
    value: Any,
    dtype: torch.dtype,
    shape: tuple[int | None, ...],
    *,
    least: int | None = None,
    finite: bool = True,
) -> Iterator[str]:
    if not isinstance(value, Tensor):
        yield f"{name} must be a tensor; got {_short(value)}"
    elif value.dtype != dtype or tuple(value.shape) != shape:
        sizes = list(shape)
        yield f"{name} must be {dtype} {sizes}; got {value.dtype} {list(value.shape)}"
    elif value.layout != torch.strided or not value.is_contiguous():
        yield f"{name} must be a dense contiguous tensor"
    elif finite and not all_finite(value):
        yield f"{name} holds values that are not finite"
    elif least is not None and value.numel() and float(value.min()) < least:
        yield f"{name} must be at least {least}; got {float(value.min())}"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, dict):
        return f"a dict of {', '.join(map(repr, list(value)[:6])) or 'nothing'}"
    return repr(value) if isinstance(value, (int, float, str, type(None))) else type(value).__name__
