"""What sentence-transformers reads beside a checkpoint of transformers: modules, pooling, prompts.

vLLM takes the pooling and the longest input from the same files. How a message becomes the model's prompt is the chat
template's work (`hf_processor.CHAT_TEMPLATE`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llave_jax.common.directories import make_directory
from llave_jax.models.config import LlaveConfig
from llave_jax.weights.json_files import write_json

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
TRANSFORMER = "sentence_bert_config.json"
POOLING = "1_Pooling"
NORMALIZE = "2_Normalize"

# The first version that reads multimodal models this way.
_VERSION = "6.0.0"


def write_files(directory: Path, config: LlaveConfig, prompts: Mapping[str, str]) -> None:
    """Write the files of a SentenceTransformer: the model, its last token, normalised.

    Args:
      directory: a checkpoint in the OneVision layout that is being staged.
      config: the model.
      prompts: name -> text that goes in front of an item's text.
    """
    # All three names are also those of versions before 6, by which vLLM finds the pooling.
    kinds = {"": "Transformer", POOLING: "Pooling", NORMALIZE: "Normalize"}
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, (path, kind) in enumerate(kinds.items())
    ]
    write_json(directory / MODULES, modules, sort_keys=False)
    write_json(directory / TRANSFORMER, _transformer_values(config))
    for path in (POOLING, NORMALIZE):
        make_directory(directory / path)
    # sentence-transformers 6 also has "pooling_mode"; vLLM and older versions know these keys alone. Some versions of
    # vLLM take the first key that is true, so the order counts.
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    pooling = {
        "word_embedding_dimension": config.text.hidden_size,
        **{f"pooling_mode_{mode}": False for mode in (*modes, "weightedmean_tokens")},
        "pooling_mode_lasttoken": True,
        "include_prompt": True,
    }
    write_json(directory / POOLING / "config.json", pooling, sort_keys=False)
    write_json(directory / NORMALIZE / "config.json", {})
    settings = {
        "__version__": {"sentence_transformers": _VERSION},
        "default_prompt_name": None,
        "model_type": "SentenceTransformer",
        "prompts": dict(prompts),
        "similarity_fn_name": "cosine",
    }
    write_json(directory / SETTINGS, settings)


def _transformer_values(config: LlaveConfig) -> dict:
    """The content of sentence_bert_config.json: every input becomes a message, and so goes through the chat template."""
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    return {
        "do_lower_case": False,
        "max_seq_length": config.inputs.max_length,
        "modality_config": {
            "text": forward,
            "image": forward,
            "message": {**forward, "format": "structured"},
        },
        "module_output_name": "token_embeddings",
        "transformer_task": "feature-extraction",
    }
