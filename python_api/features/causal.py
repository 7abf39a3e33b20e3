"""The causal check of refusal latents: set them to zero and see whether refusal falls, and what else does.

For the refusal latents R, for none, and for random sets matched to R in activation, the model is run twice:

    error kept     z - sum over the set of f_t W_dec[f]         only the set's contribution is gone
    SAE alone      x_hat without the set                        z is what the SAE says it is

With no latent at zero, "error kept" is the untouched model and "SAE alone" is the plain splice. A refusal latent found
in an SAE whose splice changes refusals is not evidence. R is evidence when zeroing it takes refusals away, zeroing the
random sets does not, and truthfulness stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..hooks import HeadSelection, ZEdit
from ..prompts.chat import Chat
from ..prompts.records import ContrastPair, HarmfulPrompt, prompts_of
from ..sae import TopKSAE
from .attribution import FeatureReport
from .intervening import Judge, MakeEdits, at_content, generate_edited, judge_refusals, percent, score_edited
from .site_sae import SiteSAE, site_saes

Mode = Literal["error kept", "SAE alone"]
MODES: tuple[Mode, ...] = ("error kept", "SAE alone")


@dataclass(frozen=True)
class CausalRow:
    """One run. `latents` and `mass` (mean activation per token) are sums over the layers; percentages of the prompts.

    `truthful`: log P(right) > log P(wrong), percent of the hallucination pairs, None without them.
    """

    zeroed: str
    mode: Mode
    latents: int
    mass: float
    refused: float
    truthful: float | None


@dataclass(frozen=True)
class CausalCheck:
    """The rows: "none", "R", "random 1", ..., each in both modes; and what they say.

    Attributes:
        fall, random_fall: how many points of refusals zeroing R, and the worst random set, takes, error kept.
        splice_change: how many points of refusals the SAE's splice itself takes (negative: adds).
        n: prompts asked.
    """

    rows: list[CausalRow]
    fall: float
    random_fall: float
    splice_change: float
    n: int

    @property
    def ok(self) -> bool:
        """Zeroing R takes more than 50 points, no random set more than 5, and the splice itself at most 5."""
        return self.fall > 50 and self.random_fall <= 5 and abs(self.splice_change) <= 5

    @property
    def verdict(self) -> str:
        """One or more plain sentences."""
        words = [f"Zeroing R takes {self.fall:.0f} points of refusals, the worst random set {self.random_fall:.0f}."]
        if self.fall <= 50:
            words.append("R does not carry most of the refusals.")
        if self.random_fall > 5:
            words.append("Random latents matter too: the fall is not R's alone.")
        if abs(self.splice_change) > 5:
            words.append(
                f"The SAE's splice alone changes refusals by {-self.splice_change:+.0f} points: its latents are no "
                "evidence about the model; train it longer."
            )
        if self.ok:
            words.append("R carries refusal.")
        return " ".join(words)

    def table(self) -> str:
        """The rows as text, the modes side by side, and the verdict."""
        lines = [
            f"{'zeroed':<10}{'latents':>8}{'mass':>9}   refused, %: {MODES[0]}  {MODES[1]}   right preferred, %: "
            f"{MODES[0]}  {MODES[1]}"
        ]
        for kept, alone in zip(self.rows[::2], self.rows[1::2], strict=True):
            right = ["-" if r.truthful is None else f"{r.truthful:.1f}" for r in (kept, alone)]
            lines.append(
                f"{kept.zeroed:<10}{kept.latents:8d}{kept.mass:9.3f}{kept.refused:26.1f}{alone.refused:11.1f}"
                f"{right[0]:>33}{right[1]:>11}"
            )
        return "\n".join([*lines, self.verdict])

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok, "verdict": self.verdict}


def matched_latents(mass: Tensor, refusal: Sequence[int], generator: torch.Generator, nearest: int = 8) -> list[int]:
    """As many latents outside `refusal`, each drawn from the `nearest` in activation to one of R, strongest first.

    Without repetition; `mass` [n_latents] is the mean activation. ValueError if too few latents are left that fire.
    """
    mass = mass.detach().double().cpu()
    free = mass > 0
    free[list(refusal)] = False
    if int(free.sum()) < len(refusal):
        raise ValueError(
            f"report: expected at least {len(refusal)} other latents that fire to compare with, got {int(free.sum())}; "
            "use a smaller n"
        )
    chosen: list[int] = []
    for f in sorted(refusal, key=lambda i: -float(mass[i])):
        pool = free.nonzero()[:, 0]
        # The ratio counts, not the difference: activations span orders of magnitude.
        gap = (mass[pool].log() - mass[f].clamp_min(1e-12).log()).abs()
        near = pool[gap.argsort(stable=True)[:nearest]]
        pick = int(near[torch.randint(len(near), (), generator=generator)])
        free[pick] = False
        chosen.append(pick)
    return sorted(chosen)


def zeroing(site: SiteSAE, latents: Sequence[int], mode: Mode) -> ZEdit:
    """An edit of z [..., width] that sets `latents` to zero, with the SAE's error term or without."""
    d = site.directions()
    gone = torch.zeros(site.sae.config.n_latents, dtype=torch.bool, device=d.device)
    gone[list(latents)] = True

    def edit(z: Tensor) -> Tensor:
        values, indices = site.encode(z)
        out = gone[indices]
        if mode == "error kept":
            return z - site.write(values * out, indices, d).to(z) if bool(out.any()) else z
        return site.splice(z, values * ~out, indices)

    return edit


@torch.no_grad()
def causal_check(
    model: nn.Module,
    chat: Chat,
    saes: Mapping[int, TopKSAE],
    report: FeatureReport,
    prompts: Sequence[HarmfulPrompt | str],
    hallucination_pairs: Sequence[ContrastPair] | None = None,
    *,
    heads: HeadSelection = None,
    random_sets: int = 3,
    judge: Judge | None = None,
    max_new_tokens: int = 24,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = False,
) -> CausalCheck:
    """Zeroes the R of `report` in all its layers at once, and as many random latents of like activation.

    Args:
        saes, heads: as given to `refusal_features`.
        prompts: harmful prompts, best others than those R was found on.
        hallucination_pairs: for truthfulness; None leaves it out.
        random_sets: how many random sets, each over all layers.
        judge: (prompts, answers) -> which are refusals; by default phrases.
        max_new_tokens: of an answer; a refusal shows at its beginning.

    Raises:
        ValueError: no prompts, layers that differ, an empty R in every layer, too few latents for random sets.
    """
    sites = site_saes(model, saes, heads)
    asked = prompts_of(prompts)
    if not asked:
        raise ValueError("prompts: expected at least one harmful prompt, got none")
    if set(sites) != set(report.layers):
        raise ValueError(f"saes: expected the layers of the report, {sorted(report.layers)}, got {sorted(sites)}")
    if not any(report.features.values()):
        raise ValueError("report: expected refusal latents in at least one layer, got none")
    if random_sets < 1:
        raise ValueError(f"random_sets: expected at least 1, got {random_sets}")
    generator = torch.Generator().manual_seed(seed)
    sets: dict[str, dict[int, list[int]]] = {"none": {layer: [] for layer in sites}, "R": report.features}
    for i in range(random_sets):
        sets[f"random {i + 1}"] = {
            layer: matched_latents(found.mass, found.refusal, generator) for layer, found in report.layers.items()
        }
    rows = []
    for name, latents in sets.items():
        mass = sum(float(found.mass[latents[layer]].sum()) for layer, found in report.layers.items())
        for mode in MODES:
            make = _zero_at_content(sites, latents, mode)
            bar = f"zeroing {name}, {mode}" if progress else None
            said = generate_edited(
                model, chat, asked, make, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=bar
            )
            refused = percent(judge_refusals(judge, asked, said))
            truthful = None
            if hallucination_pairs:
                right, wrong = (
                    score_edited(model, chat, questions, make, batch_size=batch_size, progress=bar)
                    for questions in (
                        [(pair.prompt, pair.chosen) for pair in hallucination_pairs],
                        [(pair.prompt, pair.rejected) for pair in hallucination_pairs],
                    )
                )
                truthful = percent((right > wrong).tolist())
            rows.append(CausalRow(name, mode, sum(map(len, latents.values())), mass, refused, truthful))
    kept = {row.zeroed: row.refused for row in rows if row.mode == "error kept"}
    alone = {row.zeroed: row.refused for row in rows if row.mode == "SAE alone"}
    return CausalCheck(
        rows,
        fall=kept["none"] - kept["R"],
        random_fall=max(kept["none"] - kept[f"random {i + 1}"] for i in range(random_sets)),
        splice_change=kept["none"] - alone["none"],
        n=len(asked),
    )


def _zero_at_content(sites: Mapping[int, SiteSAE], latents: Mapping[int, Sequence[int]], mode: Mode) -> MakeEdits:
    edits = {layer: zeroing(site, latents[layer], mode) for layer, site in sites.items()}
    return lambda _rows, content: {layer: at_content(edit, content) for layer, edit in edits.items()}
