"""The text of an answer as its tokens come: what is handed out, what is held back, and what it costs.

Tokenizers of the kinds that checkpoints have: bytes (Qwen, Llama 3), pieces with byte fallback (Llama 2), words.
"""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cm_export.host.writing import Writing

TEXTS = (
    "The quick brown fox  jumps over\n\nthe lazy dog.",
    "naïve café — 中文字符 and 日本語, déjà vu",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 done 🇫🇷!",
    " leading and trailing ",
    "",
)


def byte_level() -> Tokenizer:
    """Every byte is a token, and some pairs, one of them a space with a first byte; most of what is not ASCII comes in parts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ġ", "ä"), ("ä", "¸"), ("Ã", "©")]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Pieces that begin with ▁ for a space, and <0xE4> for what is no piece, as in Llama 2."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *map(chr, range(33, 127)), "th", "he", "▁the", "▁t"]
    merges = [("t", "h"), ("h", "e"), ("▁", "t"), ("▁t", "he")]
    vocab = {token: i for i, token in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


KINDS = {"bytes": byte_level, "byte fallback": byte_fallback}


@pytest.fixture(params=KINDS)
def tokenizer(request) -> Tokenizer:
    made = KINDS[request.param]()
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    return made


class Counting:
    """`decode` of a tokenizer, and how many tokens it was given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.tokens = tokenizer, []

    def __call__(self, ids):
        self.tokens.append(len(ids))
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def writing(tokenizer, stop=(), decode=None):
    end = tokenizer.token_to_id("<|end|>")
    return Writing(decode or Counting(tokenizer), lambda i: i != end, stop)


def written(tokenizer, ids, stop=()):
    """(pieces as they came, text, the stop string, tokens used)."""
    one, pieces, used = writing(tokenizer, stop), [], 0
    for i in ids:
        pieces.append(one.add(i))
        used += 1
        if one.stopped is not None:
            break
    pieces.append(one.end())
    assert "".join(pieces) == one.text
    return pieces, one.text, one.stopped, used


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_that_decoding_everything_at_once_gives(tokenizer, text):
    ids = tokenizer.encode(text).ids
    pieces, found, stopped, _ = written(tokenizer, ids)
    assert found == tokenizer.decode(ids) and stopped is None
    assert not any("\ufffd" in piece for piece in pieces), "no part of a character is shown"


def test_random_ids_join_to_the_same_text_as_far_as_their_bytes_are_characters(tokenizer):
    rng = random.Random(0)
    end = tokenizer.token_to_id("<|end|>")
    for _ in range(300):
        ids = []
        for _ in range(rng.randint(1, 12)):
            ids += tokenizer.encode(
                rng.choice(("the", " ", "é", "中", "👩‍👧", "x t", "\n")), add_special_tokens=False
            ).ids
            ids += [end] * rng.randint(0, 1)
        assert written(tokenizer, ids)[1] == tokenizer.decode(ids, skip_special_tokens=True)


def test_bytes_that_are_no_character_are_shown_as_such_and_stop_nothing(tokenizer):
    part = tokenizer.encode("中").ids[:-1] if tokenizer.token_to_id("<0xE4>") is None else None
    ids = part or [tokenizer.token_to_id("<0xE4>"), tokenizer.token_to_id("<0xB8>")]
    pieces, text, *_ = written(tokenizer, [*ids, *tokenizer.encode("ok").ids])
    assert text.startswith("\ufffd") and text.endswith("ok")
    pieces, text, *_ = written(tokenizer, ids)
    assert pieces[:-1] == [""] * len(ids) and "\ufffd" in pieces[-1], "the end shows what was waiting"


def test_a_step_decodes_a_few_tokens_however_long_the_answer_is(tokenizer):
    ids = tokenizer.encode("the naïve 中文 fox 👩‍👧 " * 200).ids
    decode = Counting(tokenizer)
    one, spent = writing(tokenizer, decode=decode), []
    for i in ids:
        before = sum(decode.tokens)
        one.add(i)
        spent.append(sum(decode.tokens) - before)
    assert len(ids) > 2000 and max(spent) <= 40 and sum(spent) / len(ids) < 12
    half = len(ids) // 2
    assert sum(spent[half:]) <= 1.2 * sum(spent[:half])


def test_control_tokens_and_bytes_that_never_become_a_character_do_not_add_up(tokenizer):
    bad = tokenizer.encode("中").ids[0] if tokenizer.token_to_id("<0xE4>") is None else tokenizer.token_to_id("<0xE4>")
    for ids in ([tokenizer.token_to_id("<|end|>")] * 500, [bad] * 500):
        decode = Counting(tokenizer)
        one = writing(tokenizer, decode=decode)
        for i in ids:
            one.add(i)
        assert max(decode.tokens, default=0) <= 80


# ---------------------------------------------------------------- stop strings


def before(text: str, stop) -> str:
    """The text before the stop string that is complete first; an oracle that sees all of it."""
    return text[: min(((at + len(s), at) for s in stop if (at := text.find(s)) >= 0), default=(0, len(text)))[1]]


@pytest.mark.parametrize(
    "stop", [(" fox",), ("fox  jumps",), ("x",), ("\n\n",), ("dog.",), ("zzz", "brown f"), ("The",)]
)
def test_nothing_of_a_stop_string_is_shown_wherever_tokens_part_it(tokenizer, stop):
    ids = tokenizer.encode(TEXTS[0]).ids
    pieces, text, stopped, used = written(tokenizer, ids, stop)
    assert text == before(TEXTS[0], stop) and stopped in stop
    assert all(TEXTS[0].startswith("".join(pieces[: n + 1])) for n in range(len(pieces)))
    assert tokenizer.decode(ids[:used]).endswith(stopped), "the answer ends with the token that completes it"


def test_what_only_begins_like_a_stop_string_is_shown_in_the_end(tokenizer):
    ids = tokenizer.encode("a </s </sto").ids
    pieces, text, stopped, _ = written(tokenizer, ids, ("</stop>",))
    assert text == "a </s </sto" and stopped is None and pieces[-1] == "</sto"


def test_the_stop_string_that_is_complete_first_ends_the_answer_also_within_one_token(tokenizer):
    tokenizer = type(tokenizer).from_str(tokenizer.to_str())
    tokenizer.add_tokens(["the"])
    ids = tokenizer.encode("x the").ids
    assert len(ids) < len("x the"), "`the` must be one token for this test to say anything"
    assert written(tokenizer, ids, ("the", "h"))[1:3] == ("x t", "h")
    assert written(tokenizer, ids, ("e", "the"))[1:3] == ("x ", "the")


def test_a_character_of_several_tokens_can_be_a_stop_string(tokenizer):
    ids = tokenizer.encode("one 中 two").ids
    assert written(tokenizer, ids, ("中",))[1:3] == ("one ", "中")


def test_random_texts_end_at_the_first_of_several_stop_strings():
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    rng, stopped = random.Random(1), 0
    for _ in range(500):
        text = "".join(rng.choice("aab<é") for _ in range(rng.randint(1, 25)))
        stop = tuple("".join(rng.choice("aab<é") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3)))
        ids = tokenizer.encode(text).ids
        _, found, ended, _ = written(tokenizer, ids, stop)
        assert found == before(text, stop), (text, stop)
        assert (ended is None) == (found == text and not any(s in text for s in stop))
        stopped += ended is not None
    assert 100 < stopped < 500
