"""Reading and changing z on the real model classes, with random weights and grouped-query attention."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import refusal_kernels.python_api
from refusal_kernels.python_api.capturing import (
    attention_geometry,
    capture,
    patch_heads,
    scale_heads,
    splice,
)
from refusal_kernels.python_api.edits import ablate_heads

VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 61, 3, 4, 2, 8, 24  # head_dim is not hidden / heads, on purpose
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # the default would leave attention almost uniform and hide mistakes
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "qwen2": (
        transformers.Qwen2Config,
        transformers.Qwen2ForCausalLM,
        {"hidden_size": 32},
    ),  # has no head_dim of its own
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": 5}),
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM, {}),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM, {"sliding_window": 5}),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM, {"sliding_window": 5}),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(family: str = "llama", **changes: Any) -> Any:
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(1)
    return model_class(config_class(**{**SIZES, **extra, **changes})).eval()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    return build("llama")


def batch(rows: int = 2, tokens: int = 9, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules whose forward ran to its end."""
    ran: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: ran.append(name)

    handles = [m.register_forward_hook(note(n)) for n, m in model.named_modules() if n]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def hook_count(model: nn.Module) -> int:
    return sum(
        len(m._forward_pre_hooks)
        + len(m._forward_hooks)
        + len(m._backward_hooks)
        + len(m._forward_pre_hooks_with_kwargs)
        for m in model.modules()
    )


def test_the_package_is_lazy_guarded_and_complete() -> None:
    """In a fresh interpreter: importing costs nothing heavy, one name costs only its own, a stray import is refused."""
    program = """
import sys
import refusal_kernels.python_api as api
heavy = {"transformers", "datasets", "typer", "peft", "accelerate", "matplotlib"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
api.scale_heads
assert not heavy & set(sys.modules), heavy & set(sys.modules)
for name in api.__all__:
    assert getattr(api, name).__name__ == name
assert set(api.__all__) <= set(dir(api))
sys.path.insert(0, sys.argv[1])
try:
    import python_api
except ImportError as error:
    assert "import refusal_kernels.python_api, not python_api" in str(error)
else:
    raise AssertionError("python_api was importable by itself")
"""
    root = Path(refusal_kernels.python_api.__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", program, str(root)], check=True, timeout=120)


# ------------------------------------------------------------------------------------------------------ reading z


def test_geometry(model: Any) -> None:
    got = attention_geometry(model)
    assert (got.n_layers, got.n_heads, got.n_kv_heads, got.head_dim) == (LAYERS, HEADS, KV_HEADS, HEAD_DIM)
    assert got.layers == (0, 1, 2)
    assert got.d_z == HEADS * HEAD_DIM
    assert got.d_model == model.config.hidden_size
    assert [got.kv_head(h) for h in range(HEADS)] == [0, 0, 1, 1]


def test_z_through_o_proj_is_the_attention_output(model: Any) -> None:
    outputs: dict[int, Tensor] = {}
    handles = [
        layer.self_attn.register_forward_hook(lambda _m, _a, out, i=i: outputs.__setitem__(i, out[0]))
        for i, layer in enumerate(model.model.layers)
    ]
    x = batch()
    with torch.no_grad():
        model(**x)
    for handle in handles:
        handle.remove()
    with capture(model) as cap:
        z = cap.run(x)
    assert list(z) == [0, 1, 2]
    assert cap.widths == dict.fromkeys(range(3), HEADS * HEAD_DIM)
    for i, layer in enumerate(model.model.layers):
        assert z[i].shape == (18, HEADS * HEAD_DIM)
        assert not z[i].requires_grad
        assert torch.equal(layer.self_attn.o_proj(z[i]).reshape(outputs[i].shape), outputs[i])


def test_each_head_is_its_own_attention_over_its_group_s_keys(llama: Any) -> None:
    """z recomputed head by head in fp64 from the layer's input, with the key/value head of its group."""
    seen: dict[str, Tensor] = {}
    attention = llama.model.layers[1].self_attn
    handle = attention.register_forward_pre_hook(
        lambda _m, _a, kw: seen.update(x=kw["hidden_states"]), with_kwargs=True
    )
    x = batch(rows=1)
    with capture(llama, [1], per_head=True) as cap:
        got = cap.run(x)[1]
    handle.remove()
    hidden, n = seen["x"][0].detach().double(), 9
    angle = torch.arange(n).double()[:, None] * 10_000.0 ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

    def rotate(v: Tensor) -> Tensor:
        half = HEAD_DIM // 2
        return v * cos + torch.cat([-v[:, half:], v[:, :half]], 1) * sin

    for head in range(HEADS):

        def part(linear: nn.Linear, i: int) -> Tensor:
            return hidden @ linear.weight.detach().double()[i * HEAD_DIM : (i + 1) * HEAD_DIM].T

        group = head // (HEADS // KV_HEADS)
        q, k, v = part(attention.q_proj, head), part(attention.k_proj, group), part(attention.v_proj, group)
        score = rotate(q) @ rotate(k).T / HEAD_DIM**0.5
        score = score.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        torch.testing.assert_close(got[:, head].double(), score.softmax(1) @ v, rtol=1e-4, atol=1e-5)


def test_head_selection_takes_the_columns_in_the_order_given(llama: Any) -> None:
    x = batch()
    with capture(llama, [0, 2]) as cap:
        whole = cap.run(x)
    with capture(llama, [0, 2], heads={2: [3, 1]}) as cap:
        some = cap.run(x)
        assert cap.widths == {0: HEADS * HEAD_DIM, 2: 2 * HEAD_DIM}
    with capture(llama, [0, 2], heads=[2], per_head=True) as cap:
        single = cap.run(x)
    by_head = whole[2].unflatten(-1, (HEADS, HEAD_DIM))
    assert torch.equal(some[0], whole[0])
    assert torch.equal(some[2].unflatten(-1, (2, HEAD_DIM)), by_head[:, [3, 1]])
    assert single[2].shape == (18, 1, HEAD_DIM)
    assert torch.equal(single[2], by_head[:, [2]])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_and_does_not_matter(model: Any, side: str) -> None:
    lengths, width = (9, 4), 9
    ids, mask = torch.zeros(2, width, dtype=torch.int64), torch.zeros(2, width, dtype=torch.int64)
    alone = []
    with capture(model) as cap:
        for row, n in enumerate(lengths):
            text = batch(1, n, seed=row)["input_ids"]
            alone.append(cap.run(text))
            at = slice(width - n, width) if side == "left" else slice(0, n)
            ids[row, at], mask[row, at] = text[0], 1
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        together = cap.run({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    for layer in range(LAYERS):
        assert together[layer].shape[0] == sum(lengths)
        torch.testing.assert_close(together[layer], torch.cat([a[layer] for a in alone]), rtol=1e-4, atol=1e-5)


def test_positions_choose_the_tokens(llama: Any) -> None:
    x = batch()
    wanted = torch.zeros(2, 9, dtype=torch.bool)
    wanted[0, 3] = wanted[1, 0] = wanted[1, 8] = True
    with capture(llama, [1]) as cap:
        assert torch.equal(cap.run(x, positions=wanted)[1], cap.run(x)[1][[3, 9, 17]])
        with pytest.raises(ValueError, match=r"positions: expected shape \[2, 9\]"):
            cap.run(x, positions=wanted[:, :5])


# ------------------------------------------------------------------------------------------------------ early stop


@pytest.mark.parametrize("use_cache", [None, False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_nothing_after_the_deepest_z_runs(model: Any, use_cache: bool | None, grad: bool) -> None:
    x: dict[str, Any] = batch()
    if use_cache is not None:
        x["use_cache"] = use_cache
    with watched(model) as ran, torch.set_grad_enabled(grad), capture(model, [1]) as cap:
        assert set(cap.run(x)) == {1}
    assert "model.layers.0" in ran
    assert "model.layers.1.self_attn.v_proj" in ran
    assert not [n for n in ran if n.startswith(("model.layers.2", "model.norm", "lm_head", "model.layers.1.mlp"))]
    assert not {"model", "model.layers.1", "model.layers.1.self_attn", "model.layers.1.self_attn.o_proj"} & set(ran)


def test_run_builds_no_cache_unless_asked(llama: Any) -> None:
    caches: list[bool] = []
    handle = llama.model.layers[0].register_forward_pre_hook(
        lambda _m, _a, kwargs: caches.append(kwargs["past_key_values"] is not None), with_kwargs=True
    )
    with capture(llama, [1]) as cap:
        cap.run(batch())
        cap.run({**batch(), "use_cache": True})
    handle.remove()
    assert caches == [False, True]


def test_early_stop_returns_what_a_full_forward_has(model: Any) -> None:
    x = batch()
    with capture(model, [0, 1]) as cap:
        short = cap.run(x)
        with torch.no_grad():
            logits = model(**x).logits  # a plain call inside the context runs to its end and records as well
        full = {layer: z.reshape(18, -1) for layer, z in cap.z.items()}
    assert logits.shape == (2, 9, VOCAB)
    assert all(torch.equal(short[layer], full[layer]) for layer in (0, 1))


def test_early_stop_is_switched_off_for_offloaded_weights(llama: Any) -> None:
    """Accelerate's hooks have a second half after the forward; unwinding would leave weights on the device."""
    accelerate = pytest.importorskip("accelerate")
    model = build()
    accelerate.cpu_offload(model, execution_device="cpu")
    x = batch()
    with capture(model, [0]) as cap, watched(model) as ran:
        z = cap.run(x)[0]
    assert "lm_head" in ran
    assert all(p.is_meta for p in model.model.layers[0].parameters())
    with capture(llama, [0]) as cap:
        assert torch.equal(cap.run(x)[0], z)


# ------------------------------------------------------------------------------------------- leaving things alone


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was(error: type[BaseException] | None) -> None:
    model = build()
    model.train()
    model.model.layers[1].eval()  # a mixed state must come back mixed
    flags = [m.training for m in model.modules()]
    config, hooks = model.config.to_dict(), hook_count(model)
    x = batch()

    def fail(*_: Any) -> None:
        if error is not None:
            raise error("on purpose")

    handle = model.model.layers[1].self_attn.v_proj.register_forward_hook(fail)
    expected = contextlib.nullcontext() if error is None else pytest.raises(error, match="on purpose")
    with expected, capture(model, [0, 2]) as cap:
        assert not any(m.training for m in model.modules())
        cap.run(x)
    handle.remove()
    assert [m.training for m in model.modules()] == flags
    assert model.config.to_dict() == config
    assert hook_count(model) == hooks
    assert cap.z == {}


def test_dropout_is_off_inside_unless_asked() -> None:
    model = build(attention_dropout=0.5).train()
    model.config._attn_implementation = "eager"
    x = batch()
    with capture(model, [1]) as cap:
        assert torch.equal(cap.run(x)[1], cap.run(x)[1])
    with capture(model, [1], eval_mode=False) as cap:
        assert not torch.equal(cap.run(x)[1], cap.run(x)[1])


@pytest.mark.parametrize("edit", ["scale", "ablate", "patch", "splice"])
def test_edits_leave_no_hook_behind(edit: str) -> None:
    model = build()
    hooks = hook_count(model)
    make: dict[str, Callable[[], Any]] = {
        "scale": lambda: scale_heads(model, {0: {1: 0.5}, 2: {0: 2.0}}, positions="unmasked"),
        "ablate": lambda: ablate_heads(model, {0: [1], 2: [0]}, positions="unmasked"),
        "patch": lambda: patch_heads(model, {0: {1: torch.zeros(HEAD_DIM)}}, positions="unmasked"),
        "splice": lambda: splice(model, {0: lambda z: z, 1: lambda z: z}, positions="unmasked"),
    }
    with make[edit]():
        assert hook_count(model) > hooks
    assert hook_count(model) == hooks
    with pytest.raises(ZeroDivisionError), make[edit]():
        raise ZeroDivisionError
    assert hook_count(model) == hooks


def test_a_bad_second_layer_registers_nothing() -> None:
    model = build()
    hooks = hook_count(model)
    for bad in (
        lambda: capture(model, [0, 9]),
        lambda: splice(model, {0: lambda z: z, 9: lambda z: z}),
        lambda: scale_heads(model, {0: {0: 1.0}, 9: {0: 1.0}}),
    ):
        with pytest.raises(ValueError, match="layer: expected 0 <= layer < 3"), bad():
            pass
    assert hook_count(model) == hooks


def test_run_keeps_no_activations(llama: Any) -> None:
    with capture(llama, [0, 1]) as cap:
        z = cap.run(batch())
        alive = weakref.ref(z[0])
        del z
        gc.collect()
        assert cap.z == {}
        assert alive() is None


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"layers": [3]}, ValueError, r"layer: expected 0 <= layer < 3 \(LlamaForCausalLM\), got 3"),
        ({"layers": [-1]}, ValueError, "got -1"),
        ({"layers": []}, ValueError, "at least one layer"),
        ({"layers": [1, 1]}, ValueError, "distinct"),
        ({"layers": 1}, TypeError, "layers: expected a sequence of ints"),
        ({"layers": ["1"]}, TypeError, "layer: expected an int, got '1'"),
        ({"layers": [1.0]}, TypeError, r"layer: expected an int, got 1\.0"),
        ({"layers": [True]}, TypeError, "layer: expected an int, got True"),
        ({"heads": ["0"]}, TypeError, "heads of layer 0: expected an int, got '0'"),
        ({"heads": [4]}, ValueError, "heads: expected 0 <= head < 4 for layer 0, got 4"),
        ({"heads": [0, 0]}, ValueError, "distinct heads"),
        ({"heads": []}, ValueError, "at least one"),
        ({"heads": "0"}, TypeError, "heads"),
        ({"layers": [0], "heads": {1: [0]}}, ValueError, r"names layers \[1\]"),
    ],
)
def test_bad_arguments(llama: Any, arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message), capture(llama, **arguments):
        pass


def test_integers_of_other_libraries_are_layers_and_heads(llama: Any) -> None:
    with capture(llama, np.array([0, 1]), heads=[np.int32(2)]) as cap:
        z = cap.run(torch.tensor([[5, 6, 7]]))
    assert cap.layers == [0, 1]
    assert all(type(layer) is int for layer in cap.layers)
    assert {layer: x.shape[0] for layer, x in z.items()} == {0: 3, 1: 3}
    assert cap.heads == {0: [2], 1: [2]}


def test_running_after_the_end_of_the_context_says_so(llama: Any) -> None:
    with capture(llama, [1]) as cap:
        cap.run(torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match="run was called after the end of the with block"):
        cap.run(torch.tensor([[5, 6]]))


def test_models_that_cannot_be_captured() -> None:
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no layer with self_attn\.o_proj.*c_proj"), capture(gpt2):
        pass
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got str"), capture("llama"):  # type: ignore[arg-type]
        pass
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="layer 0 are on the meta device"), capture(empty):
        pass
    with pytest.raises(TypeError, match="_orig_mod"), capture(torch.compile(build())):  # type: ignore[arg-type]
        pass


def test_a_hybrid_model_offers_the_layers_that_have_heads() -> None:
    config = transformers.Qwen3NextConfig(
        **{**SIZES, "num_hidden_layers": 2},
        layer_types=["linear_attention", "full_attention"],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    model = transformers.Qwen3NextForCausalLM(config).eval()
    assert attention_geometry(model).layers == (1,)
    with capture(model) as cap:
        assert {k: v.shape for k, v in cap.run(batch()).items()} == {1: (18, HEADS * HEAD_DIM)}
    with (
        pytest.raises(ValueError, match=r"layer 0 \(Qwen3NextDecoderLayer\) has no self_attn.o_proj"),
        capture(model, [0]),
    ):
        pass


def test_peft_wrapped_models(llama: Any) -> None:
    peft = pytest.importorskip("peft")
    model = build()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj", "v_proj"], r=2))
    x = batch()
    with capture(wrapped) as cap, capture(llama) as plain:
        got, expected = cap.run(x), plain.run(x)
    assert attention_geometry(wrapped) == attention_geometry(llama)
    assert all(torch.equal(got[layer], expected[layer]) for layer in range(LAYERS))  # LoRA's B starts at zero


def test_unmasked_edits_of_a_wrapped_model_see_the_mask_in_generate(llama: Any) -> None:
    """PeftModel.generate enters below the wrapper."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["v_proj"], r=2)).eval()
    x = batch(rows=2)
    x["attention_mask"][0, :4] = 0
    touched: list[int] = []

    def shift(z: Tensor) -> Tensor:
        touched.append(z.shape[0])
        return z + 1

    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with splice(wrapped, {0: shift, 1: shift}, "unmasked"):
        got = wrapped.generate(**x, **options)
    assert touched == [14, 14, 2, 2, 2, 2, 2, 2]  # the prompt without its padding, then one token a row
    with splice(llama, {0: shift, 1: shift}, "unmasked"):
        assert torch.equal(llama.generate(**x, **options), got)


def test_other_towers_and_wrappers_do_not_confuse(llama: Any) -> None:
    """Llama 4's image tower has self_attn.o_proj as well; the layers meant are the language model's."""
    text = {**SIZES, "intermediate_size_mlp": 16, "num_local_experts": 2}
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": HIDDEN,
        "projector_input_dim": HIDDEN,
        "projector_output_dim": HIDDEN,
    }
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    model = transformers.Llama4ForConditionalGeneration(config).eval()
    assert attention_geometry(model).n_layers == LAYERS
    with watched(model) as ran, capture(model, [1]) as cap:
        assert cap.run(batch())[1].shape == (18, HEADS * HEAD_DIM)
    assert "model.language_model.layers.0" in ran or "language_model.model.layers.0" in ran

    class Wrapper(nn.Module):  # as DistributedDataParallel: one attribute "module", no config
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **kwargs: Any) -> Any:
            return self.module(**kwargs)

    with capture(Wrapper(llama), [1]) as cap, capture(llama, [1]) as plain:
        assert torch.equal(cap.run(batch())[1], plain.run(batch())[1])


# ---------------------------------------------------------------------------------------------------- changing z


def zeroed(model: Any, family_layer: int, heads: list[int], factor: float = 0.0) -> Tensor:
    """Logits of a copy of ``model`` with the heads' columns of o_proj scaled."""
    import copy

    other = copy.deepcopy(model)
    with torch.no_grad():
        for head in heads:
            other.model.layers[family_layer].self_attn.o_proj.weight[:, head * HEAD_DIM : (head + 1) * HEAD_DIM] *= (
                factor
            )
        return other(**batch()).logits


def test_ablation_and_scaling_equal_changed_o_proj_columns(model: Any) -> None:
    x = batch()
    with torch.no_grad():
        plain = model(**x).logits
        with ablate_heads(model, {1: [0, 2]}):
            ablated = model(**x).logits
        with scale_heads(model, {1: {0: 0.0, 2: 0.0}}):
            scaled_away = model(**x).logits
        with scale_heads(model, {1: {3: 0.5}}):
            halved = model(**x).logits
        with scale_heads(model, {1: {3: 1.0}, 0: {}}):
            unchanged = model(**x).logits
        assert torch.equal(model(**x).logits, plain)
    torch.testing.assert_close(ablated, zeroed(model, 1, [0, 2]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled_away, zeroed(model, 1, [0, 2]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(halved, zeroed(model, 1, [3], 0.5), rtol=1e-5, atol=1e-5)
    assert torch.equal(unchanged, plain)
    assert (ablated - plain).abs().max() > 1e-3
    assert (halved - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    "positions",
    [
        slice(4, 6),
        [4, 5],
        [-5, -4],
        torch.tensor([0, 0, 0, 0, 1, 1, 0, 0, 0]),
        torch.tensor([[0, 0, 0, 0, 1, 1, 0, 0, 0]] * 2).bool(),
    ],
    ids=["slice", "list", "negative", "mask1d", "mask2d"],
)
def test_edits_touch_only_their_positions(llama: Any, positions: Any) -> None:
    x = batch()
    with capture(llama, [1, 2]) as before:
        z = before.run(x)[1].reshape(2, 9, HEADS, HEAD_DIM)
    contexts: list[Any] = [
        ablate_heads(llama, {1: [2]}, positions),
        scale_heads(llama, {1: {2: 0.0}}, positions),
        patch_heads(llama, {1: {2: torch.zeros(HEAD_DIM)}}, positions),
        splice(llama, {1: lambda part: part * 0}, positions, heads=[2]),
    ]
    expected = z.clone()
    expected[:, 4:6, 2] = 0
    for context in contexts:
        with context, capture(llama, [1]) as cap:
            assert torch.equal(cap.run(x)[1].reshape(2, 9, HEADS, HEAD_DIM), expected)


def test_unmasked_follows_the_mask_of_each_call(llama: Any) -> None:
    with splice(llama, {0: lambda z: z + 1.0}, "unmasked"), capture(llama, [0]) as cap:
        changed = {}
        for n in (9, 5):
            x = batch()
            x["attention_mask"][1, n:] = 0
            llama(**x)
            changed[n] = cap.z[0].clone()
    for n in (9, 5):
        x = batch()
        x["attention_mask"][1, n:] = 0
        with capture(llama, [0]) as cap:
            llama(**x)
            difference = changed[n] - cap.z[0]
        torch.testing.assert_close(difference[1, :n], torch.ones_like(difference[1, :n]))
        assert torch.equal(difference[1, n:], torch.zeros_like(difference[1, n:]))


def test_identity_splice_leaves_every_bit(model: Any) -> None:
    x = batch()
    x["attention_mask"][0, 6:] = 0
    plain = model(**x).logits
    for positions in (None, "unmasked", [1, 2]):
        for heads in (None, [3, 0]):
            with splice(model, {layer: lambda z: z for layer in range(LAYERS)}, positions, heads):  # type: ignore[arg-type]
                assert torch.equal(model(**x).logits, plain)


def test_splice_hands_over_the_touched_tokens_and_casts_back() -> None:
    model = build().to(torch.bfloat16)
    x = batch()
    shapes: list[tuple[Any, torch.dtype]] = []

    def reconstruct(z: Tensor) -> Tensor:
        shapes.append((tuple(z.shape), z.dtype))
        return z.float() * 1.0  # an fp32 SAE inside a bf16 model

    with torch.no_grad():
        plain = model(**x).logits
        with splice(model, {0: reconstruct}):
            assert torch.equal(model(**x).logits, plain)
        with splice(model, {0: reconstruct}, [0, 1, 2], heads=[1, 2]):
            assert torch.equal(model(**x).logits, plain)
    assert shapes == [((2, 9, 32), torch.bfloat16), ((6, 16), torch.bfloat16)]


def test_splice_refuses_another_shape(llama: Any) -> None:
    with (
        pytest.raises(
            ValueError, match=r"functions: expected \[2, 9, 32\] from the function of layer 0, got \[2, 9, 31\]"
        ),
        splice(llama, {0: lambda z: z[..., 1:]}),
    ):
        llama(**batch())


def test_patching_moves_one_run_s_heads_into_another(llama: Any) -> None:
    ours, theirs = batch(seed=1), batch(seed=2)
    with torch.no_grad():
        with capture(llama) as cap:
            donor_logits = llama(**theirs).logits
            donor = {layer: z.clone() for layer, z in cap.z.items()}
        with capture(llama, [1]) as cap:
            own = cap.run(ours)[1].reshape(2, 9, HEADS, HEAD_DIM)
        given = donor[1].unflatten(-1, (HEADS, HEAD_DIM))[:, :, 3]
        with patch_heads(llama, {1: {3: given}}), capture(llama, [1]) as cap:
            got = cap.run(ours)[1].reshape(2, 9, HEADS, HEAD_DIM)
        # Every head's z from the donor, on the donor's own tokens, is the donor.
        with patch_heads(llama, dict(donor)):
            assert torch.equal(llama(**theirs).logits, donor_logits)
            assert not torch.equal(llama(**ours).logits, donor_logits)
    assert torch.equal(got[:, :, 3], given)
    assert torch.equal(got[:, :, :3], own[:, :, :3])
    message = r"broadcasts to \[2, 9, 8\] for head 0 of layer 1, got \[7\]"
    with patch_heads(llama, {1: {0: torch.zeros(7)}}), pytest.raises(ValueError, match=message):
        llama(**ours)


def test_contexts_compose_in_the_order_of_entering(llama: Any) -> None:
    x = batch()
    with capture(llama, [1]) as cap:
        z = cap.run(x)[1]
    with splice(llama, {1: lambda v: v + 1}), splice(llama, {1: lambda v: v * 2}), capture(llama, [1]) as cap:
        assert torch.equal(cap.run(x)[1], (z + 1) * 2)
    with capture(llama, [1]) as cap, splice(llama, {1: lambda v: v + 1}):
        assert torch.equal(cap.run(x)[1], z)


def test_nested_captures_stop_at_their_own_layer(llama: Any) -> None:
    x = batch()
    with capture(llama, [0]) as outer, capture(llama, [2]) as inner:
        deep = inner.run(x)[2]
        assert set(outer.z) == {0}  # it watched the inner run, and did not cut it short
        assert torch.equal(outer.run(x)[0], outer.run(x)[0])
    with capture(llama, [2]) as cap:
        assert torch.equal(cap.run(x)[2], deep)


def test_gradients_reach_z_factors_and_spliced_functions() -> None:
    model = build().double()
    x = batch()

    def objective() -> Tensor:
        return model(**x).logits[:, -1].log_softmax(-1)[:, 7].sum()

    # d/d factor of one head at 1 equals <d objective / d z_head, z_head>, the first-order screen of head influence.
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    with scale_heads(model, {1: {2: factor}}):
        (by_factor,) = torch.autograd.grad(objective(), factor)
    with capture(model, [1], detach=False) as cap:
        value = objective()
        (whole,) = torch.autograd.grad(value, cap.z[1])
        inner = (whole * cap.z[1])[..., 2 * HEAD_DIM : 3 * HEAD_DIM].sum()
    torch.testing.assert_close(by_factor, inner.detach(), rtol=1e-9, atol=1e-12)
    eps, sides = 1e-2, []  # large, because transformers' norms round to fp32 whatever the model's dtype
    with torch.no_grad():
        for sign in (1, -1):
            with scale_heads(model, {1: {2: 1 + sign * eps}}):
                sides.append(objective())
    torch.testing.assert_close(by_factor, (sides[0] - sides[1]) / (2 * eps), rtol=1e-2, atol=1e-4)

    shift = torch.zeros(HEADS * HEAD_DIM, dtype=torch.float64, requires_grad=True)
    with splice(model, {1: lambda z: z + shift}, [8]):
        (by_shift,) = torch.autograd.grad(objective(), shift)
    torch.testing.assert_close(by_shift, whole[:, 8].sum(0), rtol=1e-9, atol=1e-12)


def test_edits_act_during_cached_generation(llama: Any) -> None:
    x = batch(rows=1)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with ablate_heads(llama, {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}, positions="unmasked"):
        cached = llama.generate(**x, **options)
        uncached = llama.generate(**x, **options, use_cache=False)
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, llama.generate(**x, **options))


def test_a_cached_prefix_gives_the_z_of_the_new_tokens(llama: Any) -> None:
    x = batch()
    with torch.no_grad(), capture(llama, [2]) as cap:
        whole = cap.run(x)[2].reshape(2, 9, -1)
        prefix = llama(input_ids=x["input_ids"][:, :6], use_cache=True).past_key_values
        rest = cap.run(
            {"input_ids": x["input_ids"][:, 6:], "attention_mask": x["attention_mask"], "past_key_values": prefix}
        )
    torch.testing.assert_close(rest[2].reshape(2, 3, -1), whole[:, 6:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("edit", "arguments", "message"),
    [
        (scale_heads, [{}], "factors: expected a non-empty dict"),
        (scale_heads, [{0: 0.5}], r"factors: expected \{head: factor\}"),
        (scale_heads, [{0: {0: "x"}}], "factors: expected a float"),
        (scale_heads, [{0: {0: torch.ones(2)}}], "0-dim"),
        (scale_heads, [{-1: {0: 1.0}}], "got -1"),
        (ablate_heads, [{0: [7]}], "0 <= head < 4"),
        (ablate_heads, [{0: [0]}, "everything"], "positions: expected"),
        (ablate_heads, [{0: [0]}, [9]], r"positions: expected ints in \[-9, 9\)"),
        (ablate_heads, [{0: [0]}, torch.tensor([4, 5])], "positions: expected shape"),
        (ablate_heads, [{0: [0]}, torch.arange(9)], "use a list of ints"),
        (patch_heads, [{0: [1.0]}], "values: expected a tensor"),
        (splice, [{0: 3}], "functions: expected a callable"),
    ],
)
def test_bad_edits(llama: Any, edit: Callable[..., Any], arguments: list[Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message), edit(llama, *arguments):
        llama(**batch())
