# SPDX-License-Identifier: Apache-2.0
"""Methods of transfer on a GPU: equal to those on the CPU, which the equations are checked on."""

import pytest
import torch

import lorax_kernels as lk
from lorax_kernels import testing

pytestmark = pytest.mark.gpu

M, N, R, K = 300, 220, 6, 40
# Bases come from the CPU, so that only products and small eigenproblems in float64 differ.
CLOSE = 1e-5


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def layers():
    made = []
    for i in range(3):
        W = testing.matrix("power", M, N, K, generator=seeded(i))
        noise = torch.randn(M, N, generator=seeded(10 + i))
        W_t = W + 0.1 * W.norm() * noise / noise.norm()
        B, A = torch.randn(M, R, generator=seeded(i)), torch.randn(R, N, generator=seeded(i))
        made.append((B, A, W, W_t))
    return tuple(map(list, zip(*made, strict=True)))


def on_gpu(tensors):
    return [x.cuda() for x in tensors]


def svds_on_gpu(svds):
    return [lk.SVD(s.U.cuda(), s.S.cuda(), s.V.cuda(), s.error, s.passes, s.path) for s in svds]


def assert_same_updates(got, want):
    for B, A, B_w, A_w in zip(*got, *want, strict=True):
        assert B.is_cuda
        update, wanted = (B @ A).cpu().double(), B_w.double() @ A_w.double()
        assert float((update - wanted).norm() / wanted.norm()) < CLOSE


def test_transport():
    B, A, W_s, W_t = layers()
    sources, targets = lk.truncated_svd(W_s, K), lk.truncated_svd(W_t, K)
    want = lk.transfer_lora(B, A, targets, sources, "transport")
    got = lk.transfer_lora(
        on_gpu(B), on_gpu(A), svds_on_gpu(targets), svds_on_gpu(sources), "transport"
    )
    assert_same_updates(got, want)


@pytest.mark.parametrize("sides", ["input", "output", "both"])
def test_anchor(sides):
    arguments = layers()
    want = lk.anchor_lora(*arguments, scale=0.5, sides=sides)
    assert_same_updates(lk.anchor_lora(*map(on_gpu, arguments), scale=0.5, sides=sides), want)


def test_restore():
    """Drift with a gap: of noise alone, another mixture of equal directions may be found."""
    B, A, W_s, W_t = layers()
    for i, W in enumerate(W_s):
        spike = torch.randn(M, 2, generator=seeded(i)) @ torch.randn(2, N, generator=seeded(i))
        W_t[i] = W_t[i] + W.norm() * spike / spike.norm()
    want = lk.restore_lora(B, A, W_s, W_t, directions=2)
    got = lk.restore_lora(*map(on_gpu, (B, A, W_s, W_t)), directions=2)
    for G_B, G_A, B_w, A_w in zip(*got, *want, strict=True):
        update, wanted = (G_B @ G_A).cpu().double(), B_w.double() @ A_w.double()
        # Two directions are asked for to 1e-2 within 12 passes; with this gap they reach it.
        assert float((update - wanted).norm() / wanted.norm()) < 1e-2


def test_restore_embedding():
    source = torch.randn(5000, 96, generator=seeded(0))
    # Directions that are told apart.
    D = torch.randn(5000, 96, generator=seeded(1)) * 0.8 ** torch.arange(96)
    want = lk.restore_embedding(source, source + D, directions=8)
    got = lk.restore_embedding(source.cuda(), (source + D).cuda(), directions=8)
    assert_same_updates(*([pair[:1], pair[1:]] for pair in (got, want)))


def test_alignment():
    P = torch.linalg.qr(torch.randn(40, 24, generator=seeded(0))).Q
    H = torch.linalg.qr(torch.randn(90, 60, generator=seeded(1))).Q
    gate, up = (torch.randn(60, 24, generator=seeded(2 + i)) for i in range(2))
    down = torch.randn(24, 60, generator=seeded(4))
    E = torch.randn(500, 24, generator=seeded(5)).cuda()
    stream = lk.procrustes(E, E @ P.T.cuda())
    reads = [(W.cuda(), (H @ W @ P.T).cuda()) for W in (gate, up)]
    found = lk.inner_map(stream, reads, [(down.cuda(), (P @ down @ H.T).cuda())])
    torch.testing.assert_close(stream.cpu(), P, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.cpu(), H, rtol=0, atol=1e-4)
