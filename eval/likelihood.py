"""Texts ranked by their likelihood, and texts generated: a model that predicts tokens.

A candidate's score is the log-likelihood of its tokens, the end token included, after a clip and a
query, in one of three forms:

| name    | score                                                                               |
|---------|-------------------------------------------------------------------------------------|
| `sum`   | the sum over the tokens, which favours short candidates                             |
| `mean`  | the mean over the tokens: the order of lowest perplexity, the paper's (section 4.5) |
| `ratio` | the sum less that of the unconditional likelihood, without which common candidates  |
|         | are favoured (PMI; Holtzman et al. 2021, arXiv 2104.08315)                          |

The unconditional likelihood is measured on a grey clip with as many frames as the row's clip, and
is the mean over the benchmark's queries. The best form depends on the candidates, so it is chosen
on validation data.

Shapes: B queries, R rows, C candidates, N visual tokens, Dx visual width, L tokens.
"""

import hashlib
import json
import math
from dataclasses import dataclass

import torch

from eval.embed import grey_frame
from modeling_vljepa import VLJEPATokenModel
from modeling_vljepa.y_decoder import MAX_NEW_TOKENS
from processing import VLJEPAProcessor

LIKELIHOODS = ("sum", "mean", "ratio")
PAPER = "mean"
MOST_QUERIES = 64  # of the unconditional likelihood


@dataclass(frozen=True)
class LikelihoodReader:
    """The reader of log-likelihoods: the sums over each candidate's tokens, `(B, C)`.

    Attributes:
        texts (`tuple[str, ...]`): the C candidates.
        batch_size (`int`): pairs of a query and a candidate in a pass.
    """

    texts: tuple[str, ...]
    batch_size: int

    @property
    def key(self) -> str:
        """Part of the name of the vectors in the store."""
        digest = hashlib.blake2b(json.dumps(self.texts).encode(), digest_size=16)
        return f" likelihoods {digest.hexdigest()}"

    def read(
        self,
        model: VLJEPATokenModel,
        processor: VLJEPAProcessor,
        visual_embeds: torch.Tensor,
        queries: list[str],
    ) -> torch.Tensor:
        """Return the log-likelihood of each candidate after each query about `(B, N, Dx)`."""
        # Texts of equal tokens once: computed twice, they could differ in the last bit, and ties
        # would be decided by chance.
        labels, index = processor.text_labels(self.texts).unique(dim=0, return_inverse=True)
        scores = model.score_texts(
            labels.to(model.device),
            visual_embeds=visual_embeds,
            batch_size=self.batch_size,
            **processor(text=queries).to(model.device),
        )
        return scores[:, index.to(scores.device)]


@dataclass(frozen=True)
class TextReader:
    """The reader of generated texts: their token ids `(B, MAX_NEW_TOKENS)`, padded on the right.

    Attributes:
        num_beams (`int`): beams of the search; with 1, greedy.
    """

    num_beams: int

    @property
    def key(self) -> str:
        """Part of the name of the vectors in the store."""
        return f" text of {self.num_beams} beams"

    def read(
        self,
        model: VLJEPATokenModel,
        processor: VLJEPAProcessor,
        visual_embeds: torch.Tensor,
        queries: list[str],
    ) -> torch.Tensor:
        """Generate the answer to each query about clips `(B, N, Dx)`."""
        tokens = model.generate(
            visual_embeds=visual_embeds,
            num_beams=self.num_beams,
            **processor(text=queries).to(model.device),
        )
        # One width for all batches. Floats hold these numbers exactly, and the store holds floats.
        pad = MAX_NEW_TOKENS - tokens.shape[1]
        end = processor.text_tokenizer.eos_token_id
        return torch.nn.functional.pad(tokens, (0, pad), value=end)

    def decode(self, processor: VLJEPAProcessor, tokens: torch.Tensor) -> list[str]:
        """Return the texts of `(R, MAX_NEW_TOKENS)`."""
        texts = processor.batch_decode(tokens.long(), skip_special_tokens=True)
        return [text.strip() for text in texts]


@torch.inference_mode()
def grey_clip(model: VLJEPATokenModel, processor: VLJEPAProcessor, num_frames: int) -> torch.Tensor:
    """Return the visual tokens `(1, N, Dx)` of a grey clip."""
    pixels = grey_frame(processor).expand(-1, num_frames, -1, -1, -1)
    return model.encode_video(pixels.to(model.device, model.dtype))


@torch.inference_mode()
def unconditional(
    model: VLJEPATokenModel,
    processor: VLJEPAProcessor,
    reader: LikelihoodReader,
    queries: list[str],
    num_frames: int,
) -> torch.Tensor:
    """Return the logarithm of each candidate's mean likelihood on a grey clip, `(C,)`.

    Args:
        queries: the benchmark's; of more than `MOST_QUERIES` distinct ones, that many are used,
            evenly spaced in their sorted order.
    """
    model.eval()
    distinct = sorted(set(queries))
    count = min(len(distinct), MOST_QUERIES)
    asked = [distinct[step * len(distinct) // count] for step in range(count)]
    visual = grey_clip(model, processor, num_frames).expand(count, -1, -1)
    found = reader.read(model, processor, visual, asked).cpu()  # (count, C)
    return found.logsumexp(dim=0) - math.log(count)


def normalized(
    scores: torch.Tensor, lengths: torch.Tensor, prior: torch.Tensor | None, form: str
) -> torch.Tensor:
    """Return log-likelihoods `(R, C)` in one of the forms of `LIKELIHOODS`.

    Args:
        lengths (`torch.LongTensor` of shape `(C,)`): tokens of each candidate.
        prior (`torch.FloatTensor` of shape `(R, C)`, *optional*): see [`unconditional`]; for
            "ratio".
    """
    if form == "mean":
        return scores / lengths
    return scores - prior if form == "ratio" else scores


__all__ = [
    "LIKELIHOODS",
    "PAPER",
    "LikelihoodReader",
    "TextReader",
    "grey_clip",
    "normalized",
    "unconditional",
]
