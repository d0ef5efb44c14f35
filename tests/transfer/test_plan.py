# SPDX-License-Identifier: Apache-2.0
"""Plans: ranks, layouts, batches and refusals, all from names and shapes."""

import math
from pathlib import Path

import pytest
import torch

from lorax_transfer.adapters import Adapter, LoraLayer
from lorax_transfer.errors import CheckpointError, MatchError, TransferError
from lorax_transfer.plan import make_plan
from lorax_transfer.settings import BACKENDS, METHODS, Settings, restored_share


class Shapes:
    """A checkpoint of which only shapes and dtypes matter; reading it fails."""

    location = "some/model"

    def __init__(self, shapes, dtype=torch.float32):
        self._shapes = {f"{module}.weight": shape for module, shape in shapes.items()}
        self._dtype = dtype

    def names(self):
        return list(self._shapes)

    def shape(self, name):
        return self._shapes[name]

    def dtype(self, name):
        return self._dtype

    def config(self):
        return {}


def adapter(shapes, **config):
    """An adapter of rank 2 for weights of these shapes, (out, in, *kernel)."""
    layers = {
        module: LoraLayer(
            module,
            torch.ones(2, *shape[1:]),
            torch.ones(shape[0], 2, *(1 for _ in shape[2:])),
            1.0,
        )
        for module, shape in shapes.items()
    }
    return Adapter(layers, config, {}, Path("adapter"), (), "sha256:0")


def plan(shapes, source=None, target=None, dtype=torch.float32, config=None, **settings):
    base = Shapes(source or shapes, dtype)
    other = Shapes(target or source or shapes, dtype)
    return make_plan(adapter(shapes, **(config or {})), base, other, Settings(**settings))


class TestRank:
    def test_default_is_capped_in_each_layer(self):
        layers = plan({"a": (400, 700), "b": (100, 40)}).layers
        assert [layer.rank for layer in layers] == [320, 40]

    def test_too_large_is_an_error_that_names_the_layer(self):
        with pytest.raises(TransferError, match="rank 50 is larger than the shorter side, 40"):
            plan({"a": (400, 700), "b": (100, 40)}, rank=50)

    def test_other_shapes_are_capped_by_both(self):
        [layer] = plan({"a": (400, 700)}, target={"a": (500, 200)}).layers
        assert layer.rank == 200
        assert layer.is_reshaped

    def test_energy_takes_rank_as_a_cap(self):
        layers = plan({"a": (400, 700), "b": (100, 40)}, energy=0.9, rank=50).layers
        assert [layer.rank for layer in layers] == [50, 40]


class TestLayout:
    def test_a_shape_decides(self):
        shapes = {"h.0.c_fc": (30, 10), "h.0.q_proj": (20, 10)}
        stored = {"h.0.c_fc": (10, 30), "h.0.q_proj": (20, 10)}
        turned = {x.module: x.is_transposed for x in plan(shapes, stored).layers}
        assert turned == {"h.0.c_fc": True, "h.0.q_proj": False}
        assert plan(shapes, stored).layers[0].source_shape == (30, 10)

    @pytest.mark.parametrize("flag", [True, False])
    def test_a_square_follows_its_namesakes(self, flag):
        # The flag is wrong for one kind of module or the other in a model that mixes both.
        shapes = {"attn.c_proj": (10, 10), "mlp.c_proj": (10, 40), "lm_head": (90, 10)}
        stored = {"attn.c_proj": (10, 10), "mlp.c_proj": (40, 10), "lm_head": (90, 10)}
        layers = plan(shapes, stored, config={"fan_in_fan_out": flag}).layers
        assert [layer.is_transposed for layer in layers] == [True, True, False]

    @pytest.mark.parametrize("flag", [True, False])
    def test_a_square_alone_follows_the_flag(self, flag):
        [layer] = plan({"a": (10, 10)}, config={"fan_in_fan_out": flag}).layers
        assert layer.is_transposed is flag

    def test_a_kernel_counts_as_inputs(self):
        [layer] = plan({"conv": (8, 3, 3, 5)}).layers
        assert layer.source_shape == (8, 45)


class TestRefusals:
    def test_adapter_of_another_model(self):
        with pytest.raises(MatchError, match=r"expected \(10, 20\) by the adapter's factors for a"):
            plan({"a": (10, 20)}, source={"a": (10, 24)})

    def test_target_with_another_kernel(self):
        with pytest.raises(MatchError, match="another kind of layer"):
            plan({"c": (8, 3, 3, 3)}, target={"c": (8, 3, 5, 5)})

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
    def test_quantised_weights(self, dtype):
        with pytest.raises(CheckpointError, match="use the model's unquantised weights"):
            plan({"a": (10, 20)}, dtype=dtype)

    def test_filters_that_leave_nothing(self):
        with pytest.raises(TransferError, match="leave none of the adapter's 1 modules"):
            plan({"a": (10, 20)}, include="b")

    def test_excluded_modules_need_not_exist(self):
        made = plan({"a": (10, 20), "b": (10, 20)}, source={"a": (10, 20)}, exclude="^b$")
        assert [layer.module for layer in made.layers] == ["a"]
        assert list(made.excluded) == ["b"]

    @pytest.mark.parametrize(
        "bad",
        [
            {"method": "rotate"},
            {"rank": 0},
            {"energy": 0.0},
            {"energy": 1.5},
            {"energy": math.nan},
            {"min_similarity": -0.1},
            {"min_similarity": math.nan},
            {"include": "("},
            {"exclude": "*"},
            {"dtype": "int8"},
            {"backend": "metal"},
            {"strength": 1.1},
            {"strength": math.nan},
            {"directions": 0},
        ],
        ids=lambda bad: "-".join(f"{key}={value}" for key, value in bad.items()),
    )
    def test_options_out_of_range(self, bad):
        [name] = bad
        with pytest.raises(TransferError, match=f"^{name} is "):
            Settings(**bad)


class TestBatches:
    def test_equal_shapes_within_the_limit(self):
        shapes = {f"{kind}.{i}": (8, side) for i in range(5) for kind, side in (("a", 4), ("b", 6))}
        made = plan(shapes)
        # Two weights of 8 x 4 float32 are 256 bytes, of 8 x 6 are 384.
        batches = list(made.batches(limit=800))
        assert [len(batch) for batch in batches] == [3, 2, 2, 2, 1]
        for batch in batches:
            assert len({layer.source_shape for layer in batch}) == 1
        assert sorted(x.module for batch in batches for x in batch) == sorted(shapes)

    def test_a_layer_over_the_limit_comes_alone(self):
        made = plan({"a": (8, 4), "b": (8, 4)})
        assert [len(batch) for batch in made.batches(limit=1)] == [1, 1]

    def test_the_estimate_grows_with_the_largest_layer_not_with_their_number(self):
        one = plan({"a.0": (4096, 4096)}).memory_bytes
        many = plan({f"a.{i}": (4096, 4096) for i in range(32)}).memory_bytes
        larger = plan({"a.0": (16384, 4096)}).memory_bytes
        # Rank 2, float32: read, computed and written.
        factors = 31 * 3 * 4 * 2 * 2 * 4096
        # A batch holds one layer of 2 x 64 MiB within its 128 MiB.
        assert many - one == pytest.approx(1.2 * factors, rel=1e-6)
        assert larger > one + (300 << 20)


def test_names_agree_with_the_kernels():
    import lorax_kernels as lk

    assert set(METHODS) == {*lk.METHODS, "anchor", "restore", "aligned"}
    assert ("auto", *(row.name for row in lk.backends())) == BACKENDS


@pytest.mark.parametrize(
    ("drift", "outside", "share"),
    [
        (None, None, 1.0),
        (0.0, 0.1, 1.0),
        (0.004, None, 1.0),
        (0.005, None, 0.8),
        (0.16, None, 0.5),
        (0.016, 0.032, 0.5),
        # What stays outside moved more than twice as far.
        (0.016, 0.033, 0.25),
        (0.004, 0.033, 1.0),
    ],
    ids=str,
)
def test_restored_share_falls_with_the_drift(drift, outside, share):
    assert restored_share(drift, outside) == pytest.approx(share)
