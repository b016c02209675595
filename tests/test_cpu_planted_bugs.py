"""The tests of the CPU ops see kernels that are wrong: each bug is written into a copy of the sources, compiled and run.

One bug per kind of mistake: which row, which column, which group, which request, what is lost, what is shared.
"""

import numpy as np
import pytest
from conftest import wide
from cpu_attention_cases import Sizes as Attention
from cpu_attention_cases import attention
from cpu_builds import answers, changed, compiled, folder, linked, objects, prelude
from cpu_cases import Sizes, ffn, matmul
from test_cpu_native import ALL_OPS, ARM, CALLS, PLAIN, usable

from cm_export.plugins.cpu import build

PRODUCT, QUANTISE, OPS, ACTIVATE, KERNELS = "product.h", "quantise.h", "ops.cpp", "activate.h", "kernels.h"
ATTEND, CACHE, PROMPT, ROWS, NORM = "attention.h", "attention.cpp", "prompt.cpp", "rows.h", "norm.cpp"
REFINE, SELECTION = "refine.cpp", "selection.h"
EACH_GROUP = "const int last_quad = rows.first[groups.end];\n    for (int64_t g = groups.begin; g < groups.end; ++g) {"
EACH_ROW = "for (int row = 0; row < rows.count; ++row)\n"
FIRST_ROW = EACH_ROW.replace("rows.count", "1")
TAKE = """if (free_.empty()) return std::make_unique<Scratch>();
        std::unique_ptr<Scratch> scratch = std::move(free_.back());
        free_.pop_back();
        return scratch;"""
TAKE_ONE = "static Scratch* const one = new Scratch;  return std::unique_ptr<Scratch>(one);"
COUNT = "static_cast<int>(std::min<int64_t>(m.inputs - begin, m.group))"
FULL = "numbers == group && ids[numbers - 1] != ids[numbers - kQuad]"
KEPT = "!(std::fabs(x[i]) * norm[i] < threshold)"
ROUNDED = "bits_of(x[i] * factor + 12582912.0f) - bits_of(12582912.0f)"
ROW_SIZE = "return bytes_of_row(cells, width);"
GROUP_SCALE = "m.scale + (g * m.panels + panel) * kPanel;\n    const uint8_t* zero"
OUT = " + (panel - span.begin) * kPanel"
GATE = "k.gate(activation, {} + row * width, {} + row * width,"
FROM = "float* from = static_cast<const float*>(x.data){};"
SHARED = {  # what is wrong: (file, right, wrong)
    "last group": (PRODUCT, EACH_GROUP, EACH_GROUP.replace("g < g", "g + 1 < g")),
    "scale of the first group": (PRODUCT, GROUP_SCALE, GROUP_SCALE.replace("(g * m.panels + panel)", "panel")),
    "zero points of the first panel": (PRODUCT, "m.zero + (g * m.panels + panel) * kPanel", "m.zero + g * m.panels * kPanel"),
    "zero points of one row": (PRODUCT, "(zero + at), rows, row, g);", "(zero), rows, row, g);"),
    "middle of 8 bits": (PRODUCT, "Middle<1 << (bits - 1)>", "Middle<1 << 3>"),
    "x of the first row": (PRODUCT, "x + i * bytes * listed + quad * kQuad", "x + quad * kQuad"),
    "sum of the first row": (PRODUCT, "zeros[c], rows, row + i, g)", "zeros[c], rows, row, g)"),
    "scale of another group": (PRODUCT, "tile.scale + (g - g_begin) * kRegisters + column;", "tile.scale + column;"),
    "rows left over": (PRODUCT, "if (row < end) blocks", "if (row + 1 < end) blocks"),
    "outputs of another panel": (PRODUCT, f"pass.fresh, span.y{OUT});", "pass.fresh, span.y);"),
    "sums begin again in every pass": (PRODUCT, "quad == begin, taken == left", "true, taken == left"),
    "no pass is a group's last": (PRODUCT, "quad == begin, taken == left", "quad == begin, false"),
    "sums of another span": (PRODUCT, "sums += (span.end - span.begin) * kRegisters;", "sums += 0;"),
    "x of the first quads": (PRODUCT, "ids.size() + (pass.quad + q) * kQuad", "ids.size() + q * kQuad"),
    "rows of the first quads": (PRODUCT, "four(now + q * kQuad);", "four(now);"),
    "the last part of the inputs": (OPS, "m.groups() * (part + 1) / parts,", "m.groups() * (part + 1) / (parts + 1),"),
    "what a part adds": (ROWS, "all = Isa::more(all, Isa::load(", "all = (Isa::load("),
    "the rest of what a part adds": (ROWS, "sum[i] += parts[part * apart + i];", "sum[i] += 0;"),
    "the row that a part adds to": (OPS, "partial_.data() + row * stride() + first", "partial_.data() + first"),
    "groups before the last one": (PRODUCT, "before = fresh ? kNoSums : y;", "before = kNoSums;"),
    "groups before the last one of several rows": (PRODUCT, "fresh ? Isa::all(0.0f) : Isa::load(at(i, c));", "Isa::all(0.0f);"),
    "the last quad of all inputs": (OPS, "k < m.inputs ? k : (quads - 1) * kQuad", "k < m.inputs ? k : 0"),
    "squares of the first numbers": (ROWS, "squares += sum[i] * sum[i];", "squares = sum[i] * sum[i];"),
    "squares of whole steps": (ROWS, "return sum[i] * sum[i];", "return sum[i];"),
    "sums of another row": (NORM, "(added.data) + at", "(added.data)"),
    "norms of the first stretch": (OPS, "nullptr : norm + first, from", "nullptr : norm, from"),
    "z of the first stretch": (OPS, "from.x + row * from.stride + first", "from.x + row * from.stride"),
    "where bits of a stretch are kept": (OPS, "row * rows.words + first / 64", "row * rows.words"),
    "codes of the first stretch": (OPS, "down, z, row, first, last);", "down, z, row, 0, last - first);"),
    "all inputs of another product": (OPS, "rows.all_of == m.inputs && rows.in", "rows.in"),
    "all inputs, of which some were left out since": (OPS, "rows.kept = rows.all_of = 0;", "rows.kept = 0;"),
    "what a part adds with many rows": (PRODUCT, "to_y ? Isa::more", "!to_y ? Isa::more"),
    "where up is summed": (OPS, "x.sum(k, row, (half() + begin) * kPanel", "x.sum(k, row, begin * kPanel"),
    "the end of a list": (OPS, "end += kPlaces.count[bits];", "end += 8;"),
    "y not cleared": (PRODUCT, "0, (span->end - span->begin) * kPanel * sizeof(float));", "0, 0);"),
    "filled up numbers count": (QUANTISE, "ids[i] == ids[numbers - kQuad]; --i) out[i] = 0;", "false; --i) out[i] = 0;"),
    "filled up floats count": (QUANTISE, "ids[i] == ids[numbers - kQuad]; --i) out[i] = 0.0f;", "false; --i) out[i] = 0.0f;"),
    "a full group taken for granted": (QUANTISE, FULL, "numbers == group"),
    "upper bytes of one row": (PRODUCT, "Isa::more(of[r], Isa::times_high(high[r]))", "Isa::more(of[r], high[r])"),
    "upper bytes of several rows": (PRODUCT, "Isa::more(sums[i][c], Isa::times_high(high[i][c]))", "sums[i][c]"),
    "the sum of upper bytes": (PRODUCT, "Isa::more(sums, Isa::times_high(high))", "Isa::more(sums, high)"),
    "lower bytes that are the upper": (QUANTISE, "pick(codes[byte], ids", "pick(codes[0], ids"),
    "bytes of the next row": (KERNELS, "static_cast<size_t>(row) * bytes * ids.size()", "static_cast<size_t>(row) * ids.size()"),
    "a part of a group kept, all taken": (QUANTISE, "all &= bits_at(part)", "all |= bits_at(part)"),
    "what is not kept sets the scale": (QUANTISE, "bits >> i & 1 ? x[i] : 0.0f", "x[i]"),
    "one more than the threshold": (QUANTISE, KEPT, "std::fabs(x[i]) * norm[i] > threshold * 1.2f"),
    "the sign of x": (QUANTISE, KEPT, KEPT.replace("std::fabs", "")),
    "cut instead of rounded": (QUANTISE, ROUNDED, "static_cast<int32_t>(x[i] * factor)"),
    "numbers past the end of x": (QUANTISE, COUNT, "m.group"),
    "threshold of the first request": (SELECTION, "threshold[row / rows_of_a_request]", "threshold[0]"),
    "list of the first row": (OPS, f"{EACH_ROW}                any |=", f"{FIRST_ROW}                any |="),
    "up taken for gate": (OPS, GATE.format("gate", "up"), GATE.format("up", "gate")),
    "panels of up": (OPS, "{half() + begin, half() + end, up", "{half() + begin - 1, half() + end - 1, up"),
    "last outputs": (OPS, "(outputs - first) * sizeof(float)", "(outputs - first - 1) * sizeof(float)"),
    "second block of rows": (OPS, FROM.format(" + row * shape.columns"), FROM.format("")),
    "slope of an activation": (ACTIVATE, "return g * sigmoid(1.702f * g);", "return g * sigmoid(1.7f * g);"),
    "scratch of all calls": (OPS, TAKE, TAKE_ONE),
    "the rest of a key": (ATTEND, "if (at < a.width) add_products", "if (at < 0) add_products"),
    "second tile of values": (ATTEND, "std::min(r + kTileRows, a.seen), stride", "std::min<int64_t>(kTileRows, a.seen), stride"),
    "shares of the first head": (ATTEND, "*= inverse[h];", "*= inverse[0];"),
    "scale of the first numbers of a row": (ATTEND, "Isa::scale(row + width + at / kRounded * 2)", "Isa::scale(row + width)"),
    "the rest of a narrow row": (ATTEND, "at + i < width ? there[i] : 0", "0"),
    "the rest of a row of halves is not written": (ATTEND, "halves, count * sizeof *halves);", "halves, count / 4 * 8);"),
    "where halves of a row are written": (ATTEND, "row + begin * sizeof *halves, halves", "row + begin, halves"),
    "cells of a row taken for its bytes": (CACHE, ROW_SIZE, ROW_SIZE.replace("bytes", "cells", 1)),
    "halves beyond their range": (ATTEND, "std::min(std::max(v, -kMost), kMost) : v;", "v : v;"),
    "halves are cut instead of rounded": ("portable.cpp", " + 0xfff + (size >> 13 & 1)) >> 13)", ") >> 13)"),
    "halves below 2^-14": ("portable.cpp", "sign | static_cast<uint32_t>(steps - 12582912.0f)", "sign"),
    "a row of bytes is cut instead of rounded": (ATTEND, "bits += 0x7fff + (bits >> 16 & 1);", "bits += 0x10000;"),
    "where a head's narrow row is written": (CACHE, "kernel.round(cells, made + h * width,", "kernel.round(cells, made,"),
    "what the mask adds": (CACHE, "added[count] = mask[row];", "added[count] = 0.0f;"),
    "list of the first request": (CACHE, "call.listed[b * call.those + i]", "call.listed[i]"),
    "cache of the first request": (CACHE, "(token / call.tokens * kv_heads + kv)", "kv"),
    "angles of the first request": (CACHE, "call.angles_of_each ? token : n", "n"),
    "keys that a neighbour sees": (PROMPT, "key > std::max(seen.end, seen.begin)", "key > std::max(seen.end, call.keys - 1)"),
    "the mask of the first query": (PROMPT, "a.added_apart = call.mask.apart[2];", "a.added_apart = 0;"),
    "keys of the first head": (PROMPT, "head / (call.heads / call.kv_heads);", "0;"),
    "turned keys from the first one on": (PROMPT, "call.turned_of(kv) + seen.begin * call.width;", "call.turned_of(kv);"),
    "the second register of turned keys": (ATTEND, "a.width * kStep + c * Isa::kLanes % kStep);", "a.width * kStep);"),
    "what is filled up": ("shares.h", "for (; i < filled; ++i) scores[i] = kNothing;", ""),
    "where a product's keys begin": (CACHE, "(x.data) + first[index]", "(x.data)"),
    "logits of the first stretch": (REFINE, "begin = i % tasks * kStretch, end", "begin = 0, end"),
    "the last of a block": (REFINE, "for (; n < count; ++n) most[0] = std::max(most[0], values[n]);", ""),
    "the largest of the first row": (REFINE, "blocks_.data() + row * blocks_of_row_, *logits", "blocks_.data(), *logits"),
    "the margin of the first row": (REFINE, "blocks + blocks_of_row_) - margins_[row]", "blocks + blocks_of_row_) - margins_[0]"),
    "outputs that the margin is made of": (REFINE, "left_out(row, outputs_ * i / count)", "left_out(row, i)"),
    "x of the first row, refined": (REFINE, "x_.data() + at * kRemainder, eights_", "x_.data(), eights_"),
    "x below the threshold, refined": (REFINE, "bits_[k / 64] >> (k % 64) & 1 ? x[k] : 0.0f", "x[k]"),
    "the remainder of another output": (REFINE, "remainder_ + output * width_, x_", "remainder_, x_"),
    "upper codes of a remainder": (ROWS, "static_cast<float>(row[j] >> 4)", "static_cast<float>(row[j] & 15)"),
    "scales of a remainder's first groups": (ROWS, "halves + g * sizeof *read, std::min", "halves, std::min"),
    "the middle of a remainder": (ROWS, "return sums[j]; }) - middle;", "return sums[j]; });"),
}  # fmt: skip
OF_HALVES = Attention(form="fp16")
VALUES = attention(OF_HALVES).inputs["v"]
MORE = [
    *(attention(OF_HALVES, v=VALUES * np.float32(size)) for size in (2**-16, 1e5)),
    matmul(Sizes(S=330, K=40, N=129, share=0.5), 3), ffn(Sizes(bits=32, S=2, share=1), "quick_gelu", bits_out=32, z_share=1),
    matmul(Sizes(K=128, N=256, share=0.95, bits=8), 4), matmul(Sizes(K=64, N=8, share=0.5, zeros=True, S=2, B=2), 5),
    matmul(Sizes(K=520, N=129, zeros=True), 6), matmul(Sizes(K=520, N=129, S=2), 7), ffn(Sizes(N=300, zeros=True), seed=8),
    ffn(Sizes(K=520, N=129, S=2, zeros=True), seed=9), ffn(Sizes(K=520, N=129, S=19), seed=10),
    matmul(Sizes(K=520, N=129, share=0), 11), ffn(Sizes(K=128, N=129, group=64, zeros=True), seed=12),
    attention(Attention(B=2, N=3, turned="whole", rotary=8, past=80, shared=True)),
    matmul(Sizes(share=1), 13), matmul(Sizes(), 14), matmul(Sizes(share=1), 15),
]  # fmt: skip


def wrong_answers(run, **how) -> int:
    try:
        found = answers(run, [*CALLS, *MORE], **how)
    except AssertionError:
        return 1  # it crashed
    return sum(_wrong(call, y, how.get("instructions", "")) for call, y in zip([*CALLS, *MORE], found, strict=True))


def _wrong(call, y, instructions: str) -> bool:
    try:
        assert isinstance(y, np.ndarray), y
        call.check(y, instructions)
    except AssertionError:
        return True
    return False


def plain() -> dict:
    """Objects of plain C++ alone: everything but the files of single instruction sets is compiled with it."""
    return objects("plain", ("kPortable",), PLAIN)


def test_the_sources_as_they_are_pass():
    assert wrong_answers(linked(plain().values(), folder() / "plain" / "run"), threads=2, at_once=3) == 0


def with_bug(name: str, made: dict, unit: str, flags: tuple[str, ...], bug: tuple[str, str, str]):
    """The program whose file `unit` was compiled anew with the bug in it, or in a header that it includes."""
    sources = changed(name, *bug)
    made = made | {unit: compiled(sources / unit, (*flags, *prelude()), sources / "changed.o", sources)}
    return linked(made.values(), sources / "run")


# One of each kind of mistake; the others, which cost a compiler call each, are planted by `make test-wide`.
QUICK = {
    "last group", "x of the first row", "sums of another span", "rows of the first quads", "what a part adds",
    "where up is summed", "what is not kept sets the scale", "numbers past the end of x", "threshold of the first request",
    "up taken for gate", "keys that a neighbour sees",
    "codes of the first stretch", "the remainder of another output",
    "slope of an activation", "scratch of all calls", "scale of the first numbers of a row", "halves are cut instead of rounded",
    "AMX: zero points", "AVX-512: upper codes of one row", "AVX-512: x of the first of a few rows",
    "AVX2: signs of x", "ARM: zero points of 8 bits",
    "ARM: order of lanes",
}  # fmt: skip


def quick_or_wide(bugs):
    return [bug if bug in QUICK else wide(bug) for bug in bugs]


@pytest.mark.parametrize("bug", quick_or_wide(SHARED))
def test_a_wrong_kernel_is_seen(bug):
    file = SHARED[bug][0]
    unit = file if file.endswith(".cpp") else "ops.cpp" if file == SELECTION else "portable.cpp"
    run = with_bug(bug.replace(" ", "-"), plain(), unit, ("-O0",), SHARED[bug])
    assert wrong_answers(run) or wrong_answers(run, threads=2, at_once=3)


LANES = "out[8] = vreinterpretq_s32_u16(vzip1q_u16({0}_high, {1}_high));"
ONE_FILE = {
    "AMX: zero points": ("amx-bf16", "amx.cpp", "Isa::less(Isa::all(-256), zero)", "Isa::all(-256)"),
    "AMX: order of two inputs": ("amx-bf16", "amx.cpp", "_pbh(second, first)", "_pbh(first, second)"),
    "AMX: sums of the steps before": ("amx-bf16", "amx.cpp", "of_rows + column, first > begin);", "of_rows + column, false);"),
    "AMX: lower parts of keys": ("amx-bf16", "amx.cpp", "add(0, kTile), add(kTile, 0), add(0, 0);", "add(kTile, 0), add(0, 0);"),
    "AMX: values of the first step": ("amx-bf16", "amx.cpp", "values + step * 2 * kTile, apart,", "values, apart,"),
    "AMX: second value of a pair": ("amx-bf16", "amx.cpp", "beside(one, other));", "beside(one, one));"),
    "AMX: queries that are not there": ("amx-bf16", "amx.cpp", "if (query < a.heads) halve", "if (query < 0) halve"),
    "AMX: second block of rows": ("amx-bf16", "amx.cpp", "x + x_apart, 64)", "x, 64)"),
    "AVX-512: upper codes": ("avx512-vnni", "avx512.h", "_mm512_srli_epi16(both, 4)", "both"),
    "AVX-512: upper codes of one row": ("avx512-vnni", "avx512.h", "_mm512_srai_epi32(v, 4)", "v"),
    "AVX-512: bytes of two codes": ("avx512-vnni", "avx512.h", "_mm512_sub_epi32(a, b)", "a"),
    "AVX-512: x of the first of a few rows": ("avx512-vnni", PRODUCT, "Isa::quad(x + i * listed);", "Isa::quad(x);"),
    "AVX-512: groups before the last of a few rows": ("avx512-vnni", PRODUCT, "sums[i], fresh, y", "sums[i], true, y"),
    "AVX-512: the last of a few rows": ("avx512-vnni", PRODUCT, "row < rows.count;) row = take_at", "row < 0;) row = take_at"),
    "AVX-512: rows of another row": ("avx512-vnni", PRODUCT, "y + (row + i) * stride);", "y + i * stride);"),
    "AVX-512: outputs of another panel": ("avx512-vnni", PRODUCT, f"{OUT};\n        // out of", ";\n        // out of"),
    "AVX-512: sums before zero points": ("avx512-vnni", "avx512.h", "vpdpwssd %2, %1, %0", "vpmaddwd %2, %1, %0"),
    "AVX-512: second half of 8 bits": ("avx512-vnni", "avx512.h", "p2 + 64, p3 + 64", "p2, p3 + 64"),
    "AVX2: products that do not fit": ("avx2", "avx2.cpp", "if constexpr (bits == 4) {  // 2", "if constexpr (true) {  // 2"),
    "AVX-512: halves are cut": ("avx512-vnni", "avx512.h", "_MM_FROUND_TO_NEAREST_INT", "_MM_FROUND_TO_ZERO"),
    "AVX2: halves are cut": ("avx2", "avx2.cpp", "_MM_FROUND_TO_NEAREST_INT", "_MM_FROUND_TO_ZERO"),
    "AVX2: signs of x": ("avx2", "avx2.cpp", "x_odd = _mm256_srai_epi16(x, 8);", "x_odd = _mm256_srli_epi16(x, 8);"),
    "ARM: zero points of 8 bits": ("neon", "neon.h", "bits == 8 ? kOffset : 0;", "bits == 4 ? kOffset : 0;"),
    "ARM: upper bytes": ("neon", "neon.cpp", "vmull_high_s8(w, x)", "vmull_s8(vget_low_s8(w), vget_low_s8(x))"),
    "ARM: order of lanes": ("neon-dot", "neon.h", LANES.format("ab", "cd"), LANES.format("cd", "ab")),
}  # fmt: skip


X86 = {"avx2": ("avx2.cpp", "kAvx2"), "avx512-vnni": ("avx512.cpp", "kAvx512"), "amx-bf16": ("amx.cpp", "kAmx")}


@pytest.mark.parametrize("bug", quick_or_wide(ONE_FILE))
def test_a_wrong_file_of_one_instruction_set_is_seen(bug):
    instructions, *change = ONE_FILE[bug]
    if instructions.startswith("neon"):
        unit, flags = "neon.cpp", ("-O0", "-DCM_NEON_IN_PLAIN_CPP")
        made = objects("arm", ("kNeonDot", "kNeon"), ARM, unit)
    else:
        if build.compiler() and instructions not in usable():
            pytest.skip(f"this processor has no {instructions}")
        unit, kernel = X86[instructions]
        beside = (("avx512.cpp", ("-O0",)),) if unit == "amx.cpp" else ()
        made, flags = objects(instructions, (kernel,), (*ALL_OPS, *beside, (unit, ("-O0",))), unit), ("-O0",)
    run = with_bug(bug.replace(" ", "-").replace(":", ""), made, unit, flags, tuple(change))
    assert wrong_answers(run, instructions=instructions)
