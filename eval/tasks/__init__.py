"""The kinds of benchmarks: each module of this folder is one, described by its `KIND`."""

import pkgutil
from importlib import import_module

from eval.task import Kind

# The folder is the list, so that adding a kind is adding a file. Whatever depends on the kinds
# reads `TASKS`: benchmark files, the command, the report, the evaluation during training and the
# model card.
_MODULES = [import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
TASKS: dict[str, Kind] = {module.KIND.name: module.KIND for module in _MODULES}

__all__ = ["TASKS"]
