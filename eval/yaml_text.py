"""YAML of recipes, benchmarks and grids, without a key that stands twice."""

from typing import Any

import yaml
from yaml.constructor import ConstructorError


class UniqueKeyLoader(yaml.SafeLoader):
    """Load YAML like `yaml.SafeLoader`, which keeps the last of two equal keys in silence."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        # Here and not in the constructor, which has merged `<<` into the mapping: its own keys may
        # repeat merged ones.
        node = super().compose_mapping_node(anchor)
        found = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # a list or a mapping, which SafeLoader refuses as a key
            if (key.tag, key.value) in found:
                raise ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            found.add((key.tag, key.value))
        return node


def parse_yaml(text: str) -> Any:
    """Return the content of a YAML text.

    Raises:
        yaml.YAMLError: not YAML, or a mapping with one key twice; it states the line.
    """
    return yaml.load(text, UniqueKeyLoader)


__all__ = ["parse_yaml"]
