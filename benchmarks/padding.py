"""Cost of padding: a step on images with short queries, unpadded and padded to 512 tokens:
`python -m benchmarks.padding`.

The two steps alternate; the minimum of each counts. The model is the mid-size one of
`benchmarks/configs.py`. Its X-Encoder is frozen, and an image is 256 visual tokens.
"""

import argparse

import torch

from benchmarks.configs import mid_config
from benchmarks.measure import cpu_seconds
from modeling_vljepa import VLJEPAModel

LENGTHS = {"20 tokens": 20, "padded to 512": 512}
TOKENS = 20


def batch(model: VLJEPAModel, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Return images, queries of twenty tokens and targets; a mask only if there is padding."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    size = config.vision_config.crop_size
    ids = torch.randint(3, 1000, (rows, TOKENS), generator=generator)
    queries = torch.full((rows, length), config.predictor_config.pad_token_id or 0)
    queries[:, :TOKENS] = ids
    inputs = {
        "pixel_values_videos": torch.randn(rows, 1, 3, size, size, generator=generator),
        "input_ids": queries,
        "target_input_ids": torch.randint(3, 1000, (rows, TOKENS), generator=generator),
    }
    if length > TOKENS:
        inputs["attention_mask"] = (torch.arange(length) < TOKENS).long().expand(rows, -1)
    return inputs


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.padding", description=__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = VLJEPAModel(mid_config()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    batches = {name: batch(model, args.rows, length) for name, length in LENGTHS.items()}
    seconds = dict.fromkeys(LENGTHS, float("inf"))
    losses = {}
    for _ in range(args.repeats):
        for name, inputs in batches.items():
            since = cpu_seconds()
            loss = model(**inputs, return_loss=True).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[name] = min(seconds[name], cpu_seconds() - since)
            losses.setdefault(name, loss.item())
    for name, found in seconds.items():
        print(f"{name:<15}{found:8.2f} CPU-seconds per step of {args.rows} images")
    short, long = seconds.values()
    print(f"{long / short:.1f} times as long with padding; {torch.get_num_threads()} thread(s)")


if __name__ == "__main__":
    main()
