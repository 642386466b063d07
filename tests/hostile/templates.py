"""Chat templates that loop, grow, break out or are none, by what they are."""

# in the sandbox, seen from the folder where commands run
TOUCH = "touch ../code-ran"
# a module that runs it
CODE = f"import os\nos.system({TOUCH!r})\n"
LOOP, END = "{{% for a in {} %}}", "{% endfor %}"
CLASSES = "''.__class__.__mro__[1].__subclasses__()"

TEMPLATES = {
    "a long loop": "{% for i in range(1000000000) %}x{% endfor %}",
    "nested loops": f"{LOOP.format('range(99999)')}{LOOP.format('range(99999)')}{END}{END}",
    "loops over text": f"""{LOOP.format("'x' * 99999")}{LOOP.format("'x' * 99999")}{END}{END}""",
    "much text": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "a long product": "{{ 'a' * 10000000000 }}",
    "a long list": "{{ ([0] * 10000000000)|length }}",
    "a wide text": "{{ 'a'|center(10000000000) }}",
    "a wide format": "{{ '%10000000000d' % 1 }}",
    "a wide format method": "{{ '{:>10000000000}'.format(1) }}",
    "a justified text": "{{ 'a'.ljust(10000000000) }}",
    "a large power": "{{ 9 ** 9 ** 9 }}",
    "doubling": (
        "{% set n = namespace(t='x') %}{% for i in range(40) %}{% set n.t = n.t + n.t %}"
        "{% endfor %}{{ n.t }}"
    ),
    "replacing": "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
    "endless macros": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "doubling macros": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}x{% endmacro %}"
        "{{ m(40) }}"
    ),
    "classes": "{{ " + CLASSES + " }}",
    "the shell by cycler": "{{ cycler.__init__.__globals__.os.system('" + TOUCH + "') }}",
    "the shell by lipsum": "{{ lipsum.__globals__['os'].popen('" + TOUCH + "').read() }}",
    "the shell by attr": (
        "{{ (''|attr('__class__')|attr('__mro__'))[1]|attr('__subclasses__')() }}"
    ),
    "format of attributes": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "changed messages": "{% for m in messages %}{{ messages.append(m) }}{% endfor %}",
    "cleared messages": "{{ messages.clear() }}{{ messages[0].content }}",
    "an included file": "{% include '/etc/passwd' %}",
    "an imported file": "{% import '/etc/passwd' as x %}{{ x }}",
    "no syntax": "{% for %}",
    "open for ever": "{{" * 100_000,
    "deep brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "deep blocks": "{% if 1 %}" * 20_000 + "{% endif %}" * 20_000,
    "an unknown name": "{{ nothing.at.all }}",
    "a division": "{{ 1 / 0 }}",
    "its own error": "{{ raise_exception('\x1b[31mno\x07' ~ ('long ' * 100000)) }}",
    "an unknown filter": "{{ messages|nonsense }}",
    "escapes": "\x1b]0;owned\x07{{ messages[0].content }}\x1b[31m",
    "nothing": "",
    "no messages": "constant",
    "half a character": "{{ '\\ud800' }}",
    "a generation block": "{% generation %}{{ messages }}{% endgeneration %}{% generation %}",
}  # fmt: skip
