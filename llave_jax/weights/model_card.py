"""The model card of an exported directory: README.md, with the metadata that the hub reads.

The card says what the files are, their licence, their origin and whom to cite. Training data, scores and
the like are left to the model's authors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from llave_jax.models.config import LlaveConfig

README = "README.md"
# The card's name if the source has a README.md of its own.
BESIDE_README = "MODEL_CARD.md"

_MAX_CARD_BYTES = 1 << 20
_CARD_LINE = re.compile(r"(?P<key>[a-z_]+):(?P<text>( [\w./:'\"() -]{1,200})?)\s*")
_CARD_ENTRY = re.compile(r"\s*- (?P<text>[\w./:'\"() -]{1,200})\s*")

# The licence of the authors' code and of all models that they publish.
LICENSE = "apache-2.0"

# Publishers of models of this family on the hub. `_name_or_path` in a config.json may also be a folder. It is
# surely a name on the hub only if it begins with one of these.
_PUBLISHERS = ("BAAI", "Qwen", "llava-hf", "lmms-lab", "zhibinlan")

_LOADING = {
    "llave": "The files are in the layout of the authors' code (`LlavaQwenForCausalLM`), which loads them.",
    "onevision": """\
sentence-transformers 6 loads the files:

```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{title}")  # this directory, or its name on the hub: org/{title}
query = model.encode({{"image": Image.open("photo.jpg"), "text": "What is in the image"}})
target = model.encode("A cat and a dog")
```

So does vLLM (`vllm serve {title} --runner pooling --convert embed`); send texts and images as `messages`, never as
`input`, which gets no chat template. transformers loads them as `LlavaOnevisionForConditionalGeneration`: the embedding
is the last hidden state of the last token of the prompt that `chat_template.jinja` makes, L2-normalised. Items with their
vectors, to check any of these, are in `check_vectors.json`; what differs between them, above all for several images
in an item and for videos, is described in llave_jax's docs/export.md.""",
}

_TEXT = """\
# {title}

A multimodal embedding model: a text, an image, a document of both or a video becomes one
L2-normalised vector of {width} dimensions. Architecture and training follow
[LLaVE](https://arxiv.org/abs/2503.04812).

| | |
|---|---|
| language model | Qwen2, {layers} layers, width {width}, vocabulary of {vocabulary} |
| vision tower | SigLIP, {vision_layers} layers, width {vision_width}, {image_size} px in patches of {patch_size} |
| images | base crop and up to {tiles} tiles, of {canvases} canvases |
| tokens | at most {max_length} |

## Use

{loading}

With llave_jax:

```python
from llave_jax import Embedder

model = Embedder.from_pretrained("{title}")  # this directory, or its name on the hub: org/{title}
query, target = model.encode(
    [
        {{
            "image": "photo.jpg",
            "text": "Represent the given image with the following question: What is in the image",
        }},
        "A cat and a dog",
    ]
)
similarity = query @ target
```

## Licence

{licence}

## Citation

```bibtex
{citation}
```
"""

CITATION = """\
@article{lan2025llave,
  title={LLaVE: Large Language and Vision Embedding Models with Hardness-Weighted Contrastive Learning},
  author={Lan, Zhibin and Niu, Liqiang and Meng, Fandong and Zhou, Jie and Su, Jinsong},
  journal={arXiv preprint arXiv:2503.04812},
  year={2025}
}"""


def write_card(
    target: Path,
    title: str,
    config: LlaveConfig,
    layout: str,
    *,
    source_card: Path | None = None,
    source_config: dict[str, Any] | None = None,
    base_model: str | None = None,
) -> Path:
    """Write the model card of an exported directory. A README.md that exists stays.

    Args:
      target: the directory.
      title: the model's name.
      config: the model.
      layout: "llave" or "onevision".
      source_card: README.md of the checkpoint that the model comes from. The new card takes over its
        licence and its base model.
      source_config: content of that checkpoint's config.json.
      base_model: the hub's id of the model that this one was trained from; None: what `source_card`
        or `source_config` says.

    Returns:
      The file written: README.md, or MODEL_CARD.md beside one.
    """
    known = _metadata(source_card)
    licence, known_base = licence_and_base(source_card, source_config)
    base_model = base_model or known_base
    data = ModelCardData(
        license=licence,
        # A licence that is not on the hub's list has a name and a link of its own.
        license_name=known.get("license_name"),
        license_link=known.get("license_link"),
        base_model=base_model,
        pipeline_tag="feature-extraction",
        library_name="transformers",
        tags=["llave", "multimodal", "embedding", "sentence-similarity"],
    )
    text, vision, inputs = config.text, config.vision, config.inputs
    tiles = max(height * width for height, width in inputs.pinpoints) // vision.image_size**2
    body = _TEXT.format(
        title=title,
        width=text.hidden_size,
        layers=text.num_layers,
        vocabulary=text.vocab_size,
        vision_layers=vision.num_layers,
        vision_width=vision.hidden_size,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        tiles=tiles,
        canvases=len(inputs.pinpoints),
        max_length=inputs.max_length,
        loading=_LOADING[layout].format(title=title),
        licence=_licence_text(licence, bool(known.get("license")), base_model),
        citation=CITATION,
    )
    path = target / (BESIDE_README if (target / README).exists() else README)
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{body}", encoding="utf-8")
    return path


def licence_and_base(
    source_card: Path | None, source_config: dict[str, Any] | None
) -> tuple[str, Any]:
    """What a checkpoint says of its licence, and of the model that it was trained from.

    Args:
      source_card: its README.md; None, or a file that is missing: it has none.
      source_config: content of its config.json; None: it has none.

    Returns:
      The licence, that of the LLaVE models where nothing is said; and the hub's id of the base, or a list of them, or
      None.
    """
    known = _metadata(source_card)
    base = known.get("base_model") or _published_name(source_config or {})
    return known.get("license") or LICENSE, base


def _metadata(card: Path | None) -> dict[str, Any]:
    """The front matter's texts, and lists of texts, by key; empty if there is none or it cannot be read.

    YAML has references, types and much else that a card of unknown origin has no need of. Only lines `key: text`
    and `- text` are read.
    """
    if card is None or not card.is_file() or card.stat().st_size > _MAX_CARD_BYTES:
        return {}
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in map(str.strip, lines[1:]):
        return {}
    known: dict[str, Any] = {}
    key = ""
    for line in lines[1:]:
        if line.strip() == "---":
            break
        if found := _CARD_LINE.fullmatch(line):
            key, text = found["key"], found["text"].strip().strip("\"'")
            known[key] = text or []
        elif (found := _CARD_ENTRY.fullmatch(line)) and isinstance(known.get(key), list):
            known[key].append(found["text"].strip().strip("\"'"))
    return {key: value for key, value in known.items() if value}


def _published_name(config: dict[str, Any]) -> str | None:
    """The hub's id of the model that a checkpoint was made from; None if its config.json has none."""
    name = str(config.get("_name_or_path") or "")
    publishers = "|".join(map(re.escape, _PUBLISHERS))
    return name if re.fullmatch(rf"({publishers})/[\w.-]+", name) else None


def _licence_text(licence: str, inherited: bool, base_model: str | list[str] | None) -> str:
    if inherited:
        return f"`{licence}`, the licence of the checkpoint that these weights come from."
    bases = [base_model] if isinstance(base_model, str) else base_model or []
    of = f" ({', '.join(bases)})" if bases else ""
    return (
        f"`{licence}`, the licence of the LLaVE models and their code. If the model you trained "
        f"from{of} has another one, name that here and in the metadata above."
    )
