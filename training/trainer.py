"""The Trainer: transformers' own, with this objective, its parameter groups and its batches."""

from collections import defaultdict

import torch
from torch.utils.data import Sampler
from transformers import Trainer

from modeling_vljepa.losses import info_nce

from .data import MixtureSampler
from .distributed import all_gather, gather_with_gradient
from .publish import publish


class VLJEPATrainer(Trainer):
    """Contrastive training of a [`VLJEPAModel`] over one or many processes.

    It overrides what it must: the loss (in-batch negatives of all processes), the optimizer's
    groups (the Y-Encoder's own rate), the sampler (a mixture of sources) and the log (the parts
    of the loss by name).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._parts: dict[str, list[torch.Tensor]] = defaultdict(list)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        target_ids, group_ids = inputs.pop("target_ids"), inputs.pop("group_ids")
        outputs = model(**inputs)
        result = info_nce(
            gather_with_gradient(outputs.predicted_embeds),  # (B, D), B of all processes
            gather_with_gradient(outputs.target_embeds),  # (B, D)
            outputs.logit_scale,
            target_ids=all_gather(target_ids),  # (B,)
            group_ids=all_gather(group_ids),  # (B,)
        )
        parts = {
            "chance_loss": result.chance_loss,
            "accuracy": result.accuracy,
            "logit_scale": outputs.logit_scale.mean(),
        }
        for name, value in parts.items():
            self._parts[name].append(value.detach())
        return (result.loss, outputs) if return_outputs else result.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss, averaged since the last line."""
        parts = {name: torch.stack(values).mean().item() for name, values in self._parts.items()}
        self._parts.clear()
        super().log({**logs, **parts}, start_time)

    def create_optimizer(self, model=None):
        """AdamW over four groups: with and without weight decay, the Y-Encoder at its own rate.

        The Y-Encoder's new head is no part of its pretrained weights: it trains at the full rate.
        """
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        groups = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups["y_encoder." in name, name in decayed].append(parameter)
        scale = self.args.text_learning_rate_scale
        parameters = [
            {
                "params": group,
                "lr": self.args.learning_rate * (scale if in_text_encoder else 1),
                "weight_decay": self.args.weight_decay if is_decayed else 0.0,
            }
            for (in_text_encoder, is_decayed), group in groups.items()
        ]
        optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(parameters, **arguments)
        return self.optimizer

    def get_decay_parameter_names(self, model) -> list[str]:
        """Matrices decay; norms, biases and the temperature do not."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> None:
        """Publish the trained model as `python -m training.publish` does, card and code with it.

        What the other arguments would say is decided there: one commit, to the main branch.
        """
        self.save_model(_internal_call=True)  # which without this would push in its turn
        if self.is_world_process_zero():
            private = self.args.hub_private_repo if private is None else private
            token = self.args.hub_token if token is None else token
            publish(self.args.output_dir, self.args.hub_model_id, private=private, token=token)

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        return MixtureSampler(
            train_dataset.buckets,
            batch_size=self.args.train_batch_size
            * self.args.world_size
            * self.args.gradient_accumulation_steps,
            num_batches=self.args.max_steps,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )
