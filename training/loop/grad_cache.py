"""GradCache: a batch of any size in the memory of a part of it (Gao et al. 2021, arXiv 2101.06983).

1. Embed every part without a graph; store the random state at its start.
2. Compute the loss of all embeddings together, and its gradient at the embeddings.
3. Embed every part again, with a graph and the same random state; backpropagate its share of that
   gradient.

Loss and gradient are those of the whole batch at once. Gradient accumulation differs: it averages
the losses of small batches, and adds no negatives.

A frozen X-Encoder computes the same visual tokens in both passes, so step 3 reuses those of step 1.
Until then they are stored in place of the pixels of their part: on a GPU, in the machine's memory.

Rows that share a clip are put into one part, where it is encoded once. A clip whose rows fill more
than one part is encoded in each.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states

from training.loop.objective import Embeds

TEXTS = ("target_input_ids", "target_attention_mask", "target_pooler_output")
PIXELS = ("frames", "pixel_values_videos")  # uint8, as the collator makes them, or normalised
CLIPS = (*PIXELS, "visual_embeds")

Batch = dict[str, torch.Tensor]  # arguments of the model's `forward`, without `target_index`


def trim(part: Batch, prefix: str) -> None:
    """Remove from `(b, L)` tokens the last columns that are padding in every row of this part.

    Also remove a mask that is all ones, which lets the encoders skip masking. A part then costs
    what its own longest text costs, not the longest text of the batch.
    """
    ids, mask = f"{prefix}input_ids", f"{prefix}attention_mask"
    if mask not in part:
        return
    columns = part[mask].any(dim=0).nonzero()  # columns with a token; empty if all texts are
    length = int(columns.max()) + 1 if len(columns) else 0
    part[ids], part[mask] = part[ids][:, :length], part[mask][:, :length]
    if part[mask].all():
        del part[mask]


def take_clips(part: Batch) -> None:
    """Remove from a part the clips of other parts, and an index that assigns clip i to row i."""
    index = part["visual_index"]
    first, last = int(index.min()), int(index.max())
    # Slices, not the clips by index: a copy would double the memory of the waiting batch.
    part.update({name: part[name][first : last + 1] for name in CLIPS if name in part})
    part["visual_index"] = index - first
    if torch.equal(part["visual_index"], torch.arange(len(index), device=index.device)):
        del part["visual_index"]


def by_clip(batch: Batch) -> tuple[Batch, torch.Tensor]:
    """Return a batch with its rows sorted by clip, and their indices in the given batch `(B,)`."""
    if "visual_index" not in batch:
        return batch, torch.arange(row_count(batch))
    order = batch["visual_index"].argsort(stable=True)
    shared = (*TEXTS, *CLIPS)
    rows = {name: value[order] for name, value in batch.items() if name not in shared}
    return batch | rows, order


def row_count(batch: Batch) -> int:
    rows = [value for name, value in batch.items() if name not in TEXTS]
    return len(batch.get("visual_index", rows[0]))


def split(batch: Batch, rows: int) -> list[Batch]:
    """Split a batch into parts of at most `rows` rows, each with an equal share of distinct texts.

    Every part gets the clips of its rows: few, if `by_clip` has sorted the batch.

    Every part gets at least one text: sharded data parallelism runs every module in every part of
    every process. If the texts do not divide evenly, the last parts repeat the first texts.
    """
    size = row_count(batch)
    count = -(-size // rows)  # parts
    texts = len(next(value for name, value in batch.items() if name in TEXTS))
    if not size or not texts:
        raise ValueError(f"the batch has {size} rows and {texts} texts: give at least one of each")
    # Rounded up to a multiple of `count`; the modulo repeats texts from the start.
    indices = torch.arange(-(-texts // count) * count) % texts
    distinct = (*TEXTS, *CLIPS) if "visual_index" in batch else TEXTS
    parts = []
    for start, chunk in zip(range(0, size, rows), indices.chunk(count), strict=True):
        part = {
            name: value if name in distinct else value[start : start + rows]
            for name, value in batch.items()
        }
        parts.append(part | {name: batch[name][chunk] for name in TEXTS if name in batch})
        if "visual_index" in batch:
            take_clips(parts[-1])
        trim(parts[-1], "")
        trim(parts[-1], "target_")
    return parts


def frozen_vision(model: nn.Module) -> nn.Module | None:
    """Return the X-Encoder if its tokens are equal in every pass, else `None`.

    They are equal if none of its parameters trains and it is in evaluation mode, where it draws no
    random numbers.
    """
    # By name, because data parallelism or adapters may wrap the model.
    encoder = next(
        module for name, module in model.named_modules() if name.split(".")[-1] == "x_encoder"
    )
    trains = any(parameter.requires_grad for parameter in encoder.parameters())
    return None if trains or encoder.training else encoder


class RandomState:
    """State of the random generators of the CPU and of these tensors' devices."""

    def __init__(self, batch: Batch):
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*batch.values())

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same random numbers again; restore the current state afterwards."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield


def inner(value: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """Return the scalar whose gradient at `value` is `gradient`: their inner product.

    Rows that only one of the two has are ignored. A `gradient` of `None` counts as zero: the
    objective ignores that value.
    """
    # Zero times the value, not a constant: data parallelism needs every output in the graph.
    if gradient is None:
        return (0 * value).sum()
    rows = min(len(value), len(gradient))
    return (value[:rows] * gradient[:rows]).sum()


def store_like(pixels: torch.Tensor, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the tokens in `dtype` in memory of the kind that holds the pixels.

    If that is pinned, neither this copy nor the later one to the device waits. Both are in the
    device's queue of work, in this order, and the CPU reads neither.
    """
    pinned = pixels.is_pinned()
    stored = torch.empty(tokens.shape, dtype=dtype, device=pixels.device, pin_memory=pinned)
    return stored.copy_(tokens, non_blocking=pinned)


def unchanged(part: Batch) -> Batch:
    return part


def cached_step(
    model: nn.Module,
    batch: Batch,
    rows: int,
    loss_of: Callable[[Embeds], torch.Tensor],
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
    make_ready: Callable[[Batch], Batch] = unchanged,
) -> torch.Tensor:
    """Accumulate the gradient of a whole batch in the model's parameters; return the loss `()`.

    Args:
        model: a [`VLJEPAModel`], which data parallelism or adapters may wrap.
        batch: inputs of `make_ready`, which receives them part by part.
        rows: rows of one part.
        loss_of: the objective.
        backward: the training framework's backward function.
        no_sync: context in which data parallelism does not exchange gradients.
        make_ready: moves a part to the device and converts it to arguments of `model.forward`.
    """
    batch, order = by_clip(batch)
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
                # In the dtype of the encoder's weights: data parallelism converts outputs to fp32,
                # and in the Predictor's first layer autocast rounds them to bf16 again.
                dtype = next(vision.parameters()).dtype
                part["visual_embeds"] = store_like(part.pop(pixels), output.visual_embeds, dtype)
    texts = next(len(value) for name, value in batch.items() if name in TEXTS)
    bias = output.logit_bias
    predicted = torch.cat(predicted)  # (b, D)
    # Moved here: an index on the CPU would be moved too, and waited for.
    given = order.argsort().to(predicted.device, non_blocking=True)
    order = order.to(predicted.device, non_blocking=True)
    embeds = Embeds(
        predicted_embeds=predicted[given],  # (b, D), in the caller's order
        distinct_target_embeds=torch.cat(targets)[:texts],  # (U, D)
        logit_scale=output.logit_scale.detach(),  # (1,)
        logit_bias=None if bias is None else bias.detach(),  # the output is the parameter itself
    )
    # Also frees the last part's pixels and tokens on the device.
    del ready, output, predicted, targets

    # 2. Loss, and its gradient at the embeddings
    leaves = [leaf.requires_grad_() for leaf in vars(embeds).values() if leaf is not None]
    loss = loss_of(embeds)
    loss.backward(inputs=leaves)
    gradient = Embeds(*(None if leaf is None else leaf.grad for leaf in vars(embeds).values()))
    of_predicted = gradient.predicted_embeds[order]  # (b, D), in the order of the parts
    loss = loss.detach()  # its graph would keep the embeddings in memory
    del embeds, leaves

    # 3. Embeddings again, with a graph; backpropagate the gradient through it
    texts_per_part = -(-texts // len(states))
    for index, state in enumerate(states):
        is_last = index == len(states) - 1
        with state.again(), nullcontext() if is_last else no_sync():
            output = model(**make_ready(parts.pop(0)))
            # `inner` ignores the rows after this part's, and texts that a part has repeated.
            first_text = index * texts_per_part
            surrogate = inner(output.predicted_embeds, of_predicted[index * rows :])
            surrogate += inner(output.target_embeds, gradient.distinct_target_embeds[first_text:])
            if is_last:  # the temperature is in every part's graph, but its gradient counts once
                surrogate += inner(output.logit_scale, gradient.logit_scale)
                surrogate += 0 if bias is None else inner(output.logit_bias, gradient.logit_bias)
            backward(surrogate)
    return loss


__all__ = ["cached_step"]
