"""Recipes and task files that are odd YAML, run code or lead elsewhere, by what they are."""

from hostile.templates import TEMPLATES, TOUCH

LAUGHS = (
    "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
)  # fmt: skip
STAGES = "stages:\n  convert: {model: llama}\n"
ODD = {
    "nothing": "",
    "a number": "3",
    "a list": "[1, 2]",
    "aliases that grow": LAUGHS + "name: x\n" + STAGES,
    "an anchor inside of itself": "&a [*a]\n",
    "an anchor inside of its stages": "name: x\nstages: &a {convert: *a}\n",
    "a tag that runs": f"!!python/object/apply:os.system ['{TOUCH}']\n",
    "a tag that runs inside": f"name: !!python/object/apply:os.system ['{TOUCH}']\n" + STAGES,
    "an unknown tag": "name: !nonsense x\n" + STAGES,
    "deep lists": "name: " + "[" * 100_000 + "]" * 100_000 + "\n",
    "deep blocks": "".join(" " * n + "a:\n" for n in range(3000)),
    "5,000 digits": "name: x\nseed: " + "9" * 5000 + "\n" + STAGES,
    "infinity": "name: x\nseed: .inf\n" + STAGES,
    "a date as name": "name: 2026-01-01\n" + STAGES,
    "a date as key": "name: x\n2026-01-01: 1\n" + STAGES,
    "an impossible date": "name: 2026-13-45\n" + STAGES,
    "null as key": "name: x\nnull: 1\n~: 2\n" + STAGES,
    "a list as key": "name: x\n? [a, b]\n: 1\n" + STAGES,
    "a merge of nothing": "name: x\n<<: 3\n" + STAGES,
    "keys twice": "name: x\nname: y\n" + STAGES + STAGES,
    "tabs": "name: x\nstages:\n\tconvert: 1\n",
    "two documents": "name: x\n---\nname: y\n" + STAGES,
    "escapes": 'name: "\\x1b[31mx\\a"\n' + STAGES,
    "NUL": "name: \0x\n",
    "halves of characters": 'name: "\\ud800"\n' + STAGES,
    "a number in base 60": "name: 1:1:1:1:1:1\n" + STAGES,
    "binary": "name: !!binary aaaa\n" + STAGES,
    "a set": "name: !!set {a, b}\n" + STAGES,
}
RECIPES = ODD | {
    "an output upwards": "name: x\nstages:\n  convert: {model: llama, out: ../outside}\n",
    "an absolute output": "name: x\nstages:\n  convert: {model: llama, out: /tmp/outside}\n",
    "a section upwards": "name: x\nstages:\n  convert@../../outside: {model: llama}\n",
    "a name upwards": "name: ../../outside\n" + STAGES,
    "an option as model": "name: x\nstages:\n  convert: {model: --help}\n",
    "an option with a value as model": "name: x\nstages:\n  convert: {model: --out=../outside}\n",
    "code that is trusted": "name: x\nstages: {convert: {model: llama, trust_remote_code: true}}\n",
    "a reference to itself": "name: x\nstages:\n  convert: {model: '${convert}'}\n",
    "references of references": "name: x\nstages:\n  convert: {model: '${${convert}}'}\n",
    "a reference to nothing": "name: x\nstages:\n  convert: {model: '${nothing.at.all[0]}'}\n",
    "an open reference": "name: x\nstages:\n  convert: {model: '${'}\n",
    "stages as a list": "name: x\nstages: [convert]\n",
    "stages as text": "name: x\nstages: convert\n",
    "a stage of null": "name: x\nstages: {convert: null}\n",
    "a stage of a number": "name: x\nstages: {convert: 3}\n",
    "variants of themselves": "name: x\nvariants: {a: {variants: {a: {}}}}\n" + STAGES,
    "variants as text": "name: x\nvariants: abc\n" + STAGES,
    "10,000 stages": "name: x\nstages:\n"
    + "".join(f"  convert@{n}: {{model: llama}}\n" for n in range(10_000)),
    "a long section": "name: x\nstages:\n  convert@" + "n" * 5000 + ": {model: llama}\n",
    "a path as data": "name: x\nstages:\n  sft: {model: llama, data: [/dev/zero]}\n",
    "NUL in a path": 'name: x\nstages:\n  convert: {model: "a\\0b"}\n',
}  # fmt: skip
TASK = """task: own_task
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
"""
# others name no task: the list of all tasks of the harness is read then, for 10 s
ODD_TASKS = (
    "nothing", "aliases that grow", "an anchor inside of itself", "a tag that runs",
    "a tag that runs inside", "deep lists", "5,000 digits", "NUL",
)  # fmt: skip
TASKS = {name: ODD[name] for name in ODD_TASKS} | {
    "a function as text": TASK + "doc_to_text: !function evil.run\n",
    "a function as process": TASK + "process_docs: !function evil.run\n",
    "a function as metric": TASK + "metric_list: [{metric: !function evil.run}]\n",
    "a function inside of a list": TASK
    + "filter_list: [{name: x, filter: [!function evil.run]}]\n",
    "a function of a module": TASK + "process_results: !function os.system\n",
    "a class": "task: own_task\nclass: !function evil.run\n",
    "an included function": "include: ../included/evil.yaml\ntask: own_task\n",
    "an included file of the machine": "include: /etc/passwd\ntask: own_task\n",
    "an include of itself": "include: own_task.yaml\ntask: own_task\n",
    "a script as data": TASK.replace("dataset_path: json", "dataset_path: tasks/evil.py"),
    "a folder with a script as data": TASK.replace("dataset_path: json", "dataset_path: tasks"),
    "a device as data": TASK.replace("tasks/choices.jsonl", "/dev/zero"),
    "an address as data": TASK.replace("tasks/choices.jsonl", "http://127.0.0.1:9/x.jsonl"),
    "a script as metric": TASK.replace("metric: acc", "metric: tasks/evil.py"),
    "a folder as metric": TASK.replace("metric: acc", "metric: tasks"),
    "an unknown metric": TASK.replace("acc", "nonsense"),
    "an unknown output": TASK.replace("multiple_choice", "nonsense"),
    "no data": "task: own_task\n",
    "another name": TASK.replace("own_task", "other_task"),
    "a group of itself": "group: own_task\ntask: [own_task]\n",
    "a long loop": TASK + f"doc_to_text: {TEMPLATES['nested loops']!r}\n",
    "the shell": TASK + f'doc_to_text: "{TEMPLATES["the shell by cycler"]}"\n',
    "a description of escapes": TASK + 'description: "\\x1b[31m"\n',
    "itself": TASK,
}
