"""The CPU ops inside ONNX Runtime: every answer lies within the rounding of x, for every instruction set of this machine.

The meaning is computed in float64 from codes, scales and zero points (cpu_cases.py); the bound is worked out per answer.
"""

import threading
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import psutil
import pytest
from cpu_cases import ACTIVATIONS, Call, Sizes, ffn, matmul, model
from hypothesis import given, settings
from hypothesis import strategies as st

from cm_export.base.errors import InputError
from cm_export.plugins.cpu import build, library


@pytest.fixture(scope="module", autouse=True)
def compiled():
    if build.compiler() is None:
        pytest.skip("no C++ compiler: the CPU ops cannot be built here")
    library.built()


@pytest.fixture(autouse=True)
def best_instructions():
    yield
    library.use("")


def session(call: Call, threads: int = 1) -> ort.InferenceSession:
    return session_of(model(call), threads)


def session_of(made: bytes, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are what some tests are after
    options.register_custom_ops_library(str(library.built()))
    return ort.InferenceSession(made, options, providers=["CPUExecutionProvider"])


def run(call: Call, threads: int = 1) -> np.ndarray:
    feeds = {n: a for n, a in call.inputs.items() if n not in call.constants}
    return session(call, threads).run(None, feeds)[0]


INSTRUCTIONS = ("amx-bf16", "avx512-vnni", "avx-vnni", "avx2", "neon-dot", "neon", "portable")


def use(name: str) -> None:
    if name not in library.info()["usable"]:
        pytest.skip(f"this processor has no {name}")
    library.use(name)


SIZES = [
    Sizes(),
    Sizes(K=1, N=1),
    Sizes(K=1, N=1, share=1, S=2),
    Sizes(K=31, N=127, zeros=True),
    Sizes(K=32, N=128),
    Sizes(K=33, N=1, bits=8),
    Sizes(K=200, N=300, bits=8, zeros=True),
    Sizes(K=200, N=257, group=64, zeros=True),
    Sizes(K=390, N=140, group=128),
    Sizes(K=390, N=140, group=128, bits=8, zeros=True),
    Sizes(K=390, N=140, group=128, bits=8, zeros=True, x_bytes=2),
    Sizes(K=700, N=140, bits=8, x_bytes=2, share=0.9),
    Sizes(K=100, N=130, bits=32),
    Sizes(share=0),
    Sizes(share=0, S=3, zeros=True),
    Sizes(share=1),
    Sizes(share=1, S=5, bits=8),
    Sizes(share=0.03),
    Sizes(B=3, S=1),
    Sizes(B=2, S=2, zeros=True, bits=8),
    Sizes(S=2, K=200, N=257, group=64, zeros=True),
    Sizes(S=3, K=33, share=1),
    Sizes(S=4, K=390, N=140, group=128, zeros=True),
    Sizes(S=5, K=520, N=300, zeros=True, share=1),
    Sizes(S=5, N=300, share=0.5),
    Sizes(S=16, zeros=True),
    Sizes(S=17, bits=8),
    Sizes(S=17, bits=8, x_bytes=2, zeros=True),
    Sizes(B=3, S=2, bits=8, x_bytes=2, share=1),
    Sizes(x_bytes=2),
    Sizes(S=17, bits=32, share=0.3),
    Sizes(B=3, S=110, K=290, zeros=True, share=0.9),
    Sizes(B=2, S=170, K=150, bits=8, group=64, share=1),
    Sizes(B=2, S=170, K=40, bits=32),
    Sizes(S=0),
    Sizes(B=0),
    Sizes(share=1, x_bytes=0),
    Sizes(K=1, N=1, share=1, x_bytes=0),
    Sizes(K=33, N=257, S=16, share=1, x_bytes=0, zeros=True),
    Sizes(K=700, N=700, S=33, share=1, x_bytes=0, zeros=True, group=128),
    Sizes(K=290, N=140, S=47, share=1, x_bytes=0, bits=8, group=64),
    Sizes(K=600, N=260, B=2, S=170, share=1, x_bytes=0, bits=8, zeros=True),
    Sizes(K=600, N=260, S=17, share=0.7, x_bytes=0),
    Sizes(S=0, share=1, x_bytes=0),
]


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_products_are_as_near_as_rounding_x_allows(name):
    use(name)
    for seed, sizes in enumerate(SIZES):
        call = matmul(sizes, seed)
        call.check(run(call))


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_ffns_are_as_near_as_rounding_x_and_z_allows(name):
    use(name)
    for seed, (sizes, bits, group) in enumerate(
        [
            (Sizes(), 4, 32),
            (Sizes(zeros=True, N=300, group=64), 8, 64),
            (Sizes(bits=8, S=3), 32, 128),
            (Sizes(bits=8, x_bytes=2), 8, 32),
            (Sizes(bits=32, B=2, S=2, share=1), 4, 32),
            (Sizes(K=1, N=1), 8, 32),
            (Sizes(B=2, S=130, K=70, N=200, zeros=True), 4, 128),
            (Sizes(S=40, K=300, N=1300, zeros=True, share=1, x_bytes=0), 8, 64),
            (Sizes(S=3, K=70, N=200, bits=8, share=1, x_bytes=0), 4, 32),
        ]
    ):
        call = ffn(sizes, bits_out=bits, group_out=group, seed=seed, **({"z_share": 1} if sizes.x_bytes == 0 else {}))
        call.check(run(call))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_has_its_meaning(activation):
    # float weights: only the activation can be off
    call = ffn(Sizes(bits=32, S=3, N=130), activation, bits_out=32)
    call.check(run(call))
    assert call.bound.max() < 1e-3


def test_activations_end_in_their_limits_for_huge_gates():
    call = ffn(Sizes(bits=32, K=4, N=4, share=1), bits_out=32, z_share=1)
    eye, up = np.zeros_like(call.inputs["in_codes"]), np.zeros((32, 128), np.float32)
    eye[:4, :4], up[:4, :4] = np.eye(4), 1
    down = np.zeros_like(call.inputs["out_codes"])
    down[:4, :4] = np.eye(4)
    x = np.array([[[-1e4, -100, 100, 1e4]]], np.float32)
    eye[:4, 128:132] = np.full((4, 4), 1e-4)  # up: 1e-4 times the sum of x
    eye[3, 128:132] = 1.0
    call = replace(call, inputs=call.inputs | {"in_codes": eye, "out_codes": down, "x": x})
    up_out = float(x[0, 0, :3].sum() * 1e-4 + x[0, 0, 3])
    for name, expected in {
        "silu": [0, 0, 100, 1e4], "gelu": [0, 0, 100, 1e4], "gelu_new": [0, 0, 100, 1e4], "quick_gelu": [0, 0, 100, 1e4],
        "mish": [0, 0, 100, 1e4], "tanh": [-1, -1, 1, 1], "sigmoid": [0, 0, 1, 1], "leaky_relu": [-100, -1, 100, 1e4],
    }.items():  # fmt: skip
        y = run(replace(call, attributes=call.attributes | {"activation": name}))
        np.testing.assert_allclose(y[0, 0] / up_out, expected, rtol=1e-5, atol=1e-30)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.builds(
        Sizes,
        K=st.integers(1, 150),
        N=st.integers(1, 260),
        B=st.integers(1, 3),
        S=st.sampled_from([1, 1, 2, 3, 5, 20]),
        bits=st.sampled_from([4, 8, 32]),
        group=st.sampled_from([32, 64, 128]),
        zeros=st.booleans(),
        share=st.floats(0, 1),
        x_bytes=st.sampled_from([0, 1, 2]),
    ),
    seed=st.integers(0, 1000),
    place=st.integers(0, len(INSTRUCTIONS) - 1),
)
def test_any_size_is_right(sizes, seed, place):
    usable = library.info()["usable"]
    library.use(usable[place % len(usable)])
    call = matmul(sizes, seed)
    call.check(run(call))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bits", [4, 8, 32])
def test_what_is_no_number_shows_in_its_own_row_only(bad, bits):
    x = np.random.default_rng(0).standard_normal((2, 2, 100)).astype(np.float32)
    clean = run(matmul(Sizes(B=2, S=2, bits=bits), x=x))
    x[1, 0, 70] = bad
    y = run(matmul(Sizes(B=2, S=2, bits=bits), x=x))
    assert not np.isfinite(y[1, 0]).any()
    assert np.array_equal(y[0], clean[0])
    assert np.isfinite(y[1, 1]).all()


def test_what_is_no_number_and_not_kept_is_not_read():
    call = matmul(Sizes(share=0.5))
    x, threshold = call.inputs["x"].copy(), np.array([[np.inf]], np.float32)
    y = run(replace(call, inputs=call.inputs | {"x": x, "threshold": threshold}))
    assert not y.any()


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-37, 1e-20, 1e20, 1e37])
def test_tiny_and_huge_numbers_of_x_stay_within_the_bound(size):
    x = (np.random.default_rng(1).standard_normal((1, 2, 100)) * size).astype(np.float32)
    for bits in (4, 8, 32):
        call = matmul(Sizes(S=2, bits=bits, share=1), x=x)
        call.check(run(call))


def test_a_row_has_the_same_answer_alone_and_among_others_whoever_computes_it():
    two_bytes = Sizes(S=40, K=290, N=300, zeros=True, bits=8, x_bytes=2)
    few = [Sizes(S=n, K=290, N=300, zeros=True) for n in (2, 3, 4, 5, 6)]
    for sizes in (*few, Sizes(S=40, K=290, N=300, zeros=True), Sizes(S=40, bits=8), Sizes(S=300, bits=32), two_bytes):
        call = matmul(sizes)
        together = run(call)
        assert np.array_equal(together, run(call, threads=2))
        for row in (0, sizes.S - 1):
            alone = replace(call, inputs=call.inputs | {"x": call.inputs["x"][:, row : row + 1]})
            assert np.array_equal(run(alone)[:, 0], together[:, row])
            assert np.array_equal(run(alone, threads=2)[:, 0], together[:, row])


def test_an_ffn_has_the_same_answer_with_any_number_of_threads():
    for S in (1, 5, 40):
        call = ffn(Sizes(S=S, K=300, N=700, zeros=True))
        assert np.array_equal(run(call), run(call, threads=2))


def test_a_session_may_run_in_several_threads_at_once():
    call = ffn(Sizes(S=3, K=200, N=500))
    shared, feeds = session(call, 2), {n: a for n, a in call.inputs.items() if n not in call.constants}
    expected, answers = shared.run(None, feeds)[0], []
    work = [
        threading.Thread(target=lambda: answers.extend(shared.run(None, feeds)[0] for _ in range(20))) for _ in range(4)
    ]
    [t.start() for t in work], [t.join() for t in work]
    assert len(answers) == 80 and all(np.array_equal(a, expected) for a in answers)


def test_the_layers_of_a_model_share_what_they_work_in():
    """A prompt of hundreds of tokens needs megabytes for its neurons; each layer would keep its own until the process ends."""
    call, layers = ffn(Sizes(S=256, K=32, N=6000)), 12
    chain = onnx.load_from_string(model(call))
    node = chain.graph.node[0]
    for i in range(1, layers):
        further = onnx.NodeProto.FromString(node.SerializeToString())
        further.input[0], further.output[0] = f"y{i}", f"y{i + 1}"
        chain.graph.node.append(further)
    node.output[0] = "y1"
    chain.graph.node[-1].output[0] = "y"
    ready, feeds = (
        session_of(chain.SerializeToString()),
        {n: a for n, a in call.inputs.items() if n not in call.constants},
    )
    before = psutil.Process().memory_info().rss
    ready.run(None, feeds)
    of_one = 256 * 6000 * 4  # bytes of activations
    assert psutil.Process().memory_info().rss - before < 5 * of_one


@pytest.mark.parametrize(
    "sizes", [Sizes(), Sizes(bits=8, zeros=True, B=2, S=3), Sizes(bits=32, S=20), Sizes(share=0), Sizes(share=1)]
)
def test_counts_are_the_bytes_of_the_rows_that_were_read(sizes):
    call = matmul(sizes)
    ready = session(call)
    library.reset()
    ready.run(None, {n: a for n, a in call.inputs.items() if n not in call.constants})
    padding = call.inputs["w_codes"].shape[0] - sizes.K
    assert library.counts() == (call.read, call.dense) and padding >= 0
    library.reset()
    assert library.counts() == (0, 0)


# ---------------------------------------------------------------- what is refused


REFUSED = [
    ({"bits": 3}, {}, "bits are 3, not 4, 8 or 32"),
    ({"group": 48}, {}, "a group of 48, not 32, 64 or 128"),
    ({"N": 0}, {}, "N is 0"),
    ({"x_bytes": 3}, {}, "x_bytes are 3, not 0, 1 or 2"),
    ({"N": 300}, {}, "input 1 (codes) is [128,128], expected [128,192]"),
    ({"bits": 8}, {}, "input 1 (codes) is [128,128], expected [128,256]"),
    ({"bits": 32}, {}, "input 1 (codes) must be float32 with bits 32"),
    ({"group": 64}, {}, "input 2 (scale) is [4,256], expected [2,256]"),
    ({}, {"w_zero": np.zeros((4, 128), np.uint8)}, "input 3 (zero) is [4,128], expected [4,256] or no elements"),
    ({}, {"norm": np.zeros(99, np.float32)}, "input 4 (norm) is [99], expected [100] or [0]"),
    ({}, {"threshold": np.zeros((1, 1), np.float32)}, "input 5 (threshold) is [1,1] for 2 requests"),
    ({}, {"x": np.zeros(100, np.float32)}, "x is [100], expected [B,S,K] or [S,K]"),
    ({}, {"x": np.zeros((2, 1, 200), np.float32)}, "input 1 (codes) is [128,128], expected [224,128]"),
]


@pytest.mark.parametrize("attributes, inputs, message", REFUSED, ids=[r[2] for r in REFUSED])
def test_what_does_not_fit_is_refused_with_the_reason(attributes, inputs, message):
    call = matmul(Sizes(B=2))
    wrong = replace(call, attributes=call.attributes | attributes, inputs=call.inputs | inputs)
    with pytest.raises(Exception) as raised:
        run(wrong)
    assert f"PackedMatMul: {message}" in str(raised.value)


@pytest.mark.parametrize("gone", ["bits_in", "group_out", "D", "F", "activation"])
def test_an_ffn_without_an_attribute_is_refused(gone):
    call = ffn(Sizes())
    attributes = {n: v for n, v in call.attributes.items() if n != gone}
    with pytest.raises(Exception, match=f"PackedFFN: the attribute {gone} .* is missing"):
        run(replace(call, attributes=attributes))


def test_an_unknown_activation_is_refused_by_name():
    call = ffn(Sizes())
    with pytest.raises(Exception, match="PackedFFN: the activation 'sillu' is not known"):
        run(replace(call, attributes=call.attributes | {"activation": "sillu"}))


def test_instructions_that_are_not_there_are_refused():
    with pytest.raises(InputError, match="mmx: this processor does not have these instructions"):
        library.use("mmx")
