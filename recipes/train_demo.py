"""Train the demo model of cm-export from scratch: a 9.1 M parameter Qwen2-VL that answers easy-VQA questions.

Data: the train split of the PyPI package ``easy-vqa`` (MIT) and random scenes drawn here. The test split is
read only to report; progress is watched on train pictures that are held out of training.

    python recipes/train_demo.py --work WORK --out MODEL               # the whole run
    python recipes/train_demo.py --work WORK --out MODEL --init OLD    # only the last stage, from a model
    python recipes/train_demo.py --work WORK --eval-only MODEL         # only the report

Five stages: the vision tower names colour and shape of every image token (random scenes); the whole model
answers one-word questions; the same with auxiliary heads that spell out the steps of a yes/no answer (without
them training sits at 87 %); the same with two more heads on the last prompt token; then, heads dropped, short
and sentence answers mixed. Every stage leaves a checkpoint, and a run that was killed goes on after the last.
"""

import argparse
import json
import math
import random
import time
from collections import defaultdict, namedtuple
from functools import partial
from pathlib import Path

import easy_vqa
import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_model, save_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerFast, Qwen2VLConfig
from transformers import Qwen2VLForConditionalGeneration as Qwen2VL
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

COLOURS = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
COLOUR_NAMES, SHAPES = list(COLOURS), ["circle", "rectangle", "triangle"]
VOCABULARY = """
    <|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|> <unk>
    user assistant system ? . , : yes no is are there a an the image shape shapes of not what color colors
    present does contain in which how many where at left right top bottom center middle above below and or
    nothing it they same different as than describe list count name who side upper lower both neither other
    size small large big to black blue brown gray green red teal yellow circle rectangle triangle
    circles rectangles triangles zero one two three four five six"""
TOKENS = VOCABULARY.split()  # in the order of their ids
END, IMAGE = TOKENS.index("<|im_end|>"), TOKENS.index("<|image_pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCH, MERGE, TEMPORAL = 4, 2, 2
GRID = 64 // (PATCH * MERGE)  # image tokens along one side of a picture
# The official question forms; {} is a shape, a colour or, in yes/no questions, "red shape" or "circle".
WHAT_SHAPE = [
    "what shape is in the image?",
    "what shape is present?",
    "what shape does the image contain?",
    "what is the {} shape?",
]
WHAT_COLOUR = [
    "what color is the {}?",
    "what is the color of the {}?",
    "what color is the shape?",
    "what is the color of the shape?",
]
YES_FORMS = ["is there a {}?", "is there a {} in the image?", "does the image contain a {}?", "is a {} present?"]
NO_FORMS = [
    "is there not a {}?",
    "is there not a {} in the image?",
    "does the image not contain a {}?",
    "is no {} present?",
]
HELD_OUT = 120  # train pictures kept out of training; decisions are taken on them, never on the test split
# ``vision_lr`` scales the learning rate of the vision tower, ``weights`` the auxiliary losses.
Stage = namedtuple("Stage", "name steps batch lr warmup vision_lr weights")
STAGES = [
    Stage("vision", 500, 24, 2e-3, 50, 1.0, None),
    Stage("easy", 200, 8, 1e-3, 30, 0.3, None),
    Stage("aux", 300, 8, 1e-3, 10, 0.3, (0.3, 0.5, 0.0)),
    Stage("aux2", 240, 8, 8e-4, 10, 0.3, (0.1, 0.3, 0.5)),
    Stage("sentences", 420, 8, 4e-4, 10, 0.3, None),
]


def draw_scene(rng, size, count):
    """Draw up to ``count`` separate shapes; return the picture and a label for every image token."""
    boxes = []
    for _ in range(200):
        shape = rng.choice(SHAPES)
        width, tall = rng.randint(8, 32), rng.randint(8, 32)
        height = {"circle": width, "rectangle": tall, "triangle": max(7, int(width * 0.866))}[shape]
        x, y = rng.randint(0, size - width - 1), rng.randint(0, size - height - 1)
        x1, y1 = x + width, y + height
        if all(x1 + 2 < b[0] or b[2] + 2 < x or y1 + 2 < b[1] or b[3] + 2 < y for *_, b in boxes):
            boxes.append((shape, rng.choice(COLOUR_NAMES), (x, y, x1, y1)))
        if len(boxes) == count:
            break
    # Drawn at twice the size and scaled down, so that edges are soft as in the easy-VQA pictures.
    picture = Image.new("RGB", (size * 2, size * 2), tuple(rng.randint(230, 255) for _ in range(3)))
    draw = ImageDraw.Draw(picture)
    cell = PATCH * MERGE
    edge = np.arange(0, size, cell)
    labels, covered = np.zeros((len(edge),) * 2, np.int64), np.full((len(edge),) * 2, 0.2)
    for shape, colour, (x0, y0, x1, y1) in boxes:
        corners = [(2 * x0, 2 * y1), (2 * x1, 2 * y1), (x0 + x1, 2 * y0)]
        outline = corners if shape == "triangle" else [2 * x0, 2 * y0, 2 * x1, 2 * y1]
        paint = {"circle": draw.ellipse, "rectangle": draw.rectangle, "triangle": draw.polygon}[shape]
        paint(outline, fill=COLOURS[colour])
        across = np.clip(np.minimum(x1, edge + cell) - np.maximum(x0, edge), 0, None)
        down = np.clip(np.minimum(y1, edge + cell) - np.maximum(y0, edge), 0, None)
        share = np.outer(down, across) / cell**2
        better = share > covered
        labels[better] = 1 + COLOUR_NAMES.index(colour) * len(SHAPES) + SHAPES.index(shape)
        covered[better] = share[better]
    return np.asarray(picture.resize((size, size), Image.BILINEAR)), labels


def label_of(picture):
    """(shape, colour) of an easy-VQA picture, measured on its pixels: the package has no such labels."""
    colour = max(COLOUR_NAMES, key=lambda c: (picture == COLOURS[c]).all(2).sum())
    values, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    ground, fill = values[counts.argmax()].astype(float), np.array(COLOURS[colour], float)
    # How much of each pixel the shape covers; edge pixels are mixtures of the fill and the ground.
    cover = np.clip((picture - ground) @ (fill - ground) / ((fill - ground) ** 2).sum(), 0, 1)
    filled = cover.sum() / (cover.max(0).sum() * cover.max(1).sum())  # 1 rectangle, 0.79 circle, 0.5 triangle
    return ("rectangle" if filled > 0.9 else "circle" if filled > 0.66 else "triangle"), colour


def agrees(label, question, answer):
    """Whether an official question and answer fit a measured label."""
    words = question.replace("?", " ").split()
    named = all(w in label for w in words if w in SHAPES or w in COLOURS)
    if answer in ("yes", "no"):
        return (named != ("not" in words or "no" in words)) == (answer == "yes")
    return named and answer in label


def load_split(name):
    """The pictures of an official split, each with its label and its (question, answer) pairs."""
    paths, pairs = getattr(easy_vqa, f"get_{name}_image_paths")(), defaultdict(list)
    for question, answer, image in zip(*getattr(easy_vqa, f"get_{name}_questions")(), strict=True):
        pairs[image].append((question, answer))
    split = []
    for image in sorted(pairs):
        picture = np.asarray(Image.open(paths[image]).convert("RGB"))
        split.append(dict(picture=picture, pairs=pairs[image], label=label_of(picture)))
    if not all(agrees(x["label"], *pair) for x in split for pair in x["pairs"]):
        raise ValueError(f"the labels measured on the {name} pictures do not fit the official answers")
    return split


def make_pairs(rng, label, n_what, n_yes_no):
    """Questions of the official grammar, with as many yes as no answers whatever the question says."""
    shape, colour = label
    what = [(form, shape) for form in WHAT_SHAPE] + [(form, colour) for form in WHAT_COLOUR]
    what = [(form.format(colour if answer == shape else shape), answer) for form, answer in what]
    pairs = rng.sample(what, n_what)
    for _ in range(n_yes_no):
        pool, true = (SHAPES, shape) if rng.random() < 0.35 else (COLOUR_NAMES, colour)
        hit, negated = rng.random() < 0.5, rng.random() < 0.5
        word = true if hit else rng.choice([w for w in pool if w != true])
        thing = word if pool is SHAPES else word + " shape"
        question = rng.choice(NO_FORMS if negated else YES_FORMS).format(thing)
        pairs.append((question, "yes" if hit != negated else "no"))
    return pairs


def sentence_pair(pair, label):
    """The ``describe : `` form of an official question and the sentence that answers it."""
    (question, answer), (shape, colour) = pair, label
    if answer in ("yes", "no"):
        sentence = f"{answer} , there is a {colour} {shape} in the image ."
    elif answer in SHAPES:
        sentence = f"the shape in the image is a {colour} {shape} ."
    else:
        sentence = f"the color of the {shape} is {colour} ."
    return "describe : " + question, sentence


def build_tokenizer():
    """Word-level tokenizer: one token a word, anything else becomes <unk>."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(TOKENS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=TOKENS[1:7],
        clean_up_tokenization_spaces=False,
    )
    tok.chat_template = CHAT_TEMPLATE
    return tok


def build_model(**text_config):
    """A small Qwen2-VL: 8 decoder layers of width 256, 4 vision blocks of width 128; `text_config` overrides."""
    ends = dict(bos_token_id=0, eos_token_id=END, pad_token_id=0)
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[8, 12, 12])
    text = dict(
        vocab_size=math.ceil(len(TOKENS) / 8) * 8,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_parameters=rope,
        **ends,
    )
    text |= text_config
    vision = dict(
        depth=4,
        embed_dim=128,
        hidden_size=256,
        num_heads=4,
        mlp_ratio=4,
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        temporal_patch_size=TEMPORAL,
    )
    return Qwen2VL(
        Qwen2VLConfig(
            text_config=text,
            vision_config=vision,
            tie_word_embeddings=True,
            image_token_id=IMAGE,
            video_token_id=IMAGE + 1,
            vision_start_token_id=3,
            vision_end_token_id=4,
            **ends,
        )
    )


class Heads(nn.Module):
    """Auxiliary read-outs of the hidden state; they only shape training and are not saved with the model."""

    def __init__(self, width=256):
        super().__init__()
        self.dense = nn.Linear(width, 1 + len(COLOURS) * len(SHAPES))
        self.colour, self.shape = nn.Linear(width, len(COLOURS)), nn.Linear(width, len(SHAPES))
        self.match = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 2))
        self.last_match, self.last_negated = nn.Linear(width, 2), nn.Linear(width, 2)


def see(model, pictures):
    """Image tokens (B, tokens, width) of uint8 pictures (B, H, W, 3) of one size."""
    mean, std = torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD])
    x = (torch.as_tensor(pictures) / 255 - mean) / std
    b, h, w, _ = x.shape
    rows, columns = h // PATCH // MERGE, w // PATCH // MERGE
    # The patch order of Qwen2VLImageProcessor; the report, which uses that one, would show a mistake here.
    x = x.permute(0, 3, 1, 2).reshape(b, 3, rows, MERGE, PATCH, columns, MERGE, PATCH)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, TEMPORAL, -1, -1)
    grid = torch.tensor([[1, h // PATCH, w // PATCH]] * b)
    tokens = model.model.visual(x.reshape(b * rows * columns * MERGE**2, -1), grid_thw=grid).pooler_output
    return tokens.view(b, rows * columns, -1)


def pack(tok, items, grid=GRID, flat=False):
    """Pack (label, pairs) items into tensors, one row a picture: the image, then its questions and answers.

    Each question sees the image and itself, and its positions start right after the image, so a row trains
    like its questions one by one but computes the image once. ``labels`` is -100 outside answers; ``match``,
    ``last`` and ``negated`` are targets of the auxiliary heads, -1 where there is none. `flat`: positions are
    one number a token, as in most decoders, and not the three of M-RoPE.
    """
    head, cells = tok("<|im_start|>user\n<|vision_start|>").input_ids, torch.arange(grid * grid)
    prefix = [*head, *[IMAGE] * len(cells), *tok("<|vision_end|>").input_ids]
    # M-RoPE: the picture takes as many positions as it has rows.
    k, after = len(head), len(head) + (len(cells) if flat else grid)
    places_of = (cells,) if flat else (cells * 0, cells // grid, cells % grid)
    axes = [[*range(k), *(k + c).tolist(), after] for c in places_of]
    rows, places = [], []
    for label, pairs in items:
        row, place = [(token, -100, 0, -1, -1, -1) for token in prefix], []
        for number, (question, answer) in enumerate(pairs, 1):
            prompt = tok(question + "<|im_end|>\n<|im_start|>assistant\n").input_ids
            reply = tok(answer + "<|im_end|>").input_ids
            words = [TOKENS[t] for t in prompt]
            match = [int(w in label) if w in SHAPES or w in COLOURS else -1 for w in words]
            row += [(token, -100, number, m, -1, -1) for token, m in zip(prompt, match, strict=True)]
            if answer.split()[0] in ("yes", "no"):
                row[-1] = (prompt[-1], -100, number, -1, max(match), int("not" in words or "no" in words))
            row += [(token, token, number, -1, -1, -1) for token in reply]
            place += range(after + 1, after + 1 + len(prompt) + len(reply))
        rows.append(row)
        places.append(place)
    length = math.ceil(max(map(len, rows)) / 8) * 8
    rows = torch.tensor([row + [(0, -100, -1, -1, -1, -1)] * (length - len(row)) for row in rows])
    out = dict(zip(("ids", "labels", "segment", "match", "last", "negated"), rows.unbind(-1), strict=True))
    full = [[axis + place + [0] * (length - len(axis + place)) for place in places] for axis in axes]
    out["positions"] = torch.tensor(full[0] if flat else full)
    asking, seen = out["segment"][:, :, None], out["segment"][:, None]
    visible = ((seen == 0) | (seen == asking)).tril()
    out["mask"] = torch.zeros(visible.shape).masked_fill(~visible, -1e9)[:, None]
    return out


def forward(model, pictures, batch, see=see):
    """Logits and targets of the answer tokens, and the hidden states before and after each decoder layer.

    `see`: (model, pictures) -> image tokens.
    """
    decoder = model.model.language_model
    with torch.autocast("cpu", torch.bfloat16):
        x = decoder.embed_tokens(batch["ids"])
        x = x.masked_scatter((batch["ids"] == IMAGE)[..., None], see(model, pictures).float())
        out = decoder(
            inputs_embeds=x,
            position_ids=batch["positions"],
            attention_mask=batch["mask"],
            output_hidden_states=True,
            use_cache=False,
        )
    answer = batch["labels"][:, 1:] != -100
    logits = F.linear(out.last_hidden_state[:, :-1][answer].float(), decoder.embed_tokens.weight)
    return logits, batch["labels"][:, 1:][answer], out.hidden_states


def auxiliary_loss(heads, weights, states, batch, items):
    """Loss of the steps to a yes/no answer: see colour and shape, compare with the word, keep that."""

    def after_layer(number, chosen):
        x = states[number][chosen].float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    asked = (batch["segment"] > 0) & (batch["labels"] == -100)
    truth = torch.tensor([(SHAPES.index(s), COLOUR_NAMES.index(c)) for (s, c), _ in items])
    shape, colour = (t[:, None].expand_as(asked)[asked] for t in truth.unbind(1))
    seen = after_layer(3, asked)
    gather = F.cross_entropy(heads.colour(seen), colour) + F.cross_entropy(heads.shape(seen), shape)
    word, last = batch["match"] >= 0, batch["last"] >= 0
    match = F.cross_entropy(heads.match(after_layer(5, word)), batch["match"][word])
    end = after_layer(6, last)
    negated = F.cross_entropy(heads.last_negated(end), batch["negated"][last])
    keep = F.cross_entropy(heads.last_match(end), batch["last"][last]) + negated
    return weights[0] * gather + weights[1] * match + weights[2] * keep


@torch.no_grad()
def held_out_accuracy(model, tok, images, sentences):
    """Share of answers with every token right (teacher forcing), on held-out train pictures."""
    wrong = total = 0
    for start in range(0, len(images), 12):
        some, ask = images[start : start + 12], sentence_pair if sentences else lambda pair, _: pair
        batch = pack(tok, [(x["label"], [ask(p, x["label"]) for p in x["pairs"]]) for x in some])
        logits, target, _ = forward(model, np.stack([x["picture"] for x in some]), batch)
        owner = torch.arange(len(some))[:, None] * 1000 + batch["segment"][:, 1:]  # one number a question
        owner = owner[batch["labels"][:, 1:] != -100]
        wrong += len(owner[logits.argmax(-1) != target].unique())
        total += len(owner.unique())
    return 1 - wrong / total


def vision_step(rng, stage, model, heads, _tok, _images, step):
    """Loss of the vision tower on random scenes; every third batch is larger pictures with more shapes."""
    size, batch = (64, stage.batch) if step % 3 else (96, stage.batch * 5 // 12)
    counts = [rng.choice([1, 1, 1, 2, 3]) if size == 64 else rng.randint(1, 5) for _ in range(batch)]
    pictures, labels = zip(*(draw_scene(rng, size, n) for n in counts), strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = heads.dense(see(model, np.stack(pictures))).float().flatten(0, 1)
    target = torch.tensor(np.stack(labels)).flatten()
    weight = torch.tensor([0.3] + [1.0] * len(COLOURS) * len(SHAPES))  # most image tokens are empty
    right = (logits.argmax(-1) == target)[target > 0].float().mean().item()
    return F.cross_entropy(logits, target, weight=weight), right


def moved(rng, picture):
    """The picture with its shape elsewhere, mirrored or not: as they are, pictures are learnt by heart."""
    shape = picture.min(2) < 225  # the ground is light in all three channels, no shape is
    down, across = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
    shift = rng.randint(-down[0], 63 - down[-1]), rng.randint(-across[0], 63 - across[-1])
    return np.roll(picture, shift, (0, 1))[:, :: -1 if rng.random() < 0.5 else 1]


def answer_step(rng, stage, model, heads, tok, images, _step):
    """Loss of one batch of pictures with their questions, auxiliary losses included."""
    some = rng.sample(images, stage.batch)
    pictures = np.stack([moved(rng, x["picture"]) for x in some])
    items = []
    for label, official in ((x["label"], x["pairs"]) for x in some):
        if stage.name == "sentences":
            pairs = make_pairs(rng, label, 1, 3) + rng.sample(official, min(2, len(official)))
            pairs += [sentence_pair(p, label) for p in make_pairs(rng, label, 2, 5)]
        else:
            pairs = make_pairs(rng, label, 3, 11)
        items.append((label, pairs))
    batch = pack(tok, items)
    logits, target, states = forward(model, pictures, batch)
    loss = F.cross_entropy(logits, target)
    if stage.weights:
        loss = loss + auxiliary_loss(heads, stage.weights, states, batch, items)
    return loss, (logits.argmax(-1) == target).float().mean().item()


def run_stage(stage, seed, model, heads, tok, images):
    """Train one stage. The random state is its own, so a resumed run is the same as one in a piece."""
    rng = random.Random(seed)
    text, of_vision = list(model.model.language_model.parameters()), stage.name == "vision"
    groups = [
        dict(params=list(model.model.visual.parameters()), weight_decay=0.02, scale=stage.vision_lr),
        dict(params=[p for p in text if p.ndim > 1], weight_decay=0.05, scale=1.0),
        dict(params=[p for p in text if p.ndim == 1], weight_decay=0.0, scale=1.0),
        dict(params=list(heads.parameters()), weight_decay=0.0, scale=1.0 if of_vision else 2.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.98))
    next_loss = partial(vision_step if of_vision else answer_step, rng, stage, model, heads, tok, images)
    model.train()
    began, seen = time.time(), []
    for step in range(stage.steps):
        rate = stage.lr * min(1, (step + 1) / stage.warmup, max(0.02, 1.6 * (1 - step / stage.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        loss, right = next_loss(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
        optimizer.step()
        seen.append((loss.item(), right))
        if step % 20 == 19 or step == stage.steps - 1:
            loss, right = np.mean(seen[-20:], 0)
            done = f"{stage.name} {step + 1}/{stage.steps} {time.time() - began:.0f} s"
            print(f"{done} loss {loss:.4f} tokens right {right:.4f}", flush=True)


def train(args, tok):
    """All stages, or the last one from ``--init``; return the model."""
    torch.manual_seed(args.seed)
    model, heads = build_model(), Heads()
    bundle = nn.ModuleDict(dict(model=model, heads=heads))
    images = load_split("train")
    random.Random(0).shuffle(images)  # the same pictures are held out whatever the seed
    held, images = images[:HELD_OUT], images[HELD_OUT:]
    if args.init:
        model.load_state_dict(Qwen2VL.from_pretrained(args.init, dtype=torch.float32).state_dict())
    for number, stage in list(enumerate(STAGES))[-1 if args.init else 0 :]:
        saved = args.work / f"stage-{stage.name}.safetensors"
        if saved.exists():
            load_model(bundle, saved)
            continue
        stage = stage._replace(steps=max(1, round(stage.steps * args.scale)))
        run_stage(stage, args.seed + 1 + number, model, heads, tok, images)
        save_model(bundle, str(saved) + ".part")
        Path(str(saved) + ".part").replace(saved)
        if stage.name != "vision":
            word, sentence = (held_out_accuracy(model.eval(), tok, held, kind) for kind in (False, True))
            print(f"{stage.name}: held-out one-word {word:.4f}, sentences {sentence:.4f}", flush=True)
    return model


PICTURES = dict(
    image_processor_type="Qwen2VLImageProcessor",
    processor_class="Qwen2VLProcessor",
    patch_size=PATCH,
    merge_size=MERGE,
    temporal_patch_size=TEMPORAL,
    min_pixels=64 * 64,
    max_pixels=128 * 128,
    resample=3,
    image_mean=OPENAI_CLIP_MEAN,
    image_std=OPENAI_CLIP_STD,
    do_resize=True,
    do_rescale=True,
    do_normalize=True,
    do_convert_rgb=True,
    rescale_factor=1 / 255,
)
PROCESSOR = {"preprocessor_config.json": PICTURES}


def save(model, tok, out, processor=PROCESSOR):
    """Write a plain HF checkpoint directory, in fp16; `processor`: file name -> content."""
    tok.save_pretrained(out)
    model.generation_config.update(eos_token_id=END, pad_token_id=0, do_sample=False)
    model.half().save_pretrained(out)
    for name, content in processor.items():
        (out / name).write_text(json.dumps(content, indent=1) + "\n")


@torch.no_grad()
def generate(model, tok, processor, pictures, questions, zeroed=False, batch=48, grid=GRID, longest=16):
    """Greedy answers, up to `longest` tokens, to (picture number, question) pairs, as a user would ask them.

    Through the chat template and the image processor; `grid` image tokens on a side.

    The prompt up to the question is the same for all questions of a picture: read once, its cache is reused.
    """
    by_length, reads, answers = defaultdict(list), [], [None] * len(questions)
    for i, (picture, question) in enumerate(questions):
        chat = [dict(role="user", content=[dict(type="image"), dict(type="text", text=question)])]
        text = tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tok(text.replace("<|image_pad|>", "<|image_pad|>" * grid**2)).input_ids
        by_length[len(ids)].append((i, picture, ids))  # batches of one length need no padding
    shared = ids[: ids.index(TOKENS.index("<|vision_end|>")) + 1]
    for start in range(0, len(pictures), batch):
        image = processor([Image.fromarray(p) for p in pictures[start : start + batch]], return_tensors="pt")
        ids = torch.tensor([shared] * len(pictures[start : start + batch]))
        image["pixel_values"] *= 0 if zeroed else 1
        if "image_grid_thw" in image:  # Qwen2-VL asks which tokens are of pictures
            image["mm_token_type_ids"] = (ids == IMAGE).int()
        cache = model(input_ids=ids, **image).past_key_values
        reads.append(torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers]))
    reads = torch.cat(reads, 2)  # layer, key or value, picture, head, token, width
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = model.model.rope_deltas[:1]  # positions lag behind tokens alike everywhere
    for length, rows in sorted(by_length.items()):
        for start in range(0, len(rows), batch):
            numbers, seen, ids = zip(*rows[start : start + batch], strict=True)
            cache, ids = DynamicCache(), torch.tensor(ids)
            for layer, (keys, values) in enumerate(reads[:, :, list(seen)]):
                cache.update(keys, values, layer)
            out = model.generate(ids, past_key_values=cache, max_new_tokens=longest)
            for i, row in zip(numbers, out, strict=True):
                answers[i] = tok.decode(row[length:], skip_special_tokens=True).strip()
    return answers


def share(right, n, z=1.96):
    """A share with its 95 % Wilson interval."""
    p, d = right / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / d, z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return dict(right=right, n=n, share=p, low=middle - half, high=middle + half)


def report(directory, work):
    """Exact match on the whole official test split, and on every tenth question with the image zeroed."""
    tok = AutoTokenizer.from_pretrained(directory)
    processor = Qwen2VLImageProcessorPil.from_pretrained(directory)
    model = Qwen2VL.from_pretrained(directory, dtype=torch.float32).eval()
    split = load_split("test")
    rows = [(i, pair) for i, x in enumerate(split) for pair in x["pairs"]]
    result, wrong = {}, []
    for kind in ("one word", "sentence", "one word, image zeroed", "sentence, image zeroed"):
        zeroed, began = "zeroed" in kind, time.time()
        some = rows[::10] if zeroed else rows
        asked = [sentence_pair(p, split[i]["label"]) if "sentence" in kind else p for i, p in some]
        questions = [(i, q) for (i, _), (q, _) in zip(some, asked, strict=True)]
        said = generate(model, tok, processor, [x["picture"] for x in split], questions, zeroed)
        miss = [(q, a, s) for (q, a), s in zip(asked, said, strict=True) if s != a]
        result[kind] = share(len(asked) - len(miss), len(asked))
        wrong += [] if zeroed else miss
        print(f"{kind}: {result[kind]} {time.time() - began:.0f} s", flush=True)
        (work / "report.json").write_text(json.dumps(dict(result=result, wrong=wrong), indent=1) + "\n")


def main():
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="directory for checkpoints and the report")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--out", type=Path, help="train, and write the model to this directory")
    goal.add_argument("--eval-only", type=Path, help="train nothing, report on this model")
    parser.add_argument("--init", type=Path, help="start from this model and run the last stage only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps of all stages")
    args = parser.parse_args()
    torch.set_num_threads(1)  # on a busy machine several threads are slower than one
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.eval_only:
        tok = build_tokenizer()
        save(train(args, tok), tok, args.out)
    report(args.eval_only or args.out, args.work)


if __name__ == "__main__":
    main()
