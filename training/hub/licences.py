"""Licences of known backbones and their conditions for publishing weights.

Not legal advice: these are summaries, each with the address of the full text.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Licence:
    """A licence of model weights.

    Attributes:
        name: the Hub's identifier of the licence.
        url: address of its text.
        may_redistribute: permission to publish the weights, trained further or not.
        conditions: conditions of publishing them.
    """

    name: str
    url: str
    may_redistribute: str
    conditions: str


APACHE = Licence(
    "apache-2.0",
    "https://www.apache.org/licenses/LICENSE-2.0",
    "yes",
    "keep the licence text and the notices",
)
MIT = Licence(
    "mit", "https://opensource.org/license/mit", "yes", "keep the licence text and the copyright"
)
LLAMA_3_2 = Licence(
    "llama3.2",
    "https://www.llama.com/llama3_2/license",
    "yes, with conditions",
    "include a copy of the agreement and its Notice file; write 'Built with Llama' on the model's "
    "page; begin the model's name with 'Llama'; include the acceptable use policy",
)
GEMMA = Licence(
    "gemma",
    "https://ai.google.dev/gemma/terms",
    "yes, with conditions",
    "include a copy of the terms, and the use restrictions as an enforceable provision; state in a "
    "Notice file that Gemma is provided under and subject to the Gemma Terms of Use; mark changed "
    "files",
)
DINOV3 = Licence(
    "dinov3-license",
    "https://ai.meta.com/resources/models-and-libraries/dinov3-license",
    "yes, with conditions",
    "include a copy of the agreement and publish under its terms",
)
UNKNOWN = Licence("unknown", "", "unknown", "ask the author of the weights")

# By prefix of the Hub id; the longest matching prefix counts.
KNOWN = {
    "facebook/vjepa2": MIT,
    "vjepa2_1_vit": MIT,  # a published file on a disk has its own name, no Hub id
    "PE-": APACHE,
    "facebook/PE-": APACHE,
    "timm/PE-Core-": APACHE,
    "timm/vit_pe_": APACHE,
    "facebook/dinov2": APACHE,
    "facebook/dinov3": DINOV3,
    "google/siglip": APACHE,
    "openai/clip": MIT,
    "meta-llama/Llama-3.2": LLAMA_3_2,
    "HuggingFaceTB/SmolLM2": APACHE,
    "Qwen/Qwen3": APACHE,
    "google/embeddinggemma": GEMMA,
    "sentence-transformers/all-MiniLM-L6-v2": APACHE,
    "sentence-transformers/all-mpnet-base-v2": APACHE,
}


def licence_of(source: str) -> Licence:
    """Return the licence of a backbone by its Hub id."""
    prefixes = [prefix for prefix in KNOWN if source.startswith(prefix)]
    return KNOWN[max(prefixes, key=len)] if prefixes else UNKNOWN


def licence_table(backbones: dict[str, str]) -> str:
    """Return a Markdown table of each part, the source of its weights and their licence."""
    rows = [
        "| part | initialised from | licence | may be redistributed | conditions |",
        "|---|---|---|---|---|",
    ]
    for part in ("vision", "predictor", "text"):
        source = backbones.get(part)
        if source is None:
            rows.append(f"| {part} | random weights | none | yes | none |")
            continue
        licence = licence_of(source)
        name = f"[{licence.name}]({licence.url})" if licence.url else licence.name
        row = (part, source, name, licence.may_redistribute, licence.conditions)
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)
