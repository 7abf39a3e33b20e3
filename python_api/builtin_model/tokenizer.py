"""The word-level tokenizer: one word, one token, nothing added and nothing lost."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from refusal_kernels.python_api.builtin_model.world import (
    ASSISTANT,
    BOS,
    EOS,
    PAD,
    REQUEST,
    SPECIAL_TOKENS,
    UNK,
    USER,
    World,
)

# A user turn without <req> gets one at its end, so that plain text typed by a person has the form of training.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %} " + USER + " {{ message['content'] | trim }}"
    "{% if '" + REQUEST + "' not in message['content'] %} " + REQUEST + "{% endif %}"
    "{% elif message['role'] == 'assistant' %} " + ASSISTANT + " {{ message['content'] | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('role: expected user or assistant, got ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} " + ASSISTANT + "{% endif %}"
)
CONTEXT = 256  # positions the model is configured for; training documents are shorter than 50 tokens


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """The tokenizer of ``world``: splits at white space, maps words to ids, unknown words to ``<unk>``.

    It adds no special tokens: the documents of :meth:`World.documents` spell out ``<bos>`` and ``<eos>`` themselves.
    Decoding joins words with single spaces, so ``decode(encode(text)) == text`` for every text of the world.
    """
    vocabulary = {word: i for i, word in enumerate(world.vocabulary())}
    core = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
    core.pre_tokenizer = WhitespaceSplit()
    core.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in (BOS, EOS, PAD, UNK)],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )
