"""ExperimentConfig: what an experiment is made of, every setting with its default."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ..prompts.records import content_hash
from .cells import Cell, cells, full_rows, main_rows

ROWS = {"main": main_rows, "full": full_rows}

# What neither changes a cell's result nor the prompts: a cached cell stays valid.
_FREE = frozenset({"out", "rows", "data", "seeds", "workers", "threads", "device", "trust_remote_code"})


@dataclass
class ExperimentConfig:
    """Settings of an experiment. Where no source is named, a default is this project's, chosen on the built-in model.

    What is asked:
        model: "builtin", a folder, or a hub name.  dtype, device, trust_remote_code: as `load_model`.
        harmful: calibration prompts with targets.  harmful_test: the reported ones.  pairs: hallucination pairs.
        benign: harmless dialogues for calibration and over-refusal.  task, task_test: the multiple-choice task.
        knowledge: questions the model can answer already.  poison: complying dialogues. Each "builtin", a file or a hub
        name, see `prompts.readers`.
        drop_overlap: leave prompts out of the test set that also calibrate, instead of refusing them.
        calibration, n_task, n_test: prompts per calibration set, training dialogues, test prompts per figure.
        keywords: the phrase list that judges other models than the built-in one.
        max_new_tokens: of an answer (20 on the built-in model, whose answers have 15).

    What is compared:
        rows: "main" or "full", see `cells`.  data: "benign", "poisoned".  seeds.
        poison_fraction: share of the poisoned training data that complies with harm.

    Heads, SAE, bases:
        base_model: the model before its alignment, which SafeLoRA compares with. None: a stand-in for the built-in
            model (see `baselines.unaligned`), and no row of SafeLoRA for others.
        heads: how many per score count as carriers (None: 10 %).  sae_layers: empty means the layers of the refusal
            heads.  sae_tokens, sae_k, sae_expansion, sae_lr.  sae_data: text the SAE is trained on.
        latents: n of the refusal set R.  z_rank: rank of the other sources in z.  input_rank: rank per adapted linear
            of the site "all".

    Fine-tuning (method.md's defaults for large models; the built-in model needs a larger rate):
        r, alpha, targets, lr, sft_lr, epochs, batch_size, weight_decay, max_length.

    Running:
        out: folder.  workers: processes, 1 on a GPU.  threads: CPU threads of each.
    """

    model: str = "builtin"
    dtype: str = "float32"
    device: str = "auto"
    trust_remote_code: bool = False
    harmful: str = "builtin"
    harmful_test: str = "builtin"
    pairs: str = "builtin"
    benign: str = "builtin"
    task: str = "builtin"
    task_test: str = "builtin"
    knowledge: str = "builtin"
    poison: str = "builtin"
    drop_overlap: bool = False
    calibration: int = 128
    n_task: int = 1000
    n_test: int = 100
    keywords: str = "refusal-kernels-1"
    max_new_tokens: int = 128

    rows: str = "main"
    data: list[str] = field(default_factory=lambda: ["poisoned", "benign"])
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    poison_fraction: float = 0.01

    base_model: str | None = None
    heads: int | None = None
    sae_layers: list[int] = field(default_factory=list)
    sae_data: str = "builtin"
    sae_tokens: int = 200_000
    sae_k: int = 16
    sae_expansion: int = 8
    sae_lr: float | None = 1e-3
    latents: int = 8
    z_rank: int = 4
    input_rank: int = 32

    r: int = 8
    alpha: int = 16
    targets: str = "all-linear"
    lr: float = 3e-3
    sft_lr: float = 3e-4
    epochs: int = 3
    batch_size: int = 16
    weight_decay: float = 0.0
    max_length: int = 512

    out: str = "experiment"
    workers: int = 2
    threads: int = 1

    def __post_init__(self) -> None:
        if self.rows not in ROWS:
            raise ValueError(f"rows: expected {' or '.join(ROWS)}; got {self.rows!r}")
        if not self.data or any(kind not in ("benign", "poisoned") for kind in self.data):
            raise ValueError(f"data: expected benign, poisoned or both; got {self.data!r}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: expected distinct integers, at least one; got {self.seeds!r}")
        if not 0 < self.poison_fraction < 1:
            raise ValueError(f"poison_fraction: expected a share between 0 and 1; got {self.poison_fraction!r}")
        for name in ("calibration", "n_task", "n_test", "r", "epochs", "batch_size", "latents", "z_rank", "input_rank",
                     "workers", "threads", "max_new_tokens", "sae_tokens", "sae_k", "sae_expansion"):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer from 1 on; got {value!r}")

    def cells(self) -> list[Cell]:
        """All cells, in the order in which they run."""
        rows = [row for row in ROWS[self.rows]() if row["method"] != "safelora" or self.has_base_model]
        return cells(rows, self.data, self.seeds)  # type: ignore[arg-type]

    @property
    def has_base_model(self) -> bool:
        """Whether SafeLoRA has weights to compare with."""
        return self.base_model is not None or self.model == "builtin"

    def key(self) -> str:
        """Changes with every setting that a cell's result depends on."""
        return content_hash(*(f"{k}={v!r}" for k, v in sorted(self.to_dict().items()) if k not in _FREE))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)
