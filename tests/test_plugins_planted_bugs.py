"""The harness sees kernels that are wrong: each bug is written into a copy of the sources, compiled and run.

One bug per kind of mistake a kernel can make: which row, which column, which list, which order, what is lost.
"""

import plugin_builds
import pytest
from cm_export.plugins.harness.cases import OPS, calls
from cm_export.plugins.harness.library import Library
from cm_export.plugins.harness.run import Cpu, run

ASCENDING = """int32_t id = 0;
        for (int32_t i = 0; i < listed; ++i) {
            int32_t smaller = 0;
            for (int32_t j = 0; j < listed; ++j) smaller += ids[group * listed + j] < ids[group * listed + i];
            if (smaller == place) id = ids[group * listed + i];
        }"""
LISTED = "const int32_t id = ids[group * listed + place];"
KERNELS, ROWS = "core_ffn/kernels.h", "core_ffn/rows.h"
FFN = {  # what is wrong: (file, right, wrong)
    "stride of a row": (ROWS, "+ row * m.columns) + chunk)", "+ row * (m.columns - kColumns)) + chunk)"),
    "stride of a packed row": (ROWS, "+ row * chunks + chunk)", "+ row * (chunks - 1) + chunk)"),
    "last columns of x": (KERNELS, "chunks = static_cast<int>(ceil_div(columns, kColumns));", "chunks = columns / kColumns;"),
    "last columns of y": (KERNELS, "if (column < columns && r", "if (column + 1 < columns && r"),
    "ids taken as ascending": (KERNELS, LISTED, ASCENDING),
    "ids not read": (KERNELS, LISTED, "const int32_t id = place;"),
    "list of the first request": (KERNELS, LISTED, "const int32_t id = ids[place];"),
    "order within a block": (KERNELS, "+ (n - place * block);", "+ (block - 1 - (n - place * block));"),
    "ids read ahead": (KERNELS, "listed[i] = a.lists.neuron(tile.group, n + kNeurons + i)",
                       "listed[i] = a.lists.neuron(tile.group, n + i)"),
    "last part of the sum": (KERNELS, "part[s] = start + s < splits", "part[s] = start + s + 1 < splits"),
    "last warp of the sum": (KERNELS, "w < kDownWarps; ++w) total", "w < kDownWarps - 1; ++w) total"),
    "z of another row": (KERNELS, "a.z[tile.row(r) * neurons", "a.z[tile.first * neurons"),
    "a row of x twice": (KERNELS, "load_numbers<T, kColumns, W::kVector>(a.x + tile.row(r)",
                         "load_numbers<T, kColumns, W::kVector>(a.x + tile.row(r & ~1)"),
    "no barrier before the sum": (KERNELS, "= sum[r][c];\n        __syncthreads();", "= sum[r][c];"),
    "no barrier after the sum": (KERNELS, "        __syncthreads();\n    }\n}", "    }\n}"),
    "group of a scale": (ROWS, "chunk * kColumns / m.group]", "chunk * kColumns / (2 * m.group)]"),
    "group of a scale, one by one": (ROWS, "to_float(scales[column / m.group])", "to_float(scales[0])"),
    "zero of int4": (ROWS, "8.0f, out + i, out + i + 4", "7.0f, out + i, out + i + 4"),
    "order of int8": (ROWS, "out + i, out + i + 2)", "out + i + 2, out + i)"),
    "workspace of fewer rows": ("core_ffn/run.cuh", "const int64_t size = s.rows() * s.columns;",
                                "const int64_t size = (s.rows() * s.columns + 1) / 2;"),
}  # fmt: skip
ATTEND = "core_attention/kernels.h"
ATTENTION = {
    "head of the cache": (ATTEND, "row = kv * s.cached +", "row = (kv - kv % s.kv_heads) * s.cached +"),
    "stride of a row": (ATTEND, "a.v + row * s.columns, where", "a.v + (row / 2) * s.columns, where"),
    "list of the first request": (ATTEND, "a.ids[static_cast<int64_t>(b) * s.listed + n]", "a.ids[n]"),
    "ids not read": (ATTEND, "a.ids[static_cast<int64_t>(b) * s.listed + n]", "n"),
    "last row of a split": (ATTEND, "if (n < end) position[u] =", "if (n + 1 < end) position[u] ="),
    "mask by place": (ATTEND, "to_float(mask[j][position[u]])", "to_float(mask[j][round + u * teams + team])"),
    "mask of the first query": (ATTEND, "+ i % s.queries;", "+ 0;"),
    "mask of the first request": (ATTEND, "(a.mask_batch == 1 ? 0 : b)", "(0)"),
    "scale": (ATTEND, "a.scale * dot", "rsqrtf(s.columns) * dot"),
    "hidden rows": (ATTEND, "if (score == -INFINITY) return;", ""),
    "teams that saw nothing": (ATTEND, "if (other_m == -INFINITY) return;", ""),
    "sums of unlike maxima": (ATTEND, "l = l * mine + other_l * others;", "l = l + other_l;"),
    "last split": (ATTEND, "sum += weight * part[s * step + columns + 1];",
                   "sum += s + 1 < splits ? weight * part[s * step + columns + 1] : 0.0f;"),
    "no barrier before the warps meet": (ATTEND, "= softmax[j].l;\n        __syncthreads();", "= softmax[j].l;"),
    "no barrier after the warps met": (ATTEND, "        __syncthreads();\n    }\n}", "    }\n}"),
}  # fmt: skip
PLANTED = [(op, file, what, bug) for op, bugs in zip(OPS, (FFN, ATTENTION), strict=True) for what, bug in bugs.items()
           for file in [{"CoreFFN": "core_ffn", "CoreAttention": "core_attention"}[op.name]]]  # fmt: skip


@pytest.mark.parametrize("op, home, what, bug", PLANTED, ids=[f"{p[0].name}-{p[2]}" for p in PLANTED])
def test_a_planted_bug_is_seen(op, home, what, bug):
    file, right, wrong = bug
    name = f"{home} {what}".replace(" ", "_").replace(",", "")
    prelude = [("#pragma once", "#pragma once\n#include <cmath>\n#define rsqrtf(v) (1.0f / sqrtf(v))")]
    texts = [(right, wrong), *(prelude if "rsqrtf" in wrong else [])]
    library = Library(
        plugin_builds.changed(name, {file: texts}, [f"{home}/run_half.cu"]),
        plugin_builds.emulated().parent / "libcm_harness.so",
    )
    mine = [call for call in calls() if call.op is op and call.dtype == "float16"]
    assert any(run(library, call, Cpu()).problem for call in mine), f"{len(mine)} calls saw nothing"
