"""GradCache: a batch of any size on the memory of a part of it (Gao et al. 2021, arXiv 2101.06983).

1. embed    every part without a graph, and remember the random state it began with
2. loss     of all embeddings together; its gradient ends at them
3. embed    every part again, from the same random state, and hand each its gradient

Loss and gradient are those of the whole batch at once. Gradient accumulation is another thing:
it averages the losses of small batches, and adds no negatives.

A frozen X-Encoder says the same thing twice, so its visual tokens are kept instead: they wait
where the pixels of their part have waited, which on a GPU is the memory of the machine.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states

from training.loop.objective import Embeds

TEXTS = ("target_input_ids", "target_attention_mask", "target_pooler_output")
PIXELS = ("frames", "pixel_values_videos")  # uint8, as the collator makes them, or normalised

Batch = dict[str, torch.Tensor]  # arguments of the model's `forward`, without `target_index`


def trim(part: Batch, prefix: str) -> None:
    """Take away the last columns of `(b, L)` tokens if they are padding in every row of this part,
    and a mask of ones only: nobody pays for the longest text of another part."""
    ids, mask = f"{prefix}input_ids", f"{prefix}attention_mask"
    if mask not in part:
        return
    columns = part[mask].any(dim=0).nonzero()  # that hold a token; none where all texts are empty
    length = int(columns.max()) + 1 if len(columns) else 0
    part[ids], part[mask] = part[ids][:, :length], part[mask][:, :length]
    if part[mask].all():
        del part[mask]


def split(batch: Batch, rows: int) -> list[Batch]:
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
        trim(parts[-1], "")
        trim(parts[-1], "target_")
    return parts


def frozen_vision(model: nn.Module) -> nn.Module | None:
    """The X-Encoder, whatever is wrapped around it, if its tokens are the same at every pass:
    nothing in it trains or draws random numbers."""
    box = next(
        module for name, module in model.named_modules() if name.split(".")[-1] == "x_encoder"
    )
    trains = any(parameter.requires_grad for parameter in box.parameters())
    return None if trains or box.training else box


class RandomState:
    """The state of the CPU's generator and of the devices that hold these tensors."""

    def __init__(self, batch: Batch):
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


def as_it_is(part: Batch) -> Batch:
    return part


def cached_step(
    model: nn.Module,
    batch: Batch,
    rows: int,
    loss_of: Callable[[Embeds], torch.Tensor],
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
    make_ready: Callable[[Batch], Batch] = as_it_is,
) -> torch.Tensor:
    """Accumulate the gradient of a whole batch in the model's parameters; return the loss `()`.

    Args:
        model: a [`VLJEPAModel`], or what data parallelism made of it.
        batch: what `make_ready` makes the arguments of its `forward` from, a part at a time.
        rows: of one part.
        loss_of: the objective.
        backward: of the training framework.
        no_sync: keeps data parallelism from exchanging gradients before the last part.
        make_ready: moves a part to the device and finishes it there.
    """
    parts = split(batch, rows)
    vision = frozen_vision(model)

    # 1. Embeddings, without a graph
    states, predicted, targets = [], [], []
    with torch.no_grad():
        for part in parts:
            ready = make_ready(part)
            states.append(RandomState(ready))
            output = model(**ready)
            predicted.append(output.predicted_embeds)
            targets.append(output.target_embeds)
            pixels = next((name for name in PIXELS if name in part), None)
            if vision is not None and pixels is not None:
                place = part.pop(pixels).device
                # In the type of the encoder's weights: data parallelism hands out fp32, and
                # autocast rounds it in the Predictor's first layer anyhow.
                tokens = output.visual_embeds.to(place, next(vision.parameters()).dtype)
                part["visual_embeds"] = tokens
    texts = next(len(value) for name, value in batch.items() if name in TEXTS)
    bias = output.logit_bias
    embeds = Embeds(
        predicted_embeds=torch.cat(predicted),  # (b, D)
        distinct_target_embeds=torch.cat(targets)[:texts],  # (U, D)
        logit_scale=output.logit_scale.detach(),  # (1,)
        logit_bias=None if bias is None else bias.detach(),  # not the parameter itself
    )
    del ready, output, predicted, targets  # the last part's pixels and tokens among them

    # 2. Loss, and its gradient at the embeddings
    leaves = [leaf.requires_grad_() for leaf in vars(embeds).values() if leaf is not None]
    loss = loss_of(embeds)
    loss.backward(inputs=leaves)
    gradient = Embeds(*(None if leaf is None else leaf.grad for leaf in vars(embeds).values()))
    loss = loss.detach()  # its graph would keep the embeddings
    del embeds, leaves

    # 3. Embeddings again, with a graph, to which the gradient is handed
    some_texts = -(-texts // len(states))
    for number, state in enumerate(states):
        is_last = number == len(states) - 1
        with state.again(), nullcontext() if is_last else no_sync():
            output = model(**make_ready(parts.pop(0)))
            handed = inner(output.predicted_embeds, gradient.predicted_embeds[number * rows :])
            handed += inner(
                output.target_embeds, gradient.distinct_target_embeds[number * some_texts :]
            )
            if is_last:  # all parts have the temperature in their graph; one hands its gradient on
                handed += inner(output.logit_scale, gradient.logit_scale)
                handed += 0 if bias is None else inner(output.logit_bias, gradient.logit_bias)
            backward(handed)
    return loss


__all__ = ["cached_step"]
