"""The harness sees kernels that are wrong: each bug is written into a copy of the sources, compiled and run.

One bug per kind of mistake a kernel can make: which row, which column, which list, which order, what is lost.
"""

import functools

import plugin_builds
import pytest
from conftest import wide

from cm_export.plugins.harness.cases import OPS, calls
from cm_export.plugins.harness.library import Library
from cm_export.plugins.harness.run import Cpu, run

LISTED = "return ids == nullptr ? place : ids[group * listed + place];"
ASCENDING = """if (ids == nullptr) return place;
        for (int32_t i = 0; i < listed; ++i) {
            int32_t smaller = 0;
            for (int32_t j = 0; j < listed; ++j) smaller += ids[group * listed + j] < ids[group * listed + i];
            if (smaller == place) return ids[group * listed + i];
        }
        return -1;"""
WAIT_AND_READ = """        if (start == begin) wait_for_previous();  // z is being written while the first rows come
        float my_z[kRows];
        CM_UNROLL
        for (int r = 0; r < kRows; ++r) my_z[r] = lane < count ? to_float(a.z[tile.row(r) * neurons + mine]) : 0.0f;
"""
WAIT, *READ = WAIT_AND_READ.splitlines(keepends=True)
READ_AND_WAIT = "".join([*READ, WAIT])
KERNELS, ROWS = "core_ffn/kernels.h", "core_ffn/rows.h"
FFN = {  # what is wrong: (file, right, wrong)
    "stride of a row": (ROWS, "+ row * m.columns) + chunk)", "+ row * (m.columns - kColumns)) + chunk)"),
    "stride of a packed row": (ROWS, "+ row * chunks + chunk)", "+ row * (chunks - 1) + chunk)"),
    "last columns of x": (KERNELS, "chunks = static_cast<int>(ceil_div(columns, kColumns));", "chunks = columns / kColumns;"),
    "last columns of y": (KERNELS, "if (column < out.columns && r", "if (column + 1 < out.columns && r"),
    "ids taken as ascending": (KERNELS, LISTED, ASCENDING),
    "ids not read": (KERNELS, LISTED, "return place;"),
    "list of the first request": (KERNELS, LISTED, "return ids == nullptr ? place : ids[place];"),
    "order within a block": (KERNELS, "* block + n % block;", "* block + block - 1 - n % block;"),
    "rows read ahead": (KERNELS, "read_rows(first + kNeurons, next)", "read_rows(first, next)"),
    "a row asked of the wrong lane": (KERNELS, "my_row, (first + i) % kWarp", "my_row, (first + i + 1) % kWarp"),
    "last part of the sum": (KERNELS, "part[k] = s < splits", "part[k] = s + 1 < splits"),
    "z read before it is there": (KERNELS, WAIT_AND_READ, READ_AND_WAIT),
    "no wait for z": (KERNELS, "        if (start == begin) wait_for_previous();", ""),
    "no wait for the parts": (KERNELS, "    wait_for_previous();\n    const int lane", "    const int lane"),
    "last warp of the sum": (KERNELS, "w < kDownWarps; ++w) total", "w < kDownWarps - 1; ++w) total"),
    "z of another row": (KERNELS, "a.z[tile.row(r) * neurons + mine]", "a.z[tile.first * neurons + mine]"),
    "a row of x twice": (KERNELS, "load_numbers<T, kColumns, W::kVector>(a.x + tile.row(r)",
                         "load_numbers<T, kColumns, W::kVector>(a.x + tile.row(r & ~1)"),
    "no barrier before the sum": (KERNELS, "= sum[r][c];\n        __syncthreads();", "= sum[r][c];"),
    "no barrier after the sum": (KERNELS, "        __syncthreads();\n    }\n}", "    }\n}"),
    "group of a scale": (ROWS, "m.group_of(chunk)]", "m.group_of(chunk) / 2]"),
    "group of a scale, one by one": (ROWS, "to_float(scales[column / m.group])", "to_float(scales[0])"),
    "scale of a row left out": (KERNELS, "of_chunk[1] * W::factor(up_raw[i])", "of_chunk[1]"),
    "zero of int4": (ROWS, "half_pair<1, 8>", "half_pair<1, 16>"),
    "order of int8": (ROWS, "(word >> (8 * i))", "(word >> (8 * (1 - i)))"),
    "workspace of fewer rows": ("core_ffn/run.cuh", "const int64_t size = s.rows() * s.columns;",
                                "const int64_t size = (s.rows() * s.columns + 1) / 2;"),
    "z of what lists nothing": (KERNELS, "from_float<T>(0.0f);\n        return;", "from_float<T>(1.0f);\n        return;"),
}  # fmt: skip
LINEAR_KERNEL = "core_linear/kernels.h"
LINEAR = {
    "threshold of the first request": (LINEAR_KERNEL, "a.thresholds[tile.group]", "a.thresholds[0]"),
    "norms not read": (LINEAR_KERNEL, "fabsf(value) * norm < threshold", "fabsf(value) < threshold"),
    "only positive numbers weigh": (LINEAR_KERNEL, "fabsf(value) * norm", "value * norm"),
    "low where another row of x is not": (LINEAR_KERNEL, "x[r] = lane < count && !is_low ?", "x[r] = lane < count ?"),
    "the first row of x decides": (LINEAR_KERNEL, "needed || (lane < count && !is_low)",
                                   "needed || (r == 0 && lane < count && !is_low)"),
    "x of the wrong lane": (LINEAR_KERNEL, "lanes[i] < 0 ? 0 : lanes[i]);", "lanes[i] < 0 ? 0 : lanes[i] ^ 1);"),
    "a row of the weights too far": (LINEAR_KERNEL, "fetch(start + lanes[i], chunk)", "fetch(start, chunk)"),
    "rows read ahead are forgotten": (LINEAR_KERNEL, "raw[i] = next[i];", "raw[i] = typename W::Raw{};"),
    "last of the inputs": (KERNELS, "begin + per_warp < last ? begin + per_warp : last)",
                           "begin + per_warp < last ? begin + per_warp : last - 1)"),
}  # fmt: skip
ATTEND = "core_attention/kernels.h"
ATTENTION = {
    "head of the cache": (ATTEND, "<int64_t>(kv) * s.cached +", "<int64_t>(kv - kv % s.kv_heads) * s.cached +"),
    "stride of a row": (ATTEND, "fetch(a.v + row * s.columns", "fetch(a.v + row / 2 * s.columns"),
    "list of the first request": (ATTEND, "a.ids[static_cast<int64_t>(b) * s.listed + n]", "a.ids[n]"),
    "ids not read": (ATTEND, "a.ids[static_cast<int64_t>(b) * s.listed + n]", "n"),
    "last row of a split": (ATTEND, "a.rows ? end - start : a.rows;", "a.rows ? end - start - 1 : a.rows;"),
    "mask by place": (ATTEND, "position_of(start + i / kQueries)]", "start + i / kQueries]"),
    "mask of the first query": (ATTEND, "query(i % kQueries) % s.queries;", "0;"),
    "mask of the first request": (ATTEND, "(a.mask_batch == 1 ? 0 : b)", "(0)"),
    "scale": (ATTEND, "a.scale * dot", "rsqrtf(s.columns) * dot"),
    "hidden rows": (ATTEND, "score == -INFINITY ? 0.0f : expf(score", "expf(score"),
    "rows before which none was seen": (ATTEND, "m == -INFINITY ? 0.0f : expf(m", "expf(m"),
    "sums of unlike maxima": (ATTEND, "l = l * factor + warp_sum(sum);", "l = l + warp_sum(sum);"),
    "rows of unlike maxima": (ATTEND, "o[j] *= factors[j];", "o[j] *= 1.0f;"),
    "columns past the last": (ATTEND, "eights = (s.columns + 7) / 8;", "eights = s.columns / 8;"),
    "last split": (ATTEND, "sum += weight * l[u];",
                   "sum += start + u * groups + 1 < splits ? weight * l[u] : 0.0f;"),
    "no barrier before the scores": (ATTEND, "i / kQueries)]);\n        }\n        __syncthreads();",
                                     "i / kQueries)]);\n        }"),
    "no barrier before the softmax": (ATTEND, "a.scale * dot;\n        }\n        __syncthreads();", "a.scale * dot;\n        }"),
    "no barrier after the softmax": (ATTEND, "factors[warp] = factor;\n        }\n        __syncthreads();",
                                     "factors[warp] = factor;\n        }"),
    "no barrier before the next rows": (ATTEND, "        __syncthreads();  // before the next rows", "  //"),
    "no barrier before the sums": (ATTEND, "sums[warp] = l;\n    }\n    __syncthreads();", "sums[warp] = l;\n    }"),
    "no wait for the parts": (ATTEND, "    wait_for_previous();\n", ""),
}  # fmt: skip
HOMES = {"CoreFFN": "core_ffn", "CoreAttention": "core_attention", "CoreLinear": "core_linear"}
# One of each kind of mistake in each op; the others, which cost a compiler call each, are planted by `make test-wide`.
QUICK = {
    "CoreFFN": {
        "stride of a packed row", "last columns of x", "list of the first request", "rows read ahead", "last part of the sum",
        "no wait for z", "no barrier before the sum", "zero of int4", "workspace of fewer rows",
    },
    "CoreAttention": {
        "head of the cache", "list of the first request", "last row of a split", "mask of the first query", "scale",
        "hidden rows", "sums of unlike maxima", "columns past the last", "no barrier before the softmax",
        "no wait for the parts",
    },
    "CoreLinear": {"threshold of the first request", "norms not read", "low where another row of x is not"},
}  # fmt: skip
PLANTED = [
    (pytest.param if what in QUICK[op.name] else wide)(op, HOMES[op.name], what, bug, id=f"{op.name}-{what}")
    for op, bugs in zip(OPS, (FFN, ATTENTION, LINEAR), strict=True)
    for what, bug in bugs.items()
]  # fmt: skip


@functools.cache
def half_calls(name: str) -> list:
    """Calls of the op in float16: first every fifth, which are one of each kind, so that most bugs show soon."""
    found = [call for call in calls() if call.op.name == name and call.dtype == "float16"]
    return [*found[::5], *(call for i, call in enumerate(found) if i % 5)]


@pytest.mark.parametrize("op, home, what, bug", PLANTED)
def test_a_planted_bug_is_seen(op, home, what, bug):
    file, right, wrong = bug
    name = f"{home} {what}".replace(" ", "_").replace(",", "")
    prelude = [("#pragma once", "#pragma once\n#include <cmath>\n#define rsqrtf(v) (1.0f / sqrtf(v))")]
    texts = [(right, wrong), *(prelude if "rsqrtf" in wrong else [])]
    library = Library(
        plugin_builds.changed(name, {file: texts}, [f"{home}/run_half.cu"]),
        plugin_builds.emulated().parent / "libcm_harness.so",
    )
    mine = half_calls(op.name)
    assert any(run(library, call, Cpu()).problem for call in mine), f"{len(mine)} calls saw nothing"
