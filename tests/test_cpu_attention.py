"""CachedAttention inside ONNX Runtime: as near to its meaning in float64 as float32 allows, and each token by itself."""

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from cpu_attention_cases import CASES, LEAST, Sizes, attention, half_a_step
from cpu_attention_cases import widened as meant
from cpu_cases import Call
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_ops import INSTRUCTIONS, best_instructions, compiled, session, use  # noqa: F401 (fixtures)

from cm_export.plugins.cpu import library

SEVERAL = Sizes(N=6, heads=6, kv_heads=2, d=40, past=70, pad=3, holes=0.2, bias=True, norm=True)
FORMS = ["fp32", "fp16", "int8"]
EACH = pytest.mark.parametrize("sizes", [replace(SEVERAL, form=form) for form in FORMS], ids=FORMS)


def run(call: Call, threads: int = 1) -> list[np.ndarray]:
    return session(call, threads).run(None, call.inputs)


def flat(outputs: list[np.ndarray]) -> np.ndarray:
    """Of float16 the bits, of which a number may have several."""
    return np.concatenate([a.ravel().view(np.uint16 if a.dtype == np.float16 else a.dtype) for a in outputs])


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_it_is_attention_over_the_cache_with_the_new_rows(name):
    use(name)
    for seed, sizes in enumerate(CASES):
        call = attention(sizes, seed)
        call.check(flat(run(call)))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.builds(
        Sizes,
        B=st.integers(1, 3),
        N=st.integers(1, 9),
        heads=st.sampled_from([6, 12]),
        kv_heads=st.sampled_from([1, 2, 3, 6]),
        d=st.integers(1, 100),
        past=st.integers(0, 90),
        room=st.integers(0, 20),
        pad=st.integers(0, 20),
        holes=st.sampled_from([0, 0.5]),
        turned=st.sampled_from(["halves", "whole", "nothing"]),
        bias=st.booleans(),
        norm=st.booleans(),
        side=st.booleans(),
        shared=st.booleans(),
        listed=st.sampled_from([0, 0, 7]),
        form=st.sampled_from(FORMS),
    ),
    seed=st.integers(0, 1000),
)
def test_any_sizes(sizes, seed):
    call = attention(sizes, seed)
    call.check(flat(run(call)))


def only(call: Call, tokens: slice, past: list[np.ndarray] | None = None) -> Call:
    """The same call for some of its tokens, over the cache that those before them have left."""
    per_token = {"q": 1, "k": 1, "v": 1, "slots": 2, "mask": 2, "cos": 1, "sin": 1}
    inputs = {n: a[(slice(None),) * per_token[n] + (tokens,)] if n in per_token else a for n, a in call.inputs.items()}
    if past:
        inputs |= dict(zip(("past_key", "past_value"), past, strict=True))
    return replace(call, inputs=inputs)


@pytest.mark.parametrize("name", INSTRUCTIONS)
@pytest.mark.parametrize("threads", [1, 2])
@EACH
def test_a_token_has_the_same_bits_alone_and_among_others(name, threads, sizes):
    use(name)
    call = attention(sizes)
    together, past = run(call, threads), None
    for i in range(sizes.N):
        alone, *past = run(only(call, slice(i, i + 1), past))
        np.testing.assert_array_equal(alone[:, 0], together[0][:, i])
    for one, other in zip(past, together[1:], strict=True):
        np.testing.assert_array_equal(one, other)


def moved(call: Call, rows: int) -> Call:
    """The same request further back in its cache, as beside one that is longer; what it does not see is no number."""
    inputs = dict(call.inputs)
    for name in ("past_key", "past_value"):
        hidden = ~(call.inputs["mask"] > LEAST).any((0, 1, 2))
        nan = 255 if call.inputs[name].dtype == np.uint8 else np.nan  # in a scale as well
        filled = np.where(hidden[:, None], call.inputs[name].dtype.type(nan), call.inputs[name])
        inputs[name] = np.pad(filled, ((0, 0), (0, 0), (rows, 5), (0, 0)), constant_values=nan)
    inputs["mask"] = np.pad(call.inputs["mask"], ((0, 0),) * 3 + ((rows, 5),), constant_values=LEAST)
    inputs["slots"] = call.inputs["slots"] + [0, 0, rows]
    return replace(call, inputs=inputs)


@pytest.mark.parametrize("name", INSTRUCTIONS)
@EACH
def test_neither_where_rows_lie_nor_what_is_hidden_changes_a_bit(name, sizes):
    use(name)
    call = attention(replace(sizes, holes=0.4))
    for rows in (0, 1, 13):
        np.testing.assert_array_equal(run(moved(call, rows))[0], run(call)[0])


@pytest.mark.parametrize("name", INSTRUCTIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_number_shows_where_it_is_read_and_nowhere_else(name, bad, form):
    use(name)
    sizes = Sizes(N=4, heads=4, kv_heads=2, d=24, past=20, form=form)
    call, right = attention(sizes), run(attention(sizes))[0]
    q = call.inputs["q"].copy()
    q[0, 1, 30] = bad  # head 1 of token 1
    found = run(attention(sizes, q=q))[0].reshape(1, 4, 4, 24)
    assert np.isnan(found[0, 1, 1]).all()
    found[0, 1, 1] = right.reshape(1, 4, 4, 24)[0, 1, 1]
    np.testing.assert_array_equal(found.reshape(right.shape), right)
    v = call.inputs["v"].copy()
    v[0, 2, 5] = bad  # number 5 of the first head of keys, from token 2 on
    found = run(attention(sizes, v=v))[0].reshape(4, 4, 24)
    assert not np.isfinite(found[2:, :2, 5]).any() and np.isfinite(found[:2]).all() and np.isfinite(found[:, 2:]).all()


def test_a_token_that_sees_no_row_is_no_number():
    call = attention(Sizes())
    blind = replace(call, inputs=call.inputs | {"mask": np.full_like(call.inputs["mask"], LEAST)})
    assert np.isnan(run(blind)[0]).all()


@EACH
def test_new_rows_are_written_into_the_memory_of_the_cache(sizes):
    call = attention(sizes)
    expected, opened = run(call), session(call)
    memory = {n: ort.OrtValue.ortvalue_from_numpy(call.inputs[f"past_{n}"].copy()) for n in ("key", "value")}
    binding = opened.io_binding()
    for name, array in call.inputs.items():
        if not name.startswith("past_"):
            binding.bind_cpu_input(name, array)
    binding.bind_output("y")
    for name, value in memory.items():
        binding.bind_ortvalue_input(f"past_{name}", value)
        binding.bind_ortvalue_output(f"present_{name}", value)
    opened.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.get_outputs()[0].numpy(), expected[0])
    for value, right in zip(memory.values(), expected[1:], strict=True):
        np.testing.assert_array_equal(value.numpy(), right)


@pytest.mark.parametrize("name", INSTRUCTIONS)
@pytest.mark.parametrize("d", [1, 31, 32, 64, 70, 128])
def test_a_row_in_bytes_is_off_by_half_a_step_and_stays_as_it_is_from_then_on(name, d):
    use(name)
    rng = np.random.default_rng(d)
    rows = (rng.standard_normal((2, 3, 50, d)) * np.exp(4 * rng.standard_normal((2, 3, 50, 1)))).astype(np.float32)
    rows[0, 0, 0], rows[0, 0, 1, 0] = 0, 0
    packed = library.rounded(rows, "int8")
    assert packed.shape == (2, 3, 50, d + 2 * -(-d // 32)) and packed.dtype == np.uint8
    back = library.widened(packed)
    np.testing.assert_array_equal(back, meant(packed, d))
    assert (np.abs(back - rows) <= half_a_step(rows.astype(np.float64), "int8") * (1 + 1e-6)).all()
    assert (np.abs(packed[..., :d].view(np.int8)).max(-1)[rows.any(-1)] == 127).all()
    np.testing.assert_array_equal(library.rounded(back, "int8"), packed)
    np.testing.assert_array_equal(library.rounded(rows[:, :, 7:9], "int8"), packed[:, :, 7:9])
    rows[1, 1, 1, d - 1] = np.inf
    again = library.widened(library.rounded(rows, "int8"))
    others = np.ones(rows.shape, bool)
    others[1, 1, 1, (d - 1) // 32 * 32 :] = False
    assert np.isnan(again[~others]).all()
    np.testing.assert_array_equal(again[others], back[others])


@pytest.mark.parametrize("name", INSTRUCTIONS)
@pytest.mark.parametrize("d", [1, 7, 32, 70])
def test_a_row_of_halves_is_rounded_to_the_nearest_and_stays_as_it_is_from_then_on(name, d):
    use(name)
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)].astype(np.float64)
    between = np.sort(every)[:-1] + np.diff(np.sort(every)) / 2  # halfway: to the even one
    x = np.concatenate([every, between, np.nextafter(between.astype(np.float32), np.inf), [2**-149, -(2**-30)]])
    x = np.random.default_rng(d).permutation(np.resize(x, (-(-x.size // d), d)).astype(np.float32))
    packed = library.rounded(x, "fp16")
    assert packed.dtype == np.float16 and packed.shape == x.shape
    np.testing.assert_array_equal(packed.view(np.uint16), x.astype(np.float16).view(np.uint16))
    back = library.widened(packed)
    np.testing.assert_array_equal(back, packed.astype(np.float32))
    np.testing.assert_array_equal(library.rounded(back, "fp16").view(np.uint16), packed.view(np.uint16))


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_a_number_beyond_float16_becomes_its_largest_one_and_what_is_no_number_stays_none(name):
    use(name)
    large, inf, nan = [65504, 65519.996, 65520, 65536, 1e6, np.finfo(np.float32).max], [np.inf, -np.inf], [np.nan]
    found = library.widened(library.rounded(np.array([*large, *(-x for x in large), *inf, *nan], np.float32), "fp16"))
    np.testing.assert_array_equal(found, [65504] * 6 + [-65504] * 6 + inf + nan)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_a_key_beyond_float16_is_the_one_that_is_looked_at(name):
    use(name)
    sizes = Sizes(form="fp16", turned="nothing", heads=2, kv_heads=1, d=24, past=9, room=0)
    k = attention(sizes).inputs["k"]
    k[..., 3] = 1e6
    call = attention(sizes, k=k)
    call.inputs["q"][...] = np.abs(call.inputs["q"])
    np.testing.assert_array_equal(run(call)[0], np.tile(call.inputs["v"].astype(np.float16).astype(np.float32), 2))


@pytest.mark.parametrize("rows", [np.zeros((2, 36), np.uint8), np.zeros((2, 34), np.float32)])
def test_what_are_no_narrow_rows_is_not_widened(rows):
    with pytest.raises(TypeError, match="not rows of a narrow cache"):
        library.widened(rows)


def test_a_row_that_is_listed_twice_counts_twice():
    sizes = Sizes(past=5, room=0, holes=0, listed=5)
    call = attention(sizes, listed=np.array([[0, 1, 2, 3, 4, 5]], np.int32))
    twice = replace(call, inputs=call.inputs | {"listed": np.array([[0, 1, 2, 3, 3, 4, 5]], np.int32)})
    more = call.inputs["mask"].copy()
    more[..., 3] += np.log(2)
    np.testing.assert_allclose(
        run(twice)[0], run(replace(call, inputs=call.inputs | {"mask": more}))[0], rtol=2e-6, atol=2e-6
    )


def cut(name: str, axis: int):
    def change(call: Call) -> Call:
        return replace(call, inputs=call.inputs | {name: np.delete(call.inputs[name], -1, axis)})

    return change


def with_attributes(**changed: int):
    return lambda call: replace(call, attributes=call.attributes | changed)


def with_slot(row: int):
    return lambda call: replace(call, inputs=call.inputs | {"slots": call.inputs["slots"] * 0 + [0, 0, row]})


def listing(rows: list[list[int]]):
    return lambda call: replace(call, inputs=call.inputs | {"listed": np.array(rows, np.int32).reshape(-1, 2)})


WRONG = {
    "queries too narrow": (cut("q", 2), r"input 0 is \[1,1,23\], expected \[1,1,24\] or wider"),
    "keys of another number of tokens": (cut("k", 1), r"input 1 is \[1,0,24\]"),
    "a cache of other heads": (cut("past_key", 3), r"input 3 is \[1,1,9,23\], expected \[1,1,9,24\]"),
    "values of another length": (cut("past_value", 2), r"input 4 is \[1,1,8,24\], expected \[1,1,9,24\]"),
    "slots": (cut("slots", 3), r"input 5 is \[1,1,1,2\], expected \[1,1,1,3\]"),
    "a row behind the cache": (
        with_slot(9),
        r"slot \[0,0,9\] of request 0, head 0 does not lie in its cache of 9 rows",
    ),
    "a row before the cache": (with_slot(-1), r"slot \[0,0,-1\]"),
    "a mask that is too short": (cut("mask", 3), r"input 6 is \[1,1,1,8\], expected \[1,1,1,9\]"),
    "angles of another width": (cut("cos", 2), r"input 7 is \[1,1,11\], expected \[1,1,12\], and sin the same"),
    "a bias": (cut("k_bias", 0), r"input 10 is \[23\], expected \[24\]"),
    "a norm": (cut("q_norm", 0), r"input 12 is \[23\], expected \[24\]"),
    "a list for nobody": (listing([]), r"input 14 is \[0,2\], expected \[B,M\]"),
    "a row that is not there": (listing([[8, 9]]), "row 9 is listed of a cache of 9"),
    "no whole groups": (with_attributes(heads=3, kv_heads=2), "3 heads of queries, 2 of keys"),
    "heads too wide": (with_attributes(d=600), "d is 600, not 1 to 512"),
    "half a pair turned": (with_attributes(rotary=3), "rotary is 3"),
}


@pytest.mark.parametrize("form, width", [("fp16", 24), ("int8", 26)])
def test_a_narrow_cache_of_another_width_is_refused(form, width):
    message = rf"CachedAttention: input 3 is \[1,2,9,{width - 1}\], expected \[1,2,9,{width}\]"
    with pytest.raises(Exception, match=message):
        run(cut("past_key", 3)(attention(Sizes(form=form))))


def test_keys_of_one_form_and_values_of_another_are_refused():
    call = attention(Sizes(form="fp16"))
    call.inputs["past_value"] = call.inputs["past_value"].astype(np.float32)
    with pytest.raises(Exception, match="CachedAttention"):
        session(call)


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(change, message):
    call = change(attention(Sizes(heads=1, kv_heads=1, bias=True, norm=True)))
    with pytest.raises(Exception, match=f"CachedAttention: {message}"):
        run(call)
