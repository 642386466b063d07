"""Tiny inputs of the fixtures: random Llamas, a tokenizer of words, text, chats and preferences."""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

TEXT = (
    "the a of and to in is was he she it said went saw river house door light water stone old new "
    "red blue"
)
WORDS = TEXT.split()
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def write_inputs(folder: Path) -> None:
    """Two models and every data set; Mamba-1 needs heads of 16."""
    write_llama(folder / "llama", seed=20, heads=4, head_dim=4)
    write_llama(folder / "llama-heads-of-16", seed=16, heads=2, head_dim=16)
    draw = random.Random(0)
    texts = [sentence(draw, draw.randint(10, 40)) for _ in range(60)]
    write_rows(folder / "text.jsonl", ({"text": text} for text in texts[:48]))
    write_rows(folder / "held-out.jsonl", ({"text": text} for text in texts[48:]))
    write_rows(folder / "chats.jsonl", (chat(draw) for _ in range(24)))
    write_rows(folder / "pairs.jsonl", (pair(draw) for _ in range(30)))
    # only measured on
    write_rows(folder / "long.jsonl", ({"text": sentence(draw, 150)} for _ in range(2)))
    write_rows(folder / "choices.jsonl", (question(draw) for _ in range(6)))
    (folder / "prompts.txt").write_text("the river\na stone house\n", "utf-8")


def write_llama(folder: Path, seed: int, heads: int, head_dim: int) -> None:
    """A random Llama of two layers that shares embedding and head, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=head_dim,
        max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, initializer_range=0.4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def word_tokenizer():
    """A token per word, with a ChatML template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = [*SPECIAL, "user", "assistant", *WORDS]
    model = models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>",
        pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def sentence(draw: random.Random, length: int) -> str:
    """Words of which each decides the three that can follow."""
    return " ".join(sequence(draw, length))


def sequence(draw: random.Random, length: int) -> Iterator[str]:
    """The words of `sentence`."""
    word = draw.randrange(len(WORDS))
    for _ in range(length):
        yield WORDS[word]
        word = (3 * word + draw.randrange(3)) % len(WORDS)


def chat(draw: random.Random) -> dict:
    """A question and its answer."""
    roles = ("user", 6), ("assistant", 8)
    return {"messages": [{"role": role, "content": sentence(draw, n)} for role, n in roles]}


def pair(draw: random.Random) -> dict:
    """A prompt with an answer that follows the rule of the text, and one that does not."""
    return {
        "prompt": sentence(draw, 5),
        "chosen": sentence(draw, 6),
        "rejected": " ".join(draw.choices(WORDS, k=7)),
    }


def question(draw: random.Random) -> dict:
    """A text of which one of three continuations is right, as a task file has it."""
    choices = [sentence(draw, 2) for _ in range(3)]
    return {"query": sentence(draw, 4), "choices": choices, "gold": draw.randrange(3)}


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
