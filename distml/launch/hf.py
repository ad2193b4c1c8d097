"""Transformers in the folders of the `transformers` library: its names, shapes and config.json, both ways. No torch.

    our tensors  ── to_hf ──▶  theirs          GPT -> GPT-2's or Llama's shape, BERT -> BERT's
    our spec     ── config_of ──▶  config.json
    FOLDER       ── read_hf ──▶  our spec and tensors: `init: {from: FOLDER}`

Three things are told apart: how their modules are called (`Family`), that GPT-2's linear layers are [inputs, outputs],
and that what is one matrix here (queries, keys and values; the gate and what it gates) may be several there.

Shapes: H heads, K heads of keys and values, C width of a head.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distml.errors import UsageError
from distml.runs.tensors import read_tensors
from distml.spec.language import BERTSpec, GPTSpec, LanguageModelSpec, MaskedLanguageModelSpec
from distml.spec.schema import JobSpec

Array = NDArray[Any]
Spec = GPTSpec | BERTSpec
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
LEAVES = ("weight", "bias")
HOW_IT_COMPUTES = (
    "name",
    "heads",
    "kv_heads",
    "positions",
    "rotary_base",
    "norm",
    "norm_place",
    "norm_eps",
    "activation",
)
WHAT_IT_HAS = ("layers", "width", "tied", "head")


@dataclass(frozen=True)
class Family:
    """How one of their models calls its modules.

    Attributes:
        prefix: of the model without its output layer; files of that alone lack it.
        layer: prefix of a layer's modules.
        outside: our module -> theirs.
        inside: our module of a layer -> theirs, several where ours is their rows one below the other.
        transposed: those of our modules whose weights they keep as [inputs, outputs].
    """

    model_type: str
    architecture: str
    prefix: str
    layer: str
    outside: Mapping[str, str]
    inside: Mapping[str, tuple[str, ...]]
    transposed: frozenset[str] = field(default=frozenset())

    def theirs(self, name: str) -> tuple[str, ...]:
        """Their names of a tensor of ours."""
        module, leaf = name.rsplit(".", 1)
        if not module.startswith("layers."):
            return (f"{self.outside[module]}.{leaf}",)
        _, index, inner = module.split(".", 2)
        return tuple(f"{self.layer.format(index)}{one}.{leaf}" for one in self.inside[inner])

    def is_transposed(self, name: str) -> bool:
        """Whether they keep this tensor of ours with rows and columns exchanged."""
        return name.endswith(".weight") and name.split(".", 2)[-1].removesuffix(".weight") in self.transposed

    def ours(self, layers: int) -> Iterator[str]:
        """All names that our tensors can have."""
        for module in (*self.outside, *(f"layers.{index}.{inner}" for index in range(layers) for inner in self.inside)):
            yield from (f"{module}.{leaf}" for leaf in LEAVES)


HF_GPT2 = Family(
    "gpt2", "GPT2LMHeadModel", "transformer.", "transformer.h.{}.",
    {"tokens": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f", "output": "lm_head"},
    {"attention_norm": ("ln_1",), "attention.qkv": ("attn.c_attn",), "attention.output": ("attn.c_proj",),
     "mlp_norm": ("ln_2",), "mlp.up": ("mlp.c_fc",), "mlp.down": ("mlp.c_proj",)},
    frozenset({"attention.qkv", "attention.output", "mlp.up", "mlp.down"}),
)  # fmt: skip
HF_LLAMA = Family(
    "llama", "LlamaForCausalLM", "model.", "model.layers.{}.",
    {"tokens": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"},
    {"attention_norm": ("input_layernorm",),
     "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
     "attention.output": ("self_attn.o_proj",), "mlp_norm": ("post_attention_layernorm",),
     "mlp.up": ("mlp.gate_proj", "mlp.up_proj"), "mlp.down": ("mlp.down_proj",)},
)  # fmt: skip
HF_BERT = Family(
    "bert", "BertForMaskedLM", "bert.", "bert.encoder.layer.{}.",
    {"tokens": "bert.embeddings.word_embeddings", "positions": "bert.embeddings.position_embeddings",
     "segments": "bert.embeddings.token_type_embeddings", "norm": "bert.embeddings.LayerNorm",
     "pooler": "bert.pooler.dense", "head.dense": "cls.predictions.transform.dense",
     "head.norm": "cls.predictions.transform.LayerNorm", "output": "cls.predictions"},
    {"attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
     "attention.output": ("attention.output.dense",), "attention_norm": ("attention.output.LayerNorm",),
     "up": ("intermediate.dense",), "down": ("output.dense",), "mlp_norm": ("output.LayerNorm",)},
)  # fmt: skip
FAMILIES = {family.model_type: family for family in (HF_GPT2, HF_LLAMA, HF_BERT)}
NEEDED: dict[str, dict[str, tuple[Any, ...]]] = {  # model_type -> field of our spec -> the values that fit
    "gpt2": {"positions": ("learned",), "norm": ("layer_norm",), "norm_place": ("pre",),
             "activation": ("gelu_tanh", "gelu")},
    "llama": {"positions": ("rotary",), "norm": ("rms_norm",), "norm_place": ("pre",), "activation": ("swiglu",)},
    "bert": {"head": ("transform",)},
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ from us to them
def family_of(spec: Spec) -> Family:
    """The model of theirs that computes what ours does.

    Raises:
        UsageError: there is none; what each would need.
    """
    kinds = ("bert",) if isinstance(spec, BERTSpec) else ("gpt2", "llama")
    needs = {kind: _misfits(spec, kind) for kind in kinds}
    for kind, settings in needs.items():
        if not settings:
            return FAMILIES[kind]
    shapes = "; ".join(f"{FAMILIES[kind].architecture} needs {', '.join(settings)}" for kind, settings in needs.items())
    raise UsageError(f"no model of transformers has this one's shape: {shapes}; --format safetensors takes any")


def _misfits(spec: Spec, kind: str) -> list[str]:
    """The settings that would have to be others, as `key: value`."""
    found = [f"{key}: {values[0]}" for key, values in NEEDED[kind].items() if getattr(spec, key) not in values]
    if kind == "gpt2" and isinstance(spec, GPTSpec) and spec.kv_heads not in (None, spec.heads):
        found.append("kv_heads: null")
    return found


def config_of(spec: Spec, tensors: Mapping[str, Array], max_positions: int, end: int | None) -> dict[str, Any]:
    """Their config.json.

    Args:
        tensors: ours, by name.
        end: the token that ends a document, where there is one.
    """
    family = family_of(spec)
    up = "layers.0.up.weight" if isinstance(spec, BERTSpec) else "layers.0.mlp.up.weight"
    hidden, vocabulary = tensors[up].shape[0], tensors["tokens.weight"].shape[0]
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type,
                              "dtype": "float32", "vocab_size": vocabulary, "initializer_range": 0.02}  # fmt: skip
    if isinstance(spec, BERTSpec):
        return config | _sizes(spec, max_positions) | {
            "intermediate_size": hidden, "type_vocab_size": spec.segments, "hidden_act": "gelu",
            "layer_norm_eps": spec.norm_eps, "hidden_dropout_prob": spec.dropout,
            "attention_probs_dropout_prob": spec.dropout, "pad_token_id": None, "tie_word_embeddings": True,
        }  # fmt: skip
    config |= {"bos_token_id": end, "eos_token_id": end, "tie_word_embeddings": spec.tied}
    if family is HF_GPT2:
        return config | {
            "n_positions": max_positions, "n_embd": spec.width, "n_layer": spec.layers, "n_head": spec.heads,
            "n_inner": hidden, "activation_function": "gelu_new" if spec.activation == "gelu_tanh" else "gelu",
            "layer_norm_epsilon": spec.norm_eps, "resid_pdrop": spec.dropout, "embd_pdrop": spec.dropout,
            "attn_pdrop": spec.dropout,
        }  # fmt: skip
    return config | _sizes(spec, max_positions) | {
        "intermediate_size": hidden // 2, "num_key_value_heads": spec.kv_heads or spec.heads, "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps, "rope_theta": spec.rotary_base, "attention_dropout": spec.dropout,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rotary_base},
        "attention_bias": spec.bias, "mlp_bias": spec.bias, "head_dim": spec.width // spec.heads,
    }  # fmt: skip


def _sizes(spec: Spec, max_positions: int) -> dict[str, int]:
    return {"hidden_size": spec.width, "num_hidden_layers": spec.layers, "num_attention_heads": spec.heads,
            "max_position_embeddings": max_positions}  # fmt: skip


def to_hf(spec: Spec, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Our tensors as theirs: a tied output layer has none of its own, biases that only GPT-2 has are zero."""
    family = family_of(spec)
    tensors = dict(tensors)
    if isinstance(spec, BERTSpec) or spec.tied:
        tensors.pop("output.weight", None)
    if family is HF_GPT2 and isinstance(spec, GPTSpec) and not spec.bias:
        tensors |= _zero_biases(tensors)
    theirs: dict[str, Array] = {}
    for name, tensor in tensors.items():
        names = family.theirs(name)
        parts = np.split(tensor, _bounds(spec, tensor.shape[0], len(names)))
        theirs |= {one: part.T if family.is_transposed(name) else part for one, part in zip(names, parts, strict=True)}
    return theirs


def _zero_biases(tensors: Mapping[str, Array]) -> dict[str, Array]:
    tables = ("tokens.weight", "positions.weight", "output.weight")
    weights = {name: tensor for name, tensor in tensors.items() if name.endswith(".weight") and name not in tables}
    return {f"{name.removesuffix('weight')}bias": np.zeros(w.shape[0], w.dtype) for name, w in weights.items()}


def _bounds(spec: Spec, rows: int, parts: int) -> list[int]:
    """Where one matrix is cut into several: queries, keys and values (H, K and K heads), or two halves."""
    if parts == 3:
        kv_heads = (spec.kv_heads if isinstance(spec, GPTSpec) else None) or spec.heads
        head = rows // (spec.heads + 2 * kv_heads)
        return [spec.heads * head, (spec.heads + kv_heads) * head]
    return [rows // 2] if parts == 2 else []


# ------------------------------------------------------------------------------------------------------ from them to us
def is_hf(path: Path) -> bool:
    """Whether this is a folder that `transformers` saved a model in."""
    return (path / CONFIG).is_file()


def start_weights(folder: Path, job: JobSpec) -> dict[str, Array]:
    """The tensors of `init: {from: FOLDER}`, under our names.

    Raises:
        UsageError: they would not compute in the job's model what they do in theirs, or see `read_hf`.
    """
    spec, tensors = read_hf(folder)
    if isinstance(job.task, LanguageModelSpec | MaskedLanguageModelSpec):
        whole = job.init is None or job.init.only == ["*"]
        own, settings = job.task.model, HOW_IT_COMPUTES + (WHAT_IT_HAS if whole else ())
        found, wanted = _resolved(spec), _resolved(own)
        different = [key for key in settings if found.get(key) != wanted.get(key)]
        if not wanted.get("bias", True) and any(
            tensor.any() for name, tensor in tensors.items() if name.endswith("bias")
        ):
            different.append("bias")
        if different:
            shown = ", ".join(f"{key}: {found.get(key)} (here {wanted.get(key)})" for key in different)
            raise UsageError(f"init: the model in {folder} has {shown}; give task.model the same")
    return tensors


def _resolved(spec: Spec) -> dict[str, Any]:
    """A spec's settings, with what follows from others in its place."""
    settings = spec.model_dump()
    if isinstance(spec, GPTSpec):
        settings["kv_heads"] = spec.kv_heads or spec.heads
        if spec.positions == "learned":
            del settings["rotary_base"]
    return settings


def read_hf(folder: Path) -> tuple[Spec, dict[str, Array]]:
    """What a folder of theirs holds: the spec of our model, and its tensors.

    Raises:
        UsageError: a file is missing or damaged, or it is a model that ours cannot be.
    """
    config = _read_json(folder / CONFIG)
    spec = spec_of(config, folder)
    family = FAMILIES[config["model_type"]]
    source = _read_weights(folder)
    tensors: dict[str, Array] = {}
    for name in family.ours(spec.layers):
        parts = [_find(source, one, family.prefix) for one in family.theirs(name)]
        if all(part is not None for part in parts):
            rows = [part.T if family.is_transposed(name) else part for part in parts if part is not None]
            tensors[name] = np.ascontiguousarray(rows[0] if len(rows) == 1 else np.concatenate(rows))
        elif name.startswith("layers.") and name.endswith(".weight"):
            raise UsageError(f"{folder} is not a whole {family.architecture}: it has no {family.theirs(name)[0]}")
    if "tokens.weight" not in tensors:
        raise UsageError(f"{folder} is not a whole {family.architecture}: it has no {family.outside['tokens']}.weight")
    if isinstance(spec, BERTSpec) or spec.tied:
        tensors["output.weight"] = tensors["tokens.weight"]
    return spec, tensors


def spec_of(config: Mapping[str, Any], folder: Path) -> Spec:
    """The spec of our model that computes what theirs does. Settings that a file leaves out have their defaults.

    Raises:
        UsageError: ours cannot, or what the file says makes no sense.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UsageError(f"{folder} holds a model of type {kind}; weights come from {', '.join(FAMILIES)}")
    readers: dict[str, Callable[[Mapping[str, Any]], Spec]]
    readers = {"gpt2": _gpt2_spec, "llama": _llama_spec, "bert": _bert_spec}
    try:
        return readers[kind](config)
    except KeyError as error:
        raise UsageError(f"{folder / CONFIG} does not say {error}") from None
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{folder} holds a {kind} model that ours cannot be: {reason}") from None


def _gpt2_spec(config: Mapping[str, Any]) -> GPTSpec:
    activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    changed = [key for key, value in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False))
               if config.get(key, value) is not value]  # fmt: skip
    if changed:
        raise ValueError(f"its {changed[0]} is {config[changed[0]]}")
    return GPTSpec(
        name="gpt", layers=config["n_layer"], heads=config["n_head"], width=config["n_embd"],
        hidden=config.get("n_inner") or 4 * config["n_embd"], norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=_known(activations, config.get("activation_function", "gelu_new")),
        tied=config.get("tie_word_embeddings", True),
    )  # fmt: skip


def _llama_spec(config: Mapping[str, Any]) -> GPTSpec:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rotary.get("rope_type", rotary.get("type", "default")) != "default":
        raise ValueError(f"its rotary positions are scaled ({rotary.get('rope_type', rotary.get('type'))})")
    if (config.get("head_dim") or width // heads) * heads != width:
        raise ValueError(f"its heads are {config['head_dim']} wide, not {width} / {heads}")
    if config.get("attention_bias", False) is not config.get("mlp_bias", False):
        raise ValueError("only some of its layers have biases")
    return GPTSpec(
        name="gpt", layers=config["num_hidden_layers"], heads=heads, width=width, hidden=config["intermediate_size"],
        kv_heads=config.get("num_key_value_heads") or heads, positions="rotary", norm="rms_norm",
        rotary_base=rotary.get("rope_theta", config.get("rope_theta", 10_000.0)),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=_known({"silu": "swiglu"}, config.get("hidden_act", "silu")),
        bias=config.get("attention_bias", False), tied=config.get("tie_word_embeddings", False),
    )  # fmt: skip


def _bert_spec(config: Mapping[str, Any]) -> BERTSpec:
    _known({"gelu": "gelu"}, config.get("hidden_act", "gelu"))
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"its positions are {config['position_embedding_type']}")
    return BERTSpec(
        name="bert", layers=config["num_hidden_layers"], heads=config["num_attention_heads"],
        width=config["hidden_size"], hidden=config["intermediate_size"], segments=config.get("type_vocab_size", 2),
        norm_eps=config.get("layer_norm_eps", 1e-12),
    )  # fmt: skip


def _known(names: Mapping[str, Any], value: str) -> Any:
    if value not in names:
        raise ValueError(f"its activation is {value}; known: {', '.join(names)}")
    return names[value]


def _find(source: Mapping[str, Array], name: str, prefix: str) -> Array | None:
    """A tensor of theirs, with or without the prefix; BERT's first files call LayerNorm's gamma and beta."""
    old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    for known in (name, old):
        for one in (known, known.removeprefix(prefix)):
            if one in source:
                return source[one]
    return None


def _read_weights(folder: Path) -> dict[str, Array]:
    """All tensors of a folder's .safetensors files."""
    if (folder / WEIGHTS).is_file():
        return read_tensors(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise UsageError(f"{folder} has no {WEIGHTS}; pickled weights (.bin) are not read, save them as safetensors")
    files = _read_json(folder / INDEX).get("weight_map", {}).values()
    if not all(isinstance(name, str) and Path(name).name == name for name in files):
        raise UsageError(f"{folder / INDEX} names files outside its folder")
    return {name: tensor for file in sorted(set(files)) for name, tensor in read_tensors(folder / file).items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    if not isinstance(parsed, dict):
        raise UsageError(f"{path} is not a JSON object")
    return parsed
