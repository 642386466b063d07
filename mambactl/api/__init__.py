"""The Python API: one function per command, and models loaded into memory."""

# command -> its function; a function cannot have the name of a package, here or in Python itself
FUNCTIONS = {
    "convert": "convert",
    "teacher-cache": "teacher_cache",
    "distill": "distill",
    "sft": "sft",
    "dpo": "dpo",
    "draft": "draft",
    "eval": "evaluate",
    "spec-decode": "spec_decode",
    "synthetic": "synthetic",
    "bench": "bench",
    "generate": "generate",
    "chat": "chat",
    "serve": "serve",
    "export": "export_model",
    "push": "push",
    "inspect": "inspect",
    "table": "table",
    "plot": "plot",
    "report": "write_report",
    "doctor": "doctor",
    "recipe": "run_recipe",
    "docs": "read_docs",
}
# what has no command of its own
OTHERS = (
    "Answer",
    "Chat",
    "Completion",
    "Model",
    "SamplingParams",
    "StageResult",
    "generate_dataset",
    "load",
    "plan",
    "set_verbosity",
    "stream",
)
