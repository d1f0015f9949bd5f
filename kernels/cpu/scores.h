// Scores of a page's keys with the queries of a group. The page's tokens are the lanes of vectors: no sum runs across
// lanes, and no key is written down.
#pragma once

#include "attention.h"
#include "transpose.h"

constexpr int SPAN_PAGES = 16;  // So many lie between two corrections of the softmax.
constexpr int SPAN = SPAN_PAGES * PAGE;

// Lanes 0, 2, 4 ... or 1, 3, 5 ... of two vectors.
template <int FIRST> INLINE Floats each_second(Floats a, Floats b) {
    Ints lanes;
    for (int i = 0; i < LANES; ++i) lanes[i] = 2 * i + FIRST;
    return __builtin_shuffle(a, b, lanes);
}
// COUNT * PAGE numbers, each COUNT-th of the same row, to rows `step` floats apart; COUNT is a power of two.
template <int COUNT> INLINE void split_rows(const Floats* numbers, float* rows, int step) {
    constexpr int VECTORS = PAGE / LANES;
    if constexpr (COUNT == 1) {
        for (int i = 0; i < VECTORS; ++i) store(rows + i * LANES, numbers[i]);
    } else {
        Floats even[COUNT / 2 * VECTORS], odd[COUNT / 2 * VECTORS];
        for (int i = 0; i < COUNT / 2 * VECTORS; ++i) {
            even[i] = each_second<0>(numbers[2 * i], numbers[2 * i + 1]);
            odd[i] = each_second<1>(numbers[2 * i], numbers[2 * i + 1]);
        }
        split_rows<COUNT / 2>(even, rows, 2 * step);
        split_rows<COUNT / 2>(odd, rows + step, 2 * step);
    }
}
template <int COUNT> INLINE void split_scales(const f16* scales, float* rows) {
    Floats numbers[COUNT * PAGE / LANES];
    for (int i = 0; i < COUNT * PAGE / LANES; ++i) numbers[i] = load(scales + i * LANES);
    split_rows<COUNT>(numbers, rows, PAGE);
}
// Scales of a page's places [PAGE][groups] to rows [groups][PAGE].
INLINE void read_scales(const f16* scales, int groups, float* rows) {
    if (groups == 2) return split_scales<2>(scales, rows);  // Heads of 64 dimensions.
    if (groups == 4) return split_scales<4>(scales, rows);  // Heads of 128.
    if (groups == 8) return split_scales<8>(scales, rows);  // Heads of 256.
    for (int place = 0; place < PAGE; ++place)
        for (int g = 0; g < groups; ++g) rows[g * PAGE + place] = to_float(scales[place * groups + g]);
}

// One head of a page's keys: codes in columns of four bytes, scales in rows.
template <int FORMAT> struct KeyPage {
    alignas(64) uint32_t columns[FORMAT == F16 ? MOST_DIMS / 2 : MOST_DIMS / 4][PAGE];
    alignas(64) float scales[MOST_DIMS / GROUP][PAGE];

    INLINE KeyPage(const Cache& c, int page, int head) {
        const size_t bytes = c.code_bytes();
        transpose(c.key_codes + c.token(page, head) * bytes, bytes, int(bytes), columns[0]);
        if constexpr (FORMAT != F16)
            read_scales(c.key_scales + c.token(page, head) * c.groups(), c.groups(), scales[0]);
    }

    // Codes of dimensions d .. d + 3, not scaled yet; d is a multiple of four.
    struct Four {
        Words words[FORMAT == F16 ? 2 : 1];
        INLINE Floats operator[](int i) const {
            if constexpr (FORMAT == F16)
                return of_f16(__builtin_convertvector(words[i / 2] >> (16 * (i % 2)), Halves));
            const int bits = FORMAT == Q8 ? 8 : 4;
            return __builtin_convertvector((Ints)(words[0] << (32 - bits - 8 * i)) >> (32 - bits), Floats);
        }
    };
    INLINE Four four(int d, int part) const {
        const auto column = [&](int i) { return load_as<Words>(columns[i] + part); };
        if constexpr (FORMAT == F16) return {{column(d / 2), column(d / 2 + 1)}};
        if constexpr (FORMAT == Q8) return {{column(d / 4)}};
        const Words packed = column(d / GROUP * 4 + d % 16 / 4) ^ 0x88888888;  // This makes signed numbers of four bits.
        return {{packed >> (d % GROUP < 16 ? 0 : 4)}};
    }
    INLINE Floats scale(int d, int part) const {
        return FORMAT == F16 ? all(1.0f) : load(scales[d / GROUP] + part);
    }

    // Scores of HEADS queries, each ROW floats after the one before. Pairs (i, i + half) are turned by the cosines and
    // sines `turns` [2][half][PAGE], the second of a pair times its ratio [half] first.
    template <int HEADS>
    INLINE void score(const float* queries, const float* turns, const float* ratios, int half, int dims,
                      float* scores) const {
        for (int part = 0; part < PAGE; part += LANES) {
            Floats acc[HEADS] = {}, other[HEADS] = {}, total[HEADS] = {};
            const auto pair = [&](Floats x, Floats y, int i) __attribute__((always_inline)) {
                const Floats cosine = load(turns + i * PAGE + part), sine = load(turns + (half + i) * PAGE + part);
                y *= ratios[i];
                const Floats first = x * cosine - y * sine, second = y * cosine + x * sine;
                const float* const query = queries + i;
#pragma GCC unroll 8
                for (int g = 0; g < HEADS; ++g) {
                    acc[g] += first * query[g * ROW];
                    other[g] += second * query[g * ROW + half];
                }
            };
            const auto single = [&](Floats x, int d) __attribute__((always_inline)) {
#pragma GCC unroll 8
                for (int g = 0; g < HEADS; ++g) acc[g] += x * queries[g * ROW + d];
            };
            const auto one = [&](int d) __attribute__((always_inline)) {
                return four(d & ~3, part)[d % 4] * scale(d, part);
            };
            int i = 0;
            while (half % GROUP == 0 && i < half) {  // Of each pair of scales one can wait for the sum.
                const Floats own = scale(i, part), outer = own == 0 ? all(0x1p-24f) : own;
                const Floats inner = scale(i + half, part) / outer;
                for (const int end = i + GROUP; i < end; i += 4) {
                    const Four x = four(i, part), y = four(i + half, part);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j) pair(x[j], FORMAT == F16 ? y[j] : y[j] * inner, i + j);
                }
#pragma GCC unroll 8
                for (int g = 0; g < HEADS; ++g) {
                    total[g] += (acc[g] + other[g]) * outer;
                    acc[g] = other[g] = Floats{};
                }
            }
            for (; half % 4 == 0 && i < half; i += 4) {
                const Four x = four(i, part), y = four(i + half, part);
                const Floats scale_x = scale(i, part), scale_y = scale(i + half, part);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) pair(x[j] * scale_x, y[j] * scale_y, i + j);
            }
            for (; i < half; ++i) pair(one(i), one(i + half), i);
            int d = 2 * half;
            for (; d % 4 == 0 && d + 4 <= dims; d += 4) {
                const Four x = four(d, part);
                const Floats scale_x = scale(d, part);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) single(x[j] * scale_x, d + j);
            }
            for (; d < dims; ++d) single(one(d), d);
#pragma GCC unroll 8
            for (int g = 0; g < HEADS; ++g) store(scores + g * SPAN + part, total[g] + acc[g] + other[g]);
        }
    }
};
