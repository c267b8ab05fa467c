"""One shape for a model whose layers differ: its operations and its KV are the layers' own."""

from __future__ import annotations

from ds_cp.attention import LayerSpec
from ds_cp.startup.shapes import MeanShape, layer_windows, mean_shape, shape_notes

LLAMA = LayerSpec(32, 8, 128, 1.0)
LATENT = LayerSpec(16, 16, 192, 1.0, v_head_dim=128)
FULL = LayerSpec(64, 4, 192, 1.0, v_head_dim=128)
SLIDING = LayerSpec(64, 8, 192, 1.0, window=128, v_head_dim=128)


def test_layers_alike_have_their_own_shape() -> None:
    assert mean_shape([LLAMA] * 3) == MeanShape(32, 8, 128)
    assert shape_notes([LLAMA] * 3, 1) == []


def test_operations_and_kv_are_the_mean_of_the_layers() -> None:
    for layers in ([LATENT] * 2, [FULL, SLIDING, SLIDING, SLIDING], [LLAMA, FULL]):
        shape = mean_shape(layers)
        work = sum(2 * s.num_q_heads * (s.head_dim + s.v_dim) for s in layers) / len(layers)
        kept = sum(s.num_kv_heads * (s.head_dim + s.v_dim) for s in layers) / len(layers)
        assert abs(4 * shape.num_q_heads * shape.head_dim / work - 1) < 0.03
        assert abs(2 * shape.num_kv_heads * shape.head_dim / kept - 1) < 0.2  # whole heads


def test_what_differs_is_said() -> None:
    assert shape_notes([LATENT], 2) == ["attention layers have keys of 192 and values of 128 dims"]
    assert shape_notes([FULL, SLIDING], 2) == [
        "attention layers have 8 or 16 KV heads, keys of 192 and values of 128 dims"
    ]


def test_windows_are_counted_by_layer() -> None:
    layers = [LayerSpec(4, 2, 16, 0.25, window) for window in (None, 64, 64, 7, None)]
    assert layer_windows(layers) == ((7, 1), (64, 2)) and layer_windows(layers[:1]) == ()
