"""Pictures of the gallery."""

import numpy as np

from training.evaluation.gallery import overlay


def test_overlay_of_even_attention_is_clear():
    assert overlay(np.ones((2, 3), dtype=np.float32)) != overlay(np.eye(3, dtype=np.float32))
