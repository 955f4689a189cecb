"""`config.prompts` and `config.target_prompts`: completed, checked, saved and loaded."""

import pytest

from modeling_vljepa import VLJEPAConfig
from tests.tiny import tiny_config

DEFAULTS = {
    "caption": "Describe this video in one sentence.",
    "detail": "Describe this video in detail.",
    "question": "{}",
    "action": "What is the action shown?",
    "retrieval": "Describe this video in one sentence.",
}
TARGETS = {"action": "{}", "image": "This is a photo of {}."}


def test_config_completes_prompts():
    assert tiny_config().prompts == DEFAULTS
    assert tiny_config().target_prompts == TARGETS
    both = {"caption": "", "retrieval": ""}
    assert tiny_config(prompts={"caption": ""}).prompts == DEFAULTS | both
    config = tiny_config(prompts={"retrieval": "which ?"}, target_prompts={"action": "doing {}"})
    assert config.prompts == DEFAULTS | {"retrieval": "which ?"}
    assert config.target_prompts == TARGETS | {"action": "doing {}"}


def test_config_keeps_current_prompts_that_an_assignment_leaves_out():
    config = tiny_config(prompts={"caption": "", "detail": "more"})
    config.prompts = {"caption": "what ?"}  # retrieval was the caption query, and stays it
    both = {"caption": "what ?", "retrieval": "what ?"}
    assert config.prompts == DEFAULTS | {"detail": "more"} | both
    config.prompts = {"retrieval": "which ?"}
    config.prompts = {"caption": "who ?"}  # retrieval has a query of its own now
    own = {"caption": "who ?", "retrieval": "which ?"}
    assert config.prompts == DEFAULTS | {"detail": "more"} | own


def test_config_saves_and_loads_prompts(tmp_path):
    config = tiny_config(prompts={"caption": "", "retrieval": DEFAULTS["caption"]})
    config.save_pretrained(tmp_path)
    assert VLJEPAConfig.from_pretrained(tmp_path).prompts == config.prompts
    config.prompts["detail"] = 3
    with pytest.raises(ValueError, match="prompts.detail is a int: give a string"):
        config.save_pretrained(tmp_path / "other")
    config.prompts["detail"] = DEFAULTS["detail"]
    changed = VLJEPAConfig.from_pretrained(tmp_path, prompts={"detail": "more"})
    assert changed.prompts == config.prompts | {"detail": "more"}


@pytest.mark.parametrize("name", ["prompts", "target_prompts"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a"], "NAME is a list: give names and texts"),
        (None, "NAME is a NoneType: give names and texts"),
        ({"actoin": "a {}"}, "NAME has no 'actoin': choose among .*action"),
        ({7: "a {}"}, "NAME has no 7: choose among"),
        ({"action": 3}, "NAME.action is a int: give a string"),
        ({"action": None}, "NAME.action is a NoneType: give a string"),
        ({"action": "{} \ud83d"}, r"NAME.action holds half a character, '\\ud83d': cut texts"),
    ],
)
def test_config_rejects_prompts(name, given, message):
    with pytest.raises(ValueError, match=message.replace("NAME", name)):
        tiny_config(**{name: given})
    config = tiny_config()
    with pytest.raises(ValueError, match=message.replace("NAME", name)):
        setattr(config, name, given)
    assert (config.prompts, config.target_prompts) == (DEFAULTS, TARGETS)


@pytest.mark.parametrize("text", ["", "what ?", "{0}", "{} or {}", "{}" * 1000])
def test_config_rejects_templates_without_one_place(text):
    times = text.count("{}")
    for name, key in (("prompts", "question"), ("target_prompts", "action")):
        with pytest.raises(ValueError, match=rf"{name}.{key} is .* has {{}} {times} times: put"):
            tiny_config(**{name: {key: text}})
