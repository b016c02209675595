"""Who votes on what is core: every real token, the text after the image, or the last token.

    <pad> <pad>  a  <img> <img>  b  <img>  c  d          all   0 0 1 1 1 1 1 1 1
                                                         text  0 0 0 0 0 0 0 1 1        after the last image token
                                                         last  0 0 0 0 0 0 0 0 1

Many background tokens outvote the few that ask the question, so image tokens are best judged by the text after them.
Prompts are padded on the left; image_mask is 0 on padding.
"""

from __future__ import annotations

from ..base.by_name import nearest
from ..base.errors import InputError
from ..base.onnx_text import function
from ._torch import torch


def vote(voters: str, image_mask: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """[B,S] float32, 1 where a token votes; image_mask [B,S] bool, attention_mask [B,S] int64 (1: real token).

    A row without an image, or with no text after it, is voted on by all its real tokens. Raises InputError for another
    name than those in FUNCTIONS.
    """
    real = attention_mask > 0
    position = torch.arange(real.shape[1], device=real.device)
    if voters == "all":
        return real.float()
    if voters == "last":
        return (position == real.shape[1] - 1).expand_as(real).float()
    if voters != "text":
        raise InputError(f"unknown voters {voters!r}", fix=nearest(voters, sorted(FUNCTIONS)))
    last_image = torch.where(image_mask, position, -1).amax(1, keepdim=True)
    text = real & (position > last_image)
    return torch.where(text.any(1, keepdim=True), text, real).float()


FUNCTIONS = {
    "all": function("""
        VoteAll (image_mask, attention_mask) => (vote) {
            zero = Constant <value_int = 0> ()
            real = Greater (attention_mask, zero)
            vote = Cast <to = 1> (real)
        }"""),
    "text": function("""
        VoteText (image_mask, attention_mask) => (vote) {
            zero = Constant <value_int = 0> ()
            one = Constant <value_int = 1> ()
            none = Constant <value_int = -1> ()
            axis_1 = Constant <value_ints = [1]> ()
            prompt = Shape <start = 1> (attention_mask)
            size = Squeeze (prompt)
            position = Range (zero, size, one)
            real = Greater (attention_mask, zero)
            image_position = Where (image_mask, position, none)
            last_image = ReduceMax <keepdims = 1> (image_position, axis_1)
            is_after = Greater (position, last_image)
            is_text = And (real, is_after)
            text = Cast <to = 1> (is_text)
            all = Cast <to = 1> (real)
            any_text = ReduceMax <keepdims = 1> (text, axis_1)
            has_text = Cast <to = 9> (any_text)
            vote = Where (has_text, text, all)
        }"""),
    "last": function("""
        VoteLast (image_mask, attention_mask) => (vote) {
            zero = Constant <value_int = 0> ()
            one = Constant <value_int = 1> ()
            prompt = Shape <start = 1> (attention_mask)
            size = Squeeze (prompt)
            last = Sub (size, one)
            position = Range (zero, size, one)
            is_last = Equal (position, last)
            number = Cast <to = 1> (is_last)
            shape = Shape (attention_mask)
            vote = Expand (number, shape)
        }"""),
}
