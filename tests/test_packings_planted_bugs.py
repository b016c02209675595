"""The readers of checkpoints in few bits are wrong in every way that one mistakes them: the tests of the readers must see it.

One bug per kind of mistake: order inside a word, the zero, the group of an input, the axis, the scale, what is left out.
"""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import test_packings as tests

from cm_export.base.errors import InputError
from cm_export.source import packings
from cm_export.source.packings import awq, compressed_tensors, fp8, gptq

SHARED, GPTQ, AWQ, COMPRESSED, FP8 = "__init__", "gptq", "awq", "compressed_tensors", "fp8"
READERS = {GPTQ: gptq, AWQ: awq, COMPRESSED: compressed_tensors, FP8: fp8}
WORD = "shifts = np.arange(0, 32, bits, dtype=np.uint32)"
ORDERED, ZEROS = (f'_in_order(nibbles(parts["{part}"], 4, axis=1))' for part in ("qweight", "qzeros"))
PACKED_ZEROS, FLOATS = (
    "zero = nibbles(stored.astype(np.int32), bits, axis=0)\n",
    "return eight_bit_floats(parts, scale, {})",
)
OTHER_BITS = 'raise unread(settings, f"{bits!r} bits ({form}, {kind})", where)'
PLANTED = {  # what is wrong: (file, right, wrong)
    "the highest code of a word first": (SHARED, WORD, f"{WORD}[::-1]"),
    "codes along the other axis": (SHARED, "if axis == 1:", "if axis == 0:"),
    "the middle of symmetric codes": (SHARED, "np.float32(1 << (self.bits - 1)) if self.zero", "np.float32(7) if self.zero"),
    "the middle of kept codes": (SHARED, "np.full(self.scale.shape, 1 << (self.bits - 1)", "np.full(self.scale.shape, 8"),
    "no zero": (SHARED, "out -= zero", "out -= 0"),
    "the zero of the first group": (SHARED, "astype(np.float32)[self.groups]\n", "astype(np.float32)[0 * self.groups]\n"),
    "the scale of the first group": (SHARED, "out *= self.scale[self.groups]", "out *= self.scale[0 * self.groups]"),
    "groups taken for neighbours": (SHARED, "return length if together else None", "return length"),
    "groups that do not divide": (SHARED, "if self.length % g == 0), 0)", "if self.length >= g), 0)"),
    "zeros of kept codes": (SHARED, "zero[of_group]", "zero[0 * of_group]"),
    "scales of kept codes": (SHARED, "self.scale[of_group]", "self.scale[0 * of_group]"),
    "scales that are no 16-bit numbers": (SHARED, "return None if exact", "return None if True"),
    "floats divided by their scale": (SHARED, 'parts["weight"] * whole', 'parts["weight"] / whole'),
    "blocks turned": (SHARED, "rows, columns = block or (0, 0)", "columns, rows = block or (0, 0)"),
    "floats not turned": (SHARED, "np.ascontiguousarray((parts[\"weight\"] * whole).T)", "parts[\"weight\"] * whole"),
    "floats of any kind": (SHARED, 'if not parts.dtype("weight").startswith("F8_") or', "if False and"),
    "scales of any kind": (SHARED, "if value.dtype != np.float32:", "if False:"),
    "one less in the zero of v1": (GPTQ, 'if _format(settings) == "gptq":', "if False:"),
    "one more in the zero of v2": (GPTQ, 'if _format(settings) == "gptq":', "if True:"),
    "ones of the other width": (GPTQ, "4: 0x11111111, 8: 0x01010101", "4: 0x11111111, 8: 0x11111111"),
    "zeros along the groups": (GPTQ, "nibbles(zeros, bits, axis=1)", "nibbles(zeros, bits, axis=0)"),
    "codes along the outputs": (GPTQ, 'nibbles(parts["qweight"], bits, axis=0)', 'nibbles(parts["qweight"], bits, axis=1)'),
    "g_idx not read": (GPTQ, 'parts.indices("g_idx") if "g_idx" in parts', "0 * parts['g_idx'] if 1"),
    "group_size -1": (GPTQ, "inputs if count == 1 else", ""),
    "an order that is not there": (GPTQ, '(settings.get("desc_act") and count > 1) or', ""),
    "outputs of a word as they lie": (AWQ, "[0, 4, 1, 5, 2, 6, 3, 7]", "[0, 1, 2, 3, 4, 5, 6, 7]"),
    "the order of a word the other way": (AWQ, "[0, 4, 1, 5, 2, 6, 3, 7]", "[0, 2, 4, 6, 1, 3, 5, 7]"),
    "zeros as they lie": (AWQ, ZEROS, ZEROS.removeprefix("_in_order(")[:-1]),
    "codes as they lie": (AWQ, ORDERED, ORDERED.removeprefix("_in_order(")[:-1]),
    "one group of AWQ": (AWQ, "np.arange(inputs) // (inputs // len(scale))", "np.zeros(inputs, int)"),
    "signed numbers": (COMPRESSED, "(numbers.astype(np.int16) + (1 << (bits - 1)))", "numbers.astype(np.int16)"),
    "packed zeros along the groups": (COMPRESSED, PACKED_ZEROS, PACKED_ZEROS.replace("axis=0", "axis=1")),
    "weight_g_idx not read": (COMPRESSED, "groups = given", "pass"),
    "an order of -1": (COMPRESSED, ".min(initial=0) >= 0:", ".min(initial=0) >= -1:"),
    "numbers not turned": (COMPRESSED, 'np.ascontiguousarray(_unsigned(parts["weight"], 8).T)', '_unsigned(parts["weight"], 8)'),
    "what fills the last word": (COMPRESSED, "axis=1)[:, :inputs].T", "axis=1).T"),
    "bits by the words alone": (COMPRESSED, "sorted(said & {4, 8})", "(4, 8)"),
    "no zeros although asymmetric": (COMPRESSED, "is False for g in own)", "is None for g in own)"),
    "float zeros": (COMPRESSED, 'parts["weight_zero_point"].any()', "False"),
    "blocks not read": (COMPRESSED, FLOATS.format("_block(settings)"), FLOATS.format("None")),
    "packed numbers of 7 bits": (COMPRESSED, OTHER_BITS, "pass"),
    "no blocks where none are said": (FP8, 'settings.get("weight_block_size", _BLOCK)', 'settings.get("weight_block_size")'),
}  # fmt: skip


def changed(name: str, right: str, wrong: str) -> tuple[dict[str, ModuleType], ModuleType]:
    """The readers with one change in one of the files, and what they share."""
    text = (Path(packings.__file__).parent / f"{name}.py").read_text()
    assert right in text, right
    module = _run(text.replace(right, wrong))
    if name != SHARED:
        return {name: module}, packings
    found = {}
    for reader, real in READERS.items():
        found[reader] = _run(Path(real.__file__).read_text())
        for own in ("Matrix", "nibbles", "eight_bit_floats"):
            if hasattr(found[reader], own):
                setattr(found[reader], own, getattr(module, own))
    return found, module


def _run(text: str) -> ModuleType:
    module = ModuleType("planted")
    module.__package__ = packings.__name__
    sys.modules["planted"] = module  # dataclasses look there
    exec(compile(text, "planted", "exec"), module.__dict__)
    return module


def check(readers: dict[str, ModuleType], shared: ModuleType, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """All that test_packings.py says about matrices, of these readers."""
    patch.setattr(tests, "Parts", shared.Parts)
    of = {real: readers.get(name, real) for name, real in READERS.items()}
    for reader, *rest in tests.READ.values():
        if of[reader] is not reader or readers == READERS:
            tests.check_read(of[reader], *rest, folder)
    if {GPTQ, COMPRESSED} & {*readers}:
        for how, word in tests.ODD_GROUPS:
            tests.check_odd_groups(of[gptq], of[compressed_tensors], how, word, folder)
        tests.check_scales(of[gptq], folder)
    for block in tests.BLOCKS if {FP8, COMPRESSED} & {*readers} else ():
        tests.check_floats(of[fp8], of[compressed_tensors], "weight_scale", block, folder)
    tests.check_refused(of, folder)
    for settings in tests.UNREAD.values():
        if (name := str(settings.get("quant_method")).replace("-", "_")) in readers:
            with pytest.raises(InputError):
                readers[name].check(settings, folder)


def test_the_readers_as_they_are_pass(tmp_path, monkeypatch):
    check(READERS, packings, tmp_path, monkeypatch)


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_seen(bug, tmp_path, monkeypatch):
    readers, shared = changed(*PLANTED[bug])
    with pytest.raises(
        (AssertionError, InputError, ValueError, IndexError, TypeError, KeyError, pytest.fail.Exception)
    ):
        check(readers, shared, tmp_path, monkeypatch)
