"""Token ids equal the template's own, and the mask covers exactly what the assistant writes."""

import numpy as np
import pytest

from mambactl.data.format import encode, encode_rows
from mambactl.data.sources import Document
from mambactl.errors import UsageError

MESSAGES = [
    {"role": "system", "content": "the old king"},
    {"role": "user", "content": "river or tree"},
    {"role": "assistant", "content": "the river"},
    {"role": "user", "content": "new house"},
    {"role": "assistant", "content": "a small house"},
]


def test_text_gets_what_the_tokenizer_adds(tiny_tokenizer):
    example = encode({"text": "the old king"}, tiny_tokenizer)
    assert example.input_ids.tolist() == tiny_tokenizer("the old king")["input_ids"]
    assert example.loss_mask.all()


def test_chat_ids_are_the_templates_and_begin_once(tiny_tokenizer):
    expected = tiny_tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=True)
    for assistant_only in (False, True):
        example = encode({"messages": MESSAGES}, tiny_tokenizer, assistant_only)
        assert example.input_ids.tolist() == list(expected["input_ids"])


def test_no_second_begin_token(tiny_tokenizer):
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    tokenizer = deepcopy(tiny_tokenizer)
    begin = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)]
    )
    assert encode({"text": "the"}, tokenizer).input_ids.tolist()[0] == begin
    ids = encode({"messages": MESSAGES[:1]}, tokenizer).input_ids.tolist()
    assert ids.count(begin) == 1


def test_the_mask_is_the_assistants_turns_with_their_end(tiny_tokenizer):
    example = encode({"messages": MESSAGES}, tiny_tokenizer, assistant_only=True)
    learned = tiny_tokenizer.decode(example.input_ids[example.loss_mask])
    assert learned == "the river <|im_end|> a small house <|im_end|>"


def test_a_conversation_that_starts_with_the_assistant(tiny_tokenizer):
    example = encode({"messages": MESSAGES[2:3]}, tiny_tokenizer, assistant_only=True)
    assert tiny_tokenizer.decode(example.input_ids[example.loss_mask]).endswith("river <|im_end|>")


def test_templates_that_refuse_or_rewrite_are_sentences(tiny_tokenizer):
    from copy import deepcopy

    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        encode({"messages": MESSAGES}, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(UsageError, match="b.jsonl, row 7: the chat template refuses .*no system"):
        encode_rows([Document("b.jsonl, row 7", {"messages": MESSAGES})], tokenizer)
    tokenizer.chat_template = "{{ messages | length }} {{ messages[-1].content }}"
    with pytest.raises(UsageError, match="rewrites earlier turns"):
        encode({"messages": MESSAGES}, tokenizer, assistant_only=True)


def test_rows_are_shuffled_by_seed_and_stop_at_the_budget(tiny_tokenizer):
    rows = [Document(f"row {n}", {"text": "the " * (n + 2)}) for n in range(20)]
    everything = encode_rows(rows, tiny_tokenizer)
    assert [len(example.input_ids) for example in everything] == list(range(2, 22))
    some = encode_rows(rows, tiny_tokenizer, max_tokens=50, seed=3)
    again = encode_rows(rows, tiny_tokenizer, max_tokens=50, seed=3)
    lengths = [len(example.input_ids) for example in some]
    assert sum(lengths[:-1]) < 50 <= sum(lengths)
    assert lengths != sorted(lengths)
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(some, again, strict=True))


# the published templates in short, with special tokens that the tiny tokenizer has
TEMPLATES = {
    "llama3": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<unk>\n\n' + m.content | trim }}"
        "<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<unk>\n\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|im_end|>' }}\n"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content }}"
        "<|im_end|>{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_without_markers_are_masked_all_the_same(tiny_tokenizer, name):
    from copy import deepcopy

    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATES[name]
    example = encode({"messages": MESSAGES}, tokenizer, assistant_only=True)
    learned = tokenizer.decode(example.input_ids[example.loss_mask])
    assert learned == "the river <|im_end|> a small house <|im_end|>"


def test_a_templates_own_markers_are_trusted(tiny_tokenizer):
    from copy import deepcopy

    tokenizer = deepcopy(tiny_tokenizer)
    # such as drop earlier thoughts: no rendering of a part is a part of the whole
    tokenizer.chat_template = (
        "{{ messages | length }} {% for m in messages %}<|im_start|> {{ m.role }} "
        "{%- if m.role == 'assistant' %}{% generation %} {{ m.content }} <|im_end|>"
        "{% endgeneration %}{% else %} {{ m.content }} <|im_end|>{% endif %} {% endfor %}"
    )
    example = encode({"messages": MESSAGES}, tokenizer, assistant_only=True)
    learned = tokenizer.decode(example.input_ids[example.loss_mask])
    assert learned == "the river <|im_end|> a small house <|im_end|>"
