"""Records, the chat form and the built-in prompts: spans, padding, log-probabilities on real tiny models, templates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from refusal_kernels.python_api import builtin_model
from refusal_kernels.python_api.builtin_model.world import REFUSAL
from refusal_kernels.python_api.prompts import builtin
from refusal_kernels.python_api.prompts.chat import Chat, answer_log_probs, by_length, generate, score_answers
from refusal_kernels.python_api.prompts.records import (
    ContrastPair,
    Dialogue,
    HarmfulPrompt,
    MultipleChoice,
    OverlapError,
    check_disjoint,
    content_hash,
    prompts_of,
    set_hash,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}</turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
# As Qwen3's: the prompt for generation opens a thought that a finished answer does not have.
UNSTABLE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
SPECIAL = [
    "<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>", "<turn>", "</turn>",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokenizer(template: str | None = None, bos: str | None = "<bos>", eos: str = "<eos>") -> Any:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    out = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token="<pad>", additional_special_tokens=SPECIAL[3:]
    )
    out.chat_template = template
    return out


SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "max_position_embeddings": 512,
}  # fmt: skip
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}, LLAMA3),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}, CHATML),
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM, {"head_dim": 8}, GEMMA),
}


def build(family: str) -> tuple[Any, Chat]:
    config_class, model_class, extra, template = FAMILIES[family]
    torch.manual_seed(0)
    return model_class(config_class(**{**SIZES, **extra})).eval(), Chat(tokenizer(template))


PAIRS = [("hi", "hello you"), ("a much longer question than the first", "no"), ("q", "y" * 30), ("hi", "no")]


# ---- templates -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("template", "asked", "answered"),
    [
        (CHATML, "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "A<|im_end|>"),
        (LLAMA3, "<bos><|head|>user<|/head|>\n\nQ<|eot|><|head|>assistant<|/head|>\n\n", "A<|eot|>"),
        (GEMMA, "<bos><turn>user\nQ</turn>\n<turn>model\n", "A</turn>"),
        (LLAMA2, "<bos>[INST] Q [/INST]", " A <eos>"),
        (UNSTABLE, "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "A<eos>"),
        (None, "<bos>Q\n", "A<eos>"),
    ],
)
def test_prompt_and_answer_have_the_models_form(template: str | None, asked: str, answered: str) -> None:
    chat = Chat(tokenizer(template))
    assert chat.render("Q") == asked
    encoded = chat.encode("Q", "A")
    decode = chat.tokenizer.decode
    assert decode(encoded.ids[: encoded.start]) == asked
    assert decode(encoded.ids[encoded.start :]) == answered
    assert list(encoded.ids[: encoded.start]) == chat.encode_prompt("Q")
    opened = chat.encode("Q", "A", close=False)
    assert decode(opened.ids[opened.start :]) == answered[: answered.index("A") + 1]
    for empty in ("", " \n"):
        with pytest.raises(ValueError, match="answer: expected a text"):
            chat.encode("Q", empty)


def test_a_system_message_comes_first_or_is_refused() -> None:
    text = Chat(tokenizer(CHATML), "be brief").render("Q")
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nQ<|im_end|>")
    encoded = Chat(tokenizer(CHATML), "be brief").encode("Q", "A")
    assert tokenizer().decode(encoded.ids) == text + "A<|im_end|>"
    with pytest.raises(ValueError, match="no chat template"):
        Chat(tokenizer(), "be brief")
    with pytest.raises(ValueError, match=r"system: .* does not take it \(System role not supported"):
        Chat(tokenizer(GEMMA), "be brief")


def test_a_tokenizer_without_bos_and_template() -> None:
    chat = Chat(tokenizer(bos=None))
    assert chat.render("Q") == "Q\n"
    assert chat.pad_id == 0


def test_answers_end_at_the_templates_end_of_turn() -> None:
    model, chat = build("qwen2")
    end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat.stop_ids(model) == [2, end]
    model.generation_config.eos_token_id = [5, 2]
    assert chat.stop_ids(model) == sorted({2, 5, end})
    model.generation_config.eos_token_id = 2
    with torch.no_grad():  # a model that ends its turn at once and would then go on
        hidden = model.model(chat.prompt_batch(["Q"])["input_ids"]).last_hidden_state[0, -1]
        model.lm_head.weight[end] = 100 * hidden
    assert generate(model, chat, ["Q"], max_new_tokens=30) == [""]


# ---- batches ---------------------------------------------------------------------------------------------------------
def test_batches_are_padded_on_the_right_side_with_their_spans() -> None:
    chat = Chat(tokenizer(CHATML))
    encoded = [chat.encode(*pair) for pair in PAIRS]
    batch = chat.batch(encoded)
    for row, e in enumerate(encoded):
        n = len(e.ids)
        assert batch.input_ids[row, :n].tolist() == list(e.ids)
        assert batch.attention_mask[row].tolist() == [1] * n + [0] * (batch.input_ids.shape[1] - n)
        assert batch.targets[row].nonzero()[:, 0].tolist() == list(range(e.start, n))
        assert batch.predicting[row].nonzero()[:, 0].tolist() == list(range(e.start - 1, n - 1))
        assert batch.labels[row].tolist() == [
            token if e.start <= i < n else -100 for i, token in enumerate(batch.input_ids[row].tolist())
        ]
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    prompts = chat.prompt_batch([prompt for prompt, _ in PAIRS])
    for row, (prompt, _) in enumerate(PAIRS):
        ids = chat.encode_prompt(prompt)
        assert prompts["input_ids"][row, -len(ids) :].tolist() == ids
        assert prompts["attention_mask"][row].sum() == len(ids)
        assert prompts["position_ids"][row, -len(ids) :].tolist() == list(range(len(ids)))


def test_batches_by_length_hold_everything_once_longest_first() -> None:
    lengths = [3, 9, 1, 9, 4]
    assert list(by_length(lengths, 2)) == [[1, 3], [4, 0], [2]]
    assert list(by_length([], 2)) == []


# ---- log-probabilities -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("close", [True, False])
def test_log_probabilities_equal_a_slow_loop(family: str, close: bool) -> None:
    model, chat = build(family)
    total, count = score_answers(model, chat, PAIRS, close=close, batch_size=3)
    for (prompt, answer), mine, n in zip(PAIRS, total.tolist(), count.tolist(), strict=True):
        e = chat.encode(prompt, answer, close)
        expected = 0.0
        for at in range(e.start, len(e.ids)):  # one forward pass a token, nothing padded
            with torch.no_grad():
                logits = model(torch.tensor([e.ids[:at]])).logits[0, -1].double()
            expected += float(logits.log_softmax(0)[e.ids[at]])
        assert mine == pytest.approx(expected, abs=2e-4)
        assert n == len(e.ids) - e.start


def test_log_probabilities_have_gradients_and_leave_the_mode_alone() -> None:
    model, chat = build("llama")
    batch = chat.batch([chat.encode(*pair) for pair in PAIRS])
    logits = model(**batch.inputs).logits.detach().requires_grad_()
    log_p = answer_log_probs(logits, batch)
    plain = logits[:, :-1].log_softmax(-1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(log_p, (plain * batch.targets[:, 1:]).sum(1), rtol=1e-5, atol=1e-4)
    (mine,) = torch.autograd.grad(log_p.sum(), logits, retain_graph=True)
    (theirs,) = torch.autograd.grad((plain * batch.targets[:, 1:]).sum(), logits)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    loss = model(**batch.inputs, labels=batch.labels).loss
    torch.testing.assert_close(-log_p.sum() / batch.targets.sum(), loss.detach(), rtol=1e-4, atol=1e-5)
    model.train()
    score_answers(model, chat, PAIRS[:1])
    generate(model, chat, ["q"], max_new_tokens=1)
    assert model.training


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_generation_is_greedy_whatever_the_batch(family: str) -> None:
    model, chat = build(family)
    prompts = ["hi", "a much longer question than the first", "q"]
    said = generate(model, chat, prompts, max_new_tokens=6, batch_size=3)
    for prompt, answer in zip(prompts, said, strict=True):
        ids = chat.encode_prompt(prompt)
        begin, stops = len(ids), chat.stop_ids(model)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in stops:
                break
        assert answer == chat.tokenizer.decode(ids[begin:], skip_special_tokens=True).strip()


# ---- records ---------------------------------------------------------------------------------------------------------
def test_records_are_named_by_their_content() -> None:
    assert HarmfulPrompt("a").id == HarmfulPrompt("a", category="x").id
    assert HarmfulPrompt("a").id != HarmfulPrompt("b").id
    assert HarmfulPrompt("a", id="mine").id == "mine"
    assert Dialogue("a", "b").id != Dialogue("a", "b", harmful=True).id
    assert content_hash("ab", "c") != content_hash("a", "bc")
    assert len(content_hash("\ud800")) == 12
    assert prompts_of([HarmfulPrompt("a"), "b", ContrastPair("c", "d", "e")]) == ["a", "b", "c"]
    assert set_hash(["a", "b"]) != set_hash(["b", "a"])
    question = MultipleChoice("q", ("x", "y"), (1,))
    assert question.dialogue().answer == "y"
    for correct in ((), (0, 1)):
        with pytest.raises(ValueError, match="expected one right choice"):
            MultipleChoice("q", ("x", "y"), correct).dialogue()


def test_overlap_is_found_and_listed() -> None:
    check_disjoint(["one", HarmfulPrompt("two")], ["three"])
    with pytest.raises(OverlapError, match=r"got 2: '  ONE. '; 'two\?'") as error:
        check_disjoint(["one", HarmfulPrompt("Two.")], ["  ONE. ", "two?", "two?", "three"], "basis and test")
    assert str(error.value).startswith("basis and test prompts")


# ---- the built-in world ----------------------------------------------------------------------------------------------
def test_the_built_in_prompts_fit_the_template_and_keep_the_splits_apart() -> None:
    chat = Chat(AutoTokenizer.from_pretrained(builtin_model.path()))
    unknown = chat.tokenizer.unk_token_id
    for held_out in (False, True):
        for asked in builtin.requests("harmful", 20, held_out=held_out):
            assert chat.render(builtin.spoken(asked.prompt)) == asked.prompt
        pairs = builtin.refusal_pairs(20, held_out=held_out) + builtin.hallucination_pairs(20, held_out=held_out)
        for pair in pairs:
            for answer in (pair.chosen, pair.rejected):
                encoded = chat.encode(pair.prompt, answer)
                assert unknown not in encoded.ids
                assert chat.tokenizer.decode(encoded.ids[encoded.start :]) == f"{answer} <eos>"
        assert {pair.chosen for pair in pairs[:20]} == {REFUSAL}
    for draw in (builtin.harmful, builtin.refusal_pairs, builtin.benign, builtin.choices, builtin.hallucination_pairs):
        assert draw(10, seed=1) == draw(10, seed=1)
        assert draw(10, seed=1) != draw(10, seed=2)
        check_disjoint(draw(100), draw(100, held_out=True))
    assert all(dialogue.harmful for dialogue in builtin.poison(20))
    assert not any(dialogue.harmful for dialogue in builtin.benign(20))


def test_twins_differ_in_one_word() -> None:
    for harmful, harmless in builtin.twins(50):
        a, b = harmful.split(), harmless.split()
        assert len(a) == len(b)
        assert sum(x != y for x, y in zip(a, b, strict=True)) == 1
