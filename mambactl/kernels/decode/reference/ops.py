"""Operations of a decode pass in plain PyTorch, which `kernels.decode.triton.ops` must equal."""

from mambactl.kernels.decode.reference import (
    decode_attention,
    heads,
    linear,
    ngram,
    recurrent,
    verdict,
)


class ReferenceOps:
    """Methods of `kernels.decode.triton.ops.TritonOps`, on any device and without scratch."""

    on_host = False

    embed = staticmethod(linear.embed)
    pick = staticmethod(linear.pick)
    project = staticmethod(linear.project)
    project_qkv = staticmethod(linear.project_qkv)
    add_residual = staticmethod(linear.add_residual)
    add_normed = staticmethod(linear.add_normed)
    settle_heads = staticmethod(heads.settle_heads)
    swiglu = staticmethod(linear.swiglu)
    head_best = staticmethod(linear.head_best)
    head_logits = staticmethod(linear.head_logits)
    attention = staticmethod(decode_attention.decode_attention)
    rotate = staticmethod(recurrent.rotate)
    mamba2 = staticmethod(recurrent.mamba2_segment)
    grouped_norm = staticmethod(recurrent.grouped_norm)
    mamba1_low = staticmethod(recurrent.mamba1_low)
    mamba1 = staticmethod(recurrent.mamba1_segment)
    draft_ngram = staticmethod(ngram.draft_ngram)
    filter_rows = staticmethod(verdict.filter_rows)
    draw_rows = staticmethod(verdict.draw_rows)
    verdict_greedy = staticmethod(verdict.verdict_greedy)
    verdict_sampled = staticmethod(verdict.verdict_sampled)
    commit = staticmethod(verdict.commit)

    def square_pieces(self, rows: int, width: int) -> int:
        """Columns of `squares` for a pass of that many rows."""
        return 1

    def best_pieces(self, rows: int, vocabulary: int) -> int:
        """Columns of `best` for that many rows of the head."""
        return 1

    def scratch(
        self, rows: int, batch: int, kv_heads: int, group: int, width: int, splits: int
    ) -> tuple[int, int]:
        """Elements of attention's `partial` and `counter`."""
        return 0, 0
