// Memory, asked for before it is needed: included like product.h, which includes it.

// Where W is read next, `kAhead` bytes further along its rows: memory answers late, and processors follow by themselves only
// long stretches of few rows. Rows from quad `begin` to `end` are at `panel` of a span, and are followed by those up to `next`.
constexpr int kAhead = 768;

// A line of memory is asked for into the first cache or into the second one. AMD's Zen 4 reads up to twice as fast with the
// second; Intel's Cascade Lake was measured with the first.
static CM_INLINE void ask(const uint8_t* line, bool second_cache) {
    if (second_cache) {
        __builtin_prefetch(line, 0, 2);
    } else {
        __builtin_prefetch(line, 0, 3);
    }
}

template <int bits>
static CM_INLINE void fetch(const Matrix& m, const Rows& rows, const Span* spans, int count, const Span* span, int64_t panel,
                            int begin, int end, int next) {
    constexpr int kBytes = kPanel * bits / 8;
    panel += kAhead / kBytes > 0 ? kAhead / kBytes : 1;
    if (panel >= span->end) {
        panel -= span->end;
        if (++span == spans + count) span = spans, begin = end, end = next;
        panel += span->begin;
        if (panel >= span->end) return;
    }
    const bool second_cache = kSecondCache;
    for (int i = begin * kQuad; i < end * kQuad; ++i)
        for (int line = 0; line < kBytes; line += 64)
            ask(m.codes + static_cast<size_t>(rows.ids[i]) * m.row_bytes() + panel * kBytes + line, second_cache);
}
