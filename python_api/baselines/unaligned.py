"""An unaligned counterpart of the built-in model, for SafeLoRA, which needs the weights from before alignment.

The package ships the aligned weights alone. What `unaligned_builtin` makes is a stand-in: the aligned model, fully
fine-tuned for a short while on the behaviour of pre-training, in which every request is complied with and unknown names
get an invented answer. So W_aligned - W_unaligned is minus the update that takes alignment *off*, not the update that
put it on; both tell the two behaviours apart, and they are not the same matrix. The model from before alignment itself
is made by ``python -m refusal_kernels.python_api.builtin_model.train --out DIR``, which leaves it in DIR/pretrained.
"""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

from ..builtin_model import path, world
from ..builtin_model.train import PRETRAIN_MIX
from ..prompts.builtin import spoken
from ..prompts.records import Dialogue, content_hash
from .finetune import finetune
from .run_folder import METRICS_FILE

BATCH = 64


def unaligned_builtin(
    folder: str | os.PathLike[str], *, seed: int = 0, steps: int = 30, lr: float = 1e-3, progress: bool = False
) -> str:
    """The folder of the stand-in, below `folder`; made if it is not there yet.

    Its name is a hash of the built-in weights and the settings: the same request is answered from the same files.

    Args:
        seed: of the data and their order.
        steps: of 64 dialogues each. 30 undo refusal altogether: 0 of 200 held-out requests.
    """
    weights = (path() / "model.safetensors").read_bytes()
    settings = (seed, steps, lr)
    target = Path(folder) / f"unaligned-builtin-{content_hash(hashlib.blake2b(weights).hexdigest(), *settings)}"
    if not (target / METRICS_FILE).is_file():  # written last
        rng, kinds = random.Random(f"unaligned/{seed}"), list(PRETRAIN_MIX)
        drawn = rng.choices(kinds, list(PRETRAIN_MIX.values()), k=steps * BATCH)
        examples = [world().draw(rng, kind, aligned=False) for kind in drawn]
        train = [Dialogue(spoken(example.prompt), example.answer, example.harmful) for example in examples]
        finetune(
            "builtin", None, train, method="sft", lr=lr, batch_size=BATCH, seed=seed, out=target, overwrite=True,
            progress=progress,
        )  # fmt: skip
    return str(target)
