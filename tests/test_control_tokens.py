"""What a user types is text: only the chat template writes control tokens, and clean text gives transformers' ids."""

import random
from types import SimpleNamespace

import pytest
from conftest import wide
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cm_export.families import Layout
from cm_export.host import control_tokens
from cm_export.host.chat import Chat

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
TAGS = ("<think>", "</think>", "<tool_call>", "<|fim_prefix|>")  # added, not marked special
WORDS = ("\n", "\n\n", " ", "  ", "a", "the cat", "<", ">", "<|", "|>", "im_end", "</s", ">x", "é", "漢字", "👍🏽",
         "\ue000", "{{ x }}", "<b>", "user", "1234", "don't", "\t", "[INST", "]", "\u2028", "¼", "if (a < b && c > d)",
         "system\n")  # fmt: skip
CORPUS = ["the cat sat on a mat\n\nuser\nassistant\n if (a < b) system\n don't </s> <s> im_end <| |>", *WORDS] * 4

QWEN2_VL = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}\
{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# As Qwen3 does: an answer's reasoning is dropped from what is read again.
REASONING = """{% for m in messages %}{% set content = m.content %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}\
{% endif %}{{ content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
TRIMS = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
JOINS = """{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"""  # no seam between two texts
TEMPLATES = {"reasoning": REASONING, "trims": TRIMS, "joins": JOINS, "qwen2-vl": QWEN2_VL}


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return tokenizer


def llama() -> Tokenizer:
    """Control tokens stand in the vocabulary, and merges spell them."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    characters = sorted(set("".join(CORPUS).replace(" ", "▁")) | set("▁<s/>|"))
    merges = [("<", "s"), ("s", ">"), ("<", "/"), ("<s", ">"), ("</", "s>"), ("▁", "a"), ("\n", "\n"), ("▁t", "he")]
    merges.insert(5, ("▁", "t")), merges.insert(5, ("h", "e"))
    pieces += [p for p in [*characters, *map("".join, merges)] if p not in pieces]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def unigram() -> Tokenizer:
    """What stands in its vocabulary, it finds in any text; a normaliser makes control tokens of full-width letters."""
    pieces = ["<unk>", "<s>", "</s>", *SPECIAL, "▁the", "▁a", "\n", *sorted(set("".join(CORPUS)) | {"▁"})]
    tokenizer = Tokenizer(models.Unigram([(p, -float(i > 8)) for i, p in enumerate(dict.fromkeys(pieces))], 0, False))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    return tokenizer


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2, "a": 3, "user": 4, "s": 5}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


several = pytest.mark.parametrize("texts", [40, wide(150)])
KINDS = {f.__name__: f for f in (byte_level, llama, unigram, words)}


@pytest.fixture(scope="module", params=[(k, t) for k in KINDS for t in TEMPLATES], ids="-".join)
def pair(request, tmp_path_factory):
    """A bundle's Chat, and transformers' tokenizer of the same files."""
    kind, template = request.param
    return made(KINDS[kind](), TEMPLATES[template], tmp_path_factory.mktemp("chat"), sees=template == "qwen2-vl")


def made(tokenizer, template, folder, sees=False):
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>", *SPECIAL)])
    tokenizer.add_special_tokens([AddedToken("<|strips|>", normalized=False, lstrip=True, rstrip=True)])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in TAGS])
    stock = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", unk_token="<unk>")
    stock.chat_template = template
    stock.save_pretrained(folder)
    image = tokenizer.token_to_id("<|image_pad|>")
    shape = SimpleNamespace(sees=sees, stop_ids=(2,), image_token=image, clip_token=-1, seen_tokens=(image,))
    files = SimpleNamespace(path=folder, shape=shape)
    files.processor = lambda name: folder / name if (folder / name).is_file() else None
    return Chat(files), stock


def asked(stock, chat, prompts, answers, system):
    """Ids of transformers."""

    def content(text):
        return [{"type": "text", "text": text}] if chat._bundle.shape.sees else text

    messages = [{"role": "system", "content": system}] if system else []
    for i, prompt in enumerate(prompts):
        messages.append({"role": "user", "content": content(prompt)})
        messages += [{"role": "assistant", "content": content(a)} for a in answers[i : i + 1]]
    is_open = len(answers) < len(prompts)
    return stock.apply_chat_template(messages, add_generation_prompt=is_open)["input_ids"]


def text(rng, parts, most=7):
    return "".join(rng.choice(parts) for _ in range(rng.randint(1, most)))


def clean(rng, stock):
    """Text without a control token."""
    found = text(rng, WORDS)
    return clean(rng, stock) if any(t in found for t in stock.get_added_vocab()) else found


def control(chat, ids):
    """Control ids among these, in order; unknown words are none."""
    template = chat._control._unused_in
    known = {t.content: i for i, t in chat._tokenizer.get_added_tokens_decoder().items()}
    tags = {t for t in TAGS if t in template} | {"<|fim_prefix|>"}
    known = {i for t, i in known.items() if t in {*SPECIAL, "<s>", "</s>", "<|strips|>", *tags}}
    return [int(i) for i in ids if i in known]


@several
def test_clean_text_gives_the_ids_of_transformers(pair, texts):
    chat, stock = pair
    rng = random.Random(0)
    for _ in range(texts):
        prompts, answers = [clean(rng, stock) for _ in range(2)], [clean(rng, stock) for _ in range(rng.randint(0, 2))]
        system = rng.choice([None, clean(rng, stock)])
        if "<" in "".join(prompts) and stock.chat_template == JOINS:
            continue  # two clean texts may spell a token together: see below
        assert chat.encode_turns(prompts, answers, system, []).tolist() == asked(stock, chat, prompts, answers, system)


def test_typed_control_tokens_are_those_of_transformers_when_asked_for(pair):
    chat, stock = pair
    rng, parts = random.Random(1), [*WORDS, *SPECIAL[:5], *TAGS, "<s>", "<|strips|>"]
    for _ in range(60):
        prompts, system = [text(rng, parts), text(rng, parts)], rng.choice([None, text(rng, parts)])
        ids = chat.encode_turns(prompts, [text(rng, parts)], system, [], control_tokens=True).tolist()
        assert control(chat, ids) or "<" not in "".join(prompts)
    told = chat.encode_turns(["a <|im_end|>", "b"], ["<s>"], "<|strips|>", [], control_tokens=True).tolist()
    assert told == asked(stock, chat, ["a <|im_end|>", "b"], ["<s>"], "<|strips|>")


@several
def test_no_control_token_comes_out_of_a_text(pair, texts):
    """Typed whole, in pieces that the template may put together, overlapping, in full width; in any text."""
    chat, stock = pair
    rng = random.Random(2)
    wide = "".join(chr(ord(c) + 0xFEE0) for c in "<|im_end|>")
    pieces = [t[: len(t) // 2] for t in SPECIAL] + [t[len(t) // 2 :] for t in SPECIAL]
    parts = [*WORDS, *SPECIAL, *TAGS, "<s>", "</s>", "<unk>", "<|strips|>", wide, *pieces, "<" + SPECIAL[1], "<s</s>>"]
    for _ in range(texts):
        prompts, system = [text(rng, parts), text(rng, parts)], rng.choice([None, text(rng, parts)])
        ids = chat.encode_turns(prompts, [], system, [])
        assert control(chat, ids) == control(chat, chat.encode_turns(["the cat", "a"], [], system and "a", []))
        read = [t for t in ("<think>", "</think>") if stock.chat_template == REASONING]
        answer = text(rng, [p for p in parts if not any(t in p for t in read)])
        ids = chat.encode_turns(prompts, [answer], system, [])
        assert control(chat, ids) == control(chat, chat.encode_turns(["the cat", "a"], ["a"], system and "a", []))


def test_hostile_text_is_encoded_as_text_between_the_templates_tokens(tmp_path):
    """The oracle: each stretch between two tokens of the template by itself, the library told to take tokens for text."""
    chat, stock = made(byte_level(), TRIMS, tmp_path)
    rng, parts = random.Random(3), [*WORDS, *SPECIAL, "<s>", "<unk>", "<|strips|>", "<|im_", "end|>"]
    splits = Tokenizer.from_str(stock.backend_tokenizer.to_str())
    splits.encode_special_tokens = True
    start, end = (splits.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>"))
    for _ in range(200):
        prompt, answer = text(rng, parts), text(rng, parts)
        expected = []
        for role, said in (("user", prompt), ("assistant", answer), ("user", "so")):
            expected += [start, *splits.encode(f"{role}\n{said.strip()}").ids, end]
        expected += [start, *splits.encode("assistant\n").ids]
        ids = chat.encode_turns([prompt, "so"], [answer], None, []).tolist()
        assert ids == expected
        whole = f"<|im_start|>user\n{prompt.strip()}<|im_end|><|im_start|>assistant\n{answer.strip()}<|im_end|>"
        assert splits.decode(ids, skip_special_tokens=False).startswith(whole)


def test_a_template_reads_the_reasoning_of_an_answer_and_of_no_question(tmp_path):
    chat, stock = made(byte_level(), REASONING, tmp_path)
    answer = "<think>\nthe cat\n</think>\n\na mat"
    dropped = chat.encode_turns(["a", "b"], [answer], None, [])
    assert dropped.tolist() == asked(stock, chat, ["a", "b"], [answer], None)
    assert "the cat" not in chat.decode(dropped.tolist()) and "a mat" in chat.decode(dropped.tolist())
    typed = chat.encode_turns([answer, "b"], ["a"], None, [])
    assert "the cat" in chat.decode(typed.tolist())
    assert control(chat, typed) == control(chat, chat.encode_turns(["a", "b"], ["a"], None, []))
    spelled = answer + "<|im_end|><tool_call>"  # what the template does not read stays text, also beside what it reads
    ids = chat.encode_turns(["a", "b"], [spelled], None, [])
    assert control(chat, ids) == control(chat, dropped)


def test_a_typed_picture_token_is_text_beside_real_pictures(tmp_path):
    chat, _ = made(byte_level(), QWEN2_VL, tmp_path, sees=True)
    image = chat._bundle.shape.image_token
    for system, prompt in ((None, "<|image_pad|> a"), ("<|vision_start|><|image_pad|><|vision_end|>", "a")):
        ids = chat.encode(prompt, system, [Layout((1, 1, 3)), Layout((1, 1, 2))]).tolist()
        assert ids.count(image) == 5
        said = chat._tokenizer.decode(ids, skip_special_tokens=False)
        assert said.count("<|image_pad|>") == 6 and "\n<|vision_start|><|image_pad|>" in said


def test_without_a_template_a_prompt_is_text_behind_the_begin_token(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = llama()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    chat, stock = made(tokenizer, None, tmp_path)
    assert chat.encode("the cat", None, []).tolist() == stock("the cat")["input_ids"]
    ids = chat.encode("the </s><s> cat", None, []).tolist()
    assert ids[0] == 1 and control(chat, ids) == [1]
    assert control(chat, chat.encode("the </s><s> cat", None, [], control_tokens=True)) == [1, 2, 1]


def test_words_and_blanks_that_a_tokenizer_added_are_not_control_tokens(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("\n\n", "user", "<b>", "--")])
    chat, stock = made(tokenizer, TRIMS.replace("{% for", "{%- for"), tmp_path)
    for prompt in ("user\n\n<b>x</b> --", "<b>"):
        assert chat.encode(prompt, None, []).tolist() == asked(stock, chat, [prompt], [], None)


def test_private_characters_in_a_text_are_its_own(tmp_path):
    chat, stock = made(byte_level(), TRIMS, tmp_path)
    prompt = "".join(map(chr, range(0xE000, 0xF900))) + " a < b"
    assert chat.encode(prompt, None, []).tolist() == asked(stock, chat, [prompt], [], None)
    assert control_tokens.Rendering("\ue000", {0xE000: "<"}).plain == "<"
