# SPDX-License-Identifier: Apache-2.0
"""What the tests of the language measurement begin with."""

import numpy as np
import pytest
from tiny_language import SHAPE

from benchmarks.quality import lm_data, lm_model


@pytest.fixture(scope="module")
def weights():
    return lm_model.random_model(SHAPE)


@pytest.fixture(scope="module")
def examples():
    """Rows to be answered by themselves reversed."""
    rng = np.random.default_rng(0)
    tokens, starts = [], []
    for _ in range(96):
        prompt = rng.integers(3, SHAPE.vocab, rng.integers(3, 6))
        tokens.append(np.concatenate([prompt, prompt[::-1], [lm_data.END]]))
        starts.append(len(prompt))
    return lm_data.Examples(tokens, np.array(starts))
