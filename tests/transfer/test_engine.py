# SPDX-License-Identifier: Apache-2.0
"""The engine: batches change nothing, related models share work, and trouble is named."""

import oracle
import pytest
import torch
from adapter_makers import convnet, llama
from pairs import as_matrix, make_pair, updates

import lorax_kernels as lk
import lorax_transfer
from lorax_transfer._weights import relative_drift
from lorax_transfer.checkpoints import open_checkpoint
from lorax_transfer.errors import TransferError


@pytest.fixture
def pair(tmp_path):
    return make_pair(tmp_path, llama, target_modules=["q_proj", "v_proj", "down_proj"])


def test_batches_change_nothing(pair, monkeypatch):
    whole = lorax_transfer.scan(pair.adapter, pair.source, pair.target, rank=8)
    monkeypatch.setattr("lorax_transfer._run.BATCH_BYTES", 1)
    alone = lorax_transfer.scan(pair.adapter, pair.source, pair.target, rank=8)
    for a, b in zip(whole.layers, alone.layers, strict=True):
        assert a.module == b.module
        # The same arithmetic in stacks of another height: float32 rounding.
        for method, outcome in a.outcomes.items():
            assert outcome.energy_kept == pytest.approx(b.outcomes[method].energy_kept, rel=1e-4)
        assert pytest.approx(b.similarity.U, rel=1e-4) == a.similarity.U


def test_similarity_is_that_of_the_equations(pair):
    report = lorax_transfer.scan(pair.adapter, pair.source, pair.target, rank=8)
    for layer in report.layers:
        source, target = (
            oracle.exact_svd(as_matrix(module, module.weight.detach()), 8)
            for module in (
                pair.source_model.get_submodule(layer.module),
                pair.target_model.get_submodule(layer.module),
            )
        )
        for side, index in (("U", 0), ("V", 2)):
            wanted = oracle.similarity(source[index], target[index])
            assert getattr(layer.similarity, side) == pytest.approx(wanted, abs=2e-3)
            chance = 8 / len(source[index])
            assert getattr(layer.similarity, f"chance_{side}") == pytest.approx(chance)


def test_only_a_few_weights_are_held_at_a_time(tmp_path, pair, monkeypatch):
    """Every weight of a batch is gone before the next batch is read."""
    monkeypatch.setattr("lorax_transfer._run.BATCH_BYTES", 1)
    import weakref

    from lorax_transfer.checkpoints._safetensors import SafetensorsCheckpoint

    read, alive = SafetensorsCheckpoint.read, []
    most = 0

    def counting(self, name):
        nonlocal most
        weight = read(self, name)
        alive.append(weakref.ref(weight.untyped_storage()))
        most = max(most, sum(ref() is not None for ref in alive))
        return weight

    monkeypatch.setattr(SafetensorsCheckpoint, "read", counting)
    lorax_transfer.transfer(pair.adapter, pair.source, pair.target, tmp_path / "out", rank=8)
    # The adapter's own weights, and, to compare them, all others.
    with open_checkpoint(pair.source) as source, open_checkpoint(pair.target) as target:
        assert len(alive) == len(source.names()) + len(target.names())
    assert most <= 2


def test_the_source_starts_from_the_targets_basis(pair, monkeypatch):
    starts = []
    compute = lk.truncated_svd

    def recording(weights, *args, init=None, **options):
        starts.append(init)
        return compute(weights, *args, init=init, **options)

    monkeypatch.setattr(lk, "truncated_svd", recording)
    lorax_transfer.scan(pair.adapter, pair.source, pair.target, rank=8, include="q_proj")
    # The probe of the backend, the target, the source.
    assert [start is not None and None not in start for start in starts] == [False, False, True]


def test_identical_weights_are_decomposed_once(pair, monkeypatch):
    counts = []
    compute = lk.truncated_svd
    monkeypatch.setattr(
        lk, "truncated_svd", lambda w, *a, **o: (counts.append(len(w)), compute(w, *a, **o))[1]
    )
    report = lorax_transfer.scan(pair.adapter, pair.source, pair.source, rank=8, include="q_proj")
    assert sum(counts[1:]) == 2
    for layer in report.layers:
        if not layer.is_measured:
            continue
        assert layer.drift == 0
        assert pytest.approx(1, abs=1e-6) == layer.similarity.U


@pytest.mark.parametrize("rows", [1, 3, 5000], ids=lambda rows: f"rows={rows}")
def test_drift(rows):
    source = torch.randn(rows, 2000)
    target = (source + 0.01 * torch.randn(rows, 2000)).bfloat16()
    wanted = float((target.double() - source.double()).norm() / source.double().norm())
    assert relative_drift(source, target) == pytest.approx(wanted, rel=1e-9)
    assert relative_drift(source, source.clone()) == 0
    assert relative_drift(source.bfloat16(), source.bfloat16().float()) == 0
    assert relative_drift(torch.zeros(2, 2), torch.ones(2, 2)) is None
    assert relative_drift(torch.zeros(2, 2), torch.ones(2, 3)) is None


def test_a_missed_tolerance_is_reported(tmp_path):
    """Equal singular values at the cut determine no subspace, and the report has to say so."""

    def flat():
        model = convnet()
        with torch.no_grad():
            model.head.weight.copy_(torch.eye(5, 8))
        return model

    pair = make_pair(tmp_path, flat, drift=0.0, target_modules=["head"], r=2)
    report = lorax_transfer.scan(pair.adapter, pair.source, pair.target, rank=3)
    [layer] = report.layers
    assert layer.svd_error > 1e-3
    assert "above 0.001" in layer.reason
    assert report.totals.above_tolerance == 1
    assert any("above its tolerance" in warning for warning in report.warnings)
    with pytest.raises(TransferError, match=r"strict: head of 1 layers .* above 0.001"):
        lorax_transfer.transfer(
            pair.adapter, pair.source, pair.target, tmp_path / "out", rank=3, strict=True
        )


def test_inputs_are_unchanged(tmp_path, pair):
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    lorax_transfer.transfer(pair.adapter, pair.source, pair.target, tmp_path / "out", rank=8)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_update_norm_includes_the_scale(pair):
    report = lorax_transfer.scan(pair.adapter, pair.source, pair.target, rank=8)
    dW = updates(pair.source_model, pair.adapter)
    for layer in report.layers:
        assert layer.update_norm == pytest.approx(float(dW[layer.module].norm()), rel=1e-5)


def test_a_backend_that_cannot_run_is_one_sentence(tmp_path, pair):
    if torch.cuda.is_available():
        pytest.skip("the cuda backend may run here")
    with pytest.raises(TransferError, match=r"backend 'cuda' cannot run .*lorax-transfer info"):
        lorax_transfer.scan(pair.adapter, pair.source, pair.target, backend="cuda")


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpu:x", "mps"])
def test_devices_that_are_not_there(pair, device):
    with pytest.raises(TransferError, match=f"device is '{device}'"):
        lorax_transfer.scan(pair.adapter, pair.source, pair.target, device=device)


def test_checkpoints_are_closed(pair, monkeypatch):
    opened = []

    def remember(path):
        opened.append(open_checkpoint(path))
        return opened[-1]

    monkeypatch.setattr("lorax_transfer._run.open_checkpoint", remember)
    lorax_transfer.scan(pair.adapter, pair.source, pair.target, rank=8)
    assert len(opened) == 2
    for checkpoint in opened:
        with pytest.raises(TransferError, match="was closed"):
            checkpoint.read(checkpoint.names()[0])
