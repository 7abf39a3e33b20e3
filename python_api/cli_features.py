"""`refusal-kernels features`: the directions that carry refusal, the latents behind them, and whether they matter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import Device, Dtype, Quiet, Threads, TrustRemoteCode
from .cli_train import parse_layers

if TYPE_CHECKING:
    from .prompts.records import ContrastPair
    from .sae import TopKSAE

_DATA, _BASIS, _CHECKS, _OUTPUT = "Model and data", "Basis", "Checks", "Output"


def parse_heads(text: str | None) -> dict[int, list[int]] | None:
    """ "3.1,3.6" (layer.head) as {3: [1, 6]}; None means all heads. BadParameter otherwise."""
    if text is None:
        return None
    heads: dict[int, list[int]] = {}
    for part in text.replace(" ", "").split(","):
        layer, dot, head = part.partition(".")
        if not (dot and layer.isdecimal() and head.isdecimal() and max(len(layer), len(head)) <= 4):
            raise typer.BadParameter(f"{text!r} does not name heads; write layer.head like 3.1,3.6")
        heads.setdefault(int(layer), []).append(int(head))
    return heads


def load_saes(folders: Sequence[Path], layers: Sequence[int]) -> dict[int, TopKSAE]:
    """{layer: SAE} of the folders of SAEs, or of runs of train-sae, which hold one folder a layer.

    Args:
        layers: those to keep; empty keeps all.

    Raises:
        FileNotFoundError, ValueError: no SAE in a folder, one that does not know its layer, two of a layer, none of a
            layer that was asked for.
    """
    from .sae import CONFIG_FILE, TopKSAE

    found: dict[int, TopKSAE] = {}
    for folder in folders:
        inside = (
            [folder] if (folder / CONFIG_FILE).is_file() else sorted(p.parent for p in folder.glob(f"*/{CONFIG_FILE}"))
        )
        if not inside:
            raise FileNotFoundError(f"--sae: expected the folder of an SAE or of a train-sae run, got {folder}")
        for path in inside:
            sae = TopKSAE.from_pretrained(path)
            layer = sae.config.layer
            if layer is None:
                raise ValueError(f"--sae: {path / CONFIG_FILE} names no layer")
            if layer in found:
                raise ValueError(f"--sae: expected one SAE of layer {layer}, got another in {path}")
            found[layer] = sae
    if missing := sorted(set(layers) - set(found)):
        raise ValueError(
            f"--layers: expected layers that --sae has, {', '.join(map(str, sorted(found)))}, got "
            f"{', '.join(map(str, missing))}"
        )
    return {layer: found[layer] for layer in sorted(layers or found)}


def read_twins(source: str, n: int | None, seed: int, held_out: bool = False) -> list[tuple[str, str]]:
    """(harmful, harmless) prompts: "builtin", or a JSONL file of {"harmful": ..., "harmless": ...}."""
    from .prompts import builtin

    if source == "builtin":
        return builtin.twins(64 if n is None else n, seed, held_out)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"--twins: expected builtin or a JSONL file, got {source!r}, which is no file")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pair = (row["harmful"], row["harmless"])
        except (ValueError, TypeError, KeyError):
            pair = (None, None)
        if not all(isinstance(text, str) and text.strip() for text in pair):
            raise ValueError(f"{path}, line {number}: expected an object with the texts harmful and harmless")
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path}: expected at least one pair of twins, got none")
    return pairs


def split(records: list[Any], n: int | None, n_checks: int) -> tuple[list[Any], list[Any]]:
    """(to find the directions with, to check them with), without overlap; ValueError for fewer than two records."""
    if len(records) < 2:
        raise ValueError(f"expected at least two records, one of them for the checks, got {len(records)}")
    checks = min(n_checks, max(1, len(records) // 3))
    return records[:-checks][:n], records[-checks:]


def features(
    model: str = typer.Option(
        "builtin", help="builtin, a folder, a hub name, or a PEFT adapter's folder.", rich_help_panel=_DATA
    ),
    refusal: str = typer.Option(
        "builtin",
        help="Refusal pairs: builtin, a file of prompt, chosen (refuses), rejected (complies), or AdvBench's goal and "
        "target, to which the model's own refusals are added.",
        rich_help_panel=_DATA,
    ),
    hallucination: str = typer.Option(
        "builtin",
        help="Pairs (right, wrong answer): builtin, TruthfulQA, a file of prompt, chosen, rejected, or none.",
        rich_help_panel=_DATA,
    ),
    twins: str = typer.Option(
        "builtin",
        help="Harmful prompts with harmless twins: builtin, a JSONL file of harmful, harmless, or none.",
        rich_help_panel=_DATA,
    ),
    pairs: int = typer.Option(
        None,
        min=1,
        help="Pairs of each kind to find with. (default: all of a file, 64 of builtin)",
        rich_help_panel=_DATA,
        show_default=False,
    ),
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
    batch_size: int = typer.Option(16, min=1, help="Sequences per pass.", rich_help_panel=_DATA),
    threads: Threads = None,
    source: str = typer.Option("sae", help="sae, mean-difference, activation-svd or random.", rich_help_panel=_BASIS),
    sae: Annotated[
        list[Path] | None,
        typer.Option("--sae", help="Folder of an SAE or of a train-sae run; may be repeated.", rich_help_panel=_BASIS),
    ] = None,
    layers: str = typer.Option(
        None,
        help="Layers, like 1,3 or 0-3. (default: those of the SAEs, else all)",
        rich_help_panel=_BASIS,
        show_default=False,
    ),
    heads: str = typer.Option(
        None,
        help="Only these heads, as layer.head: 3.1,3.6. (default: all)",
        rich_help_panel=_BASIS,
        show_default=False,
    ),
    rank: int = typer.Option(
        None,
        min=1,
        help="Directions per layer. (default: what the SVD leaves of the SAE's latents; else 8)",
        rich_help_panel=_BASIS,
        show_default=False,
    ),
    input_rank: int = typer.Option(
        0, min=0, help="Also a basis of this rank of every linear's input (site all); 0: none.", rich_help_panel=_BASIS
    ),
    n: int = typer.Option(32, "--n", min=1, help="Refusal latents per layer, at most.", rich_help_panel=_BASIS),
    tau: float = typer.Option(
        0.5, min=0.0, help="Filter: |zscore(a_hall)| <= tau * zscore(a_ref).", rich_help_panel=_BASIS
    ),
    steps: int = typer.Option(
        1, min=1, help="1: gradient times latent; more: integrated gradients.", rich_help_panel=_BASIS
    ),
    seed: int = typer.Option(0, help="Of drawn prompts and random directions.", rich_help_panel=_BASIS),
    no_preflight: bool = typer.Option(
        False, "--no-preflight", help="Leave the pre-flight check out.", rich_help_panel=_CHECKS
    ),
    no_causal_check: bool = typer.Option(
        False, "--no-causal-check", help="Leave the causal check of the latents out.", rich_help_panel=_CHECKS
    ),
    checks: int = typer.Option(
        32, min=1, help="Prompts per check, kept apart from those that find the directions.", rich_help_panel=_CHECKS
    ),
    random_sets: int = typer.Option(3, min=1, help="Random controls per check.", rich_help_panel=_CHECKS),
    max_new_tokens: int = typer.Option(24, min=1, help="Tokens of an answer.", rich_help_panel=_CHECKS),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.", rich_help_panel=_OUTPUT)] = Path(
        "features"
    ),
    quiet: Quiet = False,
) -> None:
    """Find the directions that carry refusal, and check that they do.

    Writes refusal_basis.safetensors (what protect takes), features.json and, with SAEs, attribution.png and .svg.
    """
    import torch

    from .checkpoint import write_json
    from .cli_train import _silence_libraries
    from .features.attribution import refusal_features
    from .features.basis import RefusalBasis
    from .features.causal import causal_check
    from .features.inputs import input_basis
    from .features.plot import plot_attribution
    from .features.preflight import preflight
    from .features.sources import SOURCES, find_basis
    from .models import load_model
    from .prompts.chat import Chat

    if threads is not None:
        torch.set_num_threads(threads)
    if quiet:
        _silence_libraries()
    if source not in SOURCES:
        raise ValueError(f"--source: expected one of {', '.join(SOURCES)}; got {source!r}")
    if (source == "sae") != bool(sae):
        raise ValueError(f"--sae: expected folders of SAEs with --source sae and only then, got --source {source}")
    chosen, selected = parse_layers(layers), parse_heads(heads)
    saes = load_saes(sae, chosen) if sae else {}
    loaded, tokenizer = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    chat, device_of_model = Chat(tokenizer), next(loaded.parameters()).device
    saes = {layer: found.to(device_of_model) for layer, found in saes.items()}

    common: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "progress": not quiet}
    refusals, test_refusals, beginnings = _refusal_pairs(refusal, pairs, checks, seed, loaded, chat, common)
    right, test_right = _truth_pairs(hallucination, pairs, checks, seed)
    known, test_twins = _twins(twins, pairs, checks, seed)
    arguments: dict[str, Any] = {
        "heads": selected, "twins": known, "seed": seed, "model_name": model, "layers": chosen or None,
    }  # fmt: skip
    report = None
    if source == "sae":
        ablation = None
        if steps > 1 and known:  # the path of integrated gradients begins where the refusal direction is gone
            ablation = find_basis(
                "mean-difference", loaded, chat, rank=1, **arguments | {"layers": sorted(saes)}, **common
            )
        report = refusal_features(
            loaded, chat, saes, refusals, right, n=n, tau=tau, steps=steps, ablation=ablation, heads=selected,
            refusal_beginnings=beginnings, batch_size=batch_size, progress=not quiet,
        )  # fmt: skip
        typer.echo(report.table())
    basis = find_basis(
        source,  # type: ignore[arg-type]
        loaded,
        chat,
        rank=rank or (None if source == "sae" else 8),
        pairs=refusals,
        saes=saes,
        report=report,
        **arguments,
        **common,
    )
    if input_rank:
        given = input_basis(loaded, chat, refusals, rank=input_rank, batch_size=batch_size, progress=not quiet)
        basis = RefusalBasis(basis.z, given, basis.twins, basis.provenance | {"input_rank": input_rank})
    basis.provenance["sources"] = {"refusal": refusal, "hallucination": hallucination, "twins": twins}
    path = basis.save(out)
    results: dict[str, Any] = {"basis": repr(basis), "provenance": basis.provenance}
    places = [f"basis    {path}"]
    typer.echo(f"\n{basis!r}")
    if report is not None:
        results["attribution"] = report.to_dict()
        figures = plot_attribution(report, out, title=f"refusal latents of {model}")
        places.append(f"plot     {', '.join(str(figure) for figure in figures)}")
    write_json(out / "features.json", results)
    if report is not None and not no_causal_check:
        checked = causal_check(
            loaded, chat, saes, report, [pair.prompt for pair in test_refusals], test_right, heads=selected,
            random_sets=random_sets, seed=seed, **common,
        )  # fmt: skip
        results["causal_check"] = checked.to_dict()
        typer.echo(f"\nCausal check, {checked.n} other harmful prompts\n{checked.table()}")
    if not no_preflight and test_twins:
        flown = preflight(loaded, chat, basis, test_twins, n=checks, random_bases=random_sets, seed=seed, **common)
        results["preflight"] = flown.to_dict()
        typer.echo(f"\nPre-flight check, {flown.n} other twins\n{flown.table()}")
    elif not no_preflight:
        typer.echo("\nno pre-flight check: it needs --twins")
    write_json(out / "features.json", results)
    typer.echo("\n" + "\n".join([*places, f"report   {out / 'features.json'}"]))


def _refusal_pairs(
    source: str, n: int | None, checks: int, seed: int, model: Any, chat: Any, common: dict[str, Any]
) -> tuple[list[ContrastPair], list[ContrastPair], bool]:
    """(to find with, to check with, whether the completions are beginnings)."""
    from .prompts.readers import own_refusals, read_harmful, read_pairs
    from .prompts.sources import read_rows

    if source == "builtin":
        number = 64 if n is None else n
        return read_pairs(source, n=number, seed=seed), read_pairs(source, n=checks, seed=seed, held_out=True), False
    if read_rows(source).has("goal", "target"):
        whole = read_harmful(source, n=None if n is None else n + checks, seed=seed)
        progress = "the model's own refusals" if common["progress"] else None
        options = {"max_new_tokens": common["max_new_tokens"], "batch_size": common["batch_size"]}
        found, test = split(own_refusals(model, chat, whole, progress=progress, **options), n, checks)
        return found, test, True
    found, test = split(read_pairs(source, seed=seed), n, checks)
    return found, test, False


def _truth_pairs(source: str, n: int | None, checks: int, seed: int) -> tuple[Any, Any]:
    from .prompts.readers import read_pairs

    if source == "none":
        return None, None
    if source == "builtin":
        number = 64 if n is None else n
        return (
            read_pairs(source, "hallucination", n=number, seed=seed),
            read_pairs(source, "hallucination", n=checks, seed=seed, held_out=True),
        )
    return split(read_pairs(source, "hallucination", seed=seed), n, checks)


def _twins(source: str, n: int | None, checks: int, seed: int) -> tuple[Any, Any]:
    if source == "none":
        return None, None
    if source == "builtin":
        return read_twins(source, n, seed), read_twins(source, checks, seed, held_out=True)
    return split(read_twins(source, n, seed), n, checks)


def register(app: typer.Typer) -> None:
    app.command("features")(features)
