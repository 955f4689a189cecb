"""Parameter counts of a model and its modules."""

from torch import nn

from modeling_vljepa import VLJEPAForConditionalGeneration, VLJEPAModel
from modeling_vljepa.x_encoder import PERCEPTION, V_JEPA_2, V_JEPA_2_1

# Parts of encoders that an X-Encoder leaves out.
LEFT_OUT = {
    V_JEPA_2: "without V-JEPA 2's own predictor",
    V_JEPA_2_1: "without norms of levels that are not read",
    PERCEPTION: "without the attention pooling and its projection",
}


def count_parameters(
    model: VLJEPAModel | VLJEPAForConditionalGeneration,
) -> dict[str, dict[str, int]]:
    """Count all and trainable parameters of each module, and of the whole model as `all`."""
    base = model.base_model
    modules = {**dict(base.named_children()), **dict(model.named_children()), "all": model}
    # A model with a decoder has `base` as a child; its own children are listed instead.
    modules = {name: m for name, m in modules.items() if m is not base or name == "all"}
    return {
        name: {
            "parameters": sum(p.numel() for p in module.parameters()),
            "trainable": sum(p.numel() for p in module.parameters() if p.requires_grad),
        }
        for name, module in modules.items()
    }


def parameter_table(model: VLJEPAModel | VLJEPAForConditionalGeneration) -> str:
    """Return a table of all and trainable parameters of each module, in millions."""
    lines = [f"{'module':<16}{'parameters':>14}{'trainable':>14}"]
    for name, count in count_parameters(model).items():
        total, trainable = count["parameters"], count["trainable"]
        lines.append(f"{name:<16}{total / 1e6:>13.3f}M{trainable / 1e6:>13.3f}M")
    return "\n".join(lines)


def size(*modules: nn.Module) -> float:
    """Count the parameters of these modules, in millions."""
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def paper_table(model: VLJEPAModel) -> str:
    """Return a table of the counts and the paper's (section 3.1), and what each includes."""
    kind = model.config.vision_config.model_type
    backbone = model.predictor.backbone
    projections = size(model.predictor.visual_projection, model.predictor_head)
    layers = size(backbone.layers, backbone.norm)
    table = size(backbone.embed_tokens)
    rows = [
        ("X-Encoder", size(model.x_encoder), "304M", LEFT_OUT.get(kind, "")),
        ("Predictor", layers + projections, "490M", "layers, final norm and two projections:"),
        ("  layers", layers, "", "transformer layers and final norm"),
        ("  projections", projections, "", "visual tokens in, embedding out"),
        (
            "token table",
            table,
            "",
            "of the Predictor, frozen; 490M matches only without it",
        ),
        ("Y-Encoder", size(model.y_encoder), "300M", "token table and Dense layers included"),
        ("  Dense", size(model.y_encoder.dense), "", "between its pooling and the projection"),
        ("Y projection", size(model.y_head), "", "into the shared space"),
        (
            "all",
            size(model),
            "1.6B",
            "the paper's parts add up to 1.36B; it does not explain the rest",
        ),
    ]
    lines = [f"{'module':<16}{'parameters':>12}{'paper':>8}   includes"]
    lines += [f"{name:<16}{count:>11.1f}M{paper:>8}   {note}" for name, count, paper, note in rows]
    return "\n".join(lines)
