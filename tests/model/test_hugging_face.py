"""The model with the features of transformers and peft: each option has its documented effect."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel

from modeling_vljepa import LORA_MODULES_TO_SAVE, LORA_TARGET_MODULES, VLJEPAModel
from modeling_vljepa.attention import SDPA_OR_PLAIN
from tests.tiny import BERT, tiny_batch, tiny_model

BATCH = tiny_batch()
TRAINABLE = {"freeze_vision": False, "freeze_token_embedding": False}


@pytest.fixture(scope="module")
def model() -> VLJEPAModel:
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model: VLJEPAModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


def embeds(model: VLJEPAModel) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        outputs = model(**BATCH)
    return outputs.predicted_embeds, outputs.target_embeds


def assert_same(model: VLJEPAModel, expected: VLJEPAModel, atol: float = 1e-6) -> None:
    """Compare the embeddings of two models of the same weights.

    Not to the last bit: weights from a file are not aligned in memory, and a matrix product of
    one row may round differently for them.
    """
    for result, reference in zip(embeds(model), embeds(expected), strict=True):
        torch.testing.assert_close(result, reference, rtol=0, atol=atol)


# -- memory, kernels, precision, placement -------------------------------------------------


def test_gradient_checkpointing_covers_every_module_and_keeps_the_gradient():
    results = []
    for checkpointing in (False, True):
        model = tiny_model(**TRAINABLE).train()
        if checkpointing:
            model.activation_checkpointing_enable()
            layers = [m for m in model.modules() if "gradient_checkpointing" in vars(m)]
            modules = {n.split(".")[0] for n, m in model.named_modules() if m in layers}
            assert {"x_encoder", "predictor", "y_encoder"} <= modules
            assert all(layer.gradient_checkpointing for layer in layers)
        loss = model(**BATCH, return_loss=True).loss
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()]))
    (loss, gradients), (expected, reference) = results
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for gradient, other in zip(gradients, reference, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-6)


def test_attention_implementation_is_chosen_for_each_module(model, folder):
    chosen = {
        "vision_config": "eager",
        "predictor_config": "sdpa",
        "text_config": "eager",
        "": "sdpa",
    }
    mixed = VLJEPAModel.from_pretrained(folder, attn_implementation=chosen)
    eager = VLJEPAModel.from_pretrained(folder, attn_implementation="eager")
    modules = ("x_encoder", "predictor", "y_encoder")
    for some, expected in (
        (mixed, ["eager", "sdpa", "eager"]),
        (eager, ["eager"] * 3),
        (model, [SDPA_OR_PLAIN] * 3),  # nothing was chosen
    ):
        found = [some.get_submodule(m).backbone.config._attn_implementation for m in modules]
        assert found == expected
        assert_same(some, model, atol=1e-5)
    eager.set_attn_implementation("sdpa")
    assert_same(eager, model)


def test_bf16_model_stays_near_fp32(model, folder):
    half = VLJEPAModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in embeds(half)} == {torch.float32}
    assert_same(half, model, atol=0.05)
    assert half(**BATCH, return_loss=True).loss.dtype == torch.float32


def test_model_offloaded_to_disk_gives_the_same_embeddings(model, folder, tmp_path):
    devices = {"x_encoder": "cpu", "predictor": "disk", "y_encoder": "disk"}
    devices |= dict.fromkeys(("predictor_head", "y_head", "logit_scale"), "cpu")
    offloaded = VLJEPAModel.from_pretrained(folder, device_map=devices, offload_folder=tmp_path)
    assert next(offloaded.predictor.parameters()).device.type == "meta"
    assert_same(offloaded, model)


def test_no_split_modules_names_the_layers_of_every_backbone(model):
    """transformers keeps these layers whole when it places the model on several GPUs."""
    assert {"LlamaDecoderLayer", "VJEPA2Layer"} <= set(model._no_split_modules)


def test_sharded_checkpoint_gives_the_same_embeddings(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    assert_same(AutoModel.from_pretrained(tmp_path), model)


def test_tie_weights_ties_no_parameters(model, tmp_path):
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert len(set(before.values())) == len(before)
    model.tie_weights()
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


# -- tokens --------------------------------------------------------------------------------


def test_resize_token_embeddings_changes_the_predictor_only(model, tmp_path):
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(310)
    assert larger.get_input_embeddings().weight.shape == (310, 32)
    assert larger.config.predictor_config.vocab_size == 310
    assert larger.config.text_config.vocab_size == 300
    assert_same(larger, model)
    larger.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert_same(loaded, model)
    with torch.no_grad():
        ids = torch.tensor([[305]])
        loaded.predict(BATCH["pixel_values_videos"], ids.expand(3, -1))
        with pytest.raises(ValueError, match="id 305, but the vocabulary of this encoder has 300"):
            model.predict(BATCH["pixel_values_videos"], ids.expand(3, -1))


# -- adapters ------------------------------------------------------------------------------


@pytest.fixture
def lora() -> LoraConfig:
    return LoraConfig(
        r=4,
        target_modules=LORA_TARGET_MODULES,
        modules_to_save=LORA_MODULES_TO_SAVE,
        init_lora_weights=False,  # random: the default adapter changes no output
    )


def trained_names(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("text_config", [{}, BERT], ids=["gemma", "bert"])
def test_lora_adapts_the_predictor_only(text_config):
    """A list such as ["q_proj", "v_proj"] also matches the Y-Encoder, "all-linear" all layers."""
    config = LoraConfig(target_modules=LORA_TARGET_MODULES, modules_to_save=LORA_MODULES_TO_SAVE)
    adapted = get_peft_model(tiny_model(text_config=text_config), config)
    layer = "predictor.backbone.layers.{}.{}"
    inner = [f"self_attn.{x}_proj" for x in "qkvo"] + [
        f"mlp.{x}_proj" for x in ("gate", "up", "down")
    ]
    expected = {layer.format(i, name) for i in range(2) for name in inner}
    modules = dict(adapted.base_model.model.named_modules())
    assert {n.removesuffix(".lora_A") for n in modules if n.endswith(".lora_A")} == expected
    trained = {
        name.removeprefix("base_model.model.").split(".")[0] for name in trained_names(adapted)
    }
    assert trained == {"predictor", "predictor_head", "y_head", "logit_scale"}
    assert_same(adapted, tiny_model(text_config=text_config))  # before training
    adapted.train()
    adapted(**BATCH, return_loss=True).loss.backward()
    empty = [n for n, p in adapted.named_parameters() if p.requires_grad and p.grad is None]
    assert empty == []


def test_lora_adapter_is_saved_loaded_and_merged(model, folder, lora, tmp_path):
    adapted = get_peft_model(VLJEPAModel.from_pretrained(folder), lora).eval()
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1
    assert (embeds(adapted)[0] - embeds(model)[0]).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < (folder / "model.safetensors").stat().st_size / 3
    again = PeftModel.from_pretrained(VLJEPAModel.from_pretrained(folder), tmp_path / "adapter")
    assert_same(again.eval(), adapted)
    torch.testing.assert_close(again.logit_scale(), adapted.logit_scale())
    assert_same(AutoModel.from_pretrained(tmp_path / "adapter"), adapted)  # base and adapter
    merged = adapted.merge_and_unload()
    assert type(merged) is VLJEPAModel
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModel.from_pretrained(tmp_path / "merged")
    assert_same(loaded, merged)
    assert_same(loaded, again, atol=1e-5)


def test_add_adapter_and_load_adapter_of_transformers(model, folder, lora, tmp_path):
    """These methods need no PeftModel around the model."""
    adapted = VLJEPAModel.from_pretrained(folder)
    adapted.add_adapter(lora, "vqa")
    adapted.eval()
    expected = embeds(adapted)
    adapted.disable_adapters()
    assert_same(adapted, model)
    adapted.enable_adapters()
    adapted.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    loaded = VLJEPAModel.from_pretrained(folder)
    loaded.load_adapter(tmp_path, "vqa")
    # Weights moved by one unit in the last place changed a value by 1.006e-6.
    for result, reference in zip(embeds(loaded.eval()), expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=0, atol=1e-5)
    without = embeds(model)[0]
    assert (expected[0] - without).abs().max() > 1e-3  # the adapter changes far more


# -- compiled and exported -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("text_config", [{}, BERT], ids=["gemma", "bert"])
def test_compiled_model_gives_the_same_embeddings_without_graph_breaks(text_config):
    model = tiny_model(text_config=text_config)
    texts = BATCH["target_input_ids"], BATCH["target_attention_mask"]
    query = BATCH["pixel_values_videos"], BATCH["input_ids"], BATCH["attention_mask"]
    with torch.no_grad():
        predict = torch.compile(model.predict, fullgraph=True)
        encode = torch.compile(model.encode_target, fullgraph=True)
        torch.testing.assert_close(predict(*query), model.predict(*query), rtol=0, atol=1e-5)
        torch.testing.assert_close(encode(*texts), model.encode_target(*texts), rtol=0, atol=1e-5)
