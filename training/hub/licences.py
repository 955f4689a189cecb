"""Under which terms the weights of known backbones may be passed on.

Not legal advice: what is said here of a licence is a reading of it, with the place to check.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Licence:
    """
    Attributes:
        name: the Hub's identifier of the licence.
        url: its text.
        may_redistribute: whether trained or untrained weights may be published.
        conditions: what has to go with them.
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
    "pass on a copy of the agreement and its Notice file; say 'Built with Llama' on the model's "
    "page; begin the model's name with 'Llama'; the acceptable use policy goes with it",
)
GEMMA = Licence(
    "gemma",
    "https://ai.google.dev/gemma/terms",
    "yes, with conditions",
    "pass on a copy of the terms and the use restrictions as an enforceable provision; say in a "
    "Notice file that Gemma is provided under and subject to the Gemma Terms of Use; mark changed "
    "files",
)
DINOV3 = Licence(
    "dinov3-license",
    "https://ai.meta.com/resources/models-and-libraries/dinov3-license",
    "yes, with conditions",
    "pass on a copy of the agreement, under its terms",
)
UNKNOWN = Licence("unknown", "", "not known here", "ask whoever gave you the weights")

# The beginning of a Hub id; the longest that fits counts.
KNOWN = {
    "facebook/vjepa2": MIT,
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
    """The licence of a backbone, by its Hub id."""
    fitting = [start for start in KNOWN if source.startswith(start)]
    return KNOWN[max(fitting, key=len)] if fitting else UNKNOWN


def licence_table(backbones: dict[str, str]) -> str:
    """A Markdown table: each part, where its weights began, and what may be done with them."""
    rows = [
        "| part | began as | licence | may be redistributed | conditions |",
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
