"""Embed texts with a trained model, and check that embeddings are numbers.

A text is encoded once for a model, however often and by whichever pipeline, stream or benchmark it
is asked for: its embedding is cached. Texts are batched by length, so that padding costs little.

Shapes: N texts, D embedding size.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from hashlib import blake2b
from itertools import chain
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

TEXTS_PER_PASS = 64
TEXTS_PER_TOKENIZATION = 1024  # they are padded to the longest
CACHED_TEXTS = 20_000  # per model: 120 MB for the paper's 1,536 dimensions
SAMPLED = 64  # numbers of each weight that `weights_state` compares
INTERNAL = vars(nn.Module()).keys()
PLAIN = bool | int | float | str | list | tuple | dict | None


def check_finite(name: str, values: torch.Tensor) -> torch.Tensor:
    """Return a tensor; raise `ValueError` if it holds NaN or infinity.

    A ranking would put NaN anywhere, and JSON cannot hold it.
    """
    if not values.isfinite().all():
        raise ValueError(
            f"{name} of this model is not finite: its weights hold NaN, or they overflow in this "
            "dtype. Load it in float32 or bfloat16, or replace the checkpoint."
        )
    return values


# -- identity of the weights ---------------------------------------------------------------


def settings(module: nn.Module) -> str:
    """Return a module's own plain attributes, such as the active adapters of a peft layer."""
    own = vars(module).items()
    return repr([each for each in own if each[0] not in INTERNAL and isinstance(each[1], PLAIN)])


def samples_hash(weights: Iterable[torch.Tensor]) -> bytes:
    """Return a hash of up to `2 * SAMPLED` evenly spaced numbers of each tensor."""
    samples: dict[tuple, list[torch.Tensor]] = {}
    for weight in weights:
        sample = weight.detach().flatten()[:: max(weight.numel() // SAMPLED, 1)]
        samples.setdefault((weight.device, weight.dtype), []).append(sample)
    digest = blake2b(digest_size=16)
    for each in samples.values():  # one copy from a GPU, not one per weight
        digest.update(torch.cat(each).view(torch.uint8).cpu().numpy())
    return digest.digest()


def weights_state(model: PreTrainedModel) -> tuple | None:
    """Return a value that changes with the weights and layers that embed texts.

    It is compared before a cached embedding is used: it holds the address, version, dtype and
    device of each weight of the Y-Encoder and its head, and the layers' settings. A version alone
    would miss `model.to(dtype)`, which replaces `weight.data`. An address alone would miss a way
    there and back, and some optimizers write past the version. So a sample of the numbers counts
    too. Only an edit through `weight.data` of single numbers outside the sample is not seen.

    Returns: `None` if this cannot be known: in training, and for weights that are not in this
        process's memory (offloaded, sharded) or not plain numbers (quantized).
    """
    model = model.base_model
    device = model.device.type
    facts: list = [torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)]
    weights = []
    for module in chain(model.y_encoder.modules(), model.y_head.modules()):
        if module.training:
            return None
        hooks = (*module._forward_hooks, *module._forward_pre_hooks)
        facts.append((type(module), settings(module), hooks))
        # Not `parameters(recurse=False)`: with its checks of names, this takes twice as long.
        own = [each for each in module._parameters.values() if each is not None]
        if any(each.numel() == 0 or type(each.data) is not torch.Tensor for each in own):
            return None
        weights += own
        weights += [each for each in module._buffers.values() if each is not None]
    if any(weight.is_meta for weight in weights):
        return None
    for weight in weights:
        version = None if weight.is_inference() else weight._version
        facts.append((weight.data_ptr(), version, weight.dtype, weight.device, weight.shape))
    return (*facts, samples_hash(weights))


# -- cache ---------------------------------------------------------------------------------


class TargetCache:
    """The last `CACHED_TEXTS` embeddings of one model, by a hash of the text's tokens.

    Several threads may use it.
    """

    def __init__(self):
        self.lock = Lock()
        self.state: tuple | None = None  # `weights_state` of the embeddings
        self.embeds: OrderedDict[bytes, torch.Tensor] = OrderedDict()  # least recently used first

    def get(self, state: tuple, keys: Iterable[bytes]) -> dict[bytes, torch.Tensor]:
        """Return the cached embeddings among those of `keys`; forget all of other weights."""
        with self.lock:
            if state != self.state:
                self.state = state
                self.embeds.clear()
            found = {key: self.embeds[key] for key in keys if key in self.embeds}
            for key in found:
                self.embeds.move_to_end(key)
            return found

    def put(self, state: tuple, embeds: dict[bytes, torch.Tensor]) -> None:
        """Store embeddings, unless another thread has seen other weights since."""
        with self.lock:
            if state == self.state:
                self.embeds |= embeds
                while len(self.embeds) > CACHED_TEXTS:
                    self.embeds.popitem(last=False)


# By model, not by pipeline: the tasks of an endpoint and the sessions of a stream share a model.
# A pipeline is also sent to worker processes, which a lock cannot be.
CACHES: WeakKeyDictionary[nn.Module, TargetCache] = WeakKeyDictionary()
CACHES_LOCK = Lock()


def cache_of(model: PreTrainedModel) -> TargetCache:
    with CACHES_LOCK:
        return CACHES.setdefault(model.base_model, TargetCache())


# -- embedding -----------------------------------------------------------------------------


def read_tokens(processor: ProcessorMixin, texts: list[str]) -> list[tuple[bytes, int]]:
    """Return a hash of each text's tokens, and their number.

    The tokens decide an embedding: a prompt of the processor and its limit of the length are in
    them.
    """
    found = []
    for start in range(0, len(texts), TEXTS_PER_TOKENIZATION):
        batch = processor(targets=texts[start : start + TEXTS_PER_TOKENIZATION])
        ids, mask = batch["target_input_ids"], batch["target_attention_mask"].bool()
        for tokens in ids[mask].split(mask.sum(dim=1).tolist()):
            found.append((blake2b(tokens.numpy(), digest_size=16).digest(), len(tokens)))
    return found


@torch.no_grad()
def target_embeds(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    texts: list[str],
    *,
    batch_size: int = TEXTS_PER_PASS,
    on_texts: Callable[[int], object] = lambda count: None,
) -> torch.Tensor:
    """Return target embeddings, unit vectors `(N, D)` in float32 on the CPU.

    Equal texts are encoded once, and those that this model has embedded before not at all.

    Args:
        batch_size: texts per pass of the Y-Encoder.
        on_texts: called with the number of texts as they are done, repeated ones first.
    """
    model = model.base_model
    read = read_tokens(processor, texts)
    distinct = {key: (length, text) for (key, length), text in zip(read, texts, strict=True)}
    state = weights_state(model)
    found = {} if state is None else cache_of(model).get(state, distinct)
    # The longest first: a lack of memory shows at once.
    missing = sorted((key for key in distinct if key not in found), key=lambda k: -distinct[k][0])
    on_texts(len(texts) - len(missing))
    new = {}
    for start in range(0, len(missing), batch_size):
        keys = missing[start : start + batch_size]
        batch = processor(targets=[distinct[key][1] for key in keys]).to(model.device)
        embeds = model.encode_target(**batch).float().cpu()
        # Copies: a view would keep its whole batch in the cache.
        new |= {key: each.clone() for key, each in zip(keys, embeds, strict=True)}
        on_texts(len(keys))
    # Another thread may have changed the weights while they were used.
    if new and state is not None and state == weights_state(model):
        cache_of(model).put(state, new)
    found |= new
    return torch.stack([found[key] for key, _ in read])


def embed_texts(
    model: PreTrainedModel, processor: ProcessorMixin, texts: list[str]
) -> torch.Tensor:
    """Return `target_embeds` `(N, D)`; raise `ValueError` if they are not finite."""
    return check_finite("a target embedding", target_embeds(model, processor, texts))


__all__ = ["check_finite", "embed_texts", "target_embeds", "weights_state"]
