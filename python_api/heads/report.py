"""Head scores as a table of text."""

from __future__ import annotations

from .scores import SETS, HeadScores

_PUSHES = {"hallucination": "towards wrong answers", "refusal": "towards refusing"}


def format_heads(scores: HeadScores) -> str:
    """The two top lists with standard errors, the overlap against chance, and how far the screen agrees."""
    lines: list[str] = []
    how = "first order" if scores.mode == "screen" else "ablated"
    for which in SETS:
        score, screened = scores.ranked[which], scores.screen.get(which)
        lines.append(f"{which} heads, pushing {_PUSHES[which]} ({how}; nats, ± standard error over pairs)")
        lines.append(f"  {'head':<8}{'sum':>18}{'per token':>20}{'' if screened is None else 'screen':>10}".rstrip())
        for layer, head in scores.top(which):
            at = (layer, head)
            estimate = "" if screened is None else f"{screened.sum[at]:.3f}"
            lines.append(
                f"  {f'{layer}.{head}':<8}{f'{score.sum[at]:.3f} ± {score.sum_se[at]:.3f}':>18}"
                f"{f'{score.token[at]:.4f} ± {score.token_se[at]:.4f}':>20}{estimate:>10}".rstrip()
            )
    overlap = scores.overlap()
    shared = ", ".join(f"{layer}.{head}" for layer, head in overlap.heads) or "none"
    lines.append(f"on both lists: {shared} ({len(overlap.heads)} of {overlap.k})")
    lines.append(
        f"  random lists of {overlap.k} out of {overlap.n_heads} share {overlap.expected:.2f} on average, at least "
        f"{len(overlap.heads)} with p = {overlap.p_value:.3g}; Jaccard {overlap.jaccard:.3f}, by chance "
        f"{overlap.expected_jaccard:.3f}"
    )
    for which in SETS:
        if (rho := scores.spearman(which)) is not None:
            known = int((~scores.exact[which].sum.isnan() & ~scores.screen[which].sum.isnan()).sum())
            lines.append(f"screen and ablation, {which}: Spearman {rho:.2f} over the {known} heads that have both")
    return "\n".join(lines)
