"""`distml export --format hf`: a run's transformer as a folder that the `transformers` library loads.

    config.json  model.safetensors     see hf.py
    tokenizer.json  tokenizer_config.json    the run's tokeniser, in the format of the `tokenizers` library

Where `transformers` is installed, the folder is loaded with it first and must give the run's logits.

Shapes: B examples, T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distml.errors import UsageError
from distml.exchange.flat import to_numpy
from distml.exchange.layout import Array
from distml.launch.hf import CONFIG, WEIGHTS, config_of, to_hf
from distml.runs.tensors import HashingFile, TensorWriter, widest_first
from distml.tasks.bert import BERT
from distml.tasks.gpt import GPT
from distml.tasks.library_tokenizers import as_library
from distml.tasks.tokenizers import Tokenizer
from distml.tasks.transformer import uncompiled

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TOLERANCE = 1e-5  # of logits, relative to the largest where that is above 1
CHECKED_EXAMPLES, CHECKED_TOKENS = 2, 64


def transformer_of(model: nn.Module) -> GPT | BERT:
    """The model, if it is a transformer of ours.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(model, GPT | BERT):
        raise UsageError(f"--format hf writes models gpt and bert, not {type(model).__name__}; use safetensors")
    return model


def write_folder(model: GPT | BERT, tokenizer: Tokenizer | None, folder: Path) -> int:
    """Write a model and its tokeniser; the number of tensors.

    Raises:
        UsageError: it has a shape that no model of theirs has.
    """
    own = {name: to_numpy(tensor) for name, tensor in model.state_dict().items()}
    config = config_of(model.spec, own, model.max_positions, None if tokenizer is None else tokenizer.end)
    tensors = to_hf(model.spec, own)
    _write_json(folder / CONFIG, config)
    write_tensors(tensors, folder / WEIGHTS)
    if tokenizer is not None:
        library = as_library(tokenizer)
        (folder / TOKENIZER).write_text(library.to_str(), encoding="utf-8")
        special = {"eos_token": library.id_to_token(tokenizer.end)}
        if tokenizer.mask is not None:
            special["mask_token"] = library.id_to_token(tokenizer.mask)
        _write_json(folder / TOKENIZER_CONFIG, special | {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.max_positions,
            "clean_up_tokenization_spaces": False,
        })  # fmt: skip
    return len(tensors)


def write_tensors(tensors: dict[str, Array], path: Path) -> None:
    """Write a .safetensors file as `transformers` writes it."""
    with path.open("wb") as file:
        announced = {name: (tensors[name].dtype, tensors[name].shape) for name in widest_first(tensors)}
        writer = TensorWriter(HashingFile(file), announced, {"format": "pt"})
        for name in announced:
            writer.write(name, tensors[name])
        writer.end()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- checking
def compare_logits(model: GPT | BERT, folder: Path) -> float | None:
    """The largest difference between the model's logits [B, T, V] and those of `transformers`; None: not installed.

    Raises:
        RuntimeError: a tensor is missing or too many, or logits differ.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    theirs = load_with_transformers(folder, causal=isinstance(model, GPT))
    draw = torch.Generator().manual_seed(0)
    shape = (CHECKED_EXAMPLES, min(CHECKED_TOKENS, model.max_positions))
    tokens = torch.randint(model.vocabulary, shape, generator=draw)
    with torch.inference_mode(), uncompiled(model.spec):
        own, other = model(tokens), theirs(tokens).logits
    difference = float((own - other).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(own.abs().max())):
        raise RuntimeError(f"transformers computes other logits from the export, by up to {difference:.3g}")
    return difference


def load_with_transformers(folder: Path, causal: bool) -> Any:
    """The library's model, in eval mode.

    Raises:
        RuntimeError: a tensor that it needs is missing, or has another shape.
    """
    import transformers

    logging: Any = transformers.utils.logging
    kind: Any = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model, report = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    wrong = [*report["missing_keys"], *report["mismatched_keys"]]
    if wrong:
        raise RuntimeError(f"transformers does not find {wrong[0]} in the export")
    return model.eval()
