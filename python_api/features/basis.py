"""RefusalBasis: the directions to protect, one orthonormal basis per layer or per module, with where they came from.

    basis = RefusalBasis.load("features/refusal_basis.safetensors").check(model)
    basis.z[3]                                          # U [n_heads * head_dim, r]

On disk it is one safetensors file: the tensors, and in its header one JSON text with everything else and a checksum.
One file is either there as a whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoint import atomic_file

FORMAT_VERSION = 1
BASIS_FILE = "refusal_basis.safetensors"
HEADER = "refusal_basis"
TOLERANCE = 1e-4


@dataclass(repr=False, eq=False)
class RefusalBasis:
    """Orthonormal directions that carry refusal.

    Attributes:
        z: layer -> U [n_heads * head_dim, r] fp32 with orthonormal columns, in the space of o_proj's input.
        inputs: module path in the untouched base model ("model.layers.3.mlp.up_proj") -> U [in_features, r]: the site
            "all", an own basis of the input activations of every linear that is to be adapted. Modules that read the
            same input may share one tensor.
        twins: (harmful prompt, harmless prompt) pairs for the pre-flight check; may be empty.
        provenance: source, model, SAE, hash of the prompts, heads, settings; anything JSON can hold.

    The columns of every U are ordered, the most important first.

    Raises:
        TypeError: a key or a value of the wrong type, a U that is not fp32.
        ValueError: a U that is not [width, r] with 1 <= r <= width, not finite, or whose columns are not orthonormal,
            ||U^T U - I||_F > 1e-4.
    """

    z: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    twins: list[tuple[str, str]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked: set[int] = set()  # modules share tensors, and U^T U of a wide one takes a while
        for layer, u in self.z.items():
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise TypeError(f"z: expected layers as integers from 0 on, got {layer!r}")
            check_directions(f"z[{layer}]", u)
        for path, u in self.inputs.items():
            if not isinstance(path, str):
                raise TypeError(f"inputs: expected module paths, got {path!r}")
            if id(u) not in checked:
                check_directions(f"inputs[{path!r}]", u)
                checked.add(id(u))
        for pair in self.twins:
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
                raise TypeError(f"twins: expected (harmful prompt, harmless prompt) pairs, got {pair!r}")
        self.twins = [(harmful, harmless) for harmful, harmless in self.twins]
        if not isinstance(self.provenance, dict):
            raise TypeError(f"provenance: expected a dict, got {type(self.provenance).__name__}")

    def __repr__(self) -> str:
        parts = [f"z[{layer}]: {_size(u)}" for layer, u in sorted(self.z.items())]
        if self.inputs:
            ranks = sorted({u.shape[1] for u in self.inputs.values()})
            span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
            parts.append(f"inputs of {len(self.inputs)} modules: rank {span}")
        if self.twins:
            parts.append(f"{len(self.twins)} twins")
        if source := self.provenance.get("source"):
            parts.append(f"source: {source}")
        return f"RefusalBasis({', '.join(parts) or 'empty'})"

    @property
    def ranks(self) -> dict[int | str, int]:
        """Layer or module path -> number of directions."""
        ranks: dict[int | str, int] = {layer: u.shape[1] for layer, u in self.z.items()}
        return ranks | {path: u.shape[1] for path, u in self.inputs.items()}

    def truncate(self, n: int) -> RefusalBasis:
        """A basis of the first `n` directions of every U; a U of fewer keeps what it has."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n: expected an integer from 1 on, got {n!r}")
        return self._map(lambda u: u[:, :n].contiguous())

    def to(self, device: torch.device | str) -> RefusalBasis:
        """A basis with every U on `device`, in fp32 as before."""
        return self._map(lambda u: u.to(device))

    def _map(self, function: Any) -> RefusalBasis:
        made: dict[int, Tensor] = {}

        def once(u: Tensor) -> Tensor:  # tensors shared before are shared after
            if id(u) not in made:
                made[id(u)] = function(u)
            return made[id(u)]

        z = {layer: once(u) for layer, u in self.z.items()}
        inputs = {path: once(u) for path, u in self.inputs.items()}
        return RefusalBasis(z, inputs, list(self.twins), dict(self.provenance))

    def check(self, model: nn.Module) -> RefusalBasis:
        """Returns itself if it fits `model` (bare or wrapped by PEFT); ValueError naming what does not.

        Every layer of `z` must exist and have an o_proj that reads as many columns; every path of `inputs` must be a
        module of the base model with as many `in_features`. An empty basis fits no model.
        """
        from ..hooks import o_proj_modules

        if not self.z and not self.inputs:
            raise ValueError("basis: expected directions of at least one layer or module, got an empty basis")
        try:
            found: dict[str, nn.Module] = {f"z[{i}]": m for i, m in o_proj_modules(model, self.z).items()}
        except ValueError as error:
            raise ValueError(f"basis: z does not fit this model: {error}") from None
        base = base_model(model)
        modules = dict(base.named_modules())
        for path in self.inputs:
            if path not in modules:
                raise ValueError(f"basis: {type(base).__name__} has no module {path!r}, which inputs names")
            found[f"inputs[{path!r}]"] = modules[path]
        bases = {f"z[{layer}]": u for layer, u in self.z.items()}
        bases |= {f"inputs[{path!r}]": u for path, u in self.inputs.items()}
        for name, module in found.items():
            width = getattr(module, "in_features", None)
            if width != bases[name].shape[0]:
                raise ValueError(f"basis: {name} has {bases[name].shape[0]} rows, but the module reads {width} columns")
        return self

    # -- the file -----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes one file, atomically: `path` if it ends in .safetensors, else `path`/refusal_basis.safetensors.

        Tensors "z.<layer>" and "inputs.<module path>", fp32; a shared tensor is stored once, under its first path.
        The header's "refusal_basis" is JSON: format_version, twins, provenance, shared ({path: path that stores it}),
        checksum (of all of it). Returns the file. ValueError for an empty basis or provenance that JSON cannot hold.
        """
        if not self.z and not self.inputs:
            raise ValueError(f"{path}: expected directions of at least one layer or module, got an empty basis")
        self.__post_init__()  # the fields are open to assignment; what is written can be loaded
        tensors = {f"z.{layer}": _plain(u) for layer, u in self.z.items()}
        first: dict[int, str] = {}
        shared: dict[str, str] = {}
        for name, u in self.inputs.items():
            if id(u) in first:
                shared[name] = first[id(u)]
            else:
                first[id(u)] = name
                tensors[f"inputs.{name}"] = _plain(u)
        header: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "twins": [list(pair) for pair in self.twins],
            "provenance": self.provenance,
            "shared": shared,
        }
        try:
            text = json.dumps(header, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"provenance: expected what JSON can hold ({error})") from None
        text = json.dumps(header | {"checksum": _checksum(tensors, text)})
        target = _file(path)
        with atomic_file(target) as temporary:
            # One entry of metadata: safetensors writes several in random order, and equal bases should be equal files.
            save_file(tensors, temporary, metadata={HEADER: text})
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> RefusalBasis:
        """Reads what `save` wrote, every bit as it was. Only safetensors and JSON are read: no code can run.

        Raises FileNotFoundError, or one ValueError that names the file: not such a file, another version, damaged.
        """
        target = _file(path)
        if not target.is_file():
            raise FileNotFoundError(f"{target} does not exist; expected a basis written by RefusalBasis.save")
        try:
            with safe_open(target, framework="pt", device="cpu") as file:
                text = (file.metadata() or {}).get(HEADER)
                if text is None:
                    raise ValueError(f"its header has no entry {HEADER!r}")
                header = _header(text)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
            checksum = header.pop("checksum")
            if _checksum(tensors, json.dumps(header)) != checksum:
                raise ValueError("the content is not what was saved (its checksum differs)")
            z = {int(name[2:]): u for name, u in tensors.items() if name.startswith("z.")}
            inputs = {name[7:]: u for name, u in tensors.items() if name.startswith("inputs.")}
            inputs |= {name: inputs[owner] for name, owner in header["shared"].items()}
            basis = cls(dict(sorted(z.items())), inputs, header["twins"], header["provenance"])
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"{target} is not a readable refusal basis: {why}") from None
        return basis.to(device)


def check_directions(name: str, u: Any) -> None:
    """TypeError or ValueError unless `u` is fp32 [width, r], finite, with orthonormal columns."""
    if not isinstance(u, Tensor) or u.dtype != torch.float32:
        got = f"a {u.dtype} tensor" if isinstance(u, Tensor) else type(u).__name__
        raise TypeError(f"{name}: expected a float32 tensor [width, r], got {got}")
    if u.dim() != 2 or not 1 <= u.shape[1] <= u.shape[0]:
        raise ValueError(f"{name}: expected shape [width, r] with 1 <= r <= width, got {list(u.shape)}")
    v = u.detach().double()
    error = float((v.T @ v - torch.eye(v.shape[1], dtype=v.dtype, device=v.device)).norm())
    if not error <= TOLERANCE:  # NaN fails too
        raise ValueError(f"{name}: expected orthonormal columns to {TOLERANCE:g}, got ||U^T U - I|| = {error:.3g}")


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT's and DistributedDataParallel's wrappers, whose paths `inputs` uses."""
    while True:
        get = getattr(model, "get_base_model", None)
        inner = get() if callable(get) else getattr(model, "module", None)
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def _size(u: Tensor) -> str:
    return f"rank {u.shape[1]} of {u.shape[0]}"


def _plain(u: Tensor) -> Tensor:
    return u.detach().to("cpu").contiguous()


def _file(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    return target if target.suffix == ".safetensors" else target / BASIS_FILE


def _checksum(tensors: Mapping[str, Tensor], header: str) -> str:
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _header(text: str) -> dict[str, Any]:
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError(f"the header holds {type(header).__name__}, not an object")
    if header.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"format_version must be {FORMAT_VERSION}; got {header.get('format_version')!r}")
    if missing := {"twins", "provenance", "shared", "checksum"} - header.keys():
        raise ValueError(f"the header lacks {', '.join(sorted(missing))}")
    return header
