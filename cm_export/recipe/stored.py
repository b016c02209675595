"""The table [weights] of a recipe: in how many bits ONNX Runtime reads each kind of weight; one stored copy serves every graph.

    precision = "int4"  ->  ffn, q, k, o 4 bits      v, head, embedding, vision 8 bits (docs/precision.md)
    ffn = "int8"        ->  that kind alone is another

A TensorRT engine has its own precision ([engine]); its graphs are made from the float32 weights in either case.
"""

from dataclasses import dataclass

from ..base.errors import InputError
from ..quant.cache_rows import CELLS, bytes_of_row
from .option import check_fields, option

PRECISIONS = ("fp32", "int8", "int4")
AUTO = "auto"
BITS = {AUTO: 32, "fp32": 32, "int8": 8, "int4": 4}  # auto: nobody has decided yet, see Recipe.for_model
KINDS = ("ffn", "attention", "value", "head", "embedding", "vision")
_AS_PRECISION = ("", *PRECISIONS)
_SENSITIVE = ("value", "head", "embedding", "vision")  # kinds that stay at 8 bits where 4 are asked for all


@dataclass(frozen=True)
class StoredWeights:
    """The settings of [weights]; a kind that is "" follows `precision`."""

    precision: str = option(
        AUTO,
        "--weights",
        "Bits of the weights on ONNX Runtime; int4 keeps v, head, embedding, vision at 8; auto: int8 of a model that is not tiny",
        choices=(AUTO, *PRECISIONS),
    )
    ffn: str = option("", "", "Bits of the FFNs' weights", choices=_AS_PRECISION)
    attention: str = option("", "", "Bits of the weights of attention's products, q, k and o", choices=_AS_PRECISION)
    value: str = option("", "", "Bits of the values' product, v", choices=_AS_PRECISION)
    head: str = option(
        "", "", "Bits of the LM head; unset, int4 stores a large one in two times 4", choices=_AS_PRECISION
    )
    embedding: str = option(
        "", "", "Bits of the token embedding; one that is the LM head, too, has its bits or fp32", choices=_AS_PRECISION
    )
    vision: str = option("", "", "Bits of the products of the vision tower", choices=_AS_PRECISION)
    cache: str = option(
        "fp32",
        "--cache",
        "Keys and values that decode keeps; fp16: half of the bytes, int8: a quarter, where products of few bits read them",
        choices=tuple(CELLS),
    )
    group: int = option(32, "--weight-group", "Weights along the inputs that share a scale", choices=(32, 64, 128))
    zeros: bool = option(True, "", "Whether a group has a zero point besides its scale, at 4 bits")
    codes: str = option(
        AUTO,
        "--weight-codes",
        "Codes that the checkpoint holds: kept, rounded anew, or auto: kept wherever this loses nothing",
        choices=(AUTO, "kept", "anew"),
    )
    float32: bool = option(
        False,
        "--keep-floats/--no-keep-floats",
        "Whether the bundle keeps the float32 numbers of weights that it stores in few bits",
    )
    least_agreement: float = option(
        0.0,
        "--least-agreement",
        "A build fails where fewer next tokens than this share are as with float32 weights, 0: it only says how many",
        low=0,
        high=1,
    )

    @property
    def is_open(self) -> bool:
        """Whether the model decides."""
        return self.precision == AUTO

    def of(self, kind: str) -> int:
        """Bits of a kind of weight: 4, 8 or 32."""
        own = getattr(self, kind)
        if not own:
            own = "int8" if self.precision == "int4" and kind in _SENSITIVE else self.precision
        return BITS[own]

    @property
    def refines_head(self) -> bool:
        """Whether the head's 8 bits are two times 4, of which a step reads the second only for tokens that may be chosen.

        With `precision` int4, unless head = "int8" asks for 8 bits that are all read.
        """
        return self.precision == "int4" and not self.head

    def storing(self) -> dict[str, int]:
        """What decides the bytes of the packed file."""
        own = {"group": self.group, "zeros": self.zeros, "refines_head": self.refines_head}
        return {kind: self.of(kind) for kind in KINDS} | own

    def row_of_cache(self, width: int) -> int:
        """Bytes of one token's keys or values of a head of `width` numbers, in decode."""
        return bytes_of_row(self.cache if self.packs else "fp32", width)

    @property
    def words(self) -> str:
        """The precision, and kinds that are stored otherwise than it says: "int4", "int4, ffn fp32, cache int8"."""
        others = [f"{kind} {getattr(self, kind)}" for kind in KINDS if getattr(self, kind)]
        return ", ".join([self.precision, *others, *([f"cache {self.cache}"] if self.cache != "fp32" else [])])

    @property
    def packs(self) -> bool:
        """Whether any kind is stored in fewer bits."""
        return any(self.of(kind) < 32 for kind in KINDS)


def check_stored(w: StoredWeights, where: str) -> None:
    """Raises InputError naming the first field that cannot hold."""
    check_fields(w, "weights.", where)
    if w.least_agreement and not (w.packs or w.is_open):
        fix = "give a precision of int8 or int4, or use --require-agreement, which judges the pruning"
        raise InputError("weights.least_agreement with float32 weights", where=where, fix=fix)
