"""The trainer of token models: VL-JEPA's, with another loss and one more part of a batch."""

import torch

from modeling_vljepa import VLJEPATokenModel
from modeling_vljepa.input_checks import IGNORED
from training.arguments import VLJEPATrainingArguments
from training.data.collator import ContrastiveCollator
from training.loop.distributed import all_mean
from training.loop.objective import Embeds, Ids, check_objective
from training.loop.trainer import VLJEPATrainer, take_ids


class HybridCollator(ContrastiveCollator):
    """Collator that also gives each row's target as labels of the language model."""

    def __call__(self, samples: list[dict]) -> dict:
        """Return the batch of the parent, with `labels` `(B, L)`."""
        labels = self.processor.text_labels([sample["target"] for sample in samples])
        return {**super().__call__(samples), "labels": labels}


class TokenCollator(HybridCollator):
    """Collator of a model without a Y-Encoder, which reads each target as labels alone."""

    def encode_targets(self, targets: list[str]) -> dict:
        """Return nothing: no Y-Encoder reads the targets."""
        return {}


class TokenTrainer(VLJEPATrainer):
    """Trainer of a [`VLJEPATokenModel`]; data, optimizer, evaluation and saving are VL-JEPA's.

    The loss is `token_loss_weight` times the mean over the target tokens of a step, of all
    processes and parts, plus the rest of the weight times the recipe's objective.
    """

    called = (*VLJEPATrainer.called, "score_texts", "generate")

    @staticmethod
    def check(model: VLJEPATokenModel, args: VLJEPATrainingArguments) -> None:
        """Reject an objective that a hybrid cannot use; see `check_objective`."""
        if model.config.predicts_embeddings:
            check_objective(model, args)

    def _get_num_items_in_batch(self, batch_samples: list[dict], device) -> torch.Tensor:
        """Return the number of target tokens of a step, as a mean over processes, `()`.

        Upstream leaves out the first label of each row, because its models shift the labels.
        """
        count = sum((batch["labels"] != IGNORED).sum() for batch in batch_samples)
        return all_mean(count.float().to(device))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = Ids(**take_ids(inputs))
        outputs = model(**self.make_ready(inputs))
        # Processes and parts of a step have different numbers of tokens, and their losses are
        # averaged. Without this factor, tokens of short batches would count more.
        parts = self.current_gradient_accumulation_steps
        token_loss = outputs.loss * outputs.target_tokens * parts / num_items_in_batch
        weight = self.args.token_loss_weight
        loss = weight * token_loss
        self._parts["token_loss"].append(token_loss.detach())
        if weight < 1:
            embeds = Embeds(
                outputs.predicted_embeds,  # (b, D)
                outputs.target_embeds,  # (U, D), distinct: the model got no `target_index`
                outputs.logit_scale,
                outputs.logit_bias,
            )
            embedding_loss, parts = self.objective(embeds, ids, seed=self.state.global_step)
            # The chance loss is that of this part, not of the whole loss of the progress line.
            parts["embedding_chance_loss"] = parts.pop("chance_loss", embedding_loss)
            for name, value in {"embedding_loss": embedding_loss, **parts}.items():
                self._parts[name].append(value.detach())
            loss = loss + (1 - weight) * embedding_loss
        return (loss, outputs) if return_outputs else loss


__all__ = ["HybridCollator", "TokenCollator", "TokenTrainer"]
