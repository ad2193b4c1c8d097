"""From text to tokens and back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from own.oracle import OWN

from distml.errors import UsageError
from distml.spec.language import BPESpec, BytesSpec, CharactersSpec, TokenizerFileSpec
from distml.spec.language_rules import file_vocabulary
from distml.tasks.tokenizers import END, MASK, from_json, learn_bpe, make_tokenizer, read_tokenizer

TEXTS = [*(OWN / "rhymes.txt").read_text().split("\n\n"), "naïve café — 東京 🙂\n\ttabs  and   spaces"]
BYTES, CHARACTERS, BPE = BytesSpec(name="bytes"), CharactersSpec(name="characters"), BPESpec(name="bpe", vocabulary=300)
ALL = {spec.name: spec for spec in (BYTES, CHARACTERS, BPE)}


@pytest.fixture(scope="module", params=ALL)
def tokenizer(request):
    return make_tokenizer(ALL[request.param], TEXTS, mask=False)


def test_text_comes_back_as_it_was(tokenizer):
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert all(0 <= token < tokenizer.vocabulary for token in tokens)
        assert tokenizer.end not in tokens


def test_many_texts_at_once_are_each_texts_tokens(tokenizer):
    found = [tokens.tolist() for tokens in tokenizer.encode_all(iter(TEXTS * 30))]
    assert found == [tokenizer.encode(text) for text in TEXTS] * 30


def test_a_file_gives_the_same_tokeniser(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    again = read_tokenizer(path)
    assert again.to_json() == tokenizer.to_json()
    assert again.encode(TEXTS[-1]) == tokenizer.encode(TEXTS[-1])
    assert (again.vocabulary, again.end, again.mask) == (tokenizer.vocabulary, tokenizer.end, None)
    assert file_vocabulary(path) == tokenizer.vocabulary  # read without the library
    assert make_tokenizer(TokenizerFileSpec(name="file", path=str(path)), [], False).to_json() == tokenizer.to_json()


@pytest.mark.parametrize("name", ALL)
def test_a_token_is_reserved_for_masked_ones_where_it_is_needed(name, tmp_path):
    plain, masking = (make_tokenizer(ALL[name], TEXTS, mask) for mask in (False, True))
    assert plain.mask is None
    assert masking.mask not in (None, masking.end)
    assert masking.vocabulary == (plain.vocabulary if name == "bpe" else plain.vocabulary + 1)  # bpe: one pair less
    assert masking.decode([masking.mask, *masking.encode("ab"), masking.end]) == "ab"
    (tmp_path / "plain.json").write_text(plain.to_json())
    (tmp_path / "masking.json").write_text(masking.to_json())
    assert read_tokenizer(tmp_path / "masking.json", mask=True).mask == masking.mask
    with pytest.raises(UsageError, match=r"plain\.json has no token for masked ones \(\[MASK\] or <mask>\)"):
        read_tokenizer(tmp_path / "plain.json", mask=True)


def test_names_of_special_tokens_are_ordinary_text(tokenizer):
    text = f"{END} {MASK}"
    assert tokenizer.end not in tokenizer.encode(text)
    special = learn_bpe(TEXTS, 300, mask=True)
    assert not {special.end, special.mask} & set(special.encode(text))
    assert special.decode(special.encode(text)) == text
    special.library.encode_special_tokens = False  # the control
    assert {special.end, special.mask} <= set(special.encode(text))


def test_the_numbers_of_bytes_and_characters():
    tokens = make_tokenizer(BYTES, TEXTS, False)
    assert (tokens.vocabulary, tokens.end, tokens.encode("aé")) == (257, 256, [97, 0xC3, 0xA9])
    tokens = make_tokenizer(CHARACTERS, ["cab"], False)
    assert (tokens.vocabulary, tokens.end, tokens.encode("abcx")) == (5, 4, [0, 1, 2, 3])
    assert tokens.decode([2, 1, 0, 3, 4]) == "cba\ufffd"


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_bytes_know_every_text(text):
    tokenizer = make_tokenizer(BYTES, [], False)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_byte_pairs_are_learned_from_the_text_and_the_same_each_time():
    learned = [learn_bpe(iter(TEXTS), 300, False) for _ in range(3)]
    assert len({tokenizer.to_json() for tokenizer in learned}) == 1
    assert learned[0].vocabulary == 300
    assert len(learned[0].encode("falling down")) < len("falling down") / 1.5
    assert len(learned[0].encode("Xq9#")) == 4  # unknown pairs: byte by byte
    assert learn_bpe(["ab"], 5000, False).vocabulary == 258  # 256 bytes, the end, one pair


@pytest.mark.parametrize(("content", "message"), [
    ("{", "is not JSON"), ("[]", "is no tokeniser"), ("{}", "is no tokeniser"),
    ('{"format": "distml-tokenizer", "name": "words"}', "is no tokeniser"),
    ('{"format": "distml-tokenizer", "version": 2, "name": "bytes"}', "is no tokeniser"),
    ('{"format": "distml-tokenizer", "name": "characters", "characters": "", "mask": false}', "it knows no characters"),
    ("[" * 100_000, "is not JSON"), ('{"model": {"vocab": {"a": Infinity}}}', "is no tokeniser"),
])  # fmt: skip
def test_a_file_that_is_no_tokeniser(tmp_path, content, message):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UsageError) as caught:
        read_tokenizer(tmp_path / "t.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"tokeniser {tmp_path / 't.json'}")
    assert file_vocabulary(tmp_path / "t.json") is None or "version" in content


def test_a_file_without_characters_is_refused_before_a_text_is_met(tmp_path):
    (tmp_path / "t.json").write_text(make_tokenizer(CHARACTERS, ["ab"], False).to_json())
    assert read_tokenizer(tmp_path / "t.json").encode("ab") == [0, 1]  # the control
    (tmp_path / "t.json").write_text((tmp_path / "t.json").read_text().replace('"ab"', '""'))
    with pytest.raises(UsageError, match="it knows no characters"):
        read_tokenizer(tmp_path / "t.json").encode("ab")


def test_a_library_tokeniser_without_an_end():
    text = learn_bpe(TEXTS, 300, False).to_json().replace(json.dumps(END), '"<other>"')
    with pytest.raises(ValueError, match="has no token that ends a document"):
        from_json(text)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_tokenizer(tmp_path / "t.json")
    (tmp_path / "t.json").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="it is not text"):
        read_tokenizer(tmp_path / "t.json")
