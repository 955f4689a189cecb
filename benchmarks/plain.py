"""The reference of the speed of training and prediction: bare transformers modules in a plain loop.

Nothing here uses the project's model, loss or trainer. The modules get equal weights, and batches
come from the same collator, so the loss of every step can be compared.

Shapes: B batch, T frames, C channels, N visual tokens, Dx their width, L query tokens, Ly target
tokens, U distinct texts, Dt width of a text, D embedding size.
"""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, get_scheduler

from modeling_vljepa import VLJEPAModel
from processing import VLJEPAVideoProcessor
from training.arguments import VLJEPATrainingArguments

Batch = dict[str, torch.Tensor]


def bare(config: PreTrainedConfig) -> PreTrainedModel:
    """Build an encoder with transformers' default attention, whatever the project chooses."""
    return AutoModel.from_config(copy.deepcopy(config), attn_implementation="sdpa")


def mean(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Average the states `(B, L, H)` of the real tokens to `(B, H)`."""
    if mask is None:
        return states.float().mean(dim=1)
    weights = mask[:, :, None].float()
    return (states.float() * weights).sum(dim=1) / weights.sum(dim=1)


def head(projection: nn.Linear, pooled: torch.Tensor) -> torch.Tensor:
    """Project `(B, H)` to fp32 unit vectors `(B, D)`."""
    return F.normalize(projection(pooled.to(projection.weight.dtype)).float(), dim=-1)


class PlainModel(nn.Module):
    """V-JEPA 2, a Llama and a text encoder with the weights of `model`, which stays as it is.

    Frozen encoders are stored in bf16 if training computes in bf16, as `training.train` does.
    """

    def __init__(self, model: VLJEPAModel, bf16: bool = False):
        super().__init__()
        config = model.config
        if config.predictor_pooling != "mean":
            raise ValueError("predictor_pooling: PlainModel pools by the mean alone.")
        self.pooling = config.visual_token_pooling
        self.vision = bare(config.vision_config)
        del self.vision.predictor  # a part of V-JEPA 2's own training
        self.predictor = bare(config.predictor_config)
        self.text = bare(config.text_config)
        if "pooler" in dict(self.text.named_children()):
            self.text.pooler = None
        for mine, its in (
            (self.vision, model.x_encoder.backbone),
            (self.predictor, model.predictor.backbone),
            (self.text, model.y_encoder.backbone),
        ):
            mine.load_state_dict(its.state_dict())
        self.projection = copy.deepcopy(model.predictor.visual_projection)
        self.predictor_head = copy.deepcopy(model.predictor_head.projection)
        self.text_head = copy.deepcopy(model.y_head.projection)
        self.log_scale = nn.Parameter(model.logit_scale.weight.detach().clone())
        self.is_frozen = {
            self.vision: config.freeze_vision,
            self.text: config.freeze_text,
            self.predictor.get_input_embeddings(): config.freeze_token_embedding,
        }
        for module in (module for module, frozen in self.is_frozen.items() if frozen):
            module.requires_grad_(False).to(torch.bfloat16 if bf16 else torch.float32)
        self.train()

    def train(self, mode: bool = True) -> "PlainModel":
        super().train(mode)
        for module in (module for module, frozen in self.is_frozen.items() if frozen):
            module.eval()
        return self

    def encode_video(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode `(B, T, C, H, W)` to `(B, N, Dx)`."""
        if pixels.shape[1] % self.vision.config.tubelet_size:
            pixels = torch.cat([pixels, pixels[:, -1:]], dim=1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen[self.vision]):
            tokens = self.vision(pixels, skip_predictor=True).last_hidden_state
        if self.pooling == 1:
            return tokens
        height, width = (edge // self.vision.config.patch_size for edge in pixels.shape[-2:])
        grid = tokens.unflatten(1, (-1, height, width)).flatten(0, 1).movedim(-1, 1)
        pooled = F.avg_pool2d(grid, self.pooling).flatten(2).mT  # of each tubelet
        return pooled.reshape(len(tokens), -1, tokens.shape[-1])

    def predict(
        self, visual: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Return unit vectors `(B, D)` from `(B, N, Dx)`, `(B, L)` and `(B, L)`."""
        visual = self.projection(visual)
        query = self.predictor.get_input_embeddings()(input_ids).to(visual.dtype)
        if mask is not None:
            mask = torch.cat([mask.new_ones(visual.shape[:2]), mask], dim=1)
        states = self.predictor(
            inputs_embeds=torch.cat([visual, query], dim=1), attention_mask=mask, use_cache=False
        ).last_hidden_state
        with torch.autocast("cpu", enabled=False):
            return head(self.predictor_head, mean(states, mask))

    def encode_text(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return pooled states `(U, Dt)` of `(U, Ly)` and `(U, Ly)`."""
        cache = {} if self.text.config.model_type == "bert" else {"use_cache": False}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen[self.text]):
            states = self.text(input_ids=input_ids, attention_mask=mask, **cache).last_hidden_state
            return mean(states, mask)

    def embed_text(self, pooled: torch.Tensor) -> torch.Tensor:
        """Return unit vectors `(U, D)` of `(U, Dt)`."""
        with torch.autocast("cpu", enabled=False):
            return head(self.text_head, pooled)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the predicted `(B, D)` and the target embeddings `(B, D)` of a collated batch."""
        visual = self.encode_video(batch["pixels"])  # (V, N, Dx), of the distinct clips
        if "visual_index" in batch:
            visual = visual[batch["visual_index"]]  # (B, N, Dx)
        predicted = self.predict(visual, batch["input_ids"], batch.get("attention_mask"))
        pooled = batch.get("target_pooler_output")
        if pooled is None:
            pooled = self.encode_text(batch["target_input_ids"], batch.get("target_attention_mask"))
        return predicted, self.embed_text(pooled)[batch["target_index"]]


def to_pixels(frames: torch.Tensor, video: VLJEPAVideoProcessor) -> torch.Tensor:
    """Rescale and normalise uint8 frames `(B, T, 3, h, w)`."""
    average = 255 * torch.tensor(video.image_mean).view(3, 1, 1)
    deviation = 255 * torch.tensor(video.image_std).view(3, 1, 1)
    return frames.float().sub_(average).div_(deviation)


def info_nce(
    predicted: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """Return cross entropy both ways; rows that share a text or a group are left out."""
    logits = scale * predicted @ targets.T  # (B, B)
    alike = batch["target_ids"][:, None] == batch["target_ids"]
    alike |= batch["group_ids"][:, None] == batch["group_ids"]
    logits = logits.masked_fill(alike.fill_diagonal_(False), -torch.inf)
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class PlainLoop:
    """A training loop with torch's AdamW and the settings of a recipe.

    Args:
        batches: collated batches of the trainer's collator.
        video: normalises the frames.
    """

    def __init__(
        self,
        model: PlainModel,
        args: VLJEPATrainingArguments,
        batches: Iterator[Batch],
        video: VLJEPAVideoProcessor,
    ):
        self.model, self.args, self.batches, self.video = model, args, batches, video
        groups = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = args.text_learning_rate_scale if name.startswith("text.") else 1.0
                decay = args.weight_decay if parameter.ndim > 1 else 0.0
                groups.setdefault((args.learning_rate * scale, decay), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": each, "lr": lr, "weight_decay": d} for (lr, d), each in groups.items()],
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            fused=True,  # torch's fastest AdamW, on CPUs too
        )
        self.trained = [parameter for each in groups.values() for parameter in each]
        self.scheduler = get_scheduler(
            args.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=args.get_warmup_steps(args.max_steps),
            num_training_steps=args.max_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )

    def step(self) -> float:
        """Take one step and return its loss."""
        batch = next(self.batches)
        batch["pixels"] = to_pixels(batch.pop("frames"), self.video)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            predicted, targets = self.model(batch)
        loss = info_nce(predicted, targets, self.model.log_scale.exp(), batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, self.args.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss.item()
