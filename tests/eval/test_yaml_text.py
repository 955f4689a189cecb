import pytest
import yaml

from eval.yaml_text import parse_yaml


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("a: 1\nb: 2\na: 3", "a"),
        ("a:\n  - {b: 1, 'b': 2}", "b"),
        ("a: &x {b: 1}\nc: {<<: *x, <<: *x}", "<<"),
    ],
)
def test_parse_yaml_refuses_a_key_that_stands_twice(text, key):
    with pytest.raises(yaml.YAMLError, match=f"'{key}' stands twice"):
        parse_yaml(text)
    assert yaml.safe_load(text)  # which keeps the last one


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: {b: 1}\nc: {b: 1}",  # one key in two mappings
        "1: a\n'1': b",  # a number and a text
        # A merged key may stand in the mapping, too; its own value counts.
        "p: {x: &x {a: 1, b: 2}}\nq: {y: &y {<<: *x, a: 3}}\nr: {<<: *y, b: 4}",
        "a: &x {b: 1}\nc: &y {b: 2, d: 3}\ne: {<<: [*x, *y], b: 5}",
    ],
)
def test_parse_yaml_reads_everything_else_as_safe_load(text):
    assert parse_yaml(text) == yaml.safe_load(text)
