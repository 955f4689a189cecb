"""Forward passes on a GPU that does not exist: no operation mixes devices.

Fake tensors have a device and a shape, and no memory. An operation on fake tensors of two devices
raises an error, as on a GPU. An index on the CPU into a tensor on the GPU is valid in both.

torch's Python bindings ask for the CUDA device of a tensor before they run many operations, and a
build for CPUs cannot answer. So a library of one line is compiled, which answers that there is
nothing to switch. Without it, as on a machine without a C++ compiler, these tests are skipped.

The backward pass needs a GPU: torch's engine starts one thread for each.
"""

import ctypes
import shutil
import subprocess
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import ProcessorMixin

from eval.embed import embed_texts
from modeling_vljepa import VLJEPAForConditionalGeneration, VLJEPAModel
from modeling_vljepa import predictor as predictor_module
from modeling_vljepa import y_encoder as y_encoder_module
from modeling_vljepa.losses import LOSSES, TiledInfoNCE, find_matches
from modeling_vljepa.pipelines import embedding, library_writer
from modeling_vljepa.pipelines.pipeline_vljepa import VLJEPARetrievalPipeline
from modeling_vljepa.pipelines.segmentation import OnlineSegmenter
from modeling_vljepa.pipelines.stream_session import Memory, StreamSession
from tests.tiny import (
    BERT,
    DECODER,
    PERCEPTION,
    PERCEPTION_TEXT,
    SUB_CONFIGS,
    TOWER,
    VJEPA21,
    tiny_batch,
    tiny_config,
    tiny_processor,
    tiny_token_model,
)
from training.data.collator import to_pixel_values
from training.data.feature_writer import Encoder
from training.data.target_states import encode_texts
from training.loop import grad_cache
from training.loop.grad_cache import cached_step
from training.loop.objective import Embeds, Ids, Objective
from training.model.adapters import add_adapters

GPU = torch.device("cuda:0")
CPU = torch.device("cpu")
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""
# One for all tests: transformers caches tensors, and those of two modes cannot be mixed.
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
aten = torch.ops.aten


class Values(TorchDispatchMode):
    """Results of the operations that read values, which fake tensors lack.

    Every number is 1, every condition is true, and all ids of a batch differ. The input checks of
    the model then pass.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # `.item()`, `if tensor:`; in inference mode it comes under its own name
        if function in (aten._local_scalar_dense.default, aten.item.default):
            return True if args[0].dtype is torch.bool else 1
        if function in (aten.unique_dim.default, aten._unique2.default):
            indices = torch.arange(len(args[0]), device=args[0].device)
            return args[0], indices, torch.ones_like(indices)
        if function is aten.nonzero.default:
            return torch.zeros(args[0].numel(), args[0].ndim, dtype=torch.long).to(args[0].device)
        if function is aten.index.Tensor and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        ):
            return args[0]
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> torch.device:
    """The device `cuda:0`, of which this build of torch can make fake tensors."""
    if torch.backends.cuda.is_built():
        return GPU  # has the guard
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("torch's build for CPUs needs a C++ compiler for fake tensors on a GPU")
    folder, built = tmp_path_factory.mktemp("guard"), Path(torch.__file__).parent
    (folder / "guard.cpp").write_text(GUARD)
    command = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{built / 'include'}"]
    command += ["guard.cpp", "-o", "guard.so", f"-L{built / 'lib'}", "-lc10"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip(f"the C++ compiler cannot build against torch: {run.stderr[:200]}")
    ctypes.CDLL(str(folder / "guard.so"))
    return GPU


@pytest.fixture
def fake(gpu: torch.device):
    """A mode in which every tensor is fake."""
    with ExitStack() as stack:
        for mode in (FAKE, Values(), torch.no_grad()):
            stack.enter_context(mode)
        yield gpu


def on_gpu(kind: type[nn.Module] = VLJEPAModel, **changes: object) -> nn.Module:
    """Return a tiny model, built on the CPU and moved to the GPU as a user does."""
    config = tiny_config(**changes)
    for name in (*SUB_CONFIGS, "decoder_config"):
        if (part := getattr(config, name)) is not None:
            part.num_hidden_layers = 1  # a second layer has the same operations
    with _disable_current_modes():
        model = kind(config).eval()
    return model.to(GPU)  # tensors that are neither weights nor buffers stay on the CPU


def batch_on(device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in tiny_batch().items()}


def by_text(processor: ProcessorMixin, texts: list[str]) -> list[tuple[bytes, int]]:
    """Return the texts in place of the hashes of `read_tokens`: fake tokens have no bytes."""
    return [(text.encode(), 1) for text in texts]


IMAGE_TOWER = {"vision_config": TOWER | {"model_type": "dinov2"}}
KINDS = {
    "the paper's": {},
    "image tower": IMAGE_TOWER,
    "V-JEPA 2.1": {"vision_config": VJEPA21 | {"hierarchical_layers": None}},
    "Perception Encoder": {
        "vision_config": PERCEPTION,
        "text_config": PERCEPTION_TEXT,
        "text_pooling": "lasttoken",
    },
    "bert": {"text_config": BERT, "text_pooling": "cls"},
    "last token, pooled patches": {"text_pooling": "lasttoken", "visual_token_pooling": 2},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_forward_with_loss_is_on_one_device(fake, changes):
    output = on_gpu(**changes)(**batch_on(fake), return_loss=True)
    found = {output.loss.device, output.predicted_embeds.device, output.target_embeds.device}
    assert found == {fake}


def test_predict_and_encode_target_are_on_one_device(fake):
    model, batch = on_gpu(), batch_on(fake)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    texts, text_mask = batch["target_input_ids"], batch["target_attention_mask"]
    pixels = batch["pixel_values_videos"]
    visual_embeds = model.encode_video(pixels[:1])
    for found in (
        model.predict(pixels, ids, mask),
        model.predict(visual_embeds=visual_embeds, input_ids=ids, truncate_dim=8),
        model.predict(visual_embeds=visual_embeds),  # without a query
        model.predict(pixels[:2], ids, mask, visual_index=torch.ones(3, dtype=int, device=fake)),
        model.encode_target(texts, text_mask),
        model.encode_target(texts),
        model.encode_target(target_pooler_output=torch.ones(3, 32, device=fake)),
    ):
        assert (found.device, found.dtype) == (fake, torch.float32)


@pytest.mark.parametrize("as_positives", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_regularizers_are_on_one_device(fake, name, as_positives):
    objective = Objective(
        name=name,
        as_positives=as_positives,
        sigreg_weight=1.0,
        variance_weight=1.0,
        covariance_weight=1.0,
    )
    index = torch.arange(6, device=fake)
    embeds = Embeds(
        torch.ones(6, 24, device=fake),
        torch.ones(12, 24, device=fake),
        torch.ones(1, device=fake),
        torch.ones(1, device=fake),
    )
    negatives = torch.ones(6, 2, dtype=torch.long, device=fake)
    loss, parts = objective(embeds, Ids(index, index, index, negatives, negatives))
    assert {loss.device, *(part.device for part in parts.values())} == {fake}


@pytest.mark.parametrize("as_positives", [False, True])
def test_gradient_of_tiled_info_nce_is_on_one_device(fake, as_positives):
    embeds, ids = torch.ones(6, 24, device=fake), torch.arange(6, device=fake)
    scale, sums = torch.ones(1, device=fake), torch.ones(6, device=fake)
    context = SimpleNamespace(
        saved_tensors=(embeds, embeds, scale, embeds, sums, sums),
        matches=find_matches(6, fake, ids, ids, ids, 0),
        as_positives=as_positives,
        elements=12,  # three tiles
        needs_input_grad=(True, True),
    )
    gradients = TiledInfoNCE.backward(context, torch.ones((), device=fake), None)
    assert {each.device for each in gradients if each is not None} == {fake}


class FirstPassIsOver(Exception):
    """Marker: GradCache has computed the loss of all parts."""


def test_grad_cache_first_pass_moves_each_part_to_the_gpu(fake, monkeypatch):
    # The state of a GPU's generator, which is not there.
    monkeypatch.setattr(grad_cache, "get_device_states", lambda *tensors: ([], []))
    model, batch = on_gpu(), batch_on(CPU)
    batch["frames"] = torch.zeros(batch.pop("pixel_values_videos").shape, dtype=torch.uint8)
    video = tiny_processor().video_processor
    moved = []

    def make_ready(part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Move and normalise a part, as `VLJEPATrainer.make_ready` does."""
        part = {name: tensor.to(fake) for name, tensor in part.items()}
        part["pixel_values_videos"] = to_pixel_values(part.pop("frames"), video)
        moved.append({tensor.device for tensor in part.values()})
        return part

    def loss_of(embeds: Embeds) -> torch.Tensor:
        index = torch.arange(3, device=fake)
        loss, _ = Objective()(embeds, Ids(index, index, index))
        assert loss.device == fake
        raise FirstPassIsOver

    with pytest.raises(FirstPassIsOver):
        cached_step(model, batch, rows=2, loss_of=loss_of, make_ready=make_ready)
    assert moved == [{fake}, {fake}]


@pytest.mark.parametrize("context", [True, False])
def test_decoder_forward_is_on_one_device(fake, context):
    config = {"decoder_config": dict(DECODER), "decoder_reads_query": context}
    model = on_gpu(VLJEPAForConditionalGeneration, **config)
    batch, contexts = batch_on(fake), {}
    if context:
        contexts["context_input_ids"] = batch["input_ids"]
        contexts["context_attention_mask"] = batch["attention_mask"]
    embeds, labels = torch.ones(3, 24, device=fake), batch["target_input_ids"]
    output = model(predicted_embeds=embeds, labels=labels, **contexts)
    assert {output.loss.device, output.logits.device} == {fake}


def test_token_model_scores_and_learns_texts_on_one_device(fake):
    with _disable_current_modes():
        model = tiny_token_model(predicts_embeddings=True)
    model, batch = model.to(GPU), batch_on(fake)
    labels = batch["target_input_ids"]
    output = model(**batch, labels=labels)
    scores = model.score_texts(
        labels[:2],
        batch["input_ids"],
        batch["attention_mask"],
        pixel_values_videos=batch["pixel_values_videos"],
    )
    found = (output.loss, output.logits, output.predicted_embeds, output.target_embeds, scores)
    assert {each.device for each in found} == {fake}


def test_stream_windows_are_returned_on_the_cpu(fake):
    model, processor = on_gpu(), tiny_processor()
    session = StreamSession(model, processor)
    window = SimpleNamespace(
        numbers=(0, 1), times=(0.0, 0.1), frames=(torch.zeros(3, 32, 32), torch.zeros(3, 32, 32))
    )
    [embedded] = session.encoder.embed([window])
    assert {embedded.embedding.device, embedded.visual_embeds.device} == {CPU}
    again = session.read_again([Memory(None, embedded.visual_embeds)] * 3, "what is it ?")
    assert again.device == CPU


def test_stream_of_image_tower_shares_frames_on_the_gpu(fake):
    session = StreamSession(on_gpu(**IMAGE_TOWER), tiny_processor())
    frame = torch.zeros(3, 32, 32)
    windows = [
        SimpleNamespace(numbers=(n, n + 1), times=(n, n + 1), frames=(frame, frame))
        for n in range(2)
    ]
    found = [each.visual_embeds.device for each in session.encoder.embed(windows)]
    assert found == [CPU, CPU]
    assert {tokens.device for tokens in session.encoder.seen.values()} == {fake}


def test_segmenter_returns_segments_on_the_cpu():
    # Its statistics are NumPy arrays: `numpy()` of a bf16 tensor raises an error on the CPU too.
    segmenter = OnlineSegmenter()
    embeds = torch.eye(4, dtype=torch.bfloat16).requires_grad_()
    assert segmenter.segment(embeds)[0].embedding.device == CPU


def test_pipeline_predicts_on_the_gpu_and_ranks_on_the_cpu(fake, monkeypatch):
    model, processor = on_gpu(), tiny_processor()
    pipe = VLJEPARetrievalPipeline(model=model, processor=processor, device=fake)
    # It would make the GPU the current one.
    monkeypatch.setattr(pipe, "device_placement", nullcontext)
    monkeypatch.setattr(embedding, "read_tokens", by_text)
    items = [{"pixels": torch.zeros(2, 3, 32, 32), "query": "what is it ?"}] * 2
    predicted = pipe.forward(items)
    texts = pipe.embed_texts(["a dog", "a cat"])
    assert {each.device for each in (*predicted, texts)} == {CPU}


def test_texts_and_features_are_stored_on_the_cpu(fake, monkeypatch):
    monkeypatch.setattr(embedding, "read_tokens", by_text)
    model, processor = on_gpu(freeze_text=True), tiny_processor()
    texts = ["a dog", "two dogs and a cat"]
    states = encode_texts(model, processor, texts, torch.float32)
    tokens = Encoder(model, processor.video_processor, False)(
        [{"frames": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}] * 2
    )
    embeds = embed_texts(model, processor, texts)
    assert {each.device for each in (states, tokens, embeds)} == {CPU}


def test_processor_makes_pixels_on_the_cpu_from_a_clip_on_the_gpu(fake):
    processor = tiny_processor()
    clip = torch.zeros(3, 3, 40, 48, dtype=torch.uint8, device=fake)
    for given in ({"videos": [clip]}, {"videos": [[clip[0], clip[1]]]}, {"images": [clip[0]]}):
        assert processor(**given)["pixel_values_videos"].device == CPU


def test_library_and_search_take_embeddings_on_the_gpu(fake, monkeypatch):
    # Arrow reads the bytes of its columns, and fake tensors have none.
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: self.device)
    monkeypatch.setattr(library_writer.pa, "array", lambda *values: values[0])
    arrays = SimpleNamespace(from_arrays=lambda numbers, dim: numbers)
    monkeypatch.setattr(library_writer.pa, "FixedSizeListArray", arrays)
    embeds = torch.ones(2, 24, device=fake, requires_grad=True)
    assert library_writer.as_arrow(["a", "b"], embeds)["embedding"] == CPU


def test_adapters_keep_fp32_weights_in_main_memory(fake, monkeypatch):
    with _disable_current_modes():
        model = add_adapters(VLJEPAModel(tiny_config()), {"r": 2})
    layers = [each.get_base_layer() for each in model.modules() if isinstance(each, LoraLayer)]
    for layer in layers:
        layer.weight = nn.Parameter(layer.weight.to(fake), requires_grad=False)
    monkeypatch.setattr(nn.Linear, "to", lambda self, dtype: self)  # fakes cannot be swapped
    model.store_base_in_bf16()
    waiting = [weight.device for layer in layers for weight in model.in_fp32[layer].values()]
    assert set(waiting) == {CPU}


# Positive controls: faults that a GPU would report, which these tests must report too.


def mask_on_the_cpu(visual_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.ones(visual_embeds.shape[:2], dtype=torch.long), attention_mask], dim=1)


def mean_with_weights_on_the_cpu(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (states * torch.ones(states.shape[1], 1)).sum(dim=1)


FAULTS = {
    "mask": (predictor_module, "join_masks", mask_on_the_cpu),
    "pooling": (y_encoder_module, "masked_mean", mean_with_weights_on_the_cpu),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_forward_with_tensor_made_on_the_cpu_is_found(fake, monkeypatch, fault):
    monkeypatch.setattr(*fault)
    model, batch = on_gpu(), batch_on(fake)
    with pytest.raises(RuntimeError, match="cuda:0.*cpu|cpu.*cuda:0"):
        model(**batch)


def test_forward_with_buffer_on_the_cpu_is_found(fake):
    model, batch = on_gpu(), batch_on(fake)
    # Not registered, so that `to` leaves it behind.
    offset = torch.zeros(model.config.predictor_config.hidden_size)
    projection = model.predictor.visual_projection
    projection.register_forward_hook(lambda module, inputs, output: output + offset)
    with pytest.raises(RuntimeError, match="cuda:0.*cpu|cpu.*cuda:0"):
        model(**batch)


def test_loss_with_ids_on_the_cpu_is_found(fake):
    embeds = torch.ones(6, 24, device=fake)
    index, scale = torch.arange(6), torch.ones(1, device=fake)
    with pytest.raises(RuntimeError, match="cuda:0.*cpu|cpu.*cuda:0"):
        Objective()(Embeds(embeds, embeds, scale), Ids(index, index, index))
