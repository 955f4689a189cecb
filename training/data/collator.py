"""Samples to a batch of tensors: one pass of the processor, no wasted tokens."""

from itertools import chain

import torch

from processing.processing_vljepa import VLJEPAProcessor
from processing.video_processing_vljepa import VLJEPAVideoProcessor
from training.data.dataset import text_id


def to_pixel_values(frames: torch.Tensor, video: VLJEPAVideoProcessor) -> torch.Tensor:
    """Resized and cropped frames `(B, T, 3, h, w)`, uint8, to the pixels that the model reads.

    Not the collator's work: they are four times as large, and quicker made where they are read.
    """
    return video.rescale_and_normalize(
        frames,
        video.do_rescale,
        video.rescale_factor,
        video.do_normalize,
        tuple(video.image_mean),
        tuple(video.image_std),
    )


class ContrastiveCollator:
    """Stacks frames, tokenizes queries, and each distinct target once.

    Texts are padded to the longest of their batch; a mask of ones only is left out, because
    attention without a mask takes a faster path.

    Args:
        processor: the model's.
        target_states: of a frozen Y-Encoder, its output for each target text; with them, no
            target is tokenized or encoded again.
        hard_negatives: how many of a row's own `negatives` it brings into the batch.
    """

    def __init__(
        self,
        processor: VLJEPAProcessor,
        target_states: dict[str, torch.Tensor] | None = None,
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
        """Which texts are each row's hard negatives; a row that has fewer is filled up."""
        if not self.hard_negatives:
            return {}
        index = torch.zeros(len(negatives), self.hard_negatives, dtype=torch.long)
        ids = torch.full_like(index, -1)
        for row, texts in enumerate(negatives):
            for place, text in enumerate(texts):
                index[row, place], ids[row, place] = row_of[text], text_id(text)
        return {"negative_index": index, "negative_ids": ids}  # (B, n)

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """
        Returns: `frames` `(B, T, 3, h, w)`, uint8 (see `to_pixel_values`), or `visual_embeds`
            `(B, N, Dx)` where samples hold these,
            `input_ids` and `attention_mask` `(B, L)`, `target_input_ids` and
            `target_attention_mask` `(U, Ly)` of the distinct targets, or their
            `target_pooler_output` `(U, Dt)`, `target_index` `(B,)` into them, `target_ids` and
            `group_ids` `(B,)`; with hard negatives, `negative_index` and `negative_ids` `(B, n)`.
        """
        negatives = [sample["negatives"][: self.hard_negatives] for sample in samples]
        targets = list(
            dict.fromkeys([sample["target"] for sample in samples] + [*chain(*negatives)])
        )
        row_of = {target: row for row, target in enumerate(targets)}
        clip = "visual_embeds" if "visual_embeds" in samples[0] else "frames"
        batch = {
            clip: torch.stack([sample[clip] for sample in samples]),
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
