"""Cost of target states and of masks: `python -m benchmarks.target_states`.

The first table is for a Y-Encoder of MiniLM's size: texts are encoded and stored, and read by a
second start, which hashes the weights, tokenizes the texts and reads the file. The second compares
the mid-size Gemma of `benchmarks/configs.py` with masks as transformers builds them. The third is
the chance loss of InfoNCE with `unique`, as a reference. Calls alternate; the minimum counts.
"""

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, BatchFeature

from benchmarks.configs import MID, SMALL
from benchmarks.measure import cpu_seconds
from modeling_vljepa import VLJEPAConfig, VLJEPAModel
from modeling_vljepa.losses import Matches
from modeling_vljepa.y_encoder import YEncoder
from training.data.target_states import encoder_hash, read_target_states

MINILM = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
}


def least(repeats: int, **calls: Callable[[], object]) -> dict[str, float]:
    """Return the smallest CPU-seconds of each call; the calls alternate."""
    seconds = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            since = cpu_seconds()
            call()
            seconds[name] = min(seconds[name], cpu_seconds() - since)
    return seconds


def show(**seconds: float) -> None:
    first = next(iter(seconds.values()))
    for name, found in seconds.items():
        print(f"{name.replace('_', ' '):<34}{found:9.4f} CPU-seconds {found / first:8.3f}")


def tokenize(targets: list[str]) -> BatchFeature:
    """Return the tokens of texts as a processor does: four letters each."""
    ids = [
        torch.tensor([3 + hash(text[i : i + 4]) % 30_000 for i in range(0, len(text), 4)])
        for text in targets
    ]
    masks = [torch.ones_like(each) for each in ids]
    tokens = {"input_ids": ids, "attention_mask": masks}
    return BatchFeature(
        {f"target_{name}": pad_sequence(each, batch_first=True) for name, each in tokens.items()}
    )


def states(count: int) -> None:
    words = Path(__file__).read_text().split()
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=draw.randint(2, 8))) for _ in range(count)]
    config = VLJEPAConfig(**SMALL | {"text_config": MINILM, "freeze_text": True})
    model = VLJEPAModel(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (model, tokenize, texts, Path(folder), False)
        first = least(1, encode_and_store=lambda: read_target_states(*arguments))
        print(f"{len(set(texts))} texts, fp32:")
        show(
            **first,
            **least(
                3,
                read_again=lambda: read_target_states(*arguments),
                of_it_the_hash_of_the_weights=lambda: encoder_hash(model.y_encoder, torch.float32),
            ),
        )
    with torch.device("meta"):
        gemma = YEncoder(VLJEPAConfig().text_config, frozen=True)
    gemma.to_empty(device="cpu")
    show(**least(1, hash_of_EmbeddingGemma_in_fp32=lambda: encoder_hash(gemma, torch.float32)))


@torch.no_grad()
def masks(rows: int) -> None:
    config = AutoConfig.for_model(**MID["text_config"])
    encoder = YEncoder(config, frozen=True)
    for length, padded in ((16, False), (16, True), (64, False), (64, True)):
        ids = torch.randint(3, 1000, (rows, length))
        mask = (torch.arange(length) < torch.randint(2, length, (rows, 1))).long()
        given = mask if padded else None
        print(f"Gemma, {rows} texts of {length} tokens{', padded' * padded}:")
        show(
            **least(
                9,
                its_own_masks=lambda i=ids, m=given: encoder.backbone(
                    input_ids=i, attention_mask=m
                ),
                only_where_hidden=lambda i=ids, m=given: encoder.read(i, m),
            )
        )


def with_unique(matches: Matches) -> torch.Tensor:
    def count(ids: torch.Tensor) -> torch.Tensor:
        _, index, counts = ids.unique(dim=0, return_inverse=True, return_counts=True)
        return counts[index]

    both = torch.stack([matches.target_ids, matches.group_ids], dim=1)
    return count(matches.target_ids) + count(matches.group_ids) - count(both)


def counts(size: int) -> None:
    ids = torch.randint(2**62, (size // 2,))
    texts, groups = (ids[torch.randint(len(ids), (size,))] for _ in range(2))
    print(f"counts of {size} rows:")
    fresh = lambda: Matches(texts, groups, None, 0)  # noqa: E731
    assert torch.equal(with_unique(fresh()), fresh().counts)
    show(
        **least(5, with_unique=lambda: with_unique(fresh()), with_sorted_ids=lambda: fresh().counts)
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.target_states", description=__doc__)
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=32)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    states(args.texts)
    masks(args.rows)
    counts(4096)


if __name__ == "__main__":
    main()
