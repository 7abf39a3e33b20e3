"""ActivationBuffer: a model and a token stream in, shuffled batches of z out, several layers from one model pass.

Tokens of one document resemble each other, and an SAE that sees them in a row learns worse; so activations are mixed.
The buffer fills in *chunks* of c tokens. A chunk is split at random into two halves; a *block* is the second half of
the chunk before and the first half of the current one, in random order, and blocks are what is read out in batches.
So half of every block is new and half was kept, as in the usual half-refreshed buffer, but nothing stays longer than
one block. That bound makes resuming cheap and exact: the contents at any moment are a function of two chunks and the
seed, and are computed again from the stream's position at the older one. A checkpoint holds a few integers instead of
gigabytes of activations.

Memory is allocated once: 1.5 c rows a layer. Filling writes into the rows that the last block freed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .capturing import capture
from .checkpoint import check_state
from .documents import permutation
from .hooks import HeadSelection, attention_geometry, o_proj_modules, resolve_heads, resolve_layers
from .tokens import TokenStream

_STATE_VERSION = 1
_MAX_EMPTY_BATCHES = 100


@dataclass(frozen=True)
class InputStatistics:
    """What an SAE wants to know of its input x ``[n, d_in]`` before training; computed in fp64.

    Attributes:
        n_tokens: n, how many tokens were looked at.
        mean_square_norm: E||x||².
        scale: sqrt(d_in / E||x||²); x times scale has mean square norm d_in.
        mean: E x, ``[d_in]`` fp32.
        geometric_median: argmin_m E||x - m||, ``[d_in]`` fp32, of at most ``median_tokens`` of the tokens.
        total_variance: E||x - E x||².
    """

    n_tokens: int
    mean_square_norm: float
    scale: float
    mean: Tensor
    geometric_median: Tensor
    total_variance: float


def geometric_median(x: Tensor, max_iterations: int = 100, rtol: float = 1e-6) -> Tensor:
    """The point with the least mean distance to the rows of x, by Weiszfeld's iteration.

    Args:
        x: ``[n, d]``, n >= 1.
        max_iterations: at most.
        rtol: stop when the point moves by less than this share of the mean distance.

    Returns:
        ``[d]`` fp32 on x's device. Computed in fp64.

    Source: Weiszfeld 1937, with the safeguard of Vardi & Zhang 2000 (PNAS 97(4)) where the point meets a row.
    """
    if x.dim() != 2 or x.shape[0] == 0 or not x.is_floating_point():
        raise ValueError(f"x: expected a floating tensor [n, d] with n >= 1, got {x.dtype} {list(x.shape)}")
    rows = x.double()
    point = rows.mean(0)
    for _ in range(max_iterations):
        difference = rows - point
        distance = difference.norm(dim=1)
        spread = distance.mean()
        if float(spread) == 0.0:
            break
        apart = distance > 1e-12 * spread
        weight = torch.where(apart, 1.0 / distance.clamp_min(1e-300), torch.zeros_like(distance))
        pull = (weight[:, None] * difference).sum(0)  # minus the gradient, without the coincident rows
        coincident = float((~apart).sum())
        strength = float(pull.norm())
        # A row under the point holds it back with a force of up to 1 (Vardi & Zhang's eta over r).
        if strength <= coincident:
            break
        step = (1.0 - coincident / strength) * pull / weight.sum()
        point = point + step
        if float(step.norm()) <= rtol * float(spread):
            break
    return point.float()


def input_statistics(x: Tensor, median_tokens: int = 4096) -> InputStatistics:
    """Statistics of x ``[n, d_in]``; see :class:`InputStatistics`. ValueError for zero or non-finite input."""
    if x.dim() != 2 or x.shape[0] == 0:
        raise ValueError(f"x: expected [n, d_in] with n >= 1, got {list(x.shape)}")
    n, d = x.shape
    total, square = torch.zeros(d, dtype=torch.float64, device=x.device), 0.0
    for part in x.split(4096):  # never an fp64 copy of the whole buffer
        wide = part.double()
        total += wide.sum(0)
        square += float(wide.square().sum())
    mean = total / n
    mean_square = square / n
    if not math.isfinite(mean_square) or mean_square <= 0.0:
        raise ValueError(f"x: expected finite activations, not all zero; got a mean square norm of {mean_square}")
    step = max(1, n // median_tokens)
    return InputStatistics(
        n_tokens=n,
        mean_square_norm=mean_square,
        scale=math.sqrt(d / mean_square),
        mean=mean.float(),
        geometric_median=geometric_median(x[::step][:median_tokens]),
        total_variance=mean_square - float(mean.square().sum()),
    )


@dataclass(frozen=True)
class _Origin:
    """Where a chunk's first token comes from: the stream's state before a batch, and kept tokens of it to skip."""

    stream: dict[str, Any]
    skip: int


class ActivationBuffer:
    """An iterator over ``{layer: x [batch_tokens, d_in]}``, tokens of many documents mixed.

    Args:
        model: transformers causal LM with ``self_attn.o_proj``.
        stream: a :class:`~refusal_kernels.python_api.tokens.TokenStream` of its tokenizer; the buffer moves it.
        layers: layers to capture, in one pass; None for all.
        batch_tokens: tokens of a batch.
        buffer_tokens: tokens to mix over, at least ``2 * batch_tokens``; rounded so that a chunk (two thirds of it)
            holds whole batches. Memory is ``buffer_tokens * sum(d_in) * itemsize``, from first to last.
        seed: of the mixing.
        heads: None, a sequence or ``{layer: heads}``: capture only these heads' columns.
        exclude_first: leave out the first token of every sequence and every BOS: attention sinks, whose activations
            are outliers that carry no content.
        dtype: of the buffer and the batches; None: that of the model's o_proj.
        device: of the buffer; None: that of the model's o_proj.
        drop_last: leave out the last, smaller batch of a stream that ends.

    Batches are new tensors, free to be changed. Rows of different layers at the same index are the same token.

    Interrupted while it reads (Ctrl-C, an error in the model), the buffer stays where it was: ``state_dict`` is that of
    the last batch yielded, and ``next`` may be called again.

    On a CPU the same arguments give the same bits (with the same number of threads), also after
    :meth:`load_state_dict`.
    """

    _cursor: int
    _left: Tensor
    _ended: bool

    def __init__(
        self,
        model: nn.Module,
        stream: TokenStream,
        layers: Iterable[int] | None = None,
        batch_tokens: int = 4096,
        buffer_tokens: int = 65_536,
        seed: int = 0,
        *,
        heads: HeadSelection = None,
        exclude_first: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        drop_last: bool = True,
    ) -> None:
        for name, value, least in (("batch_tokens", batch_tokens, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name}: expected {least} or more, got {value}")
        if not isinstance(buffer_tokens, int) or buffer_tokens < 2 * batch_tokens:
            raise ValueError(
                f"buffer_tokens: expected an int, at least 2 * batch_tokens = {2 * batch_tokens}, got {buffer_tokens!r}"
            )
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating dtype, got {dtype}")
        self.model, self.stream = model, stream
        self.layers = resolve_layers(model, layers)
        self.heads = resolve_heads(model, self.layers, heads)
        geometry = attention_geometry(model)
        #: per layer the width of a batch.
        self.d_in = {
            layer: geometry.head_dims[layer] * (geometry.n_heads if chosen is None else len(chosen))
            for layer, chosen in self.heads.items()
        }
        self.batch_tokens, self.seed, self.exclude_first, self.drop_last = batch_tokens, seed, exclude_first, drop_last
        #: tokens of a chunk and of a block.
        self.chunk_tokens = max(1, round(buffer_tokens / 1.5 / batch_tokens)) * batch_tokens
        self._kept = self.chunk_tokens - self.chunk_tokens // 2  # second half of a chunk: stays for the next block
        self.buffer_tokens = self.chunk_tokens + self._kept
        self._dtype, self._device = dtype, device
        self._vocabulary = _embeddings(model)
        limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if isinstance(limit, int) and stream.context_length > limit:
            warnings.warn(
                f"stream: context_length {stream.context_length} exceeds the model's {limit} positions; "
                "activations beyond them are not what the model was trained on",
                stacklevel=2,
            )
        self._storage: dict[int, Tensor] = {}
        # While a block is being made, the state to go back to should that be interrupted (Ctrl-C, an error).
        self._whole: dict[str, Any] | None = None
        #: batches yielded so far.
        self.batches_seen = 0
        self._start_over()

    # ------------------------------------------------------------------------------------------ iteration

    def __iter__(self) -> Iterator[dict[int, Tensor]]:
        return self

    def __next__(self) -> dict[int, Tensor]:
        self._recover()
        if self._cursor >= self._block.numel() and not (self._ended and self._left.numel() == 0):
            self._advance()
        rows = self._block[self._cursor : self._cursor + self.batch_tokens]
        if rows.numel() == 0 or (rows.numel() < self.batch_tokens and self.drop_last):
            self._cursor = self._block.numel()
            raise StopIteration
        self._cursor += self.batch_tokens
        self.batches_seen += 1
        return {layer: x.index_select(0, rows.to(x.device)) for layer, x in self._storage.items()}

    def _start_over(self) -> None:
        self._generation = -1  # of the current block; -1: nothing was read yet
        self._block: Tensor = torch.empty(0, dtype=torch.int64)  # rows of the storage, in the order they are read out
        self._cursor = 0
        self._left = torch.empty(0, dtype=torch.int64)  # rows kept for the next block
        self._origins: dict[int, _Origin] = {}  # of the chunk before and the current one
        self._staged: dict[int, Tensor] = {}  # captured, but not yet in a chunk
        self._staged_from: _Origin | None = None
        self._primed = False
        self._ended = False

    def _recover(self) -> None:
        """After an interruption tokens are lost between the stream and the buffer: go back to the last whole block."""
        if self._whole is not None:
            self.load_state_dict(self._whole)

    def _advance(self) -> None:
        """Make the next block."""
        resuming = self._whole
        if resuming is None:
            self._whole = self.state_dict()
        if not self._primed:
            self._prime()
        generation = self._generation + 1
        free = _complement(self._left, self.buffer_tokens)[: self.chunk_tokens]
        filled = self._fill(generation, free)
        order = permutation(filled.numel(), self.seed, 2 * generation)
        shuffled = filled[order]
        # At the end of the stream everything that is left goes out.
        split = self.chunk_tokens // 2 if filled.numel() == self.chunk_tokens else filled.numel()
        block = torch.cat([self._left, shuffled[:split]])
        self._block = block[permutation(block.numel(), self.seed, 2 * generation + 1)]
        self._left = shuffled[split:]
        self._cursor = 0
        self._generation = generation
        self._origins = {k: v for k, v in self._origins.items() if k >= generation - 1}
        self._whole = resuming

    def _prime(self) -> None:
        """Chunk -1, half a chunk that fills the place of what the chunk before would have left."""
        if not self._storage:
            self._allocate()
        self._left = self._fill(-1, torch.arange(self._kept))
        self._primed = True

    def _allocate(self) -> None:
        for layer, o_proj in o_proj_modules(self.model, self.layers).items():
            parameter = next(iter(o_proj.parameters()))
            dtype = self._dtype or (parameter.dtype if parameter.is_floating_point() else torch.float32)
            device = self._device or (parameter.device if not parameter.is_meta else "cpu")
            self._storage[layer] = torch.zeros((self.buffer_tokens, self.d_in[layer]), dtype=dtype, device=device)

    def _fill(self, chunk: int, rows: Tensor) -> Tensor:
        """Write the stream's next tokens into ``rows``; returns those written, fewer only at the stream's end."""
        done = 0
        while done < rows.numel():
            n_staged = next(iter(self._staged.values())).shape[0] if self._staged else 0
            if n_staged == 0:
                if self._ended or not self._stage():
                    break
                continue
            if done == 0:
                self._origins[chunk] = self._staged_from  # type: ignore[assignment]
            take = min(n_staged, rows.numel() - done)
            at = rows[done : done + take]
            for layer, x in self._staged.items():
                storage = self._storage[layer]
                storage.index_copy_(0, at.to(storage.device), x[:take].to(storage))
                self._staged[layer] = x[take:]
            origin = self._staged_from
            self._staged_from = None if origin is None else _Origin(origin.stream, origin.skip + take)
            done += take
        return rows[:done]

    def _stage(self) -> bool:
        """Run the model on the stream's next batch; False at the stream's end."""
        self._staged = {}  # free the last capture before the model runs again
        for _ in range(_MAX_EMPTY_BATCHES):
            origin = self.stream.state_dict()
            batch = next(self.stream, None)
            if batch is None:
                self._ended = True
                return False
            largest = int(batch["input_ids"].max())
            if self._vocabulary is not None and largest >= self._vocabulary:  # on a GPU this would end the process
                raise ValueError(
                    f"stream: token id {largest}, but the model has {self._vocabulary} embeddings; "
                    "is the tokenizer the model's own?"
                )
            wanted = self._wanted(batch)
            if bool(wanted.any()):
                with capture(self.model, self.layers, self.heads) as cap:
                    self._staged = cap.run(batch, positions=wanted)
                self._staged_from = _Origin(origin, 0)
                return True
        raise ValueError(
            f"stream: {_MAX_EMPTY_BATCHES} batches in a row without a token to keep (padding and, with exclude_first, "
            "first tokens are left out)"
        )

    def _wanted(self, batch: dict[str, Any]) -> Tensor:
        """The tokens to keep: no padding and, if asked, no first tokens."""
        ids: Tensor = batch["input_ids"]
        mask = batch.get("attention_mask")
        wanted = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool().clone()
        if self.exclude_first:
            if "position_ids" in batch:
                wanted &= batch["position_ids"] != 0
            elif mask is None:
                wanted[:, 0] = False
            else:
                wanted &= mask.cumsum(1) != 1
            if self.stream.bos_token_id is not None:
                wanted &= ids != self.stream.bos_token_id
        return wanted

    # ------------------------------------------------------------------------------------------ statistics

    def statistics(self, median_tokens: int = 4096) -> dict[int, InputStatistics]:
        """Per layer :class:`InputStatistics` of what is in the buffer now, ``buffer_tokens`` tokens at the beginning.

        Uses up nothing: before the first batch the buffer is filled with the tokens that the first batches will hold.
        """
        self._recover()
        if self._generation < 0:
            self._advance()
        rows = torch.cat([self._block, self._left])
        if rows.numel() == 0:
            raise ValueError("stream: ended before its first token")
        return {
            layer: input_statistics(x if rows.numel() == x.shape[0] else x[rows.to(x.device)], median_tokens)
            for layer, x in self._storage.items()
        }

    # ------------------------------------------------------------------------------------------ resuming

    def state_dict(self) -> dict[str, Any]:
        """A small dict of JSON types. No activations: they are computed again, at most two chunks of tokens."""
        if self._whole is not None:
            return self._whole
        older = (
            self._origins.get(self._generation - 1) if self._generation >= 0 else _Origin(self.stream.state_dict(), 0)
        )
        return {
            "version": _STATE_VERSION,
            "generation": self._generation,
            "cursor": self._cursor,
            "batches_seen": self.batches_seen,
            "origin": None if older is None else {"stream": older.stream, "skip": older.skip},
            "settings": self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "heads": [self.heads[layer] for layer in self.layers],
            "d_in": [self.d_in[layer] for layer in self.layers],
            "batch_tokens": self.batch_tokens,
            "chunk_tokens": self.chunk_tokens,
            "seed": self.seed,
            "exclude_first": self.exclude_first,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken: the next batch has the bits that it had then.

        Raises:
            ValueError: another version or other settings (it says which), or a stream that no longer reaches there.
        """
        if not isinstance(state, dict) or state.get("version") != _STATE_VERSION:
            got = state.get("version") if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"state: expected an ActivationBuffer state of version {_STATE_VERSION}, got {got!r}")
        check_state("ActivationBuffer", state, ("cursor", "batches_seen"))
        generation, origin = state.get("generation"), state.get("origin")
        if isinstance(generation, bool) or not isinstance(generation, int) or generation < -1:
            raise ValueError(f"state: expected generation to be an int from -1 on, got {generation!r}")
        if not isinstance(origin, dict) or not isinstance(origin.get("skip"), int) or origin["skip"] < 0:
            raise ValueError(f"state: expected origin to be a stream's state and tokens to skip, got {origin!r}")
        saved = state["settings"]
        different = [f"{k} {saved.get(k)!r} -> {v!r}" for k, v in self._settings().items() if saved.get(k) != v]
        if different:
            raise ValueError(f"state: was saved by a buffer with other settings ({', '.join(different)})")
        self._start_over()
        self._whole = state
        self.stream.load_state_dict(origin.get("stream", {}))
        if generation >= 0:
            self._skip(origin["skip"])
            if generation == 0:
                self._advance()
            else:
                # The older chunk's block was read out long ago, and what it kept from its predecessor with it; only
                # the half that it left for the current block matters.
                if not self._storage:
                    self._allocate()
                self._generation, self._primed = generation - 2, True
                self._left = torch.arange(self._kept)
                self._advance()
                self._advance()
            if self._cursor > self._block.numel() or self._generation != generation:
                raise ValueError("state: the stream ends before the saved position; is it the same data?")
        self._cursor = state["cursor"]
        self.batches_seen = state["batches_seen"]
        self._whole = None

    def _skip(self, n: int) -> None:
        if n and not self._stage():
            raise ValueError("state: the stream ends before the saved position; is it the same data?")
        for layer, x in self._staged.items():
            self._staged[layer] = x[n:]
        if self._staged_from is not None:
            self._staged_from = _Origin(self._staged_from.stream, n)


def _embeddings(model: nn.Module) -> int | None:
    get = getattr(model, "get_input_embeddings", None)
    return getattr(get() if callable(get) else None, "num_embeddings", None)


def _complement(rows: Tensor, n: int) -> Tensor:
    free = torch.ones(n, dtype=torch.bool)
    free[rows] = False
    return free.nonzero()[:, 0]
