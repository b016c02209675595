"""Several pictures in one prompt: which token belongs to which, and a quota of its own for each.

token       a <i><i> b <i><i><i> c        the host says which picture a token belongs to: two may stand side by side
picture    -1  0  0 -1  1  1  1 -1
quota       0:1  1:2       ->            the best of each picture: no picture starves because another scores higher
"""

from __future__ import annotations

from ..base.onnx_text import function
from ._torch import torch


def picture_masks(picture: torch.Tensor, image_keep: torch.Tensor) -> torch.Tensor:
    """[B,C,S] bool: the tokens of each picture; image_keep [B,C] says by its size how many pictures there may be."""
    return picture[:, None] == torch.arange(image_keep.shape[1], device=picture.device)[:, None]


def quota(score: torch.Tensor, picture: torch.Tensor, image_keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A score [B,S] int64 of 1 for the image_keep [B,C] best tokens of each picture and 0 elsewhere, and their number [B].

    score [B,S] int64, 0 <= score < 2^62 / S; picture [B,S] int64, -1 for text and padding. Ties: the lower position
    wins. The last column never counts, as in `keep_tokens`, which takes both results.
    """
    prompt = score.shape[1]
    position = torch.arange(prompt, device=score.device)
    counts = (picture >= 0) & (position < prompt - 1)
    key = torch.where(counts, score * prompt + prompt - 1 - position, -1)
    ranked = key.sort(dim=1, descending=True, stable=True).indices
    member = picture_masks(torch.where(counts, picture, -1).gather(1, ranked), image_keep)
    chosen = (member & (member.long().cumsum(2) <= image_keep[..., None])).any(1)
    chosen = torch.zeros_like(chosen).scatter(1, ranked, chosen).long()
    return chosen, chosen.sum(1)


PICTURE_MASKS = function("""
    PictureMasks (picture, image_keep) => (masks) {
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        axis_1 = Constant <value_ints = [1]> ()
        pictures = Shape <start = 1> (image_keep)
        size = Squeeze (pictures)
        number = Range (zero, size, one)
        number_col = Unsqueeze (number, axis_1)
        picture_row = Unsqueeze (picture, axis_1)
        masks = Equal (picture_row, number_col)
    }""")

QUOTA = function("""
    Quota (score, picture, image_keep) => (chosen, count) {
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        none = Constant <value_int = -1> ()
        axis_1 = Constant <value_ints = [1]> ()
        axis_2 = Constant <value_ints = [2]> ()
        prompt = Shape <start = 1> (score)
        size = Squeeze (prompt)
        last = Sub (size, one)
        position = Range (zero, size, one)
        tie_break = Sub (last, position)
        is_image = Greater (picture, none)
        before_last = Less (position, last)
        counts = And (is_image, before_last)
        scaled = Mul (score, size)
        unique = Add (scaled, tie_break)
        key = Where (counts, unique, none)
        ranked_key, ranked = TopK <axis = 1> (key, prompt)
        counted = Where (counts, picture, none)
        ranked_picture = GatherElements <axis = 1> (counted, ranked)

        pictures = Shape <start = 1> (image_keep)
        picture_size = Squeeze (pictures)
        number = Range (zero, picture_size, one)
        number_col = Unsqueeze (number, axis_1)
        picture_row = Unsqueeze (ranked_picture, axis_1)
        member = Equal (picture_row, number_col)
        member64 = Cast <to = 7> (member)
        along = Squeeze (axis_2)
        place = CumSum (member64, along)
        keep_col = Unsqueeze (image_keep, axis_2)
        in_quota = LessOrEqual (place, keep_col)
        taken = And (member, in_quota)
        taken64 = Cast <to = 7> (taken)
        taken_row = ReduceMax <keepdims = 0> (taken64, axis_1)
        nothing = Mul (ranked, zero)
        chosen = ScatterElements <axis = 1> (nothing, ranked, taken_row)
        count = ReduceSum <keepdims = 0> (chosen, axis_1)
    }""")
