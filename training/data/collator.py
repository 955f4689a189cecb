"""Collation of samples into a batch of tensors."""

from collections.abc import Mapping
from itertools import chain

import torch

from processing.processing_vljepa import VLJEPAProcessor
from processing.video_processing_vljepa import VLJEPAVideoProcessor
from training.data.dataset import text_id


def to_pixel_values(frames: torch.Tensor, video: VLJEPAVideoProcessor) -> torch.Tensor:
    """Rescale and normalise uint8 frames `(B, T, 3, h, w)` to the pixels that the model reads.

    The collator leaves this to the training step: fp32 pixels are four times as large to move, and
    the model's device computes them faster.
    """
    return video.rescale_and_normalize(
        frames,
        video.do_rescale,
        video.rescale_factor,
        video.do_normalize,
        tuple(video.image_mean),
        tuple(video.image_std),
    )


def stack_clips(samples: list[dict]) -> dict[str, torch.Tensor]:
    """Return the distinct clips of samples, and `visual_index` `(B,)` into them if any is shared.

    Clips are equal if their `clip_id` is: the rows of an augmented source have clips of their own.
    """
    name = "visual_embeds" if "visual_embeds" in samples[0] else "frames"
    clips = {sample["clip_id"]: sample[name] for sample in samples}
    stacked = {name: torch.stack([*clips.values()])}
    if len(clips) < len(samples):
        number_of = {clip: number for number, clip in enumerate(clips)}
        index = [number_of[sample["clip_id"]] for sample in samples]
        stacked["visual_index"] = torch.tensor(index)
    return stacked


class ContrastiveCollator:
    """Collator that stacks each distinct clip once, tokenizes queries, and tokenizes each distinct
    target once.

    Texts are padded to the longest of their batch. A mask of ones only is left out: attention
    without a mask takes a faster path.

    Args:
        processor: the processor of the model.
        target_states: output of a frozen Y-Encoder for each target text. With them, targets are
            neither tokenized nor encoded again.
        hard_negatives: number of a row's own `negatives` that join the batch's texts.
    """

    def __init__(
        self,
        processor: VLJEPAProcessor,
        target_states: Mapping[str, torch.Tensor] | None = None,
        hard_negatives: int = 0,
    ):
        self.processor = processor
        self.target_states = target_states
        self.hard_negatives = hard_negatives

    def encode_targets(self, targets: list[str]) -> dict[str, torch.Tensor]:
        if self.target_states is None:
            return self.processor(targets=targets)
        states = [self.target_states[target] for target in targets]
        return {"target_pooler_output": torch.stack(states)}  # (U, Dt)

    def index_negatives(
        self, negatives: list[list[str]], row_of: dict[str, int]
    ) -> dict[str, torch.Tensor]:
        """Return the index and the id of each row's hard negatives among the distinct texts.

        Rows with fewer negatives are padded: index 0, id -1.
        """
        if not self.hard_negatives:
            return {}
        index = torch.zeros(len(negatives), self.hard_negatives, dtype=torch.long)
        ids = torch.full_like(index, -1)
        for row, texts in enumerate(negatives):
            for column, text in enumerate(texts):
                index[row, column], ids[row, column] = row_of[text], text_id(text)
        return {"negative_index": index, "negative_ids": ids}  # (B, n)

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """Collate samples into one batch.

        Returns:
            of the distinct clips, `frames` `(V, T, 3, h, w)`, uint8 (see `to_pixel_values`), or
            `visual_embeds` `(V, N, Dx)` where samples hold features;
            `visual_index` `(B,)` into them, if rows share clips (else V is B);
            `input_ids` and `attention_mask` `(B, L)`;
            of the distinct targets, `target_input_ids` and `target_attention_mask` `(U, Ly)`, or
            `target_pooler_output` `(U, Dt)`;
            `target_index` `(B,)` into them, `target_ids` and `group_ids` `(B,)`;
            with hard negatives, `negative_index` and `negative_ids` `(B, n)`.
        """
        negatives = [sample["negatives"][: self.hard_negatives] for sample in samples]
        targets = list(
            dict.fromkeys([sample["target"] for sample in samples] + [*chain(*negatives)])
        )
        row_of = {target: row for row, target in enumerate(targets)}
        batch = {
            **stack_clips(samples),
            **self.processor(text=[sample["query"] for sample in samples]),
            **self.encode_targets(targets),
        }
        for name in ("attention_mask", "target_attention_mask"):
            if name in batch and batch[name].all():
                del batch[name]
        return {
            **batch,
            **self.index_negatives(negatives, row_of),
            "target_index": torch.tensor([row_of[sample["target"]] for sample in samples]),
            "target_ids": torch.tensor([sample["target_id"] for sample in samples]),
            "group_ids": torch.tensor([sample["group_id"] for sample in samples]),
        }
