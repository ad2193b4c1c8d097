"""Folders of `transformers`: what it computes from ours, what we compute from its own, and what does not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import distml
from distml.cli import main
from distml.errors import UsageError
from distml.exchange.flat import from_numpy
from distml.launch import hf_export
from distml.launch.evaluate import load_model
from distml.launch.hf import read_hf, start_weights
from distml.launch.hf_export import compare_logits, load_with_transformers, write_folder
from distml.spec.language import BERTSpec, GPTSpec
from distml.spec.loader import load_spec
from distml.tasks.bert import BERT
from distml.tasks.gpt import GPT
from distml.tasks.library_tokenizers import as_library, same_tokens
from distml.tasks.tokenizers import ByteTokenizer, CharacterTokenizer, LibraryTokenizer, learn_bpe

VOCABULARY, POSITIONS = 61, 24
LLAMA = {"positions": "rotary", "norm": "rms_norm", "activation": "swiglu", "bias": False}
SHAPES = {
    "gpt2": {},
    "gpt2_without_bias": {"bias": False, "activation": "gelu", "hidden": 40},
    "gpt2_untied": {"tied": False, "norm_eps": 1e-3},
    "llama": LLAMA | {"kv_heads": 2, "tied": False, "rotary_base": 500.0, "norm_eps": 1e-6},
    "llama_tied_with_bias": LLAMA | {"bias": True},
    "bert": {"name": "bert", "pooler": True, "segments": 3},
}


def build(seed: int = 0, **settings) -> GPT | BERT:
    """A model with weights so large that a wrong one shows, in eval mode."""
    settings = {"name": "gpt", "layers": 2, "heads": 4, "width": 32} | settings
    torch.manual_seed(seed)
    if settings["name"] == "bert":
        model: GPT | BERT = BERT(BERTSpec(**settings), VOCABULARY, POSITIONS)
    else:
        model = GPT(GPTSpec(**settings), VOCABULARY, POSITIONS)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.2)
    return model.eval()


def draw() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, POSITIONS), generator=torch.Generator().manual_seed(2))


def rebuilt(folder) -> GPT | BERT:
    """Our model of what a folder holds."""
    spec, tensors = read_hf(folder)
    model = build(seed=1, **spec.model_dump())
    missing, extra = model.load_state_dict({name: from_numpy(t) for name, t in tensors.items()}, strict=False)
    assert not missing
    assert all(name.startswith("pooler") for name in extra)
    return model


def job_with(model: dict, source, **init):
    """A job of language_model that begins with these weights."""
    (source.parent / "text.txt").write_text("text")
    spec = {"distml": "v1", "name": "job", "strategy": "single", "stop": {"steps": 1},
            "init": {"from": str(source)} | init,
            "task": {"name": "language_model", "block": 8, "model": {"name": "gpt", "max_positions": POSITIONS} | model,
                     "data": {"path": str(source.parent / "text.txt")}}}  # fmt: skip
    return load_spec(spec).job


# ------------------------------------------------------------------------------------------------------------ both ways
@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES.keys())
def test_transformers_computes_our_logits_and_we_read_them_back(settings, tmp_path):
    model = build(**settings)
    write_folder(model, None, tmp_path)
    assert compare_logits(model, tmp_path) <= 1e-5
    theirs = load_with_transformers(tmp_path, causal=isinstance(model, GPT))
    with torch.no_grad():
        torch.testing.assert_close(theirs(draw()).logits, model(draw()), rtol=1e-5, atol=1e-5)
    own = model.state_dict()
    spec, tensors = read_hf(tmp_path)
    for name in own:
        assert np.array_equal(tensors[name], own[name].numpy()), name
    if settings.get("bias", True) or settings.get("norm") == "rms_norm":
        wanted = model.spec.model_dump() | {"hidden": spec.hidden, "pooler": False}
        if isinstance(spec, GPTSpec):
            wanted["kv_heads"] = spec.kv_heads
        assert {**spec.model_dump(), "pooler": False} == {**wanted, "pooler": False}

    file = tmp_path / "model.safetensors"  # the control: a tensor that is another's
    changed = load_file(file)
    first = next(name for name in changed if ".0." in name and ("ln_1.weight" in name or "norm.weight" in name.lower()))
    changed[first] = changed[first] * 1.5
    save_file(changed, file, {"format": "pt"})
    with pytest.raises(RuntimeError, match="other logits"):
        compare_logits(model, tmp_path)


def test_we_compute_the_logits_of_their_models(tmp_path):
    import transformers as t

    common = {"vocab_size": VOCABULARY, "initializer_range": 0.2}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": POSITIONS}
    models = [
        t.GPT2LMHeadModel(t.GPT2Config(n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=4, **common)),
        t.LlamaForCausalLM(t.LlamaConfig(**common, **sizes, num_key_value_heads=2, intermediate_size=48,
                                         tie_word_embeddings=False)),
        t.LlamaForCausalLM(t.LlamaConfig(**common, **sizes, intermediate_size=48, tie_word_embeddings=True,
                                         rope_parameters={"rope_type": "default", "rope_theta": 300.0})),
        t.BertForMaskedLM(t.BertConfig(**common, **sizes, intermediate_size=48, pad_token_id=None)),
    ]  # fmt: skip
    for index, model in enumerate(models):
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.0, 0.2)
        folder = tmp_path / str(index)
        model.eval().save_pretrained(folder)
        with torch.no_grad():
            torch.testing.assert_close(rebuilt(folder)(draw()), model(draw()).logits, rtol=1e-5, atol=1e-5)


def test_files_may_be_several_low_in_precision_without_prefix_or_with_old_names(tmp_path):
    for settings, prefix in ((SHAPES["gpt2"], "transformer."), (SHAPES["bert"], "bert.")):
        model, folder = build(**settings), tmp_path / prefix
        folder.mkdir()
        write_folder(model, None, folder)
        tensors = {name.removeprefix(prefix).replace("LayerNorm.weight", "LayerNorm.gamma"): tensor.bfloat16()
                   for name, tensor in load_file(folder / "model.safetensors").items()}  # fmt: skip
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        weight_map = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
        for file in ("model-0.safetensors", "model-1.safetensors"):
            save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        expected = model.bfloat16().float()(draw())
        torch.testing.assert_close(rebuilt(folder)(draw()), expected, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- what does not
@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"norm_place": "post"}, "GPT2LMHeadModel needs norm_place: pre; LlamaForCausalLM needs positions: rotary"),
        ({"kv_heads": 2}, "GPT2LMHeadModel needs kv_heads: null;"),
        (LLAMA | {"norm": "layer_norm"}, "LlamaForCausalLM needs norm: rms_norm;"),
        ({"name": "bert", "head": "tied"}, "BertForMaskedLM needs head: transform;"),
    ],
)
def test_a_shape_that_none_of_theirs_has_is_refused_with_what_would_fit(settings, needed, tmp_path):
    with pytest.raises(UsageError, match="no model of transformers has this one's shape") as refusal:
        write_folder(build(**settings), None, tmp_path)
    assert needed in str(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "a model of type t5; weights come from gpt2, llama, bert"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rotary positions are scaled .llama3"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "positions are scaled .linear"),
        ({"head_dim": 16}, "heads are 16 wide, not 32 / 4"),
        ({"mlp_bias": True}, "only some of its layers have biases"),
        ({"hidden_act": "relu"}, "its activation is relu; known: silu"),
        ({"num_hidden_layers": None}, "that ours cannot be"),
        ({"hidden_size": "wide"}, "that ours cannot be"),
        ({"num_hidden_layers": 3}, "is not a whole LlamaForCausalLM: it has no model.layers.2.input_layernorm.weight"),
    ],
)  # fmt: skip
def test_what_ours_cannot_compute_is_refused(changes, message, tmp_path):
    write_folder(build(**SHAPES["llama"]), None, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    read_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UsageError, match=message):
        read_hf(tmp_path)


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    write_folder(build(), None, tmp_path)
    file, config = tmp_path / "model.safetensors", (tmp_path / "config.json").read_text()
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "wte" not in name}, file)
    with pytest.raises(UsageError, match=r"it has no transformer\.wte\.weight"):
        read_hf(tmp_path)
    file.write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"not a readable \.safetensors file"):
        read_hf(tmp_path)
    file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pickled weights .* are not read"):
        read_hf(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": "../other.safetensors"}}))
    with pytest.raises(UsageError, match="names files outside its folder"):
        read_hf(tmp_path)
    for text, message in ((config[:-9], "cannot read"), ("[" * 100_000, "cannot read"), ("[]", "is not a JSON object"),
                          ('{"model_type": "gpt2"}', "does not say 'n_layer'")):  # fmt: skip
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            read_hf(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 2}, "heads: 4 .here 2."),
        ({"norm_eps": 1e-3}, "norm_eps: 1e-05 .here 0.001."),
        ({"activation": "gelu"}, "activation: gelu_tanh .here gelu."),
        ({"layers": 1}, "layers: 2 .here 1."),
        ({"tied": False}, "tied: True .here False."),
        ({"bias": False}, "bias: True .here False."),
        ({"positions": "rotary"}, "positions: learned .here rotary."),
    ],
)
def test_weights_that_would_compute_something_else_here_are_refused(wrong, message, tmp_path):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    write_folder(build(), None, folder)
    right = {"layers": 2, "heads": 4, "width": 32}
    assert len(start_weights(folder, job_with(right, folder))) == 2 + 2 * 12 + 2 + 1
    with pytest.raises(UsageError, match=message):
        start_weights(folder, job_with(right | wrong, folder))


def test_some_of_the_weights_may_go_into_a_smaller_model(tmp_path):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    write_folder(build(), None, folder)
    job = job_with({"layers": 1, "heads": 4, "width": 32}, folder, only=["layers.0.*"])
    assert "layers.0.mlp.up.weight" in start_weights(folder, job)


def test_zero_biases_of_theirs_are_no_loss(tmp_path):
    """GPT-2 always has biases: those of a model without are written as zeros."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    settings = {"layers": 2, "heads": 4, "width": 32, "bias": False}
    model = build(**settings)
    write_folder(model, None, folder)
    found = start_weights(folder, job_with(settings, folder))
    own = {name: value.detach().numpy() for name, value in model.named_parameters()}
    assert all(np.array_equal(found[name], value) for name, value in own.items())
    biases = [value for name, value in found.items() if name not in own and name.endswith(".bias")]
    assert biases
    assert not any(value.any() for value in biases)


# ----------------------------------------------------------------------------------------------------------- tokenisers
TEXT = "naïve “cats”, 猫 and 🐈\n\tend  of it "


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_the_tokeniser_gives_the_same_tokens_in_transformers(kind, mask, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = {"bytes": lambda: ByteTokenizer(mask), "characters": lambda: CharacterTokenizer(TEXT, mask),
                 "bpe": lambda: learn_bpe([TEXT], 270, mask)}[kind]()  # fmt: skip
    write_folder(build(), tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer.encode(TEXT)
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == tokens
    assert theirs.decode(tokens) == TEXT
    assert (theirs.eos_token_id, theirs.mask_token_id) == (tokenizer.end, tokenizer.mask)
    assert theirs.model_max_length == POSITIONS
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == tokenizer.end


def test_every_byte_is_its_own_token():
    library = as_library(ByteTokenizer())
    text = "".join(map(chr, range(0x800)))
    assert library.encode(text).ids == list(text.encode())


def test_tokenisers_are_compared_in_whatever_form():
    known = [ByteTokenizer(), ByteTokenizer(mask=True), CharacterTokenizer("abc"), CharacterTokenizer("abd")]
    for i, one in enumerate(known):
        for j, other in enumerate(known):
            assert same_tokens(one, other) == same_tokens(LibraryTokenizer(as_library(one)), other) == (i == j)


def test_a_character_that_is_not_known_is_the_token_for_others():
    tokenizer = CharacterTokenizer("abc")
    assert as_library(tokenizer).encode("abzc").ids == tokenizer.encode("abzc") == [0, 1, 3, 2]


# ----------------------------------------------------------------------------------------------------- the command line
def test_a_run_is_exported_and_another_begins_with_it(language_run, tmp_path, capsys):
    out = tmp_path / "hf"
    assert main(["export", str(language_run), "--format", "hf", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{out}: 28 tensors of step 120"
    assert "loaded with transformers: the run's logits" in lines[1]
    trained = load_model(language_run)
    theirs = load_with_transformers(out, causal=True)
    tokens = torch.randint(trained.model.vocabulary, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, trained.model(tokens), rtol=1e-5, atol=1e-5)

    spec = {**json.loads((language_run.parent / "letters.yaml").read_text()), "init": {"from": str(out)},
            "stop": {"steps": 1}, "optimizer": {"name": "sgd", "lr": 0.0}}  # fmt: skip
    spec["task"]["data"]["path"] = str(language_run.parent / "text.txt")
    distml.run(spec, out=tmp_path / "again")
    again = load_model(tmp_path / "again").model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in trained.model.state_dict().items())


def test_without_transformers_the_export_says_that_it_was_not_checked(language_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hf_export.importlib.util, "find_spec", lambda name: None)
    assert main(["export", str(language_run), "--format", "hf", "--out", str(tmp_path / "hf")]) == 0
    assert "not checked against transformers, which is not installed" in capsys.readouterr().out


def test_a_wrong_export_does_not_appear(language_run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "hf"
    monkeypatch.setattr(hf_export, "to_hf", lambda spec, tensors: {
        name: tensor * (1.5 if "ln_1.weight" in name else 1.0) for name, tensor in TO_HF(spec, tensors).items()
    })  # fmt: skip
    assert main(["export", str(language_run), "--format", "hf", "--out", str(out)]) == 1
    assert "transformers computes other logits" in capsys.readouterr().err
    assert not list(tmp_path.glob("hf*"))


TO_HF = hf_export.to_hf


def test_other_runs_are_refused(tiny, tmp_path, capsys):
    assert main(["export", str(tiny), "--format", "hf", "--out", str(tmp_path / "hf")]) == 2
    assert "--format hf writes models gpt and bert, not MLP" in capsys.readouterr().err
    assert not list(tmp_path.glob("hf*"))
