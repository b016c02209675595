"""Weights in few bits: every quantiser and every layout, against the weight, ONNX, ONNX Runtime and the bytes of before."""

import hashlib

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cm_export.base.errors import InputError
from cm_export.bundle import predictor
from cm_export.plugins.core_ffn import pack
from cm_export.quant import packing
from cm_export.quant.error import codes_of, numbers, relative_error
from cm_export.quant.groups import SIZES, fitting
from cm_export.quant.precision import PRECISIONS
from cm_export.quant.rounding import least_squares, nearest
from cm_export.quant.scheme import Quantised, Scheme

QUANTISERS = [nearest, least_squares]
CASES = settings(max_examples=60, deadline=None)
HALF = np.dtype(np.float16)


@st.composite
def schemes(draw):
    """A scheme with groups of any size, one weight and odd sizes included."""
    scale = draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
    return Scheme(draw(st.sampled_from([4, 8])), draw(st.integers(1, 20)), draw(st.sampled_from([0, 1])), scale)


def random_weight(scheme, groups, other, seed, spread=1.0):
    """Gaussian [F,D] of `groups` groups along the axis and `other` along the other one; the first group is zero."""
    rng = np.random.default_rng(seed)
    shape = (other, groups * scheme.group) if scheme.axis else (groups * scheme.group, other)
    weight = (rng.standard_normal(shape) * spread).astype(np.float32)
    weight[(0, slice(scheme.group)) if scheme.axis else (slice(scheme.group), 0)] = 0
    return weight


WEIGHTS = (st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**32 - 1), st.sampled_from([1e-2, 1.0, 50.0]))


# ------------------------------------------------------------------------------------------------ rounding
@CASES
@given(schemes(), *WEIGHTS)
def test_nearest_is_off_by_half_a_step_at_most(scheme, groups, other, seed, spread):
    weight = random_weight(scheme, groups, other, seed, spread)
    found = nearest(weight, scheme)
    step = np.repeat(found.scale.astype(np.float32), scheme.group, axis=scheme.axis)
    # The largest weight of a group may lie beyond the last code by what rounding takes off the scale.
    beyond = float(ml_dtypes.finfo(scheme.scale).eps) * -scheme.lowest
    assert (np.abs(found.numbers() - weight) <= step * (0.5 + beyond + 1e-4)).all()


@CASES
@given(schemes(), *WEIGHTS)
def test_the_scale_search_is_never_worse_than_its_widest_scale(scheme, groups, other, seed, spread):
    weight = random_weight(scheme, groups, other, seed, spread)

    def error(codes, scale):
        off = Quantised(codes, scale, scheme).numbers() - weight
        shape = list(weight.shape)
        shape[scheme.axis : scheme.axis + 1] = [-1, scheme.group]
        return np.square(off).reshape(shape).sum(scheme.axis + 1)

    found = least_squares(weight, scheme)
    shape = list(weight.shape)
    shape[scheme.axis : scheme.axis + 1] = [-1, scheme.group]
    grouped, along = weight.reshape(shape), scheme.axis + 1
    peak = np.take_along_axis(grouped, np.expand_dims(np.abs(grouped).argmax(along), along), along)
    step = (peak / scheme.lowest).astype(scheme.scale)
    step[step.astype(np.float32) == 0] = 1
    codes = np.clip(np.rint(grouped / step.astype(np.float32)), scheme.lowest, -scheme.lowest - 1).astype(np.int8)
    assert (
        error(found.codes, found.scale) <= error(codes.reshape(weight.shape), step.squeeze(along)) * 1.001 + 1e-6
    ).all()


@CASES
@given(schemes(), *WEIGHTS, st.sampled_from(QUANTISERS))
def test_codes_are_within_their_bits_and_a_group_of_zeros_stays_zero(scheme, groups, other, seed, spread, quantiser):
    weight = random_weight(scheme, groups, other, seed, spread)
    found = quantiser(weight, scheme)
    assert found.codes.dtype == np.int8 and found.codes.shape == weight.shape
    assert found.scale.dtype == scheme.scale and found.scale.shape == scheme.scale_shape(weight.shape)
    assert found.codes.min() >= scheme.lowest and found.codes.max() < -scheme.lowest
    assert (found.numbers()[weight == 0] == 0).all() and np.isfinite(found.scale.astype(np.float32)).all()


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("axis", [0, 1])
def test_groups_along_a_column_are_those_along_a_row_of_the_transposed(quantiser, axis):
    weight = random_weight(Scheme(4, 8, axis), 3, 16, seed=5)
    one, other = (quantiser(w, Scheme(4, 8, a)) for w, a in ((weight, axis), (weight.T.copy(), 1 - axis)))
    np.testing.assert_array_equal(one.codes, other.codes.T)
    np.testing.assert_array_equal(one.scale, other.scale.T)


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_of_one_weight_is_that_weight(quantiser, bits):
    weight = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)
    np.testing.assert_allclose(quantiser(weight, Scheme(bits, 1)).numbers(), weight, rtol=0.06)
    np.testing.assert_allclose(nearest(weight, Scheme(bits, 1)).numbers(), weight, rtol=1e-6)


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_name(quantiser, axis, wrong):
    weight = np.ones((8, 8), np.float32)
    weight[3, 5] = wrong
    with pytest.raises(InputError, match=r"layers\.0\.up: a weight is not finite"):
        quantiser(weight, Scheme(4, 8, axis), "layers.0.up")


def test_a_scale_that_its_type_cannot_hold_is_refused():
    weight = random_weight(Scheme(4, 8), 2, 2, seed=0, spread=1e25)
    for quantiser in QUANTISERS:
        with pytest.raises(InputError, match=r"does not fit into float16|too large"):
            quantiser(weight, Scheme(4, 8, scale=HALF))
    with pytest.raises(InputError, match="too large"):
        least_squares(weight, Scheme(4, 8))


def test_sizes_that_do_not_divide_are_refused_in_words():
    for shape, axis, match in (((8, 20), 1, "rows of 20 in groups of 8"), ((20, 8), 0, "columns of 20 in groups of 8")):
        for quantiser in QUANTISERS:
            with pytest.raises(InputError, match=match):
                quantiser(np.ones(shape, np.float32), Scheme(4, 8, axis))
    for wrong, match in ({"bits": 3}, "4 or 8"), ({"group": 0}, "at least 1"), ({"axis": 2}, "axis 0 or 1"):
        with pytest.raises(InputError, match=match):
            Scheme(**{"bits": 4, "group": 8} | wrong)
    with pytest.raises(InputError, match="whole 2s"):
        packing.packed(np.zeros((2, 3), np.int8), 4)
    for bits, whole in ((4, 8), (8, 4)):
        with pytest.raises(InputError, match=f"whole {whole}s"):
            packing.words(np.zeros((2, whole + 2), np.int8), bits)


def test_the_largest_group_that_divides_is_taken():
    assert [fitting(n, "length", where="w", fix="f") for n in (768, 192, 96, 48, 72)] == list(SIZES)
    assert fitting(256, "length", where="w", fix="f", most=64) == 64
    with pytest.raises(InputError, match=r"^w: row length 72 is no multiple of 16; f$"):
        fitting(72, "row length", where="w", fix="f", least=16)


# ------------------------------------------------------------------------------------------------ packing
@CASES
@given(st.sampled_from([4, 8]), st.integers(0, 9), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_every_layout_gives_back_its_codes(bits, rows, eights, seed):
    lowest = Scheme(bits, 8).lowest
    codes = np.random.default_rng(seed).integers(lowest, -lowest, (rows, 8 * eights)).astype(np.int8)
    packed, words = packing.packed(codes, bits), packing.words(codes, bits)
    assert packed.dtype == np.uint8 and packed.shape == (rows, eights * bits)
    assert words.dtype == np.int32 and words.tobytes() == packed.tobytes()
    np.testing.assert_array_equal(codes_of(packed, bits), codes)
    np.testing.assert_array_equal(codes_of(words, bits), codes)
    if rows and eights:
        blocks = packing.blocks(packed, bits, 8)
        assert blocks.shape == (rows, eights, bits)
        halves = np.stack([blocks & 15, blocks >> 4], -1).reshape(codes.shape) if bits == 4 else blocks
        np.testing.assert_array_equal(halves.reshape(codes.shape).astype(int) + lowest, codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_is_packed_as_onnx_and_as_a_number_of_twos_complement(bits):
    lowest = Scheme(bits, 8).lowest
    codes = np.arange(lowest, -lowest).astype(np.int8)[None]
    kind = {4: onnx.TensorProto.INT4, 8: onnx.TensorProto.INT8}[bits]
    tensor = onnx.TensorProto(dims=codes.shape, data_type=kind, raw_data=packing.packed(codes, bits).tobytes())
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), codes)
    word = int(packing.words(codes, bits)[0, 0]) & 0xFFFFFFFF
    assert [word >> (j * bits) & 2**bits - 1 for j in range(32 // bits)] == [
        int(c) % 2**bits for c in codes[0, : 32 // bits]
    ]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_onnx_runtime_multiplies_blocks_as_the_numbers_they_stand_for(bits, quantiser):
    rng, scheme = np.random.default_rng(2), Scheme(bits, 32)
    weight, x = (rng.standard_normal(s).astype(np.float32) for s in ((24, 64), (3, 64)))
    found = quantiser(weight, scheme)
    blocks = packing.blocks(packing.packed(found.codes, bits), bits, 32)
    attributes = {"K": 64, "N": 24, "bits": bits, "block_size": 32}
    node = onnx.helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **attributes)
    given_ = [onnx.numpy_helper.from_array(blocks, "w"), onnx.numpy_helper.from_array(found.scale, "s")]
    ports = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (("x", [3, 64]), ("y", None))]
    graph = onnx.helper.make_graph([node], "g", ports[:1], ports[1:], given_)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ found.numbers().T, rtol=1e-4, atol=1e-4)


def test_both_parts_of_a_weight_come_from_one_fit_in_either_order():
    fits = []

    def fit():
        fits.append(0)
        return nearest(np.ones((2, 8), np.float32), Scheme(4, 8))

    for order in (("codes", "scale"), ("scale", "codes")):
        fits.clear()
        parts = packing.parts(fit, lambda found: packing.packed(found.codes, 4))
        read = {kind: parts[kind]() for kind in order}
        assert len(fits) == 1 and (read["codes"] == 0x77).all() and read["scale"].shape == (2, 1)


# ------------------------------------------------------------------------------------------------ error
@CASES
@given(schemes(), st.integers(0, 2**32 - 1), st.sampled_from(QUANTISERS))
def test_the_error_of_packed_bytes_is_that_of_the_codes(scheme, seed, quantiser):
    weight = random_weight(scheme, 4, 8, seed)
    assume(weight.any() and weight.shape[1] % 8 == 0)
    found = quantiser(weight, scheme)
    expected = np.linalg.norm(found.numbers() - weight) / np.linalg.norm(weight)
    for stored in (packing.packed(found.codes, scheme.bits), packing.words(found.codes, scheme.bits)):
        assert relative_error(weight, stored, found.scale, scheme) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme(8, 128), Scheme(4, 64, 0), Scheme(8, 128, 0)])
def test_a_wrong_pack_or_scale_is_told_from_rounding(scheme):
    weight = np.random.default_rng(3).standard_normal((256, 256)).astype(np.float32)
    found = nearest(weight, scheme)
    stored = packing.packed(found.codes, scheme.bits)
    limit = {4: 0.13, 8: 0.008}[scheme.bits]
    assert 0 < relative_error(weight, stored, found.scale, scheme) < limit
    swapped = stored >> 4 | stored << 4
    for wrong in (np.roll(stored, 1, 0), np.roll(stored, 1, 1), swapped, stored ^ np.uint8(0x88)):
        assert relative_error(weight, wrong, found.scale, scheme) > 3 * limit
    spoilt = found.scale.copy()
    spoilt[1, 1] = np.nan
    assert relative_error(weight, stored, spoilt, scheme) == np.inf


# ------------------------------------------------------------------------------------------------ what is written
def seeded(rows=64, columns=128):
    """Heavy tails and one group of zeros, the same on every machine."""
    even = np.random.PCG64(7).random_raw(rows * columns).astype(np.float64) / 2.0**64 - 0.5
    weight = (8 * even**3).reshape(rows, columns).astype(np.float32)
    weight[1, :64] = 0
    return weight


def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).tobytes()).hexdigest()[:16]


# The bytes that the first version of each writer gave, before they shared one package.
WORDS = {
    ("float32", 4, 64): ("e494c58c999891e1", "5b8b73d0731287a2"),
    ("float32", 8, 128): ("f160e5a9e068b845", "02074f79f21f5f8c"),
    ("float32", 4, 8): ("57a4c4e29cdc3465", "e5722ed753aed0e8"),
    ("float16", 4, 64): ("957e4088edc19fa8", "403b0c7826d59d0f"),
    ("float16", 8, 128): ("5fb7a4fc663e3c0d", "3ca3d4deb0d2cf92"),
    ("float16", 4, 8): ("0d283992c5730a37", "93f2b2d09e8e7bcb"),
    ("bfloat16", 4, 64): ("fad663565d0d22d4", "2512adb15b08d98d"),
    ("bfloat16", 8, 128): ("d8cdd365403be8eb", "0da9830c197fe310"),
    ("bfloat16", 4, 8): ("3fb9073d73eee951", "73656dcdb06bfbf5"),
}
COPIES = {  # packed, scale, blocks
    64: ("7f57ffffd7a99c34", "461a11436bc17d5d", "d12f767f2cf46e4b"),
    32: ("830c108acf655d03", "977f783f53337f46", "32907bbdb9ee6480"),
    16: ("cfe8324b192d93aa", "75de0d9b7ef8a5a4", "81285b2c42f2ccfa"),
}
ENGINES = {  # bits, group, axis: of TensorRT's weight files
    (4, 64, 1): ("957e4088edc19fa8", "403b0c7826d59d0f"),
    (8, 128, 1): ("5fb7a4fc663e3c0d", "3ca3d4deb0d2cf92"),
    (4, 64, 0): ("aae18fc09fe267a2", "16872a888f50d30d"),
    (4, 8, 0): ("4b3139fa391f7b7a", "dd30ef281d82468f"),
}


@pytest.mark.parametrize(("dtype", "bits", "group"), WORDS)
def test_words_of_the_plugin_are_the_bytes_they_always_were(dtype, bits, group):
    words, scale = pack.quantize(seeded().astype(np.dtype(dtype)), bits, group)
    assert (sha(words), sha(scale)) == WORDS[dtype, bits, group]


@pytest.mark.parametrize("group", COPIES)
def test_copies_of_the_predictor_are_the_bytes_they_always_were(group):
    found = least_squares(seeded(), Scheme(4, group))
    packed = packing.packed(found.codes, 4)
    assert (sha(packed), sha(found.scale), sha(packing.blocks(packed, 4, group))) == COPIES[group]
    assert group != 64 or predictor.scheme(128) == Scheme(4, 64)


@pytest.mark.parametrize(("bits", "group", "axis"), ENGINES)
def test_weights_of_engines_are_the_bytes_they_always_were(bits, group, axis):
    from cm_export.backends.tensorrt.quantize import readers

    parts = readers({"w": seeded()}, "w", Scheme(bits, group, axis, HALF), turned=False)
    assert (sha(parts["codes"]()), sha(parts["scale"]())) == ENGINES[bits, group, axis]
    again = readers({"w": np.ascontiguousarray(seeded().T)}, "w", Scheme(bits, group, axis, HALF), turned=True)
    assert (sha(again["codes"]()), sha(again["scale"]())) == ENGINES[bits, group, axis]


def test_an_engine_weight_beyond_16_bit_is_refused_by_name():
    from cm_export.backends.tensorrt.quantize import readers

    weight = seeded()
    weight[5, 5] = 1e6
    for axis in (0, 1):
        with pytest.raises(InputError, match=r"\bw: .*not fit into"):
            readers({"w": weight}, "w", Scheme(4, 64, axis, HALF), turned=False)["scale"]()


def test_a_precision_says_what_it_packs_and_in_how_many_bits():
    assert {n: p.weights.bits for n, p in PRECISIONS.items() if p.packs} == {"int8": 8, "int4": 4}
    for known in PRECISIONS.values():
        assert (known.weights is None) == (not known.packs)
    assert Scheme(4, 64).bits_per_weight == 4.5 and PRECISIONS["int8"].weights.bits_per_weight == 8 + 16 / 128


def test_numbers_of_words_and_of_bytes_are_the_same():
    found = nearest(seeded(), Scheme(4, 32))
    stored = (packing.packed(found.codes, 4), packing.words(found.codes, 4))
    for s in stored:
        np.testing.assert_array_equal(numbers(s, found.scale, found.scheme), found.numbers())
