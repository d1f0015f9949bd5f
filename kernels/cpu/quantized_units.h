// Blocks of GGUF times some rows of x in fixed point: all groups are of one size, so that loops have no ends to look for, and
// scales of the groups of a unit are read together. The numbers and their order are those of quantized_groups.h.
#pragma once

#include "quantized_groups.h"

namespace quantized {

// How scales lie: a float16 for each group, perhaps with a min; or for a unit of 256 rows, times codes of a byte, of
// four bits for scales and mins, and of six bits for scales alone or both. See QuantizedMatrix.
enum Scaling { OTHER, PLAIN, WITH_MINS, BYTES, NIBBLES, SIX_BITS, SIX_BIT_PAIRS };

constexpr int UNIT_ROWS = 256;

INLINE Scaling scaling_of(const Matrix& m) {
    if (!m.group_rows || m.zeros || m.scale_kind != FLOAT16) return OTHER;
    if (!m.scale_codes) return m.group_rows != 32 ? OTHER : m.mins ? WITH_MINS : PLAIN;
    if (m.group_rows << m.unit_shift != UNIT_ROWS) return OTHER;
    if (m.are_six_bits) return m.mins ? SIX_BIT_PAIRS : SIX_BITS;
    return m.mins ? NIBBLES : BYTES;
}

template <Scaling SCALING> constexpr bool HAS_MINS = SCALING == WITH_MINS || SCALING == NIBBLES || SCALING == SIX_BIT_PAIRS;

// Scales, and mins, of COUNT groups that have one unit.
template <Scaling SCALING, int COUNT>
INLINE void read_scales(const Matrix& m, size_t unit, Tile (&scales)[COUNT], Tile (&mins)[COUNT]) {
    for (int p = 0; p < PARTS; ++p) {
        const size_t at = unit * OUTPUTS + p * LANES;
        const Floats scale = load((const f16*)m.scales + at);
        const Floats min = HAS_MINS<SCALING> ? load(m.mins + at) : Floats{};
        const auto put = [&](int i, Ints of_scale, Ints of_min) __attribute__((always_inline)) {
            scales[i].part[p] = scale * __builtin_convertvector(of_scale, Floats);
            if (HAS_MINS<SCALING>) mins[i].part[p] = min * __builtin_convertvector(of_min, Floats);
        };
        const auto byte = [&](int i) __attribute__((always_inline)) {
            constexpr int BYTES_OF_UNIT = SCALING == SIX_BITS || SCALING == SIX_BIT_PAIRS ? 12 : COUNT;
            return whole(load_as<Bytes>(m.scale_codes + (unit * BYTES_OF_UNIT + i) * OUTPUTS + p * LANES));
        };
        if constexpr (SCALING == PLAIN || SCALING == WITH_MINS) scales[0].part[p] = scale, mins[0].part[p] = min;
        if constexpr (SCALING == BYTES) {
#pragma GCC unroll 16
            for (int i = 0; i < COUNT; ++i) put(i, byte(i), Ints{});
        }
        if constexpr (SCALING == NIBBLES) {
#pragma GCC unroll 16
            for (int i = 0; i < COUNT; ++i) put(i, byte(i) & 15, byte(i) >> 4 & 15);
        }
        if constexpr (SCALING == SIX_BITS) {
#pragma GCC unroll 16
            for (int i = 0; i < COUNT; ++i) {
                const Ints low = byte(i % 8) >> (i / 8 * 4) & 15, high = byte(8 + i % 4) >> (i / 4 * 2) & 3;
                put(i, (low | high << 4) - 32, Ints{});
            }
        }
        if constexpr (SCALING == SIX_BIT_PAIRS) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const Ints first = byte(i), second = byte(4 + i), rest = byte(8 + i);
                put(i, first & 63, second & 63);
                put(4 + i, (first >> 2 & 48) | (rest & 15), (second >> 2 & 48) | (rest >> 4 & 15));
            }
        }
    }
}

// Asks for the scales, and mins, of COUNT groups that have one unit, before they are read.
template <Scaling SCALING, int COUNT> INLINE void fetch_scales(const Matrix& m, size_t unit) {
    constexpr int BYTES_OF_UNIT = SCALING == SIX_BITS || SCALING == SIX_BIT_PAIRS ? 12 : COUNT;
    __builtin_prefetch((const f16*)m.scales + unit * OUTPUTS);
    if (HAS_MINS<SCALING>) __builtin_prefetch(m.mins + unit * OUTPUTS);
    if (SCALING == PLAIN || SCALING == WITH_MINS) return;
    for (int i = 0; i < BYTES_OF_UNIT * OUTPUTS; i += LINE)
        __builtin_prefetch(m.scale_codes + unit * BYTES_OF_UNIT * OUTPUTS + i);
}

// A tile times T rows of x, added to `totals`.
template <int BITS, int T, Coding CODING, Scaling SCALING, int ROWS>
__attribute__((noinline)) void add_units(const Matrix& m, int tile, Place place, Tile* totals) {
    constexpr int SETS = T == 1 ? 2 : 1;  // Sets of sums take turns: a product waits for the one before.
    constexpr int PRODUCT_BITS = CODING == BOOK ? 8 : BITS, ZERO = CODING == BOOK ? 128 : 1 << (BITS - 1);
    constexpr int GROUPS = SCALING == PLAIN || SCALING == WITH_MINS ? 1 : UNIT_ROWS / ROWS;
    constexpr int TOGETHER = CODING == HALVES ? 2 : 1;
    constexpr int UNIT_BYTES = GROUPS * ROWS * OUTPUTS * BITS / 8;
    const Book book(m.codebook);
    Tile total[T];
    for (int t = 0; t < T; ++t) total[t] = totals[t];
    const uint8_t* codes = place.codes;
    const int8_t* x = place.quads;
    const Share* share = place.shares;
    const int units = m.groups / GROUPS;
    // With few rows memory is what takes the time, and its own streams end with a page of 4 KiB.
    constexpr bool FETCHES = T <= 2;
    for (int unit = 0; unit < units; ++unit) {
        Tile scales[GROUPS], mins[GROUPS];
        const size_t place = size_t(tile) * units + unit;
        read_scales<SCALING>(m, place, scales, mins);
        if (FETCHES) fetch_scales<SCALING, GROUPS>(m, place + std::max(1, AHEAD / UNIT_BYTES));
        for (int first = 0; first < GROUPS; first += TOGETHER) {
#pragma GCC unroll 2
            for (int g = first; g < first + TOGETHER; ++g) {
                Sums upper[SETS * T] = {}, lower[SETS * T] = {};
#pragma GCC unroll 4
                for (int row = 0; row < ROWS; row += STEP<BITS, CODING>) {
                    if (FETCHES)
                        for (int i = 0; i < BLOCK_LINES<BITS>; ++i) __builtin_prefetch(codes + AHEAD + i * LINE);
                    const auto use = [&](int quad, const Line& four) __attribute__((always_inline)) {
#pragma GCC unroll 8
                        for (int t = 0; t < T; ++t, x += 8) {
                            add_products<PRODUCT_BITS>(upper[quad % SETS * T + t], four, x);
                            add_products<PRODUCT_BITS>(lower[quad % SETS * T + t], four, x + 4);
                        }
                    };
                    read_step<BITS, CODING>(book, codes, g % 2, use);
                }
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t, ++share)
                    for (int p = 0; p < PARTS; ++p) {
                        Ints up = upper[t].part[p], low = lower[t].part[p];
                        if (SETS == 2) up += upper[1].part[p], low += lower[1].part[p];
                        Ints whole = (up << 8) + low;
                        if (!HAS_MINS<SCALING>) whole -= ZERO * share->sum;
                        total[t].part[p] += __builtin_convertvector(whole, Floats) * (scales[g].part[p] * share->scale);
                        if (HAS_MINS<SCALING>) total[t].part[p] += mins[g].part[p] * share->total;
                    }
            }
        }
    }
    for (int t = 0; t < T; ++t) totals[t] = total[t];
}

// False, and nothing added, for matrices of another form.
template <int T> INLINE bool add_units(const Matrix& m, int tile, const Place& place, Tile* totals) {
    const Scaling scaling = scaling_of(m);
    if (scaling == OTHER) return false;
    const int bits = m.group_bits[0];
#define UNITS(WIDTH, CODING, SCALING, ROWS) \
    if (scaling == SCALING && bits == WIDTH && m.group_rows == ROWS && !m.codebook == (CODING != BOOK)) \
        return add_units<WIDTH, T, CODING, SCALING, ROWS>(m, tile, place, totals), true;
    UNITS(4, NUMBERS, PLAIN, 32)
    UNITS(4, NUMBERS, WITH_MINS, 32)
    UNITS(5, NUMBERS, PLAIN, 32)
    UNITS(5, NUMBERS, WITH_MINS, 32)
    UNITS(8, NUMBERS, PLAIN, 32)
    UNITS(4, BOOK, PLAIN, 32)
    UNITS(2, NUMBERS, NIBBLES, 16)
    UNITS(3, HALVES, SIX_BITS, 16)
    UNITS(4, NUMBERS, SIX_BIT_PAIRS, 32)
    UNITS(5, NUMBERS, SIX_BIT_PAIRS, 32)
    UNITS(6, NUMBERS, BYTES, 16)
    UNITS(4, BOOK, BYTES, 32)
#undef UNITS
    return false;
}

}  // namespace quantized
