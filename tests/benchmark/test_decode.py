"""Decoding's rows from known times, the work that contestants do, and what a token reads."""

import pytest

from megabts.benchmark import decode
from megabts.benchmark.shapes import SHAPES


def test_rows_are_ratios_of_rounds() -> None:
    seconds = {"dense": [1.0, 2.0], "bts": [4.0, 8.0], "hf": [2.0, 4.0], "read": [3.0, 6.0]}
    dense, bts, share = decode.decode_rows("M.bf16.decode", "M", 1, 128, seconds)
    assert (dense.name, dense.value.median) == ("M.bf16.decode_dense_vs_hf", 2.0)
    assert (bts.name, bts.value.median) == ("M.bf16.decode_bts_vs_hf_dense", 0.5)
    assert (share.name, share.value.median) == ("M.bf16.decode_bts_bandwidth_share", 0.75)
    assert dense.ours
    assert dense.yardstick
    assert (dense.ours.median, dense.yardstick.median) == (127 * 0.75, 127 * 0.375)
    assert dense.line
    assert share.line
    assert dense.line.holds(dense.value.median)
    assert share.line.holds(share.value.median)
    del seconds["read"]
    rows = decode.decode_rows("S.fp32.decode_16", "S", 16, 128, seconds)
    assert [row.line for row in rows] == [None, None]
    assert rows[0].ours
    assert rows[0].ours.median == 16 * 127 * 0.75


def test_what_a_token_reads() -> None:
    s = SHAPES["S"]
    d, f, qkv = s.hidden_size, s.ffn_size, sum(s.qkv_heads) * s.head_dim
    layer = (qkv + s.num_heads * s.head_dim + 3 * f) * d + 2 * d
    stitches = (2 * (3 + 4) + 2 * (3 + 3)) * d * d  # projections and gates
    weights = 4 * s.num_layers * layer + stitches + s.vocab_size * d + d
    assert decode.token_bytes("S", "fp32") == 4 * weights
    assert decode.token_bytes("S", "bf16") == 2 * weights


@pytest.mark.parametrize("batch", [1, 2])
def test_rounds_run(batch: int) -> None:
    rounds = {
        "ours": decode.engine_round(True, "S", "fp32", batch, 4),
        "theirs": decode.transformers_round("S", "fp32", batch, 4),
    }
    for name, run in rounds.items():
        first, again = run(), run()
        assert first, name
        assert again, name
        assert 0 < again < 10, name
