"""A transformers Trainer with this objective, its parameter groups and its batches."""

import json
import math
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from eval.task import Benchmark, Task
from eval.tasks import TASKS
from modeling_vljepa import VLJEPAModel, VLJEPATokenModel
from modeling_vljepa.input_checks import values_checked
from training.arguments import RecipeError, VLJEPATrainingArguments
from training.data.collator import ContrastiveCollator, to_pixel_values
from training.data.dataset import Batch
from training.data.mixture import MixtureSampler
from training.hub.publishing import publish
from training.loop.bad_rows import BadRows
from training.loop.checkpoints import (
    POSITIONS,
    AtomicCheckpoints,
    Place,
    read_place,
    write_place,
)
from training.loop.distributed import all_mean
from training.loop.grad_cache import cached_step
from training.loop.objective import Embeds, Ids, Objective, check_objective
from training.loop.rates import learning_rates, part_of, steps_alone, train_new_parts_first
from training.loop.speed import SpeedMeter, training_flops

LANES = 8  # by default: divisible by 1, 2, 4 and 8 processes


class VLJEPATrainer(AtomicCheckpoints, Trainer):
    """Trainer of a [`VLJEPAModel`] on one or many processes.

    It overrides the loss (in-batch negatives of all processes), the step (GradCache), the
    optimizer's groups (a learning rate for each encoder), the sampler (a mixture of sources), the
    evaluation (benchmarks), the log (parts of the loss by name) and the saving of checkpoints
    (complete or not at all).

    Args:
        benchmarks: benchmarks that `evaluate` measures.
        limit: maximum number of rows of each.
        peak_flops: operations per second that one device can reach.
        lanes, max_bad_share: settings of the recipe's section `data`.
    """

    # Methods of the model that evaluation calls; data parallelism knows `forward` only.
    called = ("encode_video", "predict", "encode_target")

    def __init__(
        self,
        *args,
        benchmarks: list[Benchmark] = (),
        limit: int | None = None,
        peak_flops: float | None = None,
        lanes: int | None = None,
        max_bad_share: float = 0.0,
        **kwargs,
    ):
        # Trainer requires an eval_dataset to evaluate; the benchmarks take its place.
        super().__init__(*args, eval_dataset=list(benchmarks) or None, **kwargs)
        self.benchmarks, self.limit = benchmarks, limit
        self.objective = Objective(
            name=self.args.objective,
            as_positives=self.args.interchangeable == "positives",
            sigreg_weight=self.args.sigreg_weight,
            variance_weight=self.args.variance_weight,
            covariance_weight=self.args.covariance_weight,
        )
        self._parts: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.lanes = lanes
        sources = [source.arguments for source in self.train_dataset.sources]
        self.bad_rows = BadRows(sources, Path(self.args.output_dir), max_bad_share)
        self._resumed: str | None = None
        self.speed_meter = SpeedMeter(peak_flops)
        self.add_callback(self.speed_meter)

    @staticmethod
    def check(model: VLJEPAModel, args: VLJEPATrainingArguments) -> None:
        """Reject a model that this trainer cannot train; see `check_objective`.

        Raises:
            RecipeError: the model is a token baseline, or the objective does not fit it.
        """
        if isinstance(model, VLJEPATokenModel):
            raise RecipeError(
                "model.checkpoint: it is a model that predicts tokens; train it with "
                "training.token_baseline."
            )
        check_objective(model, args)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            # FSDP's policy would round the model's outputs to bf16; autocast leaves them in fp32.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None

    def _prepare_for_training(self, *args, **kwargs):
        model, dataloader = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled:  # FSDP collects weights for `forward` only; evaluation calls these
            for name in self.called:
                register_fsdp_forward_method(model, name)
        return model, dataloader

    # -- the step --------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = Ids(**take_ids(inputs))
        outputs = model(**self.make_ready(inputs))
        embeds = Embeds(
            outputs.predicted_embeds,  # (b, D)
            outputs.target_embeds,  # (U, D), distinct: the model got no `target_index`
            outputs.logit_scale,
            outputs.logit_bias,
        )
        loss = self.loss_of(embeds, ids)
        return (loss, outputs) if return_outputs else loss

    def loss_of(self, embeds: Embeds, ids: Ids) -> torch.Tensor:
        loss, parts = self.objective(embeds, ids, seed=self.state.global_step)
        for name, value in parts.items():
            self._parts[name].append(value.detach())
        return loss

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        rows = len(inputs["target_index"])
        self.bad_rows.count(inputs.pop("source"), rows, inputs.pop("bad_rows"))
        # Before the move: on the device, the model would wait for its values in every pass.
        self.accelerator.unwrap_model(model).check_values(**inputs)
        with values_checked():
            if self.args.gradient_cache_rows is None:
                return super().training_step(model, inputs, num_items_in_batch)
            return self.cached_step(model, inputs)

    def cached_step(self, model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Accumulate the gradient of a batch by GradCache; return its loss `()`."""
        model.train()
        # The batch stays on the loader's device; `make_ready` moves one part at a time.
        waiting = dict(inputs)
        ids = Ids(**self._prepare_inputs(take_ids(waiting)))
        return cached_step(
            model,
            waiting,
            rows=self.args.gradient_cache_rows,
            make_ready=self.make_ready,
            loss_of=lambda embeds: (
                self.loss_of(embeds, ids) / self.current_gradient_accumulation_steps
            ),
            backward=self.accelerator.backward,
            no_sync=lambda: self.accelerator.no_sync(model),
        )

    def _prepare_input(self, data):
        """Move a batch to the device: without waiting, if the loader has pinned its memory."""
        pinned = self.args.dataloader_pin_memory
        data = send_to_device(data, self.args.device, non_blocking=pinned)
        return super()._prepare_input(data)  # DeepSpeed's dtype

    def make_ready(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the model's inputs: on the device, with uint8 frames rescaled and normalised."""
        inputs = self._prepare_inputs(inputs)
        # After the move: uint8 frames are a quarter of fp32 pixels, and the device is faster.
        if "frames" in inputs:  # absent with a feature store
            frames, video = inputs.pop("frames"), self.processing_class.video_processor
            inputs["pixel_values_videos"] = to_pixel_values(frames, video)
        return inputs

    # -- the optimizer ---------------------------------------------------------------------

    def create_optimizer(self, model=None):
        """Create the optimizer; a group is the parameters of one learning rate and weight decay."""
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        rates = learning_rates((name for name, _ in model.named_parameters()), self.args)
        groups = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                is_new = self.args.new_parts_alone > 0 and part_of(name) == "new"
                groups[rates[name], name in decayed, is_new].append(parameter)
        # The first group's rate is the one in the log.
        in_order = sorted(groups.items(), key=lambda item: item[0][0] != self.args.learning_rate)
        parameters = [
            {
                "params": group,
                "lr": rate,
                "weight_decay": self.args.weight_decay * is_decayed,
                "new": is_new,
            }
            for (rate, is_decayed, is_new), group in in_order
        ]
        optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
        # Upstream takes the groups from this attribute. It then also handles special optimizers:
        # bitsandbytes' 8-bit ones keep fp32 states for embeddings.
        self.optimizer_cls_and_kwargs = (optimizer_class, dict(params=parameters, **arguments))
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Create the schedule; with `new_parts_alone`, the other parts begin later."""
        first = self.lr_scheduler is None
        schedule = super().create_scheduler(num_training_steps, optimizer)
        alone = steps_alone(self.args, num_training_steps)
        if first and alone:
            train_new_parts_first(schedule, alone, self.args.get_warmup_steps(num_training_steps))
        return schedule

    def _clip_grad_norm(self, model) -> torch.Tensor:
        """Clip the gradient and return its norm; with `clip_by_part`, clip each part's."""
        if not self.args.clip_by_part:
            return super()._clip_grad_norm(model)
        parts = defaultdict(list)
        for name, parameter in model.named_parameters():
            parts[part_of(name)].append(parameter)
        clip, most = self.accelerator.clip_grad_norm_, self.args.max_grad_norm
        return torch.stack([clip(part, most) for part in parts.values()]).norm()

    def get_decay_parameter_names(self, model) -> list[str]:
        """Return the names of matrices: norms, biases and the temperature do not decay."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    # -- evaluation and the log ------------------------------------------------------------

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> dict[str, float]:
        """Return scores on the benchmarks, such as `eval_babyai_vqa_accuracy`, and chance levels.

        Every process measures every benchmark. A model sharded over processes needs all of them
        for each forward pass, so the benchmarks cannot be divided among them.
        """
        model = self.accelerator.unwrap_model(self.model)
        metrics = {}
        for benchmark in self.benchmarks if eval_dataset is None else eval_dataset:
            with self.accelerator.autocast():
                task = Task(model, self.processing_class, benchmark, limit=self.limit)
                result = TASKS[benchmark.task].evaluate(task)
            for name, score in result.scores.items():
                key = f"{metric_key_prefix}_{benchmark.name}_{name}".replace(" ", "_")
                metrics[key] = score.value
                if "chance" in score.baselines:  # not every kind of benchmark has one
                    metrics[f"{key}_chance"] = score.baselines["chance"]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a log line the parts of the loss, the speed and the peak memory.

        The parts are averaged over processes and over the steps since the last line.
        """
        if "loss" in logs:  # a line of training, not of an evaluation or of the whole run
            logs = logs | {
                name: all_mean(torch.stack(values).mean()).item()
                for name, values in self._parts.items()
            }
            self._parts.clear()
            logs |= self.speed_meter.read(self.args, self.state)
            self.report_bad_rows()
            self.mixture.forget(self.state.global_step)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        return training_flops(self.accelerator.unwrap_model(self.model), inputs)

    # -- publication and data --------------------------------------------------------------

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> None:
        """Publish the trained model as `python -m training.publish` does, with card and code.

        Other arguments of the parent's method are ignored: `publish` makes one commit on the main
        branch.
        """
        self.save_model(_internal_call=True)  # a call from outside would push again
        if self.is_world_process_zero():
            private = self.args.hub_private_repo if private is None else private
            token = self.args.hub_token if token is None else token
            repo = self.args.hub_model_id
            if repo is None or "/" not in repo:  # the Hub knows the user
                self.init_hf_repo(token=token, private=private)
                repo = self.hub_model_id
            publish(self.args.output_dir, repo, private=private, token=token)

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train, or continue a checkpoint: its weights, optimizer and position in the data."""
        self._resumed = resume_from_checkpoint
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader of this process's part of every batch."""
        args = self.args
        lanes = self.lanes or default_lanes(args)
        done, positions, planned = 0, {}, None
        if self._resumed is not None:
            done = json.loads(Path(self._resumed, TRAINER_STATE_NAME).read_text())["global_step"]
            positions, self.bad_rows.seen, self.bad_rows.bad, planned = read_place(
                Path(self._resumed), lanes=lanes, is_first=args.process_index == 0
            )
        self.mixture = MixtureSampler(
            self.train_dataset.buckets,
            batch_size=args.global_batch_size,
            num_batches=args.max_steps,
            seed=args.seed if args.data_seed is None else args.data_seed,
            parts=args.gradient_accumulation_steps,
            lanes=lanes,
            rank=args.process_index,
            world_size=args.world_size,
            start=done,
            positions=positions,
            planned=planned,
        )
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.mixture,
            collate_fn=partial(collate, self.data_collator),
            num_workers=args.dataloader_num_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            generator=torch.Generator().manual_seed(
                args.seed
            ),  # else it takes numbers from the model's
        )

    def _save_rng_state(self, output_dir: str) -> None:
        """Save this process's random state and its position in the data."""
        super()._save_rng_state(output_dir)
        place = Place(
            self.mixture.position(self.state.global_step),
            self.bad_rows.seen,
            self.bad_rows.bad,
            self.mixture.planned,
        )
        write_place(Path(output_dir, POSITIONS.format(self.args.process_index)), place)

    def report_bad_rows(self) -> None:
        """Print the rows found unusable since the last call.

        Raises:
            RecipeError: a source has more of them than `data.max_bad_share`.
        """
        if report := self.bad_rows.report(self.args.device):
            self.accelerator.print(f"WARNING: {report}", flush=True)


def default_lanes(args: VLJEPATrainingArguments) -> int:
    """Return the default number of lanes of a streamed source.

    It depends on the batch size, not on the number of processes, so that a run has the same rows
    on any number of them. If the processes do not divide it, each gets one lane.
    """
    lanes = math.gcd(args.global_batch_size // args.gradient_accumulation_steps, LANES)
    return lanes if lanes % args.world_size == 0 else args.world_size


def collate(collator: ContrastiveCollator, batch: Batch) -> dict:
    """Return a batch's tensors, its source, and the unusable rows that were replaced."""
    return {**collator(batch.samples), "source": batch.source, "bad_rows": batch.bad}


def take_ids(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove from the batch, and return, the fields of `Ids`: the model does not accept them."""
    return {name: inputs.pop(name) for name in Ids.__dataclass_fields__ if name in inputs}


__all__ = ["VLJEPATrainer"]
