"""protect: fine-tune a PEFT model without touching what a refusal basis spans.

    model = peft.get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj", "o_proj"]))
    protection = protect(model, basis)
    Trainer(model, ..., callbacks=[protection.callback()]).train()
    model.save_pretrained("adapter")          # opens in plain PEFT, projected

The gradient projection g <- (I - s U U^T) g is the paper's (arXiv 2510.07775); under Adam it leaks, so three modes that
do not stand beside it, and "forward" is the default. `sites.py` says what each site promises.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor

import refusal_kernels as rk

from ..features.basis import RefusalBasis
from .adapters import (
    Adapted,
    adapted_modules,
    adapter_names,
    check_exact,
    check_peft_model,
    compress_names,
    trained_adapters,
    trained_outside,
)
from .leak import Leak, lora_leak
from .projected import ProjectedLinear, whole
from .sites import Constraint, constraints_for
from .stepping import Factor, ProtectionWarning, StepProjector, innermost, projects_itself

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from ..prompts.chat import Chat

Mode = Literal["forward", "update", "weight", "gradient"]


def protect(
    peft_model: PeftModel,
    basis: RefusalBasis,
    *,
    mode: Mode = "forward",
    sites: str | Sequence[str] = ("o_proj", "v_proj"),
    strength: float = 1.0,
    adapter: str | Sequence[str] | None = None,
    project_start: bool = True,
    preflight: bool = True,
    tokenizer: Any = None,
) -> Protection:
    """Constrains the LoRA adapters of a model to the complement of a refusal basis.

    Args:
        peft_model: of `peft.get_peft_model` or `PeftModel.from_pretrained`, LoRA on linear layers (rsLoRA, dropout and
            quantised base weights are fine), before DistributedDataParallel or torch.compile wrap it.
        mode: "forward" trains A and B freely and runs A (I - s U U^T) or (I - s U U^T) B; it needs nothing of the
            training loop. "update", "weight" and "gradient" project around the optimizer's steps: give them the
            optimizer by `attach`, or the Trainer by `callback`.
        sites: "o_proj", "v_proj", "residual", "all"; see `sites.py` for what each promises.
        strength: s in [0, 1]; at 1 the promises are exact.
        adapter: name or names; None for all active ones.
        project_start: whether "update" and "gradient" also project the weights that training starts from, as "weight"
            and "forward" do. PEFT starts with a random A: left as it is, B A_0 U is not 0 as soon as B moves.
        preflight: whether to check first, on `basis.twins`, that refusal depends on the basis at all.
        tokenizer: for the pre-flight check; None takes the one of the base model's folder, without the network.

    Warns:
        ProtectionWarning: once, naming adapted modules that no site constrains, parameters trained outside of LoRA, an
            adapter that already violates the constraints, and a pre-flight check that failed or could not run.

    Raises:
        TypeError, ValueError: what cannot be protected exactly (DoRA and other variants, AdaLoRA, lora_bias on a
            constrained layer, initialisations that rewrite the base weights, trainable base weights of a constrained
            layer), or a basis that does not fit.
    """
    model = check_peft_model(peft_model)
    if not isinstance(basis, RefusalBasis):
        raise TypeError(f"basis: expected a RefusalBasis, got {type(basis).__name__}")
    if mode not in get_args(Mode):
        raise ValueError(f"mode: expected one of {', '.join(get_args(Mode))}; got {mode!r}")
    if isinstance(strength, bool) or not isinstance(strength, numbers.Real) or not 0 <= strength <= 1:
        raise ValueError(f"strength: expected a number from 0 to 1, got {strength!r}")
    if not project_start and mode not in ("update", "gradient"):
        raise ValueError(f"project_start: can be False for mode 'update' or 'gradient' only, got mode {mode!r}")
    names = adapter_names(model, adapter)
    check_exact(model, names)
    adapted = adapted_modules(model, names)
    constraints = constraints_for(model.get_base_model(), adapted.linear_paths, basis, sites)
    _check_constrained(model, adapted, constraints, names)
    protection = Protection(model, basis, constraints, adapted, names, mode, strength, project_start)
    held = {c.module for c in constraints}
    protection.unconstrained = [path for path in adapted.paths if path not in held]
    words = _uncovered(protection, trained_outside(model))
    if preflight:
        protection.preflight, trouble = _preflight(model, basis, tokenizer)
        words += trouble
    narrow = sorted({str(f.parameter.dtype) for f in protection._factors() if f.parameter.dtype.itemsize < 4})
    if narrow and strength == 1:
        words.append(
            f"the adapter's weights are {', '.join(narrow)}, and rounding them leaves a leak of about 1e-3; train "
            "them in fp32 (PEFT's autocast_adapter_dtype=True, and autocast around the model)"
        )
    if (before := protection.leak()) > 1e-3:
        fate = "is projected out now" if project_start and strength == 1 else "stays in part"
        words.append(f"the adapter already holds an update of leak {before:.3f}, which {fate}")
    if words:
        warnings.warn("protect: " + "; ".join(words), ProtectionWarning, stacklevel=2)
    protection._start()
    return protection


class Protection:
    """A protected model; of :func:`protect`. As a context manager it ends the protection on leaving.

    Attributes:
        model, basis, constraints, adapters, mode, strength: what is protected, and how.
        unconstrained: adapted modules that no constraint holds.
        preflight: result of the pre-flight check, None where it did not run.
    """

    def __init__(
        self,
        model: PeftModel,
        basis: RefusalBasis,
        constraints: list[Constraint],
        adapted: Adapted,
        adapters: tuple[str, ...],
        mode: Mode,
        strength: float,
        project_start: bool,
    ) -> None:
        self.model, self.basis, self.constraints, self.adapters = model, basis, constraints, adapters
        self.mode, self.strength, self._project_start = mode, strength, project_start
        self.unconstrained: list[str] = []
        self.preflight: Any = None
        self._layers = {c.module: adapted.linears[c.module] for c in constraints}
        self._steppers: list[StepProjector] = []
        self._active = False

    def _places(self) -> list[tuple[str, Any, Tensor, int]]:
        """(name, factor's module, U, dim) of every constrained factor."""
        found = []
        for c in self.constraints:
            layer, part, dim = self._layers[c.module], *(("lora_A", 1) if c.side == "input" else ("lora_B", 0))
            for name in self.adapters:
                if name in getattr(layer, part):
                    found.append((f"{c.module}.{part}.{name}", getattr(layer, part)[name], c.U, dim))
        return found

    def _factors(self) -> list[Factor]:
        return [
            Factor(name, whole(module._parameters.get("weight")), U, dim) for name, module, U, dim in self._places()
        ]

    def _start(self) -> None:
        self._active = True
        if self.mode == "forward":
            for _, module, U, dim in self._places():
                ProjectedLinear.of(module, U, dim, self.strength)
        elif self._project_start:
            self._project_weights(self.strength)

    def _project_weights(self, strength: float = 1.0) -> None:
        entries = [f.entry(f.parameter.detach()) for f in self._factors()]
        rk.ProjectionPlan(entries, strength).apply_()

    def attach(self, optimizer: Any) -> None:
        """Projects around every step of `optimizer`, a torch optimizer or accelerate's wrapper of one.

        Mode "forward" needs no optimizer, so a loop may call this in any mode. Attaching one twice changes nothing, nor
        does attaching one of `optimizer`, or any rk.ProjectedAdamW that holds the same weights in the same subspaces
        with the same strength: it projects its updates itself.

        Raises:
            TypeError, ValueError: no torch optimizer, one that does not train the constrained weights, or a
                ProjectedAdamW that holds some of them otherwise.
        """
        self._check_active("attach")
        if words := self.unheld():
            warnings.warn(f"attach: {words}", ProtectionWarning, stacklevel=2)
        if self.mode == "forward" or any(s.optimizer is innermost(optimizer) for s in self._steppers):
            return
        if projects_itself(innermost(optimizer), self._factors(), self.mode, self.strength):
            return
        self._steppers.append(
            StepProjector(optimizer, self._factors(), self.mode, self.strength, self._project_start, self.leak)
        )

    def optimizer(self, lr: float = 1e-3, **options: Any) -> rk.ProjectedAdamW:
        """AdamW over all trainable parameters that keeps the updates of the constrained ones in the complement itself:
        mode "update" without hooks, copies and passes of its own. It needs no `attach`, and `remove` does not end it.

        Args:
            lr, options: as in rk.ProjectedAdamW (betas, eps, weight_decay, backend).

        Raises:
            ValueError: another mode than "update", or no constrained weight is trainable.
        """
        self._check_active("optimizer")
        if self.mode != "update":
            raise ValueError(f"optimizer: projects updates, which is mode 'update'; this protection has {self.mode!r}")
        factors = [f for f in self._factors() if f.parameter.requires_grad]
        if not factors:
            raise ValueError("optimizer: no constrained adapter weight is trainable (is_trainable=True was not given?)")
        moved: dict[Any, Tensor] = {}  # one copy per device of a basis that many factors share
        bases = []
        for f in factors:
            key = (id(f.U), f.parameter.device)
            if key not in moved:
                moved[key] = f.U.to(f.parameter.device)
            bases.append((f.parameter, moved[key], f.dim))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return rk.ProjectedAdamW(trained, bases, lr, strength=self.strength, **options)

    def detach(self) -> None:
        """Takes the hooks off every attached optimizer."""
        for stepper in self._steppers:
            stepper.remove()
        self._steppers.clear()

    def callback(self, *, chat: Chat | None = None, prompts: Sequence[str] | None = None) -> TrainerCallback:
        """A callback for transformers.Trainer, TRL's trainers and whatever else is built on it.

        It attaches the optimizer that the Trainer makes, folds the weights before every save (so that a resumed run
        repeats an uninterrupted one), and adds the leak to the logs; with `chat` and `prompts` also the drift of the
        refusal features on these prompts.
        """
        from .callback import ProtectionCallback

        self._check_active("callback")
        return ProtectionCallback(self, chat, prompts)

    def unheld(self) -> str:
        """What is trained now and this protection does not hold though it is LoRA too: other adapters, in one
        sentence; "" where there is none."""
        others = [name for name in trained_adapters(self.model) if name not in self.adapters]
        if not others:
            return ""
        return (
            f"adapter {', '.join(others)} is trained and not held by this protection, which is of "
            f"{', '.join(self.adapters)}; its leak is not measured either (set_adapter, or protect with adapter=...)"
        )

    def leaks(self) -> list[Leak]:
        """Leak of every constraint, as the adapters stand now."""
        return [lora_leak(self._layers[c.module], self.adapters, c) for c in self.constraints]

    def leak(self) -> float:
        """The largest leak of all constraints; 0 where every promise holds."""
        return max(leak.rho for leak in self.leaks())

    def fold_(self) -> None:
        """Projects the adapters' parameters, so that they are what the promises say, in every mode.

        In mode "forward" the model computes what it computed before: its forward projects anyway, and what
        `save_pretrained` writes is projected with or without this. In mode "gradient" it takes out what leaked.

        Raises:
            ValueError: strength < 1, where projecting once more would change the model.
        """
        self._check_active("fold_")
        if self.strength != 1:
            raise ValueError(f"fold_: needs strength 1, this protection has {self.strength}; remove() ends it as it is")
        if self.mode != "forward":
            self._project_weights()
            return
        for _, module, _, _ in self._places():
            module.fold_()

    def remove(self) -> None:
        """Ends the protection. The model computes what it did; its adapters are plain LoRA again, trained freely."""
        self.detach()
        if self.mode == "forward" and self._active:
            for _, module, _, _ in self._places():
                module.release()
        self._active = False

    def _check_active(self, name: str) -> None:
        if not self._active:
            raise ValueError(f"{name}: this protection was removed; call protect again")

    def __enter__(self) -> Protection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _check_constrained(model: PeftModel, adapted: Adapted, constraints: list[Constraint], names: Sequence[str]) -> None:
    if not constraints:
        raise ValueError(
            f"sites: constrain no adapted module; adapter {', '.join(names)} touches "
            f"{compress_names(adapted.paths) or 'nothing'}"
        )
    for c in constraints:
        if c.module in adapted.others:
            raise ValueError(f"peft_model: {c.module} cannot be held exactly: {adapted.others[c.module][0]}")
        layer = adapted.linears[c.module]
        for part in (layer.lora_A, layer.lora_B):
            if any(isinstance(part[name], ProjectedLinear) for name in names if name in part):
                raise ValueError(f"peft_model: {c.module} is protected already; remove() that protection first")
        trained = [n for n, p in layer.get_base_layer().named_parameters() if p.requires_grad]
        if trained:
            raise ValueError(
                f"peft_model: the base layer's {', '.join(trained)} of {c.module} is trainable, past the adapter that "
                "is to be held; freeze it (bias='none', requires_grad_(False))"
            )
        if layer.merged:
            raise ValueError(f"peft_model: the adapter is merged into {c.module}; call unmerge_adapter() first")


def _uncovered(protection: Protection, outside: list[str]) -> list[str]:
    words = []
    if protection.unconstrained:
        words.append(
            f"no site constrains these adapted modules, which may change what flows into the basis: "
            f"{compress_names(protection.unconstrained)}"
        )
    if outside:
        words.append(f"these parameters are trained without any constraint: {compress_names(outside)}")
    return words


def _preflight(model: PeftModel, basis: RefusalBasis, tokenizer: Any) -> tuple[Any, list[str]]:
    """(result or None, what to warn of)."""
    if not basis.twins:
        return None, ["the pre-flight check did not run, for the basis has no twins (preflight=False silences this)"]
    from ..features.preflight import preflight
    from ..prompts.chat import Chat

    base = model.get_base_model()
    if tokenizer is None:
        from transformers import AutoTokenizer

        where = getattr(base.config, "name_or_path", "") or ""
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True)
        except (OSError, ValueError):
            return None, [f"the pre-flight check did not run, for {where or 'the model'!r} gave no tokenizer; pass one"]
    training = model.training
    model.eval()
    try:
        with model.disable_adapter(), torch.random.fork_rng():
            result = preflight(base, Chat(tokenizer), basis, basis.twins, n=min(32, len(basis.twins)))
    finally:
        model.train(training)
    if result.ok:
        return result, []
    return result, [
        f"the pre-flight check failed, so protecting this basis cannot be expected to hold refusal: {result.verdict}"
    ]
