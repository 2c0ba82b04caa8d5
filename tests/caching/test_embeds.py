"""Each caption is encoded once, comes back bit for bit, and never from another encoder."""

import hashlib
import threading

import pytest
import torch

from helpers.caching.embeds import EmbedCache, NonFiniteEmbedding, stored_texts, text_key
from helpers.caching.storages import dequantise, quantised
from helpers.caching.store import Writer

FINGERPRINT = {"text_encoder": "aa", "tokenizer": "bb", "length": "77", "cleaning": "if"}


class Encoder:
    """Deterministic embeddings of a text, and a record of what was asked for."""

    def __init__(self, width: int = 16) -> None:
        self.width = width
        self.batches: list[list[str]] = []

    def __call__(self, texts):
        self.batches.append(list(texts))
        return torch.stack([self.embedding(text) for text in texts])

    def embedding(self, text: str) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
        return torch.randn(77, self.width, generator=torch.Generator().manual_seed(seed)).bfloat16()


def built(folder, texts, encoder=None, fingerprint=FINGERPRINT, batch_size=4, storage="bf16") -> EmbedCache:
    cache = EmbedCache(folder, fingerprint, storage)
    cache.build(texts, encoder or Encoder(), len, batch_size)
    return cache


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16)


def test_embeddings_come_back_bit_for_bit_in_the_order_asked_for(tmp_path):
    texts = ["", "a cat", "ein Häuschen im Grünen", "猫", "line\nbreak", "a" * 500, "'quotes\" and $HOME"]
    cache = built(tmp_path, texts)
    asked = [*reversed(texts), "a cat", ""]
    for opened in (cache, EmbedCache(tmp_path, FINGERPRINT)):
        found = opened.read(asked)
        assert found.dtype == torch.bfloat16 and found.shape == (len(asked), 77, 16)
        assert torch.equal(bits(found), bits(torch.stack([Encoder().embedding(text) for text in asked])))


@pytest.mark.parametrize("width", [16, 65, 128])
def test_in_8_bits_embeddings_come_back_rounded_to_steps_of_their_groups(tmp_path, width):
    """`test_storages.py` has how large these are."""
    texts, encoder = ["", "a cat", "猫"], Encoder(width)
    cache = built(tmp_path, texts, encoder, storage="int8")
    exact = torch.stack([encoder.embedding(text) for text in texts])
    dequantise(quantised(exact), expected := torch.empty_like(exact))
    assert not torch.equal(expected, exact)
    buffer = torch.zeros(4, 77, width, dtype=torch.bfloat16)
    for opened in (cache, EmbedCache(tmp_path, FINGERPRINT, "int8")):
        assert opened.row_shape == (77, width) and opened.dtype == torch.bfloat16
        assert torch.equal(opened.read(texts), expected)
        assert torch.equal(opened.read(["猫", ""], buffer), expected[[2, 0]]) and not buffer[2:].any()


def test_exact_embeddings_and_those_in_8_bits_lie_side_by_side(tmp_path):
    exact = built(tmp_path, ["a"])
    rounded = built(tmp_path, ["a", "b"], storage="int8")
    assert exact.missing(["a", "b"]) == ["b"] and rounded.missing(["a", "b"]) == []
    assert exact.store.folder != rounded.store.folder and exact.store.foreign == rounded.store.foreign == ()
    for opened in (exact, EmbedCache(tmp_path, FINGERPRINT)):
        assert torch.equal(opened.read(["a"])[0], Encoder().embedding("a"))
    assert not torch.equal(rounded.read(["a"])[0], Encoder().embedding("a"))


def test_a_shard_of_the_other_storage_is_not_read_though_it_lies_in_the_folder(tmp_path):
    exact, rounded = built(tmp_path, ["a"]), built(tmp_path, ["b"], storage="int8")
    for cache, other in ((exact, rounded), (rounded, exact)):
        for shard in list(cache.store.folder.glob("*.safetensors")):
            (other.store.folder / shard.name).write_bytes(shard.read_bytes())
    for storage, missing in (("bf16", ["b"]), ("int8", ["a"])):
        cache = EmbedCache(tmp_path, FINGERPRINT, storage)
        assert cache.missing(["a", "b"]) == missing and len(cache.store.foreign) == 1


def test_embeddings_in_8_bits_are_made_of_exact_ones_without_the_encoder(tmp_path, capsys):
    exact = built(tmp_path, ["a", "b"])
    before = {path: path.read_bytes() for path in exact.store.folder.rglob("*.safetensors")}
    capsys.readouterr()
    cache = EmbedCache(tmp_path, FINGERPRINT, "int8")
    cache.convert(["a", "b", "c"])
    said = capsys.readouterr().out
    assert "2 captions are stored as int8" in said and str(exact.store.folder) in said
    assert cache.missing(["a", "b", "c"]) == ["c"]
    encoded = built(tmp_path / "other", ["a", "b"], storage="int8")
    assert torch.equal(cache.read(["a", "b"]), encoded.read(["a", "b"])), "as if they had been encoded"
    assert {path: path.read_bytes() for path in before} == before
    capsys.readouterr()
    cache.convert(["a", "b", "c"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("there, wanted", [(None, "int8"), ("another encoder", "int8"), ("int8", "bf16")])
def test_nothing_is_made_of_what_does_not_fit(tmp_path, capsys, there, wanted):
    """Least of all an exact embedding of one in 8 bits."""
    if there:
        changed = {"text_encoder": "another"} if there != "int8" else {}
        built(tmp_path, ["a"], fingerprint=FINGERPRINT | changed, storage="int8" if there == "int8" else "bf16")
    cache = EmbedCache(tmp_path, FINGERPRINT, wanted)
    folders = sorted(tmp_path.iterdir())
    capsys.readouterr()
    cache.convert(["a"])
    assert cache.missing(["a"]) == ["a"] and sorted(tmp_path.iterdir()) == folders and not capsys.readouterr().out


def test_of_a_damaged_exact_shard_nothing_is_made(tmp_path):
    [shard] = built(tmp_path, ["a"]).store.folder.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    cache = EmbedCache(tmp_path, FINGERPRINT, "int8")
    cache.convert(["a"])
    assert cache.missing(["a"]) == ["a"]


def test_what_is_stored_is_counted_by_the_way_it_is_stored(tmp_path):
    built(tmp_path, ["a", "b"])
    built(tmp_path, ["b", "c"], fingerprint=FINGERPRINT | {"text_encoder": "another"}, storage="int8")
    assert stored_texts(tmp_path, "bf16") == {text_key("a"), text_key("b")}
    assert stored_texts(tmp_path, "int8") == {text_key("b"), text_key("c")}
    assert stored_texts(tmp_path / "nowhere", "int8") == set()


def test_unusual_numbers_are_kept(tmp_path):
    values = torch.tensor([0.0, -0.0, 3e38, -3e38, 1e-40, 7.0]).bfloat16()
    row = values.repeat(77, 1)
    cache = built(tmp_path, ["odd"], lambda texts: row[None])
    assert torch.equal(bits(cache.read(["odd"])[0]), bits(row))


def test_a_caption_is_encoded_once_however_often_it_occurs(tmp_path):
    encoder = Encoder()
    cache = built(tmp_path, ["a", "b", "a", "a", "b"], encoder)
    assert sorted(text for batch in encoder.batches for text in batch) == ["a", "b"]
    assert len(cache.store) == 2


def test_a_second_build_encodes_only_what_is_new(tmp_path):
    built(tmp_path, ["a", "b"])
    encoder = Encoder()
    cache = EmbedCache(tmp_path, FINGERPRINT)
    assert cache.missing(["c", "a", "c", "b"]) == ["c"]
    cache.build(["a", "b", "c"], encoder, len, 4)
    assert encoder.batches == [["c"]]
    cache.build(["a", "b", "c"], encoder, len, 4)
    assert encoder.batches == [["c"]]


def test_batches_hold_texts_of_like_length_the_longest_first(tmp_path):
    encoder = Encoder()
    texts = [letter * length for letter, length in zip("abcdefg", (3, 9, 1, 7, 2, 8, 5))]
    built(tmp_path, texts, encoder, batch_size=3)
    assert [[len(text) for text in batch] for batch in encoder.batches] == [[9, 8, 7], [5, 3, 2], [1]]


@pytest.mark.parametrize("part", FINGERPRINT)
def test_two_encoders_that_share_a_folder_do_not_mix(tmp_path, part):
    built(tmp_path, ["a"])
    other = EmbedCache(tmp_path, {**FINGERPRINT, part: "another"})
    assert other.missing(["a"]) == ["a"] and other.store.foreign == ()  # nor is its folder checked for nothing
    other.build(["a"], Encoder(width=4), len, 1)
    assert other.read(["a"]).shape == (1, 77, 4)
    assert EmbedCache(tmp_path, FINGERPRINT).read(["a"]).shape == (1, 77, 16)


def test_an_embedding_that_is_not_finite_is_an_error_that_names_the_caption(tmp_path):
    def overflowing(texts):
        embeds = Encoder()(texts)
        if "the third" in texts:
            embeds[texts.index("the third"), 5, 3] = float("inf")
        return embeds

    cache = EmbedCache(tmp_path, FINGERPRINT)
    with pytest.raises(NonFiniteEmbedding, match="'the third': its weights are damaged"):
        cache.build(["the third", "of", "and"], overflowing, len, 2)
    assert "the third" in EmbedCache(tmp_path, FINGERPRINT).missing(["the third"])


def test_an_interrupted_build_keeps_what_was_encoded(tmp_path):
    def interrupted(texts):
        if texts == ["c"]:
            raise KeyboardInterrupt
        return Encoder()(texts)

    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, ["aaa", "bb", "c"], interrupted, batch_size=1)
    assert EmbedCache(tmp_path, FINGERPRINT).missing(["aaa", "bb", "c"]) == ["c"]


def test_the_next_batch_is_encoded_while_one_is_written(tmp_path, monkeypatch):
    """Each write waits until the encoder is at the next batch; were they in turns, it would wait in vain."""
    at_next, texts = [threading.Event() for _ in range(4)], ["aaa", "bb", "c"]
    at_next[3].set()
    add = Writer.add

    def slow(self, key, array):
        assert at_next[written.pop(0)].wait(20)
        add(self, key, array)

    def encoder(batch):
        at_next[3 - len(batch[0])].set()
        return Encoder()(batch)

    written = [1, 2, 3]
    monkeypatch.setattr(Writer, "add", slow)
    cache = built(tmp_path, texts, encoder, batch_size=1)
    assert written == [] and all(torch.equal(cache.read([text])[0], Encoder().embedding(text)) for text in texts)


@pytest.mark.parametrize("result", [
    torch.zeros(2, 77, 4), torch.zeros(3, 77, 4).bfloat16(), torch.zeros(77, 4).bfloat16(),
], ids=["float32", "another count", "no batch"])
def test_what_an_encoder_must_not_return_is_refused(tmp_path, result):
    with pytest.raises(ValueError, match="not bfloat16"):
        built(tmp_path, ["a", "b"], lambda texts: result)


def test_reading_fills_the_given_buffer_and_returns_its_rows(tmp_path):
    cache = built(tmp_path, ["a", "b"])
    buffer = torch.zeros(4, 77, 16, dtype=torch.bfloat16)
    found = cache.read(["b", "a"], buffer)
    assert found.shape == (2, 77, 16) and found.data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer[:2], cache.read(["b", "a"])) and not buffer[2:].any()
    with pytest.raises(ValueError, match="do not fit"):
        cache.read(["a", "b", "a"], buffer[:2])


def test_a_caption_without_embedding_is_named(tmp_path):
    with pytest.raises(KeyError, match="'never seen'"):
        built(tmp_path, ["a"]).read(["a", "never seen"])


def test_a_damaged_shard_is_announced_and_encoded_again(tmp_path, capsys):
    cache = built(tmp_path, ["a", "b"])
    [shard] = cache.store.folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    encoder = Encoder()
    again = built(tmp_path, ["a", "b"], encoder)
    assert encoder.batches == [["a", "b"]] and shard.name in capsys.readouterr().out
    assert torch.equal(again.read(["a"])[0], encoder.embedding("a"))


def test_count_size_and_time_are_told_first(tmp_path, capsys):
    texts = [f"caption {number}" for number in range(1200)]
    built(tmp_path, texts, lambda batch: torch.zeros(len(batch), 77, 16).bfloat16())
    first, second = capsys.readouterr().out.splitlines()
    assert "1,200 captions" in first and "3.0 MB" in second and "about 00:0" in second
    built(tmp_path, texts, lambda batch: torch.zeros(len(batch), 77, 64).bfloat16(), storage="int8")
    assert f"{1200 * 77 * 66 / 1e6:.1f} MB" in capsys.readouterr().out


def test_captions_that_are_longer_than_the_encoder_reads_are_counted_before_it_starts(tmp_path, capsys):
    texts = [f"{number} {'word ' * 20}".strip() for number in range(5)] + ["a" * 77, "a" * 78]

    def interrupted(batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, texts, interrupted)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "77 tokens" in line]
    assert "6 captions" in line and "longest 101" in line and line.count("'") == 2 * 3 and "word ...'" in line
    assert len(line) < 400


def test_the_length_that_an_encoder_reads_may_be_another(tmp_path, capsys):
    cache = EmbedCache(tmp_path, FINGERPRINT)
    cache.build(["four", "fives"], Encoder(), len, 4, limit=4)
    assert "1 captions have more than the 4 tokens" in capsys.readouterr().out


def test_nothing_is_said_of_captions_that_fit_or_were_encoded_before(tmp_path, capsys):
    built(tmp_path, ["a" * 77])
    assert "tokens" not in capsys.readouterr().out
    built(tmp_path, ["b" * 78])
    capsys.readouterr()
    built(tmp_path, ["b" * 78, "c"])
    assert "tokens" not in capsys.readouterr().out


def told(folder, texts, capsys, fingerprint=FINGERPRINT, storage="bf16") -> str:
    capsys.readouterr()
    built(folder, texts, fingerprint=fingerprint, storage=storage)
    lines = [line for line in capsys.readouterr().out.splitlines() if "encoded before" in line]
    return "".join(lines).removeprefix("Text embeds: ")


def test_the_log_counts_what_was_reused_and_why_the_rest_is_encoded(tmp_path, capsys):
    assert told(tmp_path, ["a", "b"], capsys).startswith("0 captions encoded before, 2 captions to encode (2 new)")
    assert told(tmp_path, ["a", "b", "c"], capsys).startswith("2 captions encoded before, 1 captions to encode (1 new)")
    assert EmbedCache(tmp_path, FINGERPRINT).plan(["a", "b", "c", "a"]) == (
        "3 captions encoded before, 0 to encode"
    )


@pytest.mark.parametrize("parts", [["text_encoder"], ["length", "cleaning"]])
def test_captions_that_another_encoder_encoded_are_told_as_such(tmp_path, capsys, parts):
    built(tmp_path, ["a", "b"])
    other = FINGERPRINT | dict.fromkeys(parts, "another")
    line = told(tmp_path, ["a", "b", "c"], capsys, other)
    assert "0 captions encoded before" in line
    assert f"(2 so far with another {' and '.join(parts)}, 1 new)" in line
    nearer = FINGERPRINT | {parts[0]: "another", "tokenizer": "another"}
    assert "another tokenizer" in EmbedCache(tmp_path, nearer).plan(["a"]) or len(parts) > 1


def test_captions_that_are_stored_otherwise_are_told_as_such(tmp_path, capsys):
    built(tmp_path, ["a"], storage="int8")
    assert "(1 so far with another storage, 1 new)" in told(tmp_path, ["a", "b"], capsys)
    other = FINGERPRINT | {"text_encoder": "another"}
    said = told(tmp_path, ["b", "c"], capsys, other, "int8")
    assert "(1 so far with another text_encoder and storage, 1 new)" in said


def test_captions_of_a_damaged_shard_are_told_as_such(tmp_path, capsys):
    cache = built(tmp_path, ["a", "b"])
    [shard] = cache.store.folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "(2 of a damaged shard, 1 new)" in told(tmp_path, ["a", "b", "c"], capsys)


def test_captions_of_a_shard_that_does_not_name_them_any_more_are_not_called_new(tmp_path, capsys):
    cache = built(tmp_path, ["a", "b"])
    [shard] = cache.store.folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:40])
    assert "(3 new or of a damaged shard)" in told(tmp_path, ["a", "b", "c"], capsys)


def test_other_peoples_files_in_the_folder_do_not_disturb(tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    for name in ("readme.txt", f"{'0' * 40}.safetensors", f"{'1' * 40}.safetensors"):
        (tmp_path / "notes" / name).write_bytes(b"" if name[0] == "0" else b"\x02\0\0\0\0\0\0\0[]" + bytes(50))
    assert "(1 new)" in told(tmp_path, ["a"], capsys)
