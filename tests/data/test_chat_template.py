"""Templates that a stranger wrote end at a bound, whatever they do, and are named with the row."""

import multiprocessing
import os
import threading
from copy import deepcopy

import pytest

from mambactl.bounds import MIB, TEMPLATE_BYTES, Bound
from mambactl.data import chat_template
from mambactl.data.bad_rows import BadRows
from mambactl.data.chat_template import ChatRenderer, TemplateStopped, render_chat
from mambactl.data.format import encode_rows
from mambactl.data.preferences import load_pairs
from mambactl.data.sources import Document
from mambactl.decode.prompts import Prompt, encode_all
from mambactl.errors import UsageError

MESSAGES = [{"role": "user", "content": "the river"}, {"role": "assistant", "content": "a tree"}]
MANY = "range(99999)"
# a list that holds itself 2^60 times, in a few hundred bytes
DEEP = (
    "{% set ns = namespace(x=['a', 'a']) %}"
    "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
)
ENDLESS = {
    "nested loops": f"{{% for a in {MANY} %}}{{% for b in {MANY} %}}{{% endfor %}}{{% endfor %}}",
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}"
    ),
    "one comparison": DEEP + DEEP.replace("ns", "other") + "{{ ns.x == other.x }}",
    "one power": "{% set n = 9 %}{{ n ** (n ** 9) > 1 }}",
    "while it is compiled": "{{ (10 ** 9) ** (10 ** 9) > 1 }}",
}
LARGE = {
    "a product": "{% set n = 10 ** 11 %}{{ 'a' * n }}",
    "a product of constants": "{{ 'a' * 10 ** 11 }}",
    "a filter": "{{ 'a' | center(10 ** 11) }}",
    "a method": "{{ 'a'.ljust(10 ** 11) }}",
    "a format": "{{ '%100000000000s' % 'a' }}",
    "a new-style format": "{{ '{:100000000000}'.format('a') }}",
    "indentation": "{{ ([1] | tojson(indent=10 ** 11)) }}",
    "doubling": (
        "{% set ns = namespace(x='a') %}"
        "{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
    ),
    "replacing": "{% set x = 'a' * 10 ** 6 %}{{ x.replace('a', x) }}",
    "a list": "{{ [1] * 10 ** 11 }}",
    "many pieces": f"{{% for a in {MANY} %}}{'a' * 9999}{{% endfor %}}",
    "a little too much": f"{{{{ 'a' * {TEMPLATE_BYTES.most + 1} }}}}",
}
REFUSED = {
    "a macro without an end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a long range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "no template": "{% for %}",
    "half of a character": r"{{ '\ud800' }}",
    "an unknown filter": "{{ 1 | nothing }}",
    "a division by zero": "{{ 1 / 0 }}",
    "a private attribute": "{{ ''.__class__.__mro__ }}",
}


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return deepcopy(tiny_tokenizer)


@pytest.fixture
def soon(monkeypatch) -> None:
    monkeypatch.setattr(chat_template, "TEMPLATE_SECONDS", Bound(0.3, "seconds of CPU time", "it"))


def with_template(tokenizer, text: str):
    tokenizer.chat_template = text
    return tokenizer


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_template_is_stopped(tokenizer, soon, name) -> None:
    with pytest.raises(TemplateStopped, match="seconds of CPU time"):
        render_chat(with_template(tokenizer, ENDLESS[name]), MESSAGES)


@pytest.mark.parametrize("name", LARGE)
def test_a_template_that_builds_gigabytes_is_stopped(tokenizer, name) -> None:
    with pytest.raises(TemplateStopped, match="16 MiB"):
        render_chat(with_template(tokenizer, LARGE[name]), MESSAGES)


def test_one_word_for_a_deep_list_is_stopped(tokenizer, soon) -> None:
    """By its memory, or before that by the time that filling it takes."""
    with pytest.raises(TemplateStopped):
        render_chat(with_template(tokenizer, DEEP + "{{ ns.x | tojson }}"), MESSAGES)


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_fails_is_a_sentence(tokenizer, name) -> None:
    with pytest.raises(UsageError, match="refuses the messages") as caught:
        render_chat(with_template(tokenizer, REFUSED[name]), MESSAGES)
    assert not isinstance(caught.value, TemplateStopped)


def test_what_fits_is_rendered(tokenizer) -> None:
    text = "ü" * (TEMPLATE_BYTES.most // 2)
    assert render_chat(with_template(tokenizer, f"{{{{ 'ü' * {len(text)} }}}}"), MESSAGES) == text


def test_a_renderer_goes_on_behind_a_chat_that_was_stopped(tokenizer) -> None:
    with_template(tokenizer, "{{ messages[0].content * (messages | length) ** 40 }}")
    with ChatRenderer(tokenizer) as renderer:
        assert renderer.render(MESSAGES[:1]) == "the river"
        with pytest.raises(TemplateStopped):
            renderer.render(MESSAGES)
        assert renderer.render(MESSAGES[:1]) == "the river"
    assert multiprocessing.active_children() == []


def test_a_chat_without_an_end_to_its_nesting_is_refused(tokenizer) -> None:
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(UsageError, match="nested too deeply|recursion"):
        render_chat(tokenizer, [{"role": "user", "content": "a", "more": deep}])


def test_other_threads_render_too(tokenizer, soon) -> None:
    errors = []

    def work() -> None:
        try:
            render_chat(with_template(tokenizer, ENDLESS["nested loops"]), MESSAGES)
        except TemplateStopped as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert len(errors) == 1


def test_the_process_holds_no_file_of_its_parent(tokenizer, tmp_path) -> None:
    with (tmp_path / "lock").open("w") as file, ChatRenderer(tokenizer) as renderer:
        renderer.render(MESSAGES)
        (child,) = multiprocessing.active_children()
        held = {os.path.realpath(f"/proc/{child.pid}/fd/{fd}")
                for fd in os.listdir(f"/proc/{child.pid}/fd")}  # fmt: skip
    assert os.path.realpath(file.name) not in held


def test_the_row_is_named_and_ends_the_run_at_once(tokenizer, tmp_path, soon) -> None:
    with_template(tokenizer, "{{ messages[0].content }}" + ENDLESS["nested loops"])
    rows = [Document(f"b.jsonl, row {n}", {"messages": MESSAGES}) for n in range(1, 40)]
    with pytest.raises(TemplateStopped, match="^b.jsonl, row 1: the chat template takes"):
        encode_rows(rows, tokenizer, bad=BadRows(skip=True))
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "the", "chosen": "old", "rejected": "new"}\n' * 40)
    with pytest.raises(TemplateStopped, match="pairs.jsonl, row 1: the chat template takes"):
        load_pairs([str(file)], tokenizer, 64, skip_bad_rows=True)
    with pytest.raises(TemplateStopped, match="prompt 1: the chat template takes"):
        encode_all([Prompt.of("the river")], tokenizer)


def test_memory_stays_near_what_it_was(tokenizer) -> None:
    """A measurement, for the limit is set from the size of a process."""
    import resource

    with pytest.raises(TemplateStopped):
        render_chat(with_template(tokenizer, LARGE["doubling"]), MESSAGES)
    own, children = (
        resource.getrusage(who).ru_maxrss * 1024
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    assert children < own + 600 * MIB
