"""Recipes of the token baseline: those of VL-JEPA, with two more keys."""

from dataclasses import dataclass
from typing import ClassVar

from training.arguments import ModelArguments, Recipe, RecipeError, VLJEPATrainingArguments
from training.arguments import read_recipe as read_any


@dataclass(kw_only=True)
class TokenModelArguments(ModelArguments):
    """The section `model`.

    Attributes:
        language_model: folder, Hub id or GGUF file of the causal language model of which the
            recipe's Predictor has layers. Default: a random model of the Predictor's shape with
            twice its layers, as the paper's Predictor has half of them.
    """

    language_model: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.lora is not None:
            raise RecipeError(
                "model.lora: the token baseline trains its whole language model; remove it, or "
                "give model.lora=null."
            )


@dataclass(kw_only=True)
class TokenTrainingArguments(VLJEPATrainingArguments):
    """The section `training`.

    Attributes:
        token_loss_weight: share of the token loss; the rest is that of `objective`. 1 is the
            baseline, which has no Y-Encoder; less is a hybrid.
        command: see `VLJEPATrainingArguments`.
    """

    command: ClassVar[str] = "training.token_baseline"

    token_loss_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.token_loss_weight <= 1:
            raise RecipeError(
                f"training.token_loss_weight: it is {self.token_loss_weight}; give more than 0, "
                "at most 1. Without a token loss, use training.train."
            )
        if self.gradient_cache_rows is not None:
            rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
            parts = -(-rows // self.gradient_cache_rows)
            cure = f"give training.gradient_accumulation_steps={parts}, which has the same loss"
            if self.is_hybrid:
                cure = "the hybrid needs memory for the whole batch"
            raise RecipeError(
                f"training.gradient_cache_rows: the token loss has no cache; set it to null and "
                f"{cure}."
            )
        if self.push_to_hub:
            raise RecipeError(
                "training.push_to_hub: model cards describe a VL-JEPA, not its baseline; set it to "
                "false."
            )

    @property
    def is_hybrid(self) -> bool:
        """True if the model also predicts embeddings."""
        return self.token_loss_weight < 1


def read_recipe(path: str, overrides: list[str] = ()) -> Recipe:
    """Read and check a recipe of a VL-JEPA for its token baseline.

    The baseline has no Y-Encoder, so its targets are not cached, and it reads no hard negatives.

    Raises:
        RecipeError: see `training.arguments.read_recipe`.
    """
    recipe = read_any(path, overrides, TokenModelArguments, TokenTrainingArguments)
    if not recipe.training.is_hybrid:
        recipe.data.cache_targets, recipe.data.hard_negatives = False, 0
    return recipe


__all__ = ["TokenModelArguments", "TokenTrainingArguments", "read_recipe"]
