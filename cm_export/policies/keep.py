"""Which prompt tokens stay: all text, the best image tokens, in their old order; and how many image tokens are enough.

    score   -  5  9  9  -                keep 2 of 3          scores, sorted  9 |
    token   a <i><i><i> b      ->        a <i><i> b                           7 |.              knee: farthest below
    keep    0     2  3  4                                                     2 |  ` - . _ .    the chord, here 2 tokens

CoreMatching (arXiv 2505.19235, section 3): the "maximum geometric distance" cut equals the argmax of the signed
vertical deviation below the chord, which is exact in int64 when multiplied by n - 1. Ties: the lower position wins.
"""

from __future__ import annotations

from ..base.onnx_text import function
from ._torch import torch

_TEXT = 2**62  # above every image key: scores stay below 2^62 / S


def keep_tokens(
    score: torch.Tensor, image_mask: torch.Tensor, attention_mask: torch.Tensor, image_keep: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept positions, ascending, and which of them count: keep [B,T] int64, kept_mask [B,T] int64.

    score [B,S] int64, 0 <= score < 2^62 / S, read at image positions; image_mask [B,S] bool; attention_mask [B,S]
    int64; image_keep [B] int64. T is the count of the row that keeps most; other rows are filled up with their
    next-ranked tokens, then padding, at kept_mask 0. The last column is always kept, as text: the answer is read there.
    """
    prompt = score.shape[1]
    position = torch.arange(prompt, device=score.device)
    tie_break = prompt - 1 - position
    real = attention_mask > 0
    image = real & image_mask & (position < prompt - 1)
    text = real & ~image
    count = text.sum(1) + torch.minimum(image_keep.clamp_min(0), image.sum(1))
    key = torch.where(image, score * prompt + tie_break, torch.where(text, _TEXT + tie_break, tie_break - prompt))
    kept = int(count.max())
    ranked = key.topk(kept, dim=1).indices
    keep, order = ranked.sort(dim=1)
    counts = torch.arange(kept, device=score.device) < count[:, None]
    return keep, counts.long().gather(1, order)


def knee_count(
    score: torch.Tensor,
    image_mask: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    fallback: torch.Tensor,
    confidence: torch.Tensor,
) -> torch.Tensor:
    """[...] int64: image tokens before the knee of the sorted scores, `fallback` without a knee, within [low, high].

    score [...,S] int64, 0 <= score < 2^62 / S; image_mask [...,S] bool; low, high, fallback [...] int64. A curve has no
    knee where it nowhere lies below its chord (linear, constant, concave, fewer than three tokens), nor where its
    largest deviation is less than confidence [1] thousandths (0..1000) of the range of the scores.
    """
    prompt = score.shape[-1]
    rank = torch.arange(prompt, device=score.device)
    size = image_mask.sum(-1, keepdim=True)
    curve = torch.where(image_mask, score, -1).sort(dim=-1, descending=True).values
    first, last = curve[..., :1], curve.gather(-1, (size - 1).clamp_min(0))
    below = (first - curve) * (size - 1) + (last - first) * rank
    below = torch.where(rank < size, below, 0)
    largest = below.amax(-1)
    knee = torch.where(below == largest[..., None], rank, prompt).amin(-1)
    # the range, scaled as the deviations are; ceil(range * confidence / 1000) without leaving int64
    scaled = ((first - last) * (size - 1)).squeeze(-1).clamp_min(0)
    least = scaled // 1000 * confidence + (scaled % 1000 * confidence + 999) // 1000
    return torch.where(largest >= least.clamp_min(1), knee, fallback).maximum(low).minimum(high)


KEEP_TOKENS = function(f"""
    KeepTokens (score, image_mask, attention_mask, image_keep) => (keep, kept_mask) {{
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        above = Constant <value_int = {_TEXT}> ()
        axis_0 = Constant <value_ints = [0]> ()
        axis_1 = Constant <value_ints = [1]> ()
        prompt = Shape <start = 1> (score)
        size = Squeeze (prompt)
        last = Sub (size, one)
        position = Range (zero, size, one)
        tie_break = Sub (last, position)

        real = Greater (attention_mask, zero)
        before_last = Less (position, last)
        real_image = And (real, image_mask)
        image = And (real_image, before_last)
        not_image = Not (image)
        text = And (real, not_image)
        image64 = Cast <to = 7> (image)
        text64 = Cast <to = 7> (text)
        image_count = ReduceSum <keepdims = 0> (image64, axis_1)
        text_count = ReduceSum <keepdims = 0> (text64, axis_1)
        wanted = Max (image_keep, zero)
        image_kept = Min (wanted, image_count)
        count = Add (text_count, image_kept)
        kept = ReduceMax <keepdims = 1> (count, axis_0)

        scaled = Mul (score, size)
        image_key = Add (scaled, tie_break)
        text_key = Add (tie_break, above)
        padding_key = Sub (tie_break, size)
        other_key = Where (text, text_key, padding_key)
        key = Where (image, image_key, other_key)
        ranked_key, ranked = TopK <axis = 1> (key, kept)
        keep, order = TopK <axis = 1, largest = 0> (ranked, kept)
        kept_size = Squeeze (kept)
        rank = Range (zero, kept_size, one)
        count_col = Unsqueeze (count, axis_1)
        counts = Less (rank, count_col)
        counts64 = Cast <to = 7> (counts)
        kept_mask = GatherElements <axis = 1> (counts64, order)
    }}""")

KNEE_COUNT = function("""
    KneeCount (score, image_mask, low, high, fallback, confidence) => (count) {
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        none = Constant <value_int = -1> ()
        thousand = Constant <value_int = 1000> ()
        almost = Constant <value_int = 999> ()
        axis_last = Constant <value_ints = [-1]> ()
        prompt = Shape <start = -1> (score)
        width = Squeeze (prompt)
        rank = Range (zero, width, one)
        image64 = Cast <to = 7> (image_mask)
        size = ReduceSum <keepdims = 1> (image64, axis_last)
        image_score = Where (image_mask, score, none)
        curve, curve_ids = TopK <axis = -1> (image_score, prompt)

        steps = Sub (size, one)
        last_rank = Max (steps, zero)
        last = GatherElements <axis = -1> (curve, last_rank)
        first = ReduceMax <keepdims = 1> (curve, axis_last)
        drop = Sub (first, curve)
        drop_scaled = Mul (drop, steps)
        slope = Sub (last, first)
        chord = Mul (slope, rank)
        deviation = Add (drop_scaled, chord)
        on_curve = Less (rank, size)
        below = Where (on_curve, deviation, zero)
        # the first of the largest, without ArgMax: its tie rule is an attribute that not every runtime honours
        largest_col = ReduceMax <keepdims = 1> (below, axis_last)
        is_largest = Equal (below, largest_col)
        candidate = Where (is_largest, rank, width)
        knee = ReduceMin <keepdims = 0> (candidate, axis_last)
        largest = Squeeze (largest_col, axis_last)

        range = Sub (first, last)
        range_scaled = Mul (range, steps)
        range_row = Squeeze (range_scaled, axis_last)
        scaled = Max (range_row, zero)
        thousands = Div (scaled, thousand)
        whole = Mul (thousands, thousand)
        rest = Sub (scaled, whole)
        least_whole = Mul (thousands, confidence)
        rest_scaled = Mul (rest, confidence)
        rest_up = Add (rest_scaled, almost)
        least_rest = Div (rest_up, thousand)
        least_sum = Add (least_whole, least_rest)
        least = Max (least_sum, one)
        has_knee = GreaterOrEqual (largest, least)
        chosen = Where (has_knee, knee, fallback)
        at_least = Max (chosen, low)
        count = Min (at_least, high)
    }""")
