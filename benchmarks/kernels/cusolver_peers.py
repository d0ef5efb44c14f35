# SPDX-License-Identifier: Apache-2.0
"""cuSOLVER's randomized and polar SVD, which torch does not bind, called in the library it loaded.

Both are of cuSOLVER's 64-bit interface: a query of the workspaces, then the call, with the same
arguments in front. Matrices are float32 and are handed over tall, a wide one as its transpose, so
that either routine takes them.
"""

import ctypes
from pathlib import Path

import torch

REAL_32, WITH_VECTORS, ECONOMY = 0, 1, 1  # CUDA_R_32F, CUSOLVER_EIG_MODE_VECTOR, econ
ADDRESS, INT, LONG, CHAR = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_byte
# A dtype and the address of a matrix, with its leading dimension; of a vector, without.
MATRIX, VECTOR = (INT, ADDRESS, LONG), (INT, ADDRESS)
OPERANDS = (*MATRIX, *VECTOR, *MATRIX, *MATRIX, INT)  # A, S, U, V and the dtype computed in
SIZES = (ADDRESS, ADDRESS)
WORKSPACES = (ADDRESS, ctypes.c_size_t, ADDRESS, ctypes.c_size_t, ADDRESS)  # the last is `info`
POLAR = (ADDRESS, ADDRESS, INT, INT, LONG, LONG, *OPERANDS)
RANDOMIZED = (ADDRESS, ADDRESS, CHAR, CHAR, LONG, LONG, LONG, LONG, LONG, *OPERANDS)
SIGNATURES = {
    "cusolverDnCreate": (ADDRESS,),
    "cusolverDnCreateParams": (ADDRESS,),
    "cusolverDnSetStream": (ADDRESS, ADDRESS),
    "cusolverDnXgesvdp_bufferSize": (*POLAR, *SIZES),
    "cusolverDnXgesvdp": (*POLAR, *WORKSPACES, ADDRESS),
    "cusolverDnXgesvdr_bufferSize": (*RANDOMIZED, *SIZES),
    "cusolverDnXgesvdr": (*RANDOMIZED, *WORKSPACES),
}


def loaded_library():
    """Path of the cuSOLVER that this process has mapped."""
    torch.linalg.eigh(torch.eye(2, device="cuda"))  # torch may load it only when it is needed
    maps = Path("/proc/self/maps").read_text().splitlines()
    found = {line.split(maxsplit=5)[-1] for line in maps if "/libcusolver.so" in line}
    if not found:
        raise OSError("torch has not loaded a shared libcusolver.so")
    return min(found)


class Cusolver:
    """A handle of the library; everything runs on torch's current stream."""

    def __init__(self, path=None, device="cuda"):
        self.library = ctypes.CDLL(path or loaded_library())
        for name, arguments in SIGNATURES.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = arguments, INT
        self.device = device
        self.handle, self.parameters = ADDRESS(), ADDRESS()
        self._call("cusolverDnCreate", ctypes.byref(self.handle))
        self._call("cusolverDnCreateParams", ctypes.byref(self.parameters))

    def polar(self, W):
        """`(U, S, V)` of all triplets, by the polar decomposition of `W`."""
        residual = ctypes.c_double()  # what was added to a singular matrix; the error shows it
        side = min(W.shape)
        head = (WITH_VECTORS, ECONOMY)
        return self._svd("cusolverDnXgesvdp", W, head, (), side, ctypes.byref(residual))

    def randomized(self, W, rank, oversampling, iterations):
        """`(U, S, V)` of the first triplets, from a random block of `rank + oversampling`."""
        head = (ord("S"), ord("S"))
        more = (rank, oversampling, iterations)
        U, S, V = self._svd("cusolverDnXgesvdr", W, head, more, rank + oversampling)
        return U[:, :rank], S[:rank], V[:, :rank]

    def _svd(self, name, W, head, more, columns, *last):
        is_tall = W.shape[0] >= W.shape[1]
        # Column-major, so the transpose of what torch allocates; the routines overwrite it.
        A = (W.T if is_tall else W).clone(memory_format=torch.contiguous_format)
        n, m = A.shape
        U, V = (torch.empty(columns, side, device=self.device) for side in (m, n))
        S = torch.empty(columns, device=self.device)
        matrices = (REAL_32, A.data_ptr(), m, REAL_32, S.data_ptr())
        matrices += (REAL_32, U.data_ptr(), m, REAL_32, V.data_ptr(), n, REAL_32)
        front = (self.handle, self.parameters, *head, m, n, *more, *matrices)
        if self.device != "cpu":
            self._call("cusolverDnSetStream", self.handle, torch.cuda.current_stream().cuda_stream)
        here, there = ctypes.c_size_t(), ctypes.c_size_t()
        self._call(f"{name}_bufferSize", *front, ctypes.byref(here), ctypes.byref(there))
        on_device = torch.empty(max(1, here.value), dtype=torch.uint8, device=self.device)
        on_host = torch.empty(max(1, there.value), dtype=torch.uint8)
        info = torch.zeros(1, dtype=torch.int32, device=self.device)
        spaces = (on_device.data_ptr(), here, on_host.data_ptr(), there, info.data_ptr())
        self._call(name, *front, *spaces, *last)
        if code := int(info):
            raise RuntimeError(f"{name}: info is {code}")
        return (U.T, S, V.T) if is_tall else (V.T, S, U.T)

    def _call(self, name, *arguments):
        if status := getattr(self.library, name)(*arguments):
            raise RuntimeError(f"{name}: cusolverStatus_t {status}")
