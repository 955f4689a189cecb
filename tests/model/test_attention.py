"""The attention of the backbones: equal to `sdpa`, and chosen by a stated rule."""

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modeling_vljepa import VLJEPAModel, attention
from modeling_vljepa.attention import SDPA_OR_PLAIN, is_plain_faster, plain_attention, sdpa_or_plain
from tests.tiny import BERT, DECODER, tiny_batch, tiny_config, tiny_model, tiny_writer

HALF = torch.bfloat16
BATCH = tiny_batch()


@pytest.fixture
def native(monkeypatch):
    """A CPU that multiplies bf16 natively, on any machine."""
    monkeypatch.setattr(attention, "cpu_has_bf16", lambda: True)


@pytest.fixture
def plain_calls(monkeypatch) -> list[int]:
    """The lengths of all calls of `plain_attention`."""
    lengths = []

    def counted(query, *args):
        lengths.append(query.shape[2])
        return plain_attention(query, *args)

    monkeypatch.setattr(attention, "plain_attention", counted)
    return lengths


def states(length: int, heads: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length + heads)
    return torch.randn(2, heads, length, 8, generator=generator).to(dtype)


def layer(training: bool = True, groups: int = 1) -> nn.Module:
    module = nn.Module().train(training)
    module.num_key_value_groups, module.is_causal = groups, False
    return module


PADDING = (torch.arange(6) < torch.tensor([6, 3])[:, None])[:, None, None].expand(2, 1, 6, 6)


@pytest.mark.parametrize(
    ("heads", "mask", "causal", "scaling"),
    [
        (4, None, False, None),
        (4, None, False, 0.7),
        (4, PADDING, False, None),
        (4, torch.zeros(2, 1, 6, 6).masked_fill(~PADDING, -1e9), False, None),
        (4, PADDING & torch.ones(6, 6, dtype=torch.bool).tril(), None, None),
        (4, None, True, None),
        (2, PADDING, False, None),  # two heads of the query share each key
    ],
    ids=["plain", "scaled", "padded", "added", "padded-causal", "causal", "grouped"],
)
def test_plain_attention_and_its_gradient_equal_sdpa(heads, mask, causal, scaling):
    """To 1e-5: the same sums in another order."""
    query, key, value = states(6), states(6, heads), states(6, heads) + 1
    results = []
    for plain in (True, False):
        inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        if plain:
            output = plain_attention(*inputs, mask, 0.0, scaling, bool(causal))
        else:
            module = layer(groups=4 // heads)
            output, _ = sdpa_attention_forward(module, *inputs, mask, 0.0, scaling, causal)
        output.sin().sum().backward()
        results.append([output, *(tensor.grad for tensor in inputs)])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_plain_attention_is_finite_where_a_padded_position_sees_no_key():
    mask = PADDING & PADDING.transpose(2, 3)
    output = plain_attention(states(6), states(6), states(6), mask, 0.0, None, False)
    assert output.isfinite().all()


@pytest.mark.parametrize(
    ("length", "training", "dtype", "expected"),
    [
        (256, True, HALF, True),
        (257, True, HALF, False),
        (16, False, HALF, False),
        (16, True, torch.float32, False),
        (16, True, torch.float16, False),
    ],
)
def test_is_plain_faster_follows_length_dtype_and_mode(native, length, training, dtype, expected):
    query = states(length, dtype=dtype)
    assert is_plain_faster(layer(training), query, query) is expected
    if dtype == torch.float32:  # autocast decides what is multiplied
        with torch.autocast("cpu", HALF):
            assert is_plain_faster(layer(training), query, query)


def test_is_plain_faster_only_on_cpus_with_bf16_outside_of_programs(native, monkeypatch):
    query = states(16, dtype=HALF)
    assert is_plain_faster(layer(), query, query)
    assert not is_plain_faster(layer(), query.to("meta"), query.to("meta"))  # another device
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not is_plain_faster(layer(), query, query)
    monkeypatch.setattr(attention, "cpu_has_bf16", lambda: False)
    assert not is_plain_faster(layer(), query, query)


def test_sdpa_or_plain_leaves_special_features_to_sdpa(native, plain_calls):
    query = states(6, dtype=HALF)
    sdpa_or_plain(layer(), query, query, query, None, position_bias=None, softcap=None)
    assert plain_calls == [6]
    bias = torch.zeros(1, 4, 6, 6, dtype=HALF)
    sdpa_or_plain(layer(), query, query, query, None, position_bias=bias)
    sdpa_or_plain(layer(), query, query, query, None, output_attentions=True)
    with pytest.raises(ValueError, match="softcap"):
        sdpa_or_plain(layer(), query, query, query, None, softcap=50.0)
    assert plain_calls == [6]


@pytest.mark.parametrize("changes", [{}, {"text_config": BERT}], ids=["gemma", "bert"])
def test_every_encoder_chooses_by_the_rule_and_stays_near_sdpa(native, plain_calls, changes):
    if "text_config" in changes:  # dropout would differ
        changes = {
            "text_config": {**BERT, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
        }
    model = tiny_model(freeze_vision=False, **changes).train()
    names = ("x_encoder", "predictor", "y_encoder")
    layers = sum(
        model.config.to_dict()[f"{name}_config"]["num_hidden_layers"]
        for name in ("vision", "predictor", "text")
    )
    results = []
    for _ in range(2):
        with torch.autocast("cpu", HALF):
            loss = model(**BATCH, return_loss=True).loss
        model.zero_grad()
        loss.backward()
        gradients = [model.get_submodule(name).backbone for name in names]
        results.append(
            [
                torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])
                for m in gradients
            ]
        )
        assert len(plain_calls) == layers  # of the first pass only
        model.set_attn_implementation("sdpa")
    for result, expected in zip(*results, strict=True):
        # Both round to bf16, in different places.
        assert torch.cosine_similarity(result, expected, dim=0) > 0.999


def test_y_decoder_chooses_by_the_rule_and_stays_near_sdpa(native, plain_calls):
    writer = tiny_writer(decoder_config=DECODER).train()
    embeds = torch.randn(2, writer.config.embedding_dim, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[5, 6, 7, 2], [8, 2, -100, -100]])
    losses = []
    for _ in range(2):
        with torch.autocast("cpu", HALF):
            losses.append(writer(predicted_embeds=embeds, labels=labels).loss)
        assert len(plain_calls) == DECODER["num_hidden_layers"]
        writer.set_attn_implementation("sdpa")
    torch.testing.assert_close(*losses, rtol=0.01, atol=0)


def test_recomputed_layers_use_the_kernel_of_the_first_pass(native, plain_calls):
    model = tiny_model(freeze_vision=False).train()
    model.activation_checkpointing_enable()
    with torch.autocast("cpu", HALF):
        loss = model(**BATCH, return_loss=True).loss
        with torch.no_grad():  # as in GradCache's first pass
            model(**BATCH)
    first = list(plain_calls)
    loss.backward()
    assert len(first) == 12 and len(plain_calls) == 18  # two passes of six layers, and one again


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_requested_attention_is_kept_and_none_is_saved(name, tmp_path, native, plain_calls):
    tiny_model().save_pretrained(tmp_path)
    assert SDPA_OR_PLAIN not in (tmp_path / "config.json").read_text()
    model = VLJEPAModel.from_pretrained(tmp_path, attn_implementation=name)
    config = tiny_config()
    config._attn_implementation = name
    for each in (model, VLJEPAModel(VLJEPAModel(config).config)):
        with torch.autocast("cpu", HALF):
            each.train()(**BATCH)
    assert plain_calls == []
    model.set_attn_implementation(SDPA_OR_PLAIN)  # back to the default
    with torch.autocast("cpu", HALF):
        model(**BATCH)
    assert len(plain_calls) == 4  # the frozen X-Encoder stays in evaluation mode
