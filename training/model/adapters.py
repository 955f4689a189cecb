"""Preparation of a model for training: low-rank adapters, and bf16 for frozen weights."""

import os
import warnings

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from modeling_vljepa import LORA_MODULES_TO_SAVE, LORA_TARGET_MODULES, VLJEPAModel, VLJEPATokenModel
from modeling_vljepa.hub_files import write_hub_files
from training.arguments import RecipeError, VLJEPATrainingArguments, check_keys


def any_trains(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


class AdaptedModel(PeftModel):
    """Model with low-rank adapters.

    Other modules that train are in memory once. peft alone would also keep their old weights, to
    restore them when adapters are switched off.

    The layers under the adapters can be stored in bf16. Their fp32 weights then wait in main
    memory: merged into a rounded weight, an adapter's small change would be lost.
    """

    def __init__(self, model: VLJEPAModel, config: LoraConfig):
        config.base_model_name_or_path = model.name_or_path or None
        with warnings.catch_warnings():
            # peft reads this property under the name that transformers deprecates.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            super().__init__(model, config)
        self.in_fp32: dict[torch.nn.Module, dict[str, torch.Tensor]] = {}
        for module in self.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.original_module = module.modules_to_save[self.active_adapter]

    def store_base_in_bf16(self) -> None:
        """Store the layers under adapters in bf16, to which autocast rounds them in any case."""
        for module in self.modules():
            if isinstance(module, LoraLayer):
                layer = module.get_base_layer()
                # The model may be on the device already. `training.memory` has shapes only.
                self.in_fp32[layer] = {
                    name: p.data if p.is_meta else p.data.cpu()
                    for name, p in layer.named_parameters()
                }
                layer.to(torch.bfloat16)

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs
    ) -> None:
        """Save the adapters, and the files with which sentence-transformers loads them.

        Without a configuration: transformers would take the folder for a complete model. So the
        adapters load with the configuration and the prompts of their base.
        """
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            prompts = self.config.prompts
            write_hub_files(save_directory, prompts, query=prompts["retrieval"])

    def merge_and_unload(self) -> VLJEPAModel:
        """Return the model with the adapters merged into its fp32 weights."""
        for layer, weights in self.in_fp32.items():
            for name, parameter in layer.named_parameters():
                parameter.data = weights[name].to(parameter.device)
        return self.base_model.merge_and_unload()


def store_frozen_in_bf16(model: VLJEPAModel | VLJEPATokenModel) -> None:
    """Store encoders and the token table in bf16 if they are frozen.

    A token baseline has no Y-Encoder.

    Trained ones stay in fp32, because bf16 would round most of their small steps away.
    """
    table = model.get_input_embeddings()
    for part in (model.x_encoder, model.y_encoder, table):
        if part is not None and not any_trains(part):
            # Not `part.to`, which would round buffers too: the frequencies of rotary positions.
            for parameter in part.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)


def add_adapters(model: VLJEPAModel, lora: dict) -> AdaptedModel:
    """Freeze the Predictor's layers and add low-rank adapters to them.

    Other modules that train still do, and are saved with the adapters.

    Args:
        lora: settings of `peft.LoraConfig`.

    Raises:
        RecipeError: a setting that peft does not have, or a value that it does not accept.
    """
    others = (*LORA_MODULES_TO_SAVE, "logit_bias", "x_encoder", "y_encoder")
    # peft freezes everything but the adapters and `modules_to_save`, so this lists what trains.
    modules = {path.split(".")[-1]: module for path, module in model.named_modules()}
    whole = [name for name in others if name in modules and any_trains(modules[name])]
    settings = check_keys(lora, LoraConfig, "model.lora")
    try:
        config = LoraConfig(**settings, target_modules=LORA_TARGET_MODULES, modules_to_save=whole)
        return AdaptedModel(model, config)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise RecipeError(f"model.lora: {error}") from error


def prepare_for_training(
    model: VLJEPAModel, lora: dict | None, args: VLJEPATrainingArguments
) -> VLJEPAModel | AdaptedModel:
    """Add adapters, and store frozen weights in bf16 if training computes in bf16."""
    if args.bf16:
        store_frozen_in_bf16(model)
    if lora is None:
        return model
    adapted = add_adapters(model, lora)
    if args.bf16:
        adapted.store_base_in_bf16()
    return adapted
