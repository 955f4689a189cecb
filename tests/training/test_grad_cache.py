"""GradCache: splitting a batch, and the same gradient as one pass, dropout included."""

import copy

import pytest
import torch

from tests.tiny import tiny_model
from training.loop.grad_cache import cached_step, split, store_like
from training.loop.objective import Embeds, Ids, Objective

ROWS, TEXTS = 7, 4
INDEX = torch.tensor([0, 1, 2, 3, 0, 1, 2])


def batch(rows: int = ROWS, texts: int = TEXTS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values_videos": torch.randn(rows, 2, 3, 32, 32, generator=generator),
        "input_ids": torch.randint(3, 300, (rows, 4), generator=generator),
        "attention_mask": torch.ones(rows, 4, dtype=torch.long),
        "target_input_ids": torch.randint(3, 300, (texts, 6), generator=generator),
    }


def loss_of(embeds: Embeds) -> torch.Tensor:
    groups = -1 - torch.arange(ROWS)
    return Objective()(embeds, Ids(target_index=INDEX, target_ids=INDEX, group_ids=groups))[0]


@pytest.mark.parametrize(("rows", "texts"), [(1, 1), (2, 9), (3, 4), (7, 2), (50, 1), (2, 3)])
def test_split_keeps_every_row_once_and_a_text_in_every_part(rows, texts):
    whole = batch(texts=texts)
    parts = split(whole, rows)
    assert len(parts) == -(-ROWS // rows)
    for name in ("pixel_values_videos", "input_ids"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
        assert all(1 <= len(part[name]) <= rows for part in parts)
    found = torch.cat([part["target_input_ids"] for part in parts])
    assert torch.equal(found[:texts], whole["target_input_ids"])
    assert len({len(part["target_input_ids"]) for part in parts}) == 1


def padded(lengths: list[int], columns: int) -> torch.Tensor:
    return (torch.arange(columns) < torch.tensor(lengths)[:, None]).long()


def test_split_trims_each_part_to_its_longest_text():
    """A part without padding has no mask; its embeddings equal those of the whole batch."""
    whole = batch()
    whole["attention_mask"] = padded([2, 1, 2, 4, 1, 0, 0], 4)
    whole["target_attention_mask"] = padded([3, 3, 1, 6], 6)
    parts = split(whole, 3)
    assert [part["input_ids"].shape for part in parts] == [(3, 2), (3, 4), (1, 0)]
    assert [part["target_input_ids"].shape for part in parts] == [(2, 3), (2, 6), (2, 3)]
    masks = ("attention_mask", "target_attention_mask")
    assert [[mask in part for mask in masks] for part in parts] == [
        [True, False],
        [True, True],
        [False, False],
    ]
    model = tiny_model()
    with torch.no_grad():
        outputs, expected = [model(**part) for part in parts], model(**whole)
        for side, rows in (("predicted_embeds", ROWS), ("target_embeds", TEXTS)):
            found = torch.cat([output[side] for output in outputs])[:rows]
            torch.testing.assert_close(found, expected[side], rtol=0, atol=1e-6)
        # Positive control: one column too few.
        parts[1]["input_ids"] = parts[1]["input_ids"][:, :-1]
        parts[1]["attention_mask"] = parts[1]["attention_mask"][:, :-1]
        less = model(**parts[1]).predicted_embeds
    assert (less - expected.predicted_embeds[3:6]).abs().max() > 1e-4


@pytest.mark.parametrize(("frozen", "trains"), [(True, False), (False, True), (False, False)])
def test_cached_step_runs_a_frozen_x_encoder_once(frozen, trains):
    """The second pass reuses its tokens. An encoder that trains needs a graph, and one in training
    mode may draw random numbers, so these run in both passes."""
    model, seen = tiny_model(freeze_vision=frozen).train(), []
    model.x_encoder.requires_grad_(trains)
    model.x_encoder.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    cached_step(model, batch(), 3, loss_of)
    assert seen == [False] * 3 + [True] * 3 * (not frozen)


@pytest.mark.parametrize("rows", [1, 3])
def test_cached_step_repeats_dropout_in_the_second_pass(rows):
    """The second pass needs the masks of the first, or its gradient is that of another loss. The
    next step must draw new masks."""
    model = tiny_model(predictor_config={"attention_dropout": 0.5}).train()
    reference = copy.deepcopy(model)
    torch.manual_seed(1)
    loss = cached_step(model, batch(), rows, loss_of)
    after = torch.get_rng_state()

    torch.manual_seed(1)
    outputs = [reference(**part) for part in split(batch(), rows)]
    predicted = torch.cat([output.predicted_embeds for output in outputs])
    texts = torch.cat([output.target_embeds for output in outputs])[:TEXTS]
    expected = loss_of(Embeds(predicted, texts, outputs[0].logit_scale))
    expected.backward()

    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    assert torch.equal(after, torch.get_rng_state())
    pairs = list(zip(model.named_parameters(), reference.parameters(), strict=True))
    for (name, found), parameter in pairs:
        if parameter.requires_grad:
            distance = (found.grad - parameter.grad).norm() / parameter.grad.norm()
            assert distance <= 1e-5, name
    # Positive control: other masks give another loss.
    torch.manual_seed(2)
    assert abs(cached_step(model, batch(), rows, loss_of) - loss) > 1e-4


@pytest.mark.parametrize("pinned", [False, True])
def test_store_like_waits_only_where_pixels_are_not_pinned(monkeypatch, pinned):
    """A CPU has no pinned memory: requests for it are recorded, and other memory is returned."""
    asked, empty, copy_ = [], torch.empty, torch.Tensor.copy_

    def recorded(*shape, pin_memory, **kwargs):
        asked.append(pin_memory)
        return empty(*shape, **kwargs)

    def copied(self, source, non_blocking):
        asked.append(non_blocking)
        return copy_(self, source)

    tokens, pixels = torch.randn(2, 3, 4), torch.zeros(2, dtype=torch.uint8)
    monkeypatch.setattr(torch, "empty", recorded)
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: pinned)
    stored = store_like(pixels, tokens, torch.bfloat16)
    assert asked == [pinned, pinned]
    assert torch.equal(stored, tokens.to(torch.bfloat16))


@pytest.mark.parametrize("logarithm", [4.7, 1e4, -1e4])
def test_cached_step_equals_one_pass_beyond_the_bound_of_the_temperature(logarithm):
    cached, whole = tiny_model(), tiny_model()
    for model in (cached, whole):
        model.logit_scale.weight.data.fill_(logarithm)
    loss = cached_step(cached, batch(), 3, loss_of)
    outputs = whole(**batch())
    parts = outputs.predicted_embeds, outputs.target_embeds, outputs.logit_scale
    expected = loss_of(Embeds(*parts))
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    gradients = [model.logit_scale.weight.grad for model in (cached, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    assert gradients[0].isfinite() and gradients[0] != 0


WHOLE = batch()
BLANK = torch.ones(TEXTS, 6, dtype=torch.long)
BLANK[2] = 0


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            WHOLE | {name: WHOLE[name][:0] for name in list(WHOLE)[:3]},
            "^the batch has 0 rows and 4",
        ),
        (WHOLE | {"target_input_ids": WHOLE["target_input_ids"][:0]}, "7 rows and 0 texts: give"),
        (WHOLE | {"target_input_ids": WHOLE["target_input_ids"][:, :0]}, "no token in any row"),
        (WHOLE | {"target_attention_mask": BLANK}, "no real token in row|no token in any row"),
    ],
    ids=["rows", "texts", "length", "tokens"],
)
def test_cached_step_rejects_batches_without_rows_or_tokens(rows, wrong, message):
    with pytest.raises(ValueError, match=message):
        cached_step(tiny_model(), wrong, rows, loss_of)


@pytest.mark.parametrize(("rows", "frozen"), [(2, True), (3, False), (7, True)])
def test_cached_step_with_shared_clips_equals_repeated_clips(rows, frozen):
    """Rows of a clip are put into one part; those of a clip in two parts are encoded in both."""
    index = torch.tensor([0, 1, 2, 0, 1, 0, 0])
    shared = {**batch(), "visual_index": index}
    shared["attention_mask"] = padded([4, 3, 2, 1, 4, 3, 2], 4)
    shared["pixel_values_videos"] = shared["pixel_values_videos"][:3]
    repeated = {**shared, "pixel_values_videos": shared["pixel_values_videos"][index]}
    del repeated["visual_index"]
    models = [tiny_model(freeze_vision=frozen) for _ in range(2)]
    seen = []
    models[0].x_encoder.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    losses = [
        cached_step(model, each, rows, loss_of)
        for model, each in zip(models, (shared, repeated), strict=True)
    ]
    # By clip, the rows are 0000112.
    once = {2: [1, 1, 1, 1], 3: [1, 2, 1], 7: [3]}[rows]
    assert seen == once * (1 if frozen else 2)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    pairs = zip(models[0].named_parameters(), models[1].parameters(), strict=True)
    for (name, one), two in pairs:
        if one.requires_grad:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert all(each["pixel_values_videos"].ndim == 5 for each in (shared, repeated))  # unchanged


def test_cached_step_adds_to_existing_gradients():
    """A backward pass adds gradients too; gradient accumulation relies on it."""
    once, twice = tiny_model(), tiny_model()
    cached_step(once, batch(), 3, loss_of)
    for _ in range(2):
        cached_step(twice, batch(), 3, loss_of)
    for one, two in zip(once.parameters(), twice.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(2 * one.grad, two.grad)


def test_cached_step_exchanges_gradients_in_the_last_part_only():
    calls = []

    class Recorder:
        def __enter__(self):
            calls.append("no_sync")

        def __exit__(self, *_):
            return None

    def backward(loss: torch.Tensor) -> None:
        calls.append("backward")
        loss.backward()

    cached_step(tiny_model(), batch(), 3, loss_of, backward, Recorder)
    assert calls == ["no_sync", "backward", "no_sync", "backward", "backward"]
