"""Learning rates of a model's parts, as the optimizer's groups.

| part                                           | peak learning rate                             |
|------------------------------------------------|------------------------------------------------|
| `predictor.visual_projection` and both heads   | `learning_rate` x `new_learning_rate_scale`    |
| layers of the Predictor                        | `learning_rate`                                |
| X-Encoder, if it trains                        | `learning_rate` x `vision_learning_rate_scale` |
| Y-Encoder                                      | `learning_rate` x `text_learning_rate_scale`   |
| temperature and bias of the loss               | `learning_rate`                                |

With `layer_decay` below 1, the rates of a backbone's layers fall from its last layer to its first.
The projections and heads are new to a model of pretrained parts. They are the same modules in a
model that has been trained before.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch.optim.lr_scheduler import LambdaLR

from training.arguments import VLJEPATrainingArguments

NEW = ("visual_projection.", "predictor_head.", "y_head.")
BACKBONES = ("x_encoder.", "predictor.", "y_encoder.")
LAYER = re.compile(r"\.backbone\.(?:\D+\.)?(\d+)\.")


def part_of(name: str) -> str:
    """Return the part of a parameter: "new", "x_encoder", "predictor", "y_encoder" or "loss".

    Adapters put a prefix before names, so parts are searched for in them.
    """
    if any(part in name for part in NEW):
        return "new"
    found = [part for part in BACKBONES if part in name]
    return found[0].rstrip(".") if found else "loss"


def layer_of(name: str) -> int | None:
    """Return the number of a parameter's layer, -1 for an embedding below the layers; `None` for
    what comes after the layers or belongs to no backbone."""
    if found := LAYER.search(name):
        return int(found[1])
    return -1 if "embed" in name and ".backbone." in name else None


def learning_rates(names: Iterable[str], args: VLJEPATrainingArguments) -> dict[str, float]:
    """Return the peak learning rate of each parameter, by its name.

    Args:
        names: names of all parameters of the model.
    """
    scales = {
        "new": args.new_learning_rate_scale,
        "x_encoder": args.vision_learning_rate_scale,
        "y_encoder": args.text_learning_rate_scale,
    }
    names, last = list(names), defaultdict(lambda: -1)
    for name in names:
        layer = layer_of(name)
        if layer is not None:
            last[part_of(name)] = max(last[part_of(name)], layer)
    rates = {}
    for name in names:
        part, layer = part_of(name), layer_of(name)
        below = 0 if layer is None or part == "new" else last[part] - layer  # layers above it
        rates[name] = args.learning_rate * scales.get(part, 1.0) * args.layer_decay**below
    return rates


def steps_alone(args: VLJEPATrainingArguments, steps: int) -> int:
    """Return the number of first steps in which new parts train alone."""
    given = args.new_parts_alone
    return int(given) if given >= 1 else round(given * steps)


def train_new_parts_first(schedule: LambdaLR, alone: int, warmup: int) -> None:
    """Keep the learning rate of all but the new parts at 0 for the first steps.

    Then it rises for `warmup` steps to that of the schedule. With a rate of 0 the weights stay,
    but the optimizer learns the size of their gradients, and every process has gradients for every
    weight, as distributed training requires.

    Args:
        schedule: one factor for each of the optimizer's groups; a group's `new` is true if its
            parameters are new.
    """

    def later(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: factor(step) * min(1.0, max(0, step - alone) / max(1, warmup))

    groups = schedule.optimizer.param_groups
    schedule.lr_lambdas = [
        factor if group["new"] else later(factor)
        for factor, group in zip(schedule.lr_lambdas, groups, strict=True)
    ]
    set_rates(schedule)  # the schedule has set those of the first step already


def set_rates(schedule: LambdaLR) -> None:
    """Set the optimizer's learning rates to those of the schedule's next step."""
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    schedule._last_lr = [
        rate * factor for rate, factor in zip(schedule.base_lrs, factors, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        if isinstance(group["lr"], torch.Tensor):  # of optimizers that must not replace it
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


__all__ = ["learning_rates", "part_of", "set_rates", "steps_alone", "train_new_parts_first"]
