"""Divergence from full recompute."""

import math

import pytest
import torch

from kvilt.errors import ModelError
from kvilt.lab.evaluate import fidelity


def test_divergence_by_hand():
    full = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log()
    other = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert abs(fidelity.divergence(full, other) - (first + math.log(2)) / 2) < 1e-6  # a ruled-out token weighs nothing
    assert fidelity.divergence(full, full) == 0.0


def test_divergence_does_not_hide_a_broken_model():
    with pytest.raises(ModelError, match="NaN"):
        fidelity.divergence(torch.zeros(1, 3), torch.full((1, 3), math.nan))


def test_agreement():
    assert fidelity.same_text("The cat.", "cat")
    assert fidelity.same_first_token((5, 6), [5])
    assert fidelity.same_first_token((), [])
    assert not fidelity.same_first_token((5,), [])
