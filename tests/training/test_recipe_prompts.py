"""A recipe's prompts: saved with the model, inherited, and compared with its sources."""

from pathlib import Path

import pytest
import yaml

from modeling_vljepa import VLJEPAConfig
from tests.tiny import tiny_model, tiny_processor, tiny_recipe, tiny_rows, tiny_settings, write_rows
from training.arguments import ModelArguments, ProcessorArguments, RecipeError, SourceArguments
from training.data.sources import read_source
from training.loop.run import fixed_query, untrained_prompts
from training.model.recipe_model import load_checkpoint, new_model
from training.train import main

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
CAPTION = "Describe this video in one sentence."
EMPTY = {"caption": "", "detail": "", "action": "", "retrieval": ""}


def test_new_model_has_the_recipes_prompts():
    arguments = ModelArguments(
        config=tiny_settings(), prompts={"caption": ""}, target_prompts={"image": "an image of {}"}
    )
    model, _ = new_model(arguments, ProcessorArguments(image_size=32), ["a b c"], seed=0)
    given = {"caption": "", "retrieval": ""}
    assert model.config.prompts == VLJEPAConfig().prompts | given
    assert model.config.target_prompts == {"action": "{}", "image": "an image of {}"}


def test_checkpoint_gives_the_prompts_that_a_recipe_leaves_out(tmp_path):
    pretrained = tiny_model(prompts=EMPTY, target_prompts={"action": "doing {}"})
    pretrained.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)

    def prompts(**given: dict) -> dict[str, str]:
        arguments = ModelArguments(checkpoint=str(tmp_path), **given)
        config = load_checkpoint(arguments, ProcessorArguments())[0].config
        assert config.target_prompts["action"] == "doing {}"
        return config.prompts

    assert prompts() == pretrained.config.prompts
    changed = {"caption": CAPTION, "retrieval": CAPTION}
    assert prompts(prompts={"caption": CAPTION}) == pretrained.config.prompts | changed
    kept = {"detail": "more", "retrieval": ""}
    assert prompts(prompts={"detail": "more"}) == pretrained.config.prompts | kept


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": {"caption": 3}}, "model.prompts.caption is a int: give a string"),
        ({"prompts": {"captoin": ""}}, "model.prompts has no 'captoin': choose among caption"),
        (
            {"target_prompts": {"image": "a"}},
            "model.target_prompts.image is 'a' and has {} 0 times",
        ),
        ({"config": {"prompts": {}}}, "model.config.prompts: give it as model.prompts"),
        ({"config": {"target_prompts": {}}}, "model.config.target_prompts: give it as"),
    ],
)
def test_recipe_rejects_prompts(given, message):
    with pytest.raises(RecipeError, match=message):
        ModelArguments(**given)


def source(folder: Path, *queries: str, **keys: object):
    rows = [
        {"image": "wide.png", "query": query, "target": f"a {index}"}
        for index, query in enumerate(queries)
    ]
    path = write_rows(folder / f"{len(list(folder.iterdir()))}.jsonl", rows)
    return read_source(SourceArguments(rows=str(path), **keys))


@pytest.mark.parametrize("streaming", [False, True])
def test_fixed_query_of_a_source(tmp_path, streaming):
    tiny_rows(tmp_path)
    assert fixed_query(source(tmp_path, "", "", streaming=streaming)) == ""
    assert fixed_query(source(tmp_path, "a ?", "a ?", streaming=streaming)) == "a ?"
    assert fixed_query(source(tmp_path, "a ?", "b ?", streaming=streaming)) is None
    one = source(tmp_path, "a ?", "b ?", query="c ?", streaming=streaming)
    assert fixed_query(one) == "c ?"


def test_untrained_prompts_warns_if_no_source_trains_a_prompt_of_the_model(tmp_path):
    tiny_rows(tmp_path)
    prompts = VLJEPAConfig().prompts
    questions = source(tmp_path, "a ?", "b ?")
    told, empty = source(tmp_path, "tell"), source(tmp_path, "")
    [warning] = untrained_prompts(prompts, [questions, told, empty])
    assert warning.startswith("WARNING: no source trains with a prompt of the model (caption, ")
    assert '"tell", ""' in warning and "'model.prompts={caption: \"tell\"}'" in warning
    assert untrained_prompts(prompts, [questions]) == []  # no fixed query
    for name in ("caption", "detail", "action"):
        trained = source(tmp_path, prompts[name])
        assert untrained_prompts(prompts, [told, trained]) == []
    assert untrained_prompts(prompts | {"retrieval": "tell"}, [told]) == []
    assert untrained_prompts(prompts | {"question": "tell"}, [told]) != []  # a template


def test_train_warns_of_untrained_prompts_and_the_cure_works(tmp_path, capsys):
    tiny_rows(tmp_path)
    rows = [{"image": "wide.png", "target": "a"}, {"image": "tall.jpg", "target": "b"}]
    recipe = str(tiny_recipe(write_rows(tmp_path / "captions.jsonl", rows), max_steps=1))
    main([recipe])
    assert "WARNING: no source trains with a prompt" in (log := capsys.readouterr().out)
    cure = log.split("such as '")[1].split("'")[0]
    main([recipe, cure])
    assert "WARNING" not in capsys.readouterr().out
    config = VLJEPAConfig.from_pretrained(tmp_path / "out")
    assert (config.prompts["caption"], config.prompts["retrieval"]) == ("", "")


@pytest.mark.parametrize(
    "path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: str(path.relative_to(RECIPES))
)
def test_shipped_recipe_names_the_queries_that_it_trains(path):
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "decoder" in path.stem:  # its checkpoint has the prompts
        return
    prompts = recipe["model"]["prompts"]
    queries = {each["query"] for each in recipe["data"]["sources"] if "query" in each}
    if "streams" in path.stem:  # the query is in the rows
        queries = {"Tell what the agent did."}
    assert prompts["caption"] in (queries or {""})
    assert prompts.keys() == {"caption", "detail", "action"}
