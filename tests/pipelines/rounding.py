"""Comparisons that hold although two computations of one thing round differently.

A product with weights in memory and one with the same weights mapped from a file can differ in the
last bit: the addresses are aligned differently, so the processor adds in another order.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from modeling_vljepa import VLJEPAForConditionalGeneration


def approximately(expected: list[dict], tolerance: float = 1e-6) -> list[dict]:
    """Return results for `==`: equal to others with the same texts and numbers this close."""
    return [
        {
            name: pytest.approx(value, abs=tolerance) if isinstance(value, float) else value
            for name, value in result.items()
        }
        for result in expected
    ]


@contextmanager
def clear_choices(model: VLJEPAForConditionalGeneration) -> Iterator[None]:
    """Assert that the best token leads the second by far at every step decoded inside.

    If it did not, two computations with a random decoder could write different texts.
    """
    leads = []

    def record(module, inputs, logits):
        first, second = logits[:, -1].topk(2).values.unbind(dim=1)
        leads.append(((first - second) / logits.std()).min().item())

    hook = model.y_decoder.backbone.get_output_embeddings().register_forward_hook(record)
    yield
    hook.remove()
    assert min(leads) > 1e-4  # rounding changes about 1e-6
