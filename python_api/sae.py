"""TopKSAE: the sparse autoencoder as an nn.Module over the operators of refusal_kernels, and its files.

    s = input_scale                                     x [..., d_in], raw activations
    pre = (s x - b_dec) W_enc^T + b_enc                 W_enc [F, d_in], b_enc [F], b_dec [d_in], F = n_latents
    values, indices = top k of relu(pre)                values, indices [..., k]
    x_hat = (sum_j values_j W_dec[indices_j] + b_dec) / s       W_dec [F, d_in], rows of unit norm

Where the scale is applied: `encode` multiplies by it on the way in, `decode` divides by it on the way out, and nowhere
else. The four parameters, the code `values`, and `loss` live on the scaled side, where E||s x||^2 = d_in, so that one
learning rate and one AuxK weight suit every model. What leaves the SAE towards the model is on the raw side: `decode`,
`forward`, and `decoder_directions()`.

Architecture: Gao et al., "Scaling and evaluating sparse autoencoders", arXiv 2406.04093, on attention outputs before
o_proj as in Kissane et al., arXiv 2406.17759. Ties, missing positives and NaN: see refusal_kernels.topk_encode.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import refusal_kernels as rk

from .checkpoint import atomic_file, read_json, write_json

FORMAT_VERSION = 1
WEIGHTS_FILE = "sae.safetensors"
CONFIG_FILE = "cfg.json"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class TopKSAEConfig:
    """The shape of an SAE and where it belongs.

    Args:
        d_in: width of the activations (for z of a whole layer: heads x head width).
        n_latents: number F of latents.
        k: number of active latents per token, 1 <= k <= n_latents.
        hook_name: the module whose input is encoded, e.g. "model.layers.1.self_attn.o_proj"; None if unknown.
        layer: the decoder layer's number; None if unknown.
        model_name: the model the activations came from, as given to `from_pretrained`; None if unknown.
        metadata: anything JSON can hold (training tokens, figures, versions).
    """

    d_in: int
    n_latents: int
    k: int
    hook_name: str | None = None
    layer: int | None = None
    model_name: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("d_in", "n_latents", "k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"TopKSAEConfig: {name} must be an integer; got {type(value).__name__} {value!r}")
            if value < 1:
                raise ValueError(f"TopKSAEConfig: {name} must be at least 1; got {value}")
        if self.k > self.n_latents:
            raise ValueError(f"TopKSAEConfig: k must be at most n_latents = {self.n_latents}; got {self.k}")
        for name in ("hook_name", "model_name"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"TopKSAEConfig: {name} must be a string or None; got {value!r}")
        if self.layer is not None and (isinstance(self.layer, bool) or not isinstance(self.layer, int)):
            raise TypeError(f"TopKSAEConfig: layer must be an integer or None; got {self.layer!r}")
        if self.layer is not None and self.layer < 0:
            raise ValueError(f"TopKSAEConfig: layer must be at least 0, or None; got {self.layer}")
        if not isinstance(self.metadata, dict):
            raise TypeError(f"TopKSAEConfig: metadata must be a dict; got {self.metadata!r}")


class SAELoss(NamedTuple):
    """What `TopKSAE.loss` returns: 0-dim tensors, on the scaled side, and the code.

    loss = mse + aux_alpha * aux_loss; mse = sum ||e||^2 / N; fvu = sum ||e||^2 / sum ||x - mean x||^2; l0 = mean number
    of values > 0 per token.
    """

    loss: Tensor
    mse: Tensor
    aux_loss: Tensor
    fvu: Tensor
    l0: Tensor
    values: Tensor
    indices: Tensor


class TopKSAE(nn.Module):
    """A TopK sparse autoencoder.

    The parameters start at random: `W_dec` with unit rows, `W_enc` equal to it, biases zero, input_scale 1. Call
    `init_from_data` with a sample of activations before training.

    Args:
        config: sizes and provenance.
        device, dtype: of the parameters. Master weights belong in fp32; fp64, bf16 and fp16 work too.
        seed: of the decoder's random directions. The global random state is left alone.
    """

    input_scale: Tensor

    def __init__(
        self,
        config: TopKSAEConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        directions = torch.randn(
            config.n_latents, config.d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float32
        )
        directions /= directions.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        directions = directions.to(device=device, dtype=dtype)
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(torch.zeros(config.n_latents, device=device, dtype=dtype))
        self.W_dec = nn.Parameter(directions)
        self.b_dec = nn.Parameter(torch.zeros(config.d_in, device=device, dtype=dtype))
        # fp32 whatever the parameters' dtype: bf16 would round the scale by up to 0.4 %.
        self.register_buffer("input_scale", torch.ones((), device=device, dtype=torch.float32))

    def extra_repr(self) -> str:
        return f"d_in={self.config.d_in}, n_latents={self.config.n_latents}, k={self.config.k}"

    def _apply(self, fn: Any, recurse: bool = True) -> TopKSAE:
        # .to(bfloat16) and .half() convert buffers too; the scale keeps its precision and follows the device only.
        scale = self.input_scale
        super()._apply(fn, recurse)
        if self.input_scale.dtype != scale.dtype:
            self.input_scale = scale.to(self.input_scale.device)
        return self

    # -- initialisation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_from_data(self, x: Tensor, *, fit_scale: bool = True) -> TopKSAE:
        """Sets input_scale so that E||s x||^2 = d_in over the sample, and b_dec to the scaled geometric median.

        Args:
            x: a sample of raw activations [..., d_in], a few thousand tokens.
            fit_scale: False leaves input_scale as it is.
        Raises ValueError for an empty, all-zero or non-finite sample.
        """
        from .buffer import input_statistics  # brings the model side in, which loading an SAE does not need

        statistics = input_statistics(self._rows(x))
        if fit_scale:
            self.input_scale.fill_(statistics.scale)
        self.b_dec.copy_(statistics.geometric_median * self.input_scale)
        return self

    # -- the code -----------------------------------------------------------------------------------------------------

    def _rows(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            what = f"{x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"TopKSAE: x must be a floating-point tensor [..., d_in]; got a {what}")
        if x.dim() == 0 or x.shape[-1] != self.config.d_in:
            raise ValueError(
                f"TopKSAE: the last dimension of x must be d_in = {self.config.d_in}; got shape {tuple(x.shape)}"
            )
        return x.reshape(-1, self.config.d_in)

    def scale_input(self, x: Tensor) -> Tensor:
        """s x in the parameters' dtype, rounded once: raw activations [..., d_in] to the scaled side."""
        if x.dtype == torch.float64 or self.W_enc.dtype == torch.float64:
            return (x.double() * self.input_scale).to(self.W_enc.dtype)
        return (x.float() * self.input_scale).to(self.W_enc.dtype)

    def encode(self, x: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
        """Raw activations [..., d_in] to values [..., k] (scaled side) and indices [..., k] int64.

        Equivalent to: torch.sort(relu((s x - b_dec) @ W_enc.T + b_enc), descending=True, stable=True), first k.
        """
        self._rows(x)
        return rk.topk_encode(self.scale_input(x), self.W_enc, self.b_enc, self.config.k, self.b_dec, backend=backend)

    def decode(self, values: Tensor, indices: Tensor, *, backend: str | None = None) -> Tensor:
        """A code [..., k] to raw activations [..., d_in].

        Equivalent to: ((values[..., None] * W_dec[indices]).sum(-2) + b_dec) / s.
        """
        x_hat = rk.sparse_decode(values, indices, self.W_dec, self.b_dec, backend=backend)
        return x_hat / self.input_scale.to(x_hat.dtype)

    def forward(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        """The reconstruction of raw activations [..., d_in], in the shape and dtype of x."""
        return self.decode(*self.encode(x, backend=backend), backend=backend).to(x.dtype)

    def dense(self, values: Tensor, indices: Tensor) -> Tensor:
        """The code as a dense [..., n_latents] tensor."""
        shape = (*values.shape[:-1], self.config.n_latents)
        return torch.zeros(shape, dtype=values.dtype, device=values.device).scatter(-1, indices.long(), values)

    def decoder_directions(self) -> Tensor:
        """W_dec / s [n_latents, d_in]: what one unit of each latent adds to the raw activation."""
        return self.W_dec / self.input_scale.to(self.W_dec.dtype)

    # -- the loss, by plain autograd ----------------------------------------------------------------------------------

    def loss(
        self,
        x: Tensor,
        *,
        dead: Tensor | None = None,
        k_aux: int | None = None,
        aux_alpha: float = 1 / 32,
        backend: str | None = None,
    ) -> SAELoss:
        """The training loss as a differentiable graph; the same gradients as `rk.sae_step(self.scale_input(x), ...)`.

        The fused step is faster; this route composes with anything autograd does (own losses, hooks, other optimisers).

        Args:
            x: raw activations [..., d_in].
            dead, k_aux, aux_alpha: as in `rk.sae_step` and `rk.aux_k_loss`; dead=None leaves AuxK out.
        """
        rows = self.scale_input(self._rows(x))
        n_tokens = max(rows.shape[0], 1)
        values, indices = rk.topk_encode(rows, self.W_enc, self.b_enc, self.config.k, self.b_dec, backend=backend)
        error = rk.sparse_decode(values, indices, self.W_dec, self.b_dec, backend=backend) - rows
        squared = error.float().square() if error.dtype != torch.float64 else error.square()
        mse = squared.sum() / n_tokens
        aux_loss = torch.zeros_like(mse)
        if dead is not None and dead.numel() > 0:
            parameters = (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
            aux_loss = rk.aux_k_loss(rows, -error.detach(), *parameters, dead, k_aux)
        with torch.no_grad():
            spread = (rows - rows.mean(0)).to(squared.dtype).square().sum()
            fvu = squared.sum() / spread
            l0 = (values > 0).sum(dtype=torch.float32) / n_tokens
        return SAELoss(mse + aux_alpha * aux_loss, mse, aux_loss, fvu, l0, values, indices)

    # -- files --------------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | os.PathLike[str]) -> Path:
        """Writes `sae.safetensors` and `cfg.json` into the folder `path`; each file is replaced in one step.

        Tensors: W_enc [F, d_in], b_enc [F], W_dec [F, d_in], b_dec [d_in] in the parameters' dtype, input_scale [] in
        fp32. The names are those of SAELens, the [F, d_in] layout and the file names those of sparsify; neither knows
        input_scale, so a converter has to fold it: W_enc s, b_dec / s, W_dec / s. Returns the folder.

        Raises ValueError, before anything is written, for values that are not finite: `from_pretrained` would refuse
        them, and files that were there may still be good.
        """
        folder = Path(path)
        if problems := _value_problems(self.state_dict()):
            raise ValueError(f"{folder}: this SAE was not written, for {'; '.join(problems)}")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().to("cpu").contiguous() for name, t in self.state_dict().items()}
        with atomic_file(folder / WEIGHTS_FILE) as temporary:
            # One metadata entry only: safetensors writes several in random order, and equal SAEs should be equal files.
            save_file(tensors, temporary, metadata={"format": "pt"})
        write_json(
            folder / CONFIG_FILE,
            {"format_version": FORMAT_VERSION, "architecture": "topk", **dataclasses.asdict(self.config)},
        )
        return folder

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> TopKSAE:
        """Loads what `save_pretrained` wrote; with dtype=None every bit is the one that was saved.

        Args:
            path: the folder.
            device: where the parameters go.
            dtype: of the parameters: float64, float32, bfloat16 or float16; None: as they were saved.

        Reads JSON and safetensors only, so a file from a stranger cannot run code. Raises FileNotFoundError, or one
        ValueError that names the file and everything wrong with it: format version, unknown or missing keys, shapes,
        dtypes, values that are not finite, as saved or in `dtype`. TypeError for a path or dtype that is none.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"TopKSAE.from_pretrained: path must be a string or a path; got {path!r}")
        if dtype is not None and dtype not in DTYPES:
            raise TypeError(
                f"TopKSAE.from_pretrained: dtype must be one of {', '.join(map(str, DTYPES))}, or None; got {dtype!r}"
            )
        folder = Path(path)
        if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
            raise FileNotFoundError(
                f"{folder} holds no SAE: expected the files {CONFIG_FILE} and {WEIGHTS_FILE} written by save_pretrained"
            )
        config = _read_config(folder / CONFIG_FILE)
        tensors = _read_weights(folder / WEIGHTS_FILE, config)
        stored = tensors["W_enc"].dtype
        tensors = {n: t.to(torch.float32 if n == "input_scale" else dtype or t.dtype) for n, t in tensors.items()}
        # Once more after the conversion: what is finite as saved may be infinite in a narrower dtype.
        if problems := _value_problems(tensors):
            converted = "" if dtype in (None, stored) else f" once converted from {stored} to {dtype}"
            raise ValueError(f"{folder / WEIGHTS_FILE}: {'; '.join(problems)}{converted}")
        sae = cls.__new__(cls)
        nn.Module.__init__(sae)
        sae.config = config
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            setattr(sae, name, nn.Parameter(tensors[name].to(device)))
        sae.register_buffer("input_scale", tensors["input_scale"].to(device))
        return sae


def _read_config(path: Path) -> TopKSAEConfig:
    raw = read_json(path)
    version = raw.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version must be {FORMAT_VERSION}; got {version!r}"
            + (" (written by another library or a newer version of this one?)" if version is None else "")
        )
    if (architecture := raw.pop("architecture", None)) != "topk":
        raise ValueError(f"{path}: architecture must be 'topk'; got {architecture!r}")
    known = {f.name for f in dataclasses.fields(TopKSAEConfig)}
    problems = [f"unknown key {name!r}" for name in sorted(raw.keys() - known)]
    problems += [f"missing key {name!r}" for name in ("d_in", "n_latents", "k") if name not in raw]
    if problems:
        raise ValueError(f"{path}: {', '.join(problems)}; expected the keys {', '.join(sorted(known))}")
    try:
        return TopKSAEConfig(**raw)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_weights(path: Path, config: TopKSAEConfig) -> dict[str, Tensor]:
    expected = {
        "W_enc": (config.n_latents, config.d_in),
        "b_enc": (config.n_latents,),
        "W_dec": (config.n_latents, config.d_in),
        "b_dec": (config.d_in,),
        "input_scale": (),
    }
    allowed = {"F64", "F32", "BF16", "F16"}
    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            problems += [f"missing tensor {name!r}" for name in expected if name not in names]
            problems += [f"unknown tensor {name!r}" for name in sorted(names - expected.keys())]
            # Headers first: a hostile or wrong file is refused before anything of its size is allocated.
            for name in sorted(names & expected.keys()):
                header = file.get_slice(name)
                if tuple(header.get_shape()) != expected[name]:
                    problems.append(f"{name} must have shape {expected[name]}; got {tuple(header.get_shape())}")
                if header.get_dtype() not in allowed:
                    problems.append(f"{name} must have a dtype of {sorted(allowed)}; got {header.get_dtype()}")
            if not problems:
                tensors = {name: file.get_tensor(name) for name in expected}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    if not problems:
        problems += _value_problems(tensors)
        if len({tensors[name].dtype for name in ("W_enc", "b_enc", "W_dec", "b_dec")}) != 1:
            problems.append("W_enc, b_enc, W_dec and b_dec must share one dtype")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return tensors


def _value_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the values of an SAE's tensors: not finite, or a scale that cannot be undone in fp32."""
    problems = [f"{name} holds values that are not finite" for name, t in tensors.items() if not all_finite(t)]
    scale = float(tensors["input_scale"])
    smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    if math.isfinite(scale) and not smallest <= scale <= largest:
        problems.append(f"input_scale must be positive, from {smallest:.2g} to {largest:.2g}; got {scale}")
    return problems


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    # Both show in the extremes; isfinite() would build a mask of the tensor's size.
    return tensor.numel() == 0 or all(math.isfinite(float(extreme)) for extreme in torch.aminmax(tensor.detach()))
