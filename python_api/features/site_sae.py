"""An SAE at its place in a model: which columns of z it reads, and where its latents write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

import refusal_kernels as rk

from ..hooks import HeadSelection, attention_geometry, head_columns, o_proj_modules, resolve_heads
from ..sae import TopKSAE


class SiteSAE:
    """The SAE of one layer's z, or of some of its heads, with raw z on both sides.

    Args:
        sae: reads the whole z of the layer, or the columns of `heads` in their order.
        heads: the selected heads of the layer, None for all. With an SAE of the whole z only what its latents write
            into these heads counts.
        layer, head_dim, width: of the layer; width is n_heads * head_dim.

    Raises:
        ValueError: the SAE's d_in is neither.
    """

    def __init__(self, sae: TopKSAE, heads: Sequence[int] | None, layer: int, head_dim: int, width: int) -> None:
        chosen = None if heads is None else head_columns(head_dim, heads)
        self.sae, self.width = sae, width
        d_in = sae.config.d_in
        if d_in == width:
            self.reads = None
        elif chosen is not None and d_in == len(chosen):
            self.reads = chosen
        else:
            selected = "" if chosen is None else f" or {len(chosen)} (the selected heads)"
            raise ValueError(f"saes: expected d_in = {width}{selected} of the SAE of layer {layer}, got {d_in}")
        # Columns of the SAE's own space that count: all, unless it reads more heads than were selected.
        self.counts = chosen if self.reads is None else None

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [..., width] -> values [..., k] (scaled side), indices [..., k] on the SAE's device."""
        x = z if self.reads is None else z.index_select(-1, self.reads.to(z.device))
        return self.sae.encode(x.detach().to(self.sae.W_enc.device))

    def directions(self) -> Tensor:
        """[n_latents, width]: what one unit of a latent adds to z; zero outside the columns that count."""
        rows = self.sae.decoder_directions().detach().float()
        out = rows.new_zeros(rows.shape[0], self.width)
        if self.reads is not None:
            return out.index_copy(1, self.reads.to(rows.device), rows)
        if self.counts is None:
            return rows
        at = self.counts.to(rows.device)
        return out.index_copy(1, at, rows.index_select(1, at))

    def write(self, values: Tensor, indices: Tensor, directions: Tensor) -> Tensor:
        """sum_j values_j directions[indices_j]: [..., width]."""
        return rk.sparse_decode(values.float(), indices, directions)

    def splice(self, z: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        """z [..., width] with the columns that the SAE reads, and that count, replaced by its reconstruction."""
        new = self.sae.decode(values, indices).to(z)
        if self.reads is not None:
            return z.index_copy(-1, self.reads.to(z.device), new)
        if self.counts is None:
            return new
        at = self.counts.to(z.device)
        return z.index_copy(-1, at, new.index_select(-1, at))


def site_saes(model: nn.Module, saes: Mapping[int, TopKSAE], heads: HeadSelection = None) -> dict[int, SiteSAE]:
    """The SAEs at their layers, ascending. TypeError or ValueError where they do not fit the model."""
    if not isinstance(saes, Mapping) or not saes or not all(isinstance(sae, TopKSAE) for sae in saes.values()):
        raise TypeError(f"saes: expected a non-empty {{layer: TopKSAE}}, got {saes!r}")
    layers = sorted(saes)
    o_proj_modules(model, layers)
    geometry, selection = attention_geometry(model), resolve_heads(model, layers, heads)
    return {
        i: SiteSAE(saes[i], selection[i], i, geometry.head_dims[i], geometry.n_heads * geometry.head_dims[i])
        for i in layers
    }
