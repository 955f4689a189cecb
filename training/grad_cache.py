"""GradCache: a batch of any size on the memory of a part of it (Gao et al. 2021, arXiv 2101.06983).

1. embed    every part without a graph, and remember the random state it began with
2. loss     of all embeddings together; its gradient ends at them
3. embed    every part again, from the same random state, and hand each its gradient

Loss and gradient are those of the whole batch at once. Gradient accumulation is another thing:
it averages the losses of small batches, and adds no negatives.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states

from .objective import Embeds

TEXTS = ("target_input_ids", "target_attention_mask", "target_pooler_output")


def split(batch: dict[str, torch.Tensor], rows: int) -> list[dict[str, torch.Tensor]]:
    """A batch in parts of at most so many rows, each with an equal share of the distinct texts.

    Every part holds a text, though the last ones may hold some a second time: sharded data
    parallelism needs every box in every part of every process.
    """
    size = len(next(value for name, value in batch.items() if name not in TEXTS))
    count = -(-size // rows)  # parts
    texts = len(next(value for name, value in batch.items() if name in TEXTS))
    places = torch.arange(-(-texts // count) * count) % texts
    parts = []
    for part, some in zip(range(0, size, rows), places.chunk(count), strict=True):
        parts.append(
            {
                name: value[some] if name in TEXTS else value[part : part + rows]
                for name, value in batch.items()
            }
        )
    return parts


class RandomState:
    """The state of the CPU's generator and of the devices that hold these tensors."""

    def __init__(self, batch: dict[str, torch.Tensor]):
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*batch.values())

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw what was drawn then; afterwards go on as if nothing had been drawn."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield


def inner(value: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """What has this gradient at `value`; of the two, the longer one's last rows are left out.

    `None` is the gradient of what the objective does not read.
    """
    if gradient is None:
        return (0 * value).sum()
    rows = min(len(value), len(gradient))
    return (value[:rows] * gradient[:rows]).sum()


def cached_step(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    rows: int,
    loss_of: Callable[[Embeds], torch.Tensor],
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
) -> torch.Tensor:
    """Accumulate the gradient of a whole batch in the model's parameters; return the loss `()`.

    Args:
        model: a [`VLJEPAModel`], or what data parallelism made of it.
        batch: the arguments of its `forward`, without `target_index`.
        rows: of one part.
        loss_of: the objective.
        backward: of the training framework.
        no_sync: keeps data parallelism from exchanging gradients before the last part.
    """
    parts = split(batch, rows)

    # 1. Embeddings, without a graph
    states, predicted, targets = [], [], []
    with torch.no_grad():
        for part in parts:
            states.append(RandomState(part))
            output = model(**part)
            predicted.append(output.predicted_embeds)
            targets.append(output.target_embeds)
    texts = next(len(value) for name, value in batch.items() if name in TEXTS)
    bias = output.logit_bias
    embeds = Embeds(
        predicted=torch.cat(predicted),  # (b, D)
        texts=torch.cat(targets)[:texts],  # (U, D)
        logit_scale=output.logit_scale.detach(),  # (1,)
        logit_bias=None if bias is None else bias.detach(),  # not the parameter itself
    )
    del output  # with the visual tokens of its part

    # 2. Loss, and its gradient at the embeddings
    leaves = [leaf.requires_grad_() for leaf in vars(embeds).values() if leaf is not None]
    loss = loss_of(embeds)
    loss.backward(inputs=leaves)

    # 3. Embeddings again, with a graph, to which the gradient is handed
    some_texts = -(-texts // len(parts))
    for number, (part, state) in enumerate(zip(parts, states, strict=True)):
        is_last = number == len(parts) - 1
        with state.again(), nullcontext() if is_last else no_sync():
            output = model(**part)
            handed = inner(output.predicted_embeds, embeds.predicted.grad[number * rows :])
            handed += inner(output.target_embeds, embeds.texts.grad[number * some_texts :])
            if is_last:  # all parts have the temperature in their graph; one hands its gradient on
                handed += inner(output.logit_scale, embeds.logit_scale.grad)
                handed += 0 if bias is None else inner(output.logit_bias, embeds.logit_bias.grad)
            backward(handed)
    return loss.detach()


__all__ = ["cached_step"]
