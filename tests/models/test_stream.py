"""Between blocks: which type the stream of hidden states has, and what may be seen of a block."""

import torch

BF16 = torch.bfloat16


def stream(model, ids, **where) -> torch.dtype:
    """The type that enters the first block."""
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].dtype)
    )
    with torch.autocast("cpu", BF16, **where):
        model(ids, use_cache=False)
    handle.remove()
    return seen[0]


def test_autocast_trains_in_an_fp32_stream(mixed_model, draw_ids) -> None:
    ids = draw_ids(1, 8)
    assert stream(mixed_model, ids) == torch.float32
    # frozen embeddings are held in bf16
    mixed_model.model.embed_tokens.to(BF16)
    assert stream(mixed_model, ids) == torch.float32
    with torch.no_grad():
        # as the finished model runs, and as a teacher does
        assert stream(mixed_model, ids) == BF16


def test_what_is_observed_of_a_block_is_what_it_does(mixed_model, draw_ids) -> None:
    model, ids = mixed_model.model, draw_ids(2, 20)
    seq_idx = (torch.arange(20) // 7).expand(2, -1)
    with torch.no_grad():
        hidden, context = model.enter(ids, None, seq_idx)
        for block in model.layers:
            after, entered, mixed = block.observe(hidden, context)
            assert torch.equal(after, block(hidden, context, None))
            assert torch.equal(entered, block.input_layernorm(hidden))
            assert torch.equal(mixed, block.mixer(entered, context, None))
            hidden = after
        whole = model(ids, seq_idx=seq_idx, use_cache=False).last_hidden_state
    assert torch.equal(model.norm(hidden), whole)


def test_rows_of_odd_width_are_padded_and_cut_again(make_hybrid, draw_ids) -> None:
    """in_proj of the tiny model has 196 rows, which no GPU aligns."""
    model = make_hybrid(["mamba2"])
    mixer = model.model.layers[0].mixer
    assert mixer.in_proj.out_features % 8
    hidden = torch.randn(1, 5, 48)
    plain, padded = (mixer._project(hidden, whole) for whole in (False, True))
    for ours, theirs in zip(padded, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
