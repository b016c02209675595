"""A later question is read over a whole cache: keys of every row are at hand, queries and activations of new rows only.

context   a <i><i> b   answer  c d        neuron votes  . . . .   1   1 1   ->   1   1 1      every new row counts
new rows               answer  c d        token votes   . . . .   .   1 1   ->   .   1 1      the question judges
question                       c d        logits of d only: nobody reads the others
"""

import numpy as np
import onnx_graphsurgeon as gs

from ..base.errors import SurgeryError
from .edit import Edit


def of_new_rows(edit: Edit, votes: gs.Variable) -> gs.Variable:
    """Votes of a context [B,P+N] -> those of its new rows [B,N]."""
    first = edit.op("Neg", edit.op("Shape", edit.input("inputs_embeds"), start=1, end=2))
    return edit.op("Slice", votes, first, edit.constant([2**62], np.int64), edit.constant([1], np.int64))


def of_question(edit: Edit, votes: gs.Variable) -> gs.Variable:
    """The same, zero before the last `question` rows (an input [1] int64): the earlier answer does not judge."""
    size = edit.op("Shape", edit.input("inputs_embeds"), start=1, end=2)
    number = edit.op("Squeeze", size)
    row = edit.op("Range", edit.constant(0, np.int64), number, edit.constant(1, np.int64))
    asks = edit.op("GreaterOrEqual", row, edit.op("Sub", size, edit.add_input("question", np.int64, [1])))
    return edit.op("Mul", of_new_rows(edit, votes), edit.op("Cast", asks, to=1))


def last_logits(edit: Edit, batch: str, vocab: int) -> None:
    """Output logits [B,N,V] -> [B,V], of the last row; the product with the head is made for that row only."""
    logits = next(t for t in edit.graph.outputs if t.name == "logits")
    head = logits.inputs[0]
    if head.op != "MatMul":
        raise SurgeryError(f"logits come from {head.op}, not from a MatMul", where=edit.graph.name)
    head.inputs[0] = edit.op("Gather", head.inputs[0], edit.constant(-1, np.int64), axis=1)
    logits.shape = [batch, vocab]
