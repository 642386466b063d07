"""Comparison of rendered chats with their rows: losses are warned of or refused."""

from copy import deepcopy
from datetime import date

import pytest

from mambactl.data.bad_rows import LOST, BadRows
from mambactl.data.chat_template import ChatRenderer, unused_templates
from mambactl.data.checks import Endings
from mambactl.data.doubts import Doubts
from mambactl.data.format import Rules, encode_rows
from mambactl.data.preferences import load_pairs, marked
from mambactl.data.sources import Document
from mambactl.errors import UsageError

ASKED = "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
CALL = {"type": "function", "function": {"name": "river", "arguments": {"city": "old"}}}
TOOL = {"type": "function", "function": {"name": "river", "parameters": {}}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def template(turn, before=""):
    turn = "<|im_start|> {{ m.role }} " + turn + " <|im_end|> "
    return before + "{% for m in messages %}" + turn + "{% endfor %}" + ASKED


def calls(arguments):
    """Content, and calls with their arguments as an expression writes them."""
    call = "{{ c.function.name }} {{ " + arguments + " }}"
    return "{{ m.content or '' }}{% for c in m.tool_calls or [] %}" + call + "{% endfor %}"


@pytest.fixture
def templated(tiny_tokenizer):
    def make(text):
        tokenizer = deepcopy(tiny_tokenizer)
        tokenizer.chat_template = text
        return tokenizer

    return make


def taught(tokenizer, messages, **more):
    """Return the learned text of a chat as the template writes it, bad rows, and doubts."""
    bad, doubts = BadRows(skip=True), Doubts()
    row = Document("a.jsonl, row 1", {"messages": messages, **more})
    found = encode_rows([row], tokenizer, rules=Rules(True), bad=bad, doubts=doubts)
    learned = [tokenizer.decode(e.input_ids[e.loss_mask]) for e in found]
    return learned, bad, doubts


@pytest.mark.parametrize(
    ("turn", "answer", "problem"),
    [
        ("{% if m.role == 'user' %}{{ m.content }}{% endif %}", {}, "turn 2, of the assistant"),
        ("{{ m.content or '' }}", {"tool_calls": [CALL]}, "the call of 'river' in turn 2"),
        (
            calls("''"),
            {"tool_calls": [CALL]},
            "the arguments of 'river' in turn 2",
        ),
        ("{% if m.role == 'assistant' %}{{ m.content }}{% endif %}", {}, "turn 1, of the user"),
    ],
)
def test_what_a_template_leaves_out_is_refused(templated, turn, answer, problem) -> None:
    words = None if answer else "the red door"
    learned, bad, _ = taught(templated(template(turn)), [user("tree"), assistant(words, **answer)])
    assert not learned and bad.counts == {LOST: 1}
    assert problem in bad.found[0].problem


@pytest.mark.parametrize(
    ("turn", "messages", "more", "doubt"),
    [
        ("{{ m.content.split('</think>')[-1] }}",
         [user("tree"), assistant("the king</think>red door")], {}, "stands before </think>"),
        ("{{ m.content[:12] }}", [user("tree"), assistant("the red door small")], {},
         "changes or leaves out a part"),
        ("{% if m.role != 'system' %}{{ m.content }}{% endif %}",
         [{"role": "system", "content": "king"}, user("tree"), assistant("door")], {},
         "leaves out whole turns"),
        ("{{ m.content }}", [user("tree"), assistant("door")], {"tools": [TOOL]},
         "does not show the tools"),
        ("{{ m.content }}", [user("tree"), assistant("door", reasoning_content="king")], {},
         "leaves out the reasoning"),
        (calls("c.function.arguments|tojson|tojson"),
         [user("tree"), assistant(None, tool_calls=[CALL])], {}, "JSON inside of JSON"),
    ],
)  # fmt: skip
def test_what_a_template_changes_is_a_warning(
    templated, capsys, turn, messages, more, doubt
) -> None:
    learned, bad, doubts = taught(templated(template(turn)), messages, **more)
    assert len(learned) == 1 and not bad.found
    assert [kind for kind in doubts.counts if doubt in kind] == list(doubts.counts)
    doubts.tell()
    assert "(1 row, the first is a.jsonl, row 1" in capsys.readouterr().err


def test_an_ordinary_chat_raises_no_doubt(templated) -> None:
    turn = calls("c.function.arguments|tojson")
    before = "{{ tools|tojson if tools else '' }}"
    tokenizer = templated(template(turn, before))
    chat = [user("a  tree\n"), assistant(None, tool_calls=[CALL]),
            {"role": "ipython", "content": "7"}, assistant("the\nred door ")]  # fmt: skip
    learned, bad, doubts = taught(tokenizer, chat, tools=[TOOL])
    assert learned and not bad.found and not doubts.counts


@pytest.mark.parametrize(
    "written",
    [
        # as an object; as text alone, as text joined to another; Python's own notation otherwise
        "c.function.arguments|tojson",
        "(c.function.arguments if c.function.arguments is string else c.function.arguments|tojson)",
        "'' + c.function.arguments",
        "c.function.arguments",
    ],
)
@pytest.mark.parametrize("marks", [False, True])
def test_arguments_are_json_once_in_every_template(templated, written, marks) -> None:
    turn = calls(written)
    if marks:
        turn = "{% generation %}" + turn + "{% endgeneration %}"
    tokenizer = templated(template(turn))
    chat = [user("tree"), assistant(None, tool_calls=[CALL])]
    with ChatRenderer(tokenizer) as renderer:
        text = renderer.render(chat)
        assert 'river {"city": "old"}' in text
        if marks:
            assert [text[a:b] for a, b in renderer.spans(chat)][1] == 'river {"city": "old"}'


def test_a_role_is_known_or_named_by_the_template(templated) -> None:
    chat = [{"role": "environment", "content": "king"}, user("a"), assistant("door")]
    _, bad, _ = taught(templated(template("{{ m.content }}")), chat)
    assert "has the role 'environment', which the chat template does not name" in (
        bad.found[0].problem
    )
    named = "{% if messages[0].role == 'environment' %}{% endif %}"
    learned, bad, _ = taught(templated(template("{{ m.content }}", named)), chat)
    assert learned and not bad.found


# as the distilled R1 models: a block is opened for what is to be written, and thoughts are left out
OPENS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|im_start|> user "
    "{{ m.content }} {% else %}<|im_start|> assistant {{ m.content.split('</think>')[-1] }}"
    "<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant <think>\n{% endif %}"
)


def test_a_block_that_the_template_opens_is_no_obstacle(templated, tmp_path) -> None:
    tokenizer = templated(OPENS.replace("{{ bos_token }}", ""))
    chat = [user("tree"), assistant("<red> door"), user("king"), assistant("queen")]
    learned, bad, doubts = taught(tokenizer, chat)
    assert not bad.found and any("opens answers" in kind for kind in doubts.counts)
    assert learned[0].split()[-4:] == ["door", "<|im_end|>", "queen", "<|im_end|>"]
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "tree", "chosen": "red door", "rejected": "door"}\n')
    (pair,) = load_pairs([str(path)], tokenizer, 64)["pairs"].pairs
    shown = marked(pair, tokenizer)
    assert shown["chosen"].split("[[")[1].split() == ["red", "door", "<|im_end|>]]"]
    assert "<think>" not in shown["chosen"]


def test_templates_by_name_are_used_for_tools_or_said(templated) -> None:
    shown = "{{ tools|tojson }}"
    tokenizer = templated(
        {
            "default": template("{{ m.content }}"),
            "tool_use": template("{{ m.content }}", shown),
            "rag": "x",
        }
    )
    chat = [user("tree"), assistant("door")]
    with ChatRenderer(tokenizer) as renderer:
        assert "river" not in renderer.render(chat)
        assert "river" in renderer.render(chat, [TOOL])
    assert unused_templates(tokenizer) == ["rag"]


def test_an_answer_without_an_end_token_is_a_warning(templated, capsys) -> None:
    marked_text = "{% generation %}{{ m.content }}{% endgeneration %}"
    for text, warns in (("{{ m.content }}", False), (marked_text, True)):
        tokenizer = templated(template(text))
        row = Document("a.jsonl, row 1", {"messages": [user("tree"), assistant("door")]})
        endings = Endings([tokenizer.eos_token_id])
        (example,) = encode_rows([row], tokenizer, rules=Rules(True))
        endings.see(row, example)
        endings.tell(tokenizer)
        said = capsys.readouterr().err
        assert ("no row learns an end token of the model (<|im_end|>)" in said) is warns


def test_the_day_of_templates_is_given(templated) -> None:
    tokenizer = templated(
        "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}" + template("{{ m.content }}")
    )
    with ChatRenderer(tokenizer, date(2001, 2, 3)) as renderer:
        assert renderer.render([user("a")]).startswith("03 Feb 2001 00:00:00.000000")
    # every rendering of a chat has one time, so that its answers are found
    learned, bad, _ = taught(tokenizer, [user("tree"), assistant("door")])
    assert learned == ["door <|im_end|>"] and not bad.found


def test_a_typed_begin_token_is_not_doubled(tiny_tokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    from mambactl.decode.prompts import Prompt, encode

    tokenizer = deepcopy(tiny_tokenizer)
    begin, word = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("the")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)]
    )
    rows = [Document("r", {"text": text}) for text in ("the", "<|im_start|>the")]
    for example in encode_rows(rows, tokenizer):
        assert example.input_ids.tolist() == [begin, word] and len(example.loss_mask) == 2
    assert encode(Prompt.of("<|im_start|>the"), tokenizer, chat=False) == [begin, word]
    # two that are typed are a fault of the text
    (twice,) = encode_rows([Document("r", {"text": "<|im_start|><|im_start|>the"})], tokenizer)
    assert twice.input_ids.tolist() == [begin] * 3 + [word]


def test_tokens_without_embedding_are_refused_by_row(tiny_tokenizer, tmp_path) -> None:
    rows = [Document(f"row {n}", {"text": text}) for n, text in enumerate(("the", "the bird"))]
    known = tiny_tokenizer.convert_tokens_to_ids("bird")
    bad = BadRows()
    found = encode_rows(rows, tiny_tokenizer, rules=Rules(vocabulary=known), bad=bad)
    assert len(found) == 1 and bad.found[0].where == "row 1"
    assert f"the tokenizer gives the token {known} (bird), the model has {known}" in (
        bad.found[0].problem
    )
    with pytest.raises(UsageError, match="row 1: the tokenizer gives"):
        encode_rows(rows, tiny_tokenizer, rules=Rules(vocabulary=known))
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "the", "chosen": "bird", "rejected": "a"}\n')
    with pytest.raises(UsageError, match="row 1: the tokenizer gives"):
        load_pairs([str(path)], tiny_tokenizer, 64, rules=Rules(vocabulary=known))
