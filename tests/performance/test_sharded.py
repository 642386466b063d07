"""The script that measures split training runs, on shapes small enough for a CPU."""

from tests.performance.sharded import measure, options_of


def test_a_part_is_checked_and_measured() -> None:
    words = "--model tiny-hybrid --check tiny-hybrid --device cpu --dtype float32 --rows 1"
    found = measure(
        options_of([*words.split(), "--parts=align-mixers,logits-whole", "--length=32"])
    )
    assert found["processes"] == 1
    assert all(part["loss_error"] < 1e-4 for part in found["check"].values())
    for part in found["parts"].values():
        assert part["tokens_per_second"] > 0 < part["peak_bytes"] and not part["shared"]
        assert part["losses"][-1] < part["losses"][0]
