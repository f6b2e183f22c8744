"""A tokenizer trained on a few lines, with and without a small chat template."""

import copy

import pytest

from ssiuu_fast.models import train_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(
        ["Question: Who is Ada?\nAnswer: a baker", "Where is Bo? in Rome", "system user assistant"], 300
    )


@pytest.fixture()
def chat_tokenizer(tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]})
    chat.chat_template = TEMPLATE
    return chat
