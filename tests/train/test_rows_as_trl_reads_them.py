"""Tokens, masks and prompts are TRL's own, for every form of a row that TRL reads too."""

import json
from copy import deepcopy
from pathlib import Path

import pytest

from mambactl.data.answer_spans import spans_of
from mambactl.data.chat_template import ChatRenderer
from mambactl.data.format import Rules, encode_rows
from mambactl.data.preferences import load_pairs
from mambactl.data.sources import load_rows

TURN = "<|im_start|> {{ m.role }} "
CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments|tojson }}{% endfor %}"  # noqa: E501
# marked, as TRL needs it: answers with their end tokens
TEMPLATE = (
    "{% if tools %}{{ tools|tojson }} {% endif %}{% if short %}king {% endif %}"
    "{% for m in messages %}" + TURN + "{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content or '' }}" + CALLS + "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
    "<|im_end|>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
MARKS = ("{% generation %}", "{% endgeneration %}")
ASK, SAY = {"role": "user", "content": "old house"}, {"role": "assistant", "content": "red door"}
MORE = [{"role": "user", "content": "new tree"}, {"role": "assistant", "content": "a bird"}]
SYSTEM = {"role": "system", "content": "the king"}
CALL = {"type": "function", "function": {"name": "river", "arguments": {"city": "old"}}}
CALLED = [
    ASK,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "blue"},
    SAY,
]
TOOLS = json.dumps([{"type": "function", "function": {"name": "river"}}])

LEARNED = {
    "chat": {"messages": [SYSTEM, ASK, SAY, *MORE]},
    "tools": {"messages": CALLED, "tools": TOOLS},
    "options of the template": {"messages": [ASK, SAY], "chat_template_kwargs": {"short": True}},
    "from and value": {
        "conversations": [
            {"from": turn["role"], "value": turn["content"]} for turn in (ASK, SAY, *MORE)
        ]
    },
    "prompt and completion": {"prompt": [SYSTEM, ASK, SAY, MORE[0]], "completion": [MORE[1]]},
    "completion with a call": {"prompt": [ASK], "completion": CALLED[1:], "tools": TOOLS},
    "text": {"text": "old house red door"},
    "prompt and completion of text": {"prompt": "old house", "completion": " red door"},
}
PAIRS = {
    "turns": {"prompt": [SYSTEM, ASK], "chosen": [SAY], "rejected": [MORE[1]]},
    "tools": {"prompt": [ASK], "chosen": CALLED[1:], "rejected": [SAY], "tools": TOOLS},
    "options of the template": {
        "prompt": [ASK],
        "chosen": [SAY],
        "rejected": [MORE[1]],
        "chat_template_kwargs": {"short": True},
    },
    "shared turns": {"chosen": [SYSTEM, ASK, SAY], "rejected": [SYSTEM, ASK, MORE[1]]},
    "text": {"prompt": "old house", "chosen": " red door", "rejected": " a bird"},
}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    found = deepcopy(tiny_tokenizer)
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def llama(tiny_llama_dir):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_llama_dir)


def prepared(kind, config, llama, tokenizer, row, folder):
    """The one row as a trainer of TRL prepares it."""
    from datasets import Dataset, disable_progress_bars
    from trl.data_utils import is_conversational, maybe_convert_to_chatml

    disable_progress_bars()
    arguments = config(
        output_dir=str(folder), max_length=None, report_to="none", use_cpu=True, bf16=False
    )
    row = maybe_convert_to_chatml(row)
    arguments.assistant_only_loss = is_conversational(row)
    rows = Dataset.from_list([row])
    trainer = kind(llama, args=arguments, train_dataset=rows, processing_class=tokenizer)
    return trainer.train_dataset[0]


def written(folder, row):
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return str(path)


@pytest.mark.parametrize("name", LEARNED)
def test_tokens_and_what_is_learned(name, llama, tokenizer, tmp_path) -> None:
    from trl import SFTConfig, SFTTrainer

    row = LEARNED[name]
    theirs = prepared(SFTTrainer, SFTConfig, llama, tokenizer, deepcopy(row), tmp_path)
    plain = deepcopy(tokenizer)
    for mark in MARKS:
        plain.chat_template = plain.chat_template.replace(mark, "")
    # with the marks of the template, and without, where answers are located
    for ours in (tokenizer, plain):
        rules = Rules(assistant_only=True, append_eos=True)
        (example,) = encode_rows(load_rows([written(tmp_path, row)]), ours, rules=rules)
        labels = [
            int(token) if kept else -100
            for token, kept in zip(example.input_ids, example.loss_mask, strict=True)
        ]
        assert example.input_ids.tolist() == theirs["input_ids"]
        assert labels == theirs["labels"]


@pytest.mark.parametrize("name", PAIRS)
def test_prompts_and_both_answers(name, llama, tokenizer, tmp_path) -> None:
    from trl import DPOConfig, DPOTrainer

    row, plain = PAIRS[name], deepcopy(tokenizer)
    for mark in MARKS:
        plain.chat_template = plain.chat_template.replace(mark, "")
    theirs = prepared(DPOTrainer, DPOConfig, llama, plain, deepcopy(row), tmp_path)
    sets = load_pairs([written(tmp_path, row)], plain, 512, chat=False)
    (pair,) = sets["rows"].pairs
    assert pair.prompt.tolist() == theirs["prompt_ids"]
    assert pair.chosen.tolist() == theirs["chosen_ids"]
    assert pair.rejected.tolist() == theirs["rejected_ids"]


# published templates; TRL has each once more with marks around what answers are
PUBLISHED = (
    *("llama3", "qwen2_5", "qwen3", "qwen3_5_think", "qwen3_instruct_2507", "gemma3", "cohere2"),
    *("deepseek_r1_distill", "deepseekv3", "nemotron_3_nano", "lfm2"),
)
ENDS = ["<end_of_turn>", "<｜end▁of▁sentence｜>", "<|eot_id|>", "<|END_OF_TURN_TOKEN|>"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_answers_in_published_templates(name, tiny_tokenizer) -> None:
    """Their words and end tokens are those that TRL marks; TRL adds white space, and headers."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    files = [folder / f"{name}.jinja", folder / f"{name}_training.jinja"]
    if not all(map(Path.is_file, files)):
        pytest.skip("this version of TRL has no such templates")
    found, answers = [], ("red door", "a bird")
    for file in files:
        tokenizer = deepcopy(tiny_tokenizer)
        tokenizer.add_tokens(ENDS, special_tokens=True)
        tokenizer.chat_template = file.read_text("utf-8")
        with ChatRenderer(tokenizer) as renderer:
            messages = [ASK, SAY, *MORE]
            text = renderer.render(messages)
            spans = spans_of({"messages": messages}, renderer, text, [])
        assert len(spans) == len(answers)
        learned = [text[start:end] for start, end in spans]
        pairs = zip(learned, answers, strict=True)
        found.append([each[each.index(answer) :].rstrip() for each, answer in pairs])
        assert all(len(each) > len(answer) for each, answer in zip(found[-1], answers, strict=True))
    assert found[0] == found[1]
