"""The script that measures on-policy steps runs, on shapes small enough for a CPU."""

from tests.performance.student_text import measure, options_of


def test_both_kinds_of_step_are_measured() -> None:
    words = "--model tiny-hybrid --teacher tiny --device cpu --dtype float32 --rows 2 --length 96"
    found = measure(options_of([*words.split(), "--prompt=8", "--tokens=8", "--steps=2"]))
    assert found["answers"] == 12 and found["copy_bytes"] > 0 and found["cache_bytes"] > 0
    assert found["onpolicy_seconds"] > found["writing_seconds"] > 0 < found["logits_seconds"]
    assert found["logits_peak_bytes"] is None and "allowed_bytes" not in found
