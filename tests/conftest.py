"""Settings of every test, and two options that look for tests that hold on one machine only."""

import gc
import os

# Before anything imports huggingface_hub: no test waits for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import nn

ALIGNMENT = 64  # bytes; torch allocates weights so, but safetensors maps a file at any address


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reversed", action="store_true", help="run all tests in reversed order")
    parser.addoption(
        "--move-unaligned",
        action="store_true",
        help="move every Linear weight that is not 64-byte aligned by one unit in the last place",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--move-unaligned"):
        nn.Linear.forward = move_unaligned(nn.Linear.forward)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--reversed"):
        items.reverse()


def pytest_collection_finish() -> None:
    """Take what is imported out of garbage collections: each training ends with one, and a fifth of
    `test_trainer.py`'s time was spent on the libraries' objects."""
    gc.freeze()


def move_unaligned(forward):
    """Return `nn.Linear.forward` as a processor computes it whose result depends on the address.

    On some processors the product of one row differs in its last bit if the weight is not aligned.
    Weights mapped from a safetensors file usually are not, so a loaded model differs from the
    saved one. Moved weights show such a difference on every processor.
    """

    def moved(self: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        # Subclasses have no address (fake tensors of an export) or several (sharded ones).
        if type(weight) is not nn.Parameter or weight.device.type != "cpu":
            return forward(self, inputs)
        if weight.data_ptr() % ALIGNMENT == 0:
            return forward(self, inputs)
        fixed = weight.detach()
        step = torch.nextafter(fixed, torch.full_like(fixed, torch.inf)) - fixed
        return nn.functional.linear(inputs, weight + step, self.bias)

    return moved
