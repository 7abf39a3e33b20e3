"""What all cells share, made once and kept: the prompts, the heads, the SAEs, the bases, and what each basis can do.

Every stage writes into a folder of its own below `<out>/prepare` and is skipped when that folder holds the result of
the same inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..baselines.unaligned import unaligned_builtin
from ..checkpoint import read_json, write_json
from ..features.basis import RefusalBasis
from ..features.sources import Source, find_basis
from ..models import load_model
from ..prompts.chat import Chat
from ..prompts.records import content_hash
from ..sae import TopKSAE
from .cells import Cell
from .config import ExperimentConfig
from .suite import Suite, builtin_suite, files_suite

Z_SOURCES: tuple[Source, ...] = ("sae", "mean-difference", "activation-svd", "random")
DONE = "stage.json"


@dataclass
class Prepared:
    """What the cells and the report need. All of it can be read again from the folders it lies in.

    Attributes:
        suite: the prompts.  saes: layer -> folder.  heads: the head scores as a dict, with "svg" the head map.
        bases: "z/<source>" and "all/<source>" -> file.  basis_hashes: the same -> hash of the content.
        features: text of the attribution with its causal check.  preflight: basis -> table.
        base_model: the unaligned model that SafeLoRA compares with, a name or a folder.
    """

    suite: Suite
    saes: dict[int, Path]
    heads: dict[str, Any]
    bases: dict[str, Path]
    basis_hashes: dict[str, str]
    features: str
    preflight: dict[str, str]
    base_model: str | None

    def basis_name(self, cell: Cell) -> str | None:
        """Which of `bases` a cell uses."""
        if cell.basis is None:
            return None
        return f"{'all' if cell.sites == ('all',) else 'z'}/{cell.basis}"

    def basis(self, cell: Cell) -> RefusalBasis | None:
        """A cell's basis, cut to its rank."""
        name = self.basis_name(cell)
        if name is None:
            return None
        basis = RefusalBasis.load(self.bases[name])
        return basis if cell.rank is None else basis.truncate(cell.rank)


def kept(folder: Path, key: str) -> dict[str, Any] | None:
    """The result of an earlier `stage` with the same key."""
    done = folder / DONE
    known = read_json(done) if done.is_file() else {}
    return known["result"] if known.get("key") == key else None


def stage(folder: Path, key: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """`make(folder)`, or what it returned for the same `key` before."""
    if (known := kept(folder, key)) is not None:
        return known
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).unlink(missing_ok=True)
    result = make(folder)
    write_json(folder / DONE, {"key": key, "result": result})
    return result


def quiet_worker(threads: int) -> None:
    """In a worker: one bar, the parent's, and Ctrl-C is the parent's business as well."""
    import signal
    import warnings

    import datasets
    from transformers.utils import logging

    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")


def _unaligned(folder: Path, key: str) -> str:
    return stage(folder, key, lambda at: {"folder": str(unaligned_builtin(at / "models"))})["folder"]


@contextmanager
def _base_model(config: ExperimentConfig, folder: Path, key: str) -> Iterator[Callable[[], str | None]]:
    """What SafeLoRA compares with, as a call that waits for it: the built-in stand-in is made beside the rest where a
    second worker is allowed."""
    if config.base_model is not None or not config.has_base_model:
        yield lambda: config.base_model
    elif config.workers < 2 or kept(folder, key) is not None:
        yield lambda: _unaligned(folder, key)
    else:
        with ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=quiet_worker, initargs=(config.threads,)
        ) as pool:
            yield pool.submit(_unaligned, folder, key).result


def load_suite(config: ExperimentConfig, model: nn.Module, chat: Chat) -> Suite:
    """The prompts that a config names."""
    if config.model == "builtin" or config.harmful == "builtin":
        return builtin_suite(calibration=config.calibration, task=config.n_task, test=config.n_test)
    return files_suite(config, model, chat)


def prepare(
    config: ExperimentConfig, *, progress: bool = True, say: Callable[[str], None] = print, model: Any = None
) -> Prepared:
    """Runs every stage that is not there yet. `model`: (model, tokenizer), already loaded, or None."""
    folder = Path(config.out) / "prepare"
    net, tokenizer = model or load_model(
        config.model, dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code
    )
    chat = Chat(tokenizer)
    suite = load_suite(config, net, chat)
    base_key = content_hash(suite.hash(), weights_hash(net))

    with _base_model(config, folder / "unaligned", content_hash(base_key)) as base_model:
        say("heads: contrastive influence of every head")
        heads = stage(
            folder / "heads",
            content_hash(base_key, config.heads),
            lambda at: _heads(config, net, chat, suite, at, progress),
        )
        layers = config.sae_layers or sorted({layer for layer, _ in heads["refusal"]})
        sae_key = content_hash(
            base_key, layers, config.sae_data, config.sae_tokens, config.sae_k, config.sae_expansion, config.sae_lr
        )
        say(f"sparse autoencoders on layers {', '.join(map(str, layers))}")
        trained = stage(folder / "sae", sae_key, lambda at: _sae(config, layers, at, progress))
        folders = {int(layer): Path(path) for layer, path in trained["folders"].items()}
        saes = {layer: TopKSAE.from_pretrained(path) for layer, path in folders.items()}
        basis_key = content_hash(sae_key, config.latents, config.z_rank, config.input_rank, config.targets)
        say("features, bases and pre-flight")
        made = stage(
            folder / "bases", basis_key, lambda at: _bases(config, net, chat, suite, saes, layers, at, progress)
        )
        bases = {name: Path(path) for name, path in made["files"].items()}
        if config.base_model is None and config.has_base_model:
            say("an unaligned built-in model, for SafeLoRA")
        return Prepared(suite, folders, heads, bases, made["hashes"], made["features"], made["preflight"], base_model())


def weights_hash(model: nn.Module) -> str:
    """A hash of the model's weights, from each tensor's shape, sum and ends: enough to tell two models apart."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        probe = torch.cat([flat[:8], flat[-8:]]).float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}{float(flat.double().sum()):.9e}{probe.tolist()}".encode())
    return digest.hexdigest()


def _heads(
    config: ExperimentConfig, model: nn.Module, chat: Chat, suite: Suite, folder: Path, progress: bool
) -> dict[str, Any]:
    from ..heads.influence import find_heads
    from ..heads.plot import plot_heads
    from ..heads.report import format_heads

    scores = find_heads(
        model, chat, suite.hallucination_pairs, suite.refusal_pairs, mode="exact", top=config.heads,
        refusal_beginnings=config.model != "builtin", out=folder, progress=progress,
    )  # fmt: skip
    scores.save(folder / "heads.json")
    plot_heads(scores, folder)
    return {
        "text": format_heads(scores),
        "refusal": [list(head) for head in scores.top("refusal")],
        "hallucination": [list(head) for head in scores.top("hallucination")],
        "overlap": [list(head) for head in scores.overlap().heads],
        "svg": str(folder / "heads.svg"),
    }


def _sae(config: ExperimentConfig, layers: list[int], folder: Path, progress: bool) -> dict[str, Any]:
    from ..runs import train_sae
    from ..train_config import TrainConfig

    result = train_sae(
        TrainConfig(
            model=config.model,
            dtype=config.dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
            data=config.sae_data,
            layers=layers,
            out=str(folder / "run"),
            sequences=64,
            k=config.sae_k,
            expansion=config.sae_expansion,
            tokens=config.sae_tokens,
            batch_tokens=2048,
            lr=config.sae_lr,
            dead_after_tokens=max(10_000, config.sae_tokens // 6),
            eval_tokens=min(8192, config.sae_tokens),
        ),
        overwrite=True,
        progress=progress,
    )
    return {
        "folders": {str(layer): str(path) for layer, path in result.folders.items()},
        "evaluation": result.metrics["evaluation"],
    }


def random_inputs(inputs: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Random bases of the same shapes, shared where the given ones are shared."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, Tensor] = {}
    for u in inputs.values():
        if id(u) not in made:
            made[id(u)] = torch.linalg.qr(torch.randn(u.shape, generator=generator)).Q.contiguous()
    return {name: made[id(u)] for name, u in inputs.items()}


def _bases(
    config: ExperimentConfig,
    model: nn.Module,
    chat: Chat,
    suite: Suite,
    saes: dict[int, TopKSAE],
    layers: list[int],
    folder: Path,
    progress: bool,
) -> dict[str, Any]:
    from ..features.attribution import refusal_features
    from ..features.causal import causal_check
    from ..features.inputs import adapted_linears, input_basis
    from ..features.preflight import preflight

    def refused(prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        return [verdict == "refuse" for verdict in suite.judge(prompts, answers)]

    pairs, hallucination = suite.refusal_pairs, suite.hallucination_pairs
    report = refusal_features(model, chat, saes, pairs, hallucination, n=config.latents)
    check = causal_check(
        model, chat, saes, report, suite.harmful, hallucination, judge=refused, max_new_tokens=suite.max_new_tokens
    )
    bases: dict[str, RefusalBasis] = {}
    for source in Z_SOURCES:
        sae = source == "sae"
        bases[f"z/{source}"] = find_basis(
            source, model, chat, layers=layers, rank=None if sae else config.z_rank, harmful=suite.harmful,
            benign=suite.benign, twins=suite.twins, pairs=pairs, saes=saes if sae else None,
            report=report if sae else None,
        )  # fmt: skip
    names = None if config.targets == "all-linear" else [name.strip() for name in config.targets.split(",")]
    modules = adapted_linears(model, names)
    rank = min(config.input_rank, *(int(getattr(module, "in_features")) // 2 for module in modules.values()))  # noqa: B009
    calibrated: dict[str, Sequence[Any]] = {"harmful": suite.harmful, "benign": suite.benign}
    for name, prompts in calibrated.items():
        inputs = input_basis(model, chat, prompts, modules=list(modules), rank=rank)
        bases[f"all/{name}"] = RefusalBasis(inputs=inputs, provenance={"source": name, "rank": rank})
    bases["all/random"] = RefusalBasis(
        inputs=random_inputs(bases["all/harmful"].inputs, 0), provenance={"source": "random", "rank": rank}
    )
    files, hashes, tables = {}, {}, {}
    for name, basis in bases.items():
        basis.twins = suite.twins[:32]
        files[name] = str(basis.save(folder / f"{name.replace('/', '_')}.safetensors"))
        hashes[name] = hashlib.blake2b(Path(files[name]).read_bytes(), digest_size=8).hexdigest()
        tables[name] = preflight(
            model, chat, basis, suite.twins, judge=refused, max_new_tokens=suite.max_new_tokens
        ).table()
    return {
        "files": files,
        "hashes": hashes,
        "preflight": tables,
        "features": f"{report.table()}\n\n{check.table()}",
        "ranks": {name: {str(at): rank for at, rank in basis.ranks.items()} for name, basis in bases.items()},
    }
