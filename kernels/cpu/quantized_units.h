// Blocks of GGUF times some rows of x in fixed point: all groups are of one size, so that loops have no ends to look for, and
// scales of the groups of a unit are read together.
//
// Where codes of scales are integers, so are sums over a unit: a group's sum times the code of its scale.
#pragma once

#include "quantized_groups.h"

namespace quantized {

// How scales lie: a float16 for each group, perhaps with a min; or for a unit of 256 rows, times codes of a byte, of
// four bits for scales and mins, and of six bits for scales alone or both. See QuantizedMatrix.
enum Scaling { OTHER, PLAIN, WITH_MINS, BYTES, NIBBLES, SIX_BITS, SIX_BIT_PAIRS };

INLINE Scaling scaling_of(const Matrix& m) {
    if (!m.group_rows || m.zeros || m.scale_kind != FLOAT16) return OTHER;
    if (!m.scale_codes) return m.group_rows != 32 ? OTHER : m.mins ? WITH_MINS : PLAIN;
    if (m.are_six_bits) return m.mins ? SIX_BIT_PAIRS : SIX_BITS;
    return m.mins ? NIBBLES : BYTES;
}

// What is known of a type of blocks when this is compiled.
template <int WIDTH, Coding CODES, Scaling SCALES, int GROUP> struct Form {
    static constexpr int BITS = WIDTH, ROWS = GROUP;  // Bits of a code, and rows of a group.
    static constexpr Coding CODING = CODES;
    static constexpr Scaling SCALING = SCALES;
    static constexpr bool HAS_CODES = SCALING >= BYTES;
    static constexpr bool HAS_MINS = SCALING == WITH_MINS || SCALING == NIBBLES || SCALING == SIX_BIT_PAIRS;
    static constexpr int GROUPS = HAS_CODES ? UNIT_ROWS / ROWS : 1;  // Of a unit.
    static constexpr int ZERO = HAS_MINS ? 0 : CODING == BOOK ? 128 : 1 << (BITS - 1);
    static constexpr int CODE_BYTES = SCALING == SIX_BITS || SCALING == SIX_BIT_PAIRS ? 12 : HAS_CODES ? GROUPS : 0;
    static constexpr int UNIT_BYTES = GROUPS * ROWS * OUTPUTS * BITS / 8;
};

// Calls use(form) with the matrix's; false where it has none.
template <class Use> INLINE bool with_form(const Matrix& m, Use&& use) {
    const Scaling scaling = scaling_of(m);
    const auto is = [&](auto form) __attribute__((always_inline)) {
        typedef decltype(form) F;
        const bool is_it = scaling == F::SCALING && m.group_bits[0] == F::BITS && m.group_rows == F::ROWS &&
                           !m.codebook == (F::CODING != BOOK);
        if (is_it) use(form);
        return is_it;
    };
    return scaling != OTHER &&
           (is(Form<4, NUMBERS, PLAIN, 32>()) || is(Form<4, NUMBERS, WITH_MINS, 32>()) ||
            is(Form<5, NUMBERS, PLAIN, 32>()) || is(Form<5, NUMBERS, WITH_MINS, 32>()) ||
            is(Form<8, NUMBERS, PLAIN, 32>()) || is(Form<4, BOOK, PLAIN, 32>()) ||
            is(Form<2, NUMBERS, NIBBLES, 16>()) || is(Form<3, HALVES, SIX_BITS, 16>()) ||
            is(Form<4, NUMBERS, SIX_BIT_PAIRS, 32>()) || is(Form<5, NUMBERS, SIX_BIT_PAIRS, 32>()) ||
            is(Form<6, NUMBERS, BYTES, 16>()) || is(Form<4, BOOK, BYTES, 32>()));
}

// A tile's unit: its scale, the codes that multiply it for each group, and each group's min.
template <class F> struct UnitScales {
    Tile scale;
    Sums codes[F::GROUPS];
    Tile mins[F::GROUPS];
};

template <class F> INLINE void read_scales(const Matrix& m, size_t unit, UnitScales<F>& to) {
    constexpr Scaling SCALING = F::SCALING;
    for (int p = 0; p < PARTS; ++p) {
        const size_t at = unit * OUTPUTS + p * LANES;
        to.scale.part[p] = load((const f16*)m.scales + at);
        const Floats min = F::HAS_MINS ? load(m.mins + at) : Floats{};
        const auto put = [&](int i, Ints of_scale, Ints of_min) __attribute__((always_inline)) {
            to.codes[i].part[p] = of_scale;
            if (F::HAS_MINS) to.mins[i].part[p] = min * __builtin_convertvector(of_min, Floats);
        };
        const auto byte = [&](int i) __attribute__((always_inline)) {
            return whole(load_as<Bytes>(m.scale_codes + (unit * F::CODE_BYTES + i) * OUTPUTS + p * LANES));
        };
        if constexpr (SCALING == WITH_MINS) to.mins[0].part[p] = min;
        if constexpr (SCALING == BYTES) {
#pragma GCC unroll 16
            for (int i = 0; i < F::GROUPS; ++i) put(i, byte(i), Ints{});
        }
        if constexpr (SCALING == NIBBLES) {
#pragma GCC unroll 16
            for (int i = 0; i < F::GROUPS; ++i) put(i, byte(i) & 15, byte(i) >> 4 & 15);
        }
        if constexpr (SCALING == SIX_BITS) {
#pragma GCC unroll 16
            for (int i = 0; i < F::GROUPS; ++i) {
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

// Asks for a unit's scales, and mins, before they are read.
template <class F> INLINE void fetch_scales(const Matrix& m, size_t unit) {
    __builtin_prefetch((const f16*)m.scales + unit * OUTPUTS);
    if (F::HAS_MINS) __builtin_prefetch(m.mins + unit * OUTPUTS);
    for (int i = 0; i < F::CODE_BYTES * OUTPUTS; i += LINE)
        __builtin_prefetch(m.scale_codes + unit * F::CODE_BYTES * OUTPUTS + i);
}

// A tile times T rows of x, added to `totals`.
template <class F, int T> __attribute__((noinline)) void add_units(const Matrix& m, int tile, Place place, Tile* totals) {
    constexpr int SETS = T == 1 ? 2 : 1;  // Sets of sums take turns: a product waits for the one before.
    constexpr int PRODUCT_BITS = F::CODING == BOOK ? 8 : F::BITS;
    constexpr int TOGETHER = F::CODING == HALVES ? 2 : 1;
    const Book book(m.codebook);
    Tile total[T];
    for (int t = 0; t < T; ++t) total[t] = totals[t];
    const uint8_t* codes = place.codes;
    const int8_t* x = place.quads;
    const Share* share = place.shares;
    const int units = m.groups / F::GROUPS;
    // With few rows memory is what takes the time, and its own streams end with a page of 4 KiB.
    constexpr bool FETCHES = T <= 2;
    for (int unit = 0; unit < units; ++unit) {
        UnitScales<F> of;
        const size_t place = size_t(tile) * units + unit;
        read_scales<F>(m, place, of);
        if (FETCHES) fetch_scales<F>(m, place + std::max(1, AHEAD / F::UNIT_BYTES));
        Sums of_unit[T] = {};
        for (int first = 0; first < F::GROUPS; first += TOGETHER) {
#pragma GCC unroll 2
            for (int g = first; g < first + TOGETHER; ++g) {
                Sums upper[SETS * T] = {}, lower[SETS * T] = {};
#pragma GCC unroll 4
                for (int row = 0; row < F::ROWS; row += STEP<F::BITS, F::CODING>) {
                    if (FETCHES)
                        for (int i = 0; i < BLOCK_LINES<F::BITS>; ++i) __builtin_prefetch(codes + AHEAD + i * LINE);
                    const auto use = [&](int quad, const Line& four) __attribute__((always_inline)) {
#pragma GCC unroll 8
                        for (int t = 0; t < T; ++t, x += 8) {
                            add_products<PRODUCT_BITS>(upper[quad % SETS * T + t], four, x);
                            add_products<PRODUCT_BITS>(lower[quad % SETS * T + t], four, x + 4);
                        }
                    };
                    read_step<F::BITS, F::CODING>(book, codes, g % 2, use);
                }
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t)
                    for (int p = 0; p < PARTS; ++p) {
                        Ints up = upper[t].part[p], low = lower[t].part[p];
                        if (SETS == 2) up += upper[1].part[p], low += lower[1].part[p];
                        Ints whole = (up << 8) + low;
                        if (F::ZERO) whole -= F::ZERO * share[g * T + t].sum;
                        if (F::HAS_CODES) whole *= of.codes[g].part[p];
                        of_unit[t].part[p] += whole;
                    }
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
            for (int p = 0; p < PARTS; ++p)
                total[t].part[p] +=
                    __builtin_convertvector(of_unit[t].part[p], Floats) * (of.scale.part[p] * share[t].scale);
        for (int g = 0; F::HAS_MINS && g < F::GROUPS; ++g)
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t)
                for (int p = 0; p < PARTS; ++p) total[t].part[p] += of.mins[g].part[p] * share[g * T + t].total;
        share += F::GROUPS * T;
    }
    for (int t = 0; t < T; ++t) totals[t] = total[t];
}

// False, and nothing added, for matrices of another form.
template <int T> INLINE bool add_units(const Matrix& m, int tile, const Place& place, Tile* totals) {
    return with_form(m, [&](auto form) __attribute__((always_inline)) {
        add_units<decltype(form), T>(m, tile, place, totals);
    });
}

}  // namespace quantized
