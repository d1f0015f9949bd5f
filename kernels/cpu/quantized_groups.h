// Groups of codes of any widths, one after the other, times some rows of x in fixed point.
#pragma once

#include "quantized_input.h"

namespace quantized {

constexpr int MOST_ROWS = LANES == 16 ? 8 : 2;  // Rows of x at a time, as many as the registers allow.
constexpr int AHEAD = 6144;                     // Bytes of codes that are fetched before they are read.

enum ScaleKind { FLOAT16, FLOAT32, CODES };

struct Tile { Floats part[PARTS]; };  // Each output has a number.

// A group's scales, and its least values where the matrix has such.
struct Scales { Tile scale, min; };

// By codes of six bits, 16 in 12 bytes: those of 16 groups' scales, or of eight groups' scales and mins.
INLINE void times_six_bits(const Matrix& m, size_t tile, int g, int first, Floats& scale, Floats& min) {
    const int8_t* const unit = m.scale_codes + m.unit_place(tile, g) * 12 + first;
    const auto byte = [&](int i) __attribute__((always_inline)) { return whole(load_as<Bytes>(unit + i * OUTPUTS)); };
    const int code = g & ((1 << m.unit_shift) - 1), i = code % 4;
    if (!m.mins) {
        const Ints low = byte(code % 8) >> (code / 8 * 4) & 15, high = byte(8 + i) >> (code / 4 * 2) & 3;
        scale *= __builtin_convertvector((low | high << 4) - 32, Floats);
        return;
    }
    Ints of_scale = byte(i), of_min = byte(4 + i);
    if (code < 4) {
        of_scale &= 63, of_min &= 63;
    } else {
        const Ints rest = byte(8 + i);
        of_scale = (of_scale >> 2 & 48) | (rest & 15), of_min = (of_min >> 2 & 48) | (rest >> 4 & 15);
    }
    scale *= __builtin_convertvector(of_scale, Floats);
    min *= __builtin_convertvector(of_min, Floats);
}

INLINE Scales scales_of(const Matrix& m, size_t tile, int g) {
    const size_t at = m.place(tile, g), unit = m.unit_place(tile, g);
    Scales of = {};
    for (int p = 0; p < PARTS; ++p) {
        Floats &scale = of.scale.part[p], &min = of.min.part[p];
        if (m.scale_kind == FLOAT16) {
            scale = load((const f16*)m.scales + unit + p * LANES);
        } else if (m.scale_kind == FLOAT32) {
            scale = load((const float*)m.scales + unit + p * LANES);
        } else {
            const Floats code = widen(load_as<Bytes>((const uint8_t*)m.scales + at + p * LANES));
            scale = code * code * (m.group_max[g] * (1.0f / 256));
        }
        if (m.mins) min = load(m.mins + unit + p * LANES);
        if (m.holds_both()) {
            const Bytes both = load_as<Bytes>((const uint8_t*)m.scale_codes + at + p * LANES);
            scale *= widen(both & 15);
            min *= widen(both >> 4);
        } else if (m.are_six_bits) {
            times_six_bits(m, tile, g, p * LANES, scale, min);
        } else if (m.scale_codes) {
            scale *= widen(load_as<Bytes>(m.scale_codes + at + p * LANES));
        }
    }
    return of;
}

// How codes stand for numbers and lie in blocks: as they are; two groups in a block; or in a book of sixteen.
enum Coding { NUMBERS, HALVES, BOOK };
template <int BITS, Coding CODING> constexpr int STEP = BLOCK_ROWS<BITS> / (CODING == HALVES ? 2 : 1);  // In rows.
template <int NUMBER> using Number = std::integral_constant<int, NUMBER>;

template <int BITS, Coding CODING> INLINE Sums zero_of(const Matrix& m, size_t tile, int g) {
    typedef int16_t Shorts __attribute__((vector_size(2 * LANES)));
    Sums zero;
    for (int p = 0; p < PARTS; ++p) {
        zero.part[p] = all(CODING == BOOK ? 128 : m.mins ? 0 : 1 << (BITS - 1));
        if (m.zeros) zero.part[p] = __builtin_convertvector(load_as<Shorts>(m.zeros + m.place(tile, g) + p * LANES), Ints);
    }
    return zero;
}

// A step of rows of a group: calls use(quad, codes) for every four of them, and goes on to the next step's codes.
// is_second: whether the group is the second one in its blocks.
template <int BITS, Coding CODING, class Use>
INLINE void read_step(const Book& book, const uint8_t*& codes, bool is_second, Use&& use) {
    constexpr int QUADS = STEP<BITS, CODING> / 4;
    Line block[BLOCK_LINES<BITS>];
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK_LINES<BITS>; ++i) block[i] = load_line(codes + i * LINE);
    const auto read = [&](auto first) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int quad = first.value; quad < first.value + QUADS; ++quad) {
            Line four = codes_of<BITS>(block, quad);
            if constexpr (CODING == BOOK) four = book.at(four);
            use(quad, four);
        }
    };
    if (CODING == HALVES && is_second) read(std::integral_constant<int, CODING == HALVES ? QUADS : 0>());
    else read(std::integral_constant<int, 0>());
    if (CODING != HALVES || is_second) codes += BLOCK_LINES<BITS> * LINE;
}

// Calls run(bits, coding, first, last) for the runs of groups begin .. end that are alike, the former two as constants.
template <class Run> INLINE void for_runs(const Matrix& m, int begin, int end, Run&& run) {
    for (int first = begin, last; first < end; first = last) {
        const int bits = m.group_bits[first];
        for (last = first + 1; last < end && m.group_bits[last] == bits;) ++last;
        const bool are_halves = bits == 3 && m.group_starts[first + 1] - m.group_starts[first] < BLOCK_ROWS<3>;
        const auto as = [&](auto width, auto coding) __attribute__((always_inline)) { run(width, coding, first, last); };
        if (bits == 2) as(Number<2>(), Number<NUMBERS>());
        if (bits == 3 && !are_halves) as(Number<3>(), Number<NUMBERS>());
        if (bits == 3 && are_halves) as(Number<3>(), Number<HALVES>());
        if (bits == 4 && !m.codebook) as(Number<4>(), Number<NUMBERS>());
        if (bits == 4 && m.codebook) as(Number<4>(), Number<BOOK>());
        if (bits == 5) as(Number<5>(), Number<NUMBERS>());
        if (bits == 6) as(Number<6>(), Number<NUMBERS>());
        if (bits == 8) as(Number<8>(), Number<NUMBERS>());
    }
}

// Where a tile's walk through its groups is: the next codes, and the rows of x beside them.
struct Place {
    const uint8_t* codes;
    const int8_t* quads;
    const Share* shares;
};

// Groups first .. last of a tile, all of BITS bits, times T rows of x, added to `totals`.
template <int BITS, int T, Coding CODING>
__attribute__((noinline)) void add_groups(const Matrix& m, int tile, int first, int last, Place& place, Tile* totals) {
    constexpr int SETS = T == 1 ? 2 : 1;  // Sets of sums take turns: a product waits for the one before.
    constexpr int PRODUCT_BITS = CODING == BOOK ? 8 : BITS;
    const Book book(m.codebook);
    Tile total[T];
    for (int t = 0; t < T; ++t) total[t] = totals[t];
    const uint8_t* codes = place.codes;
    const int8_t* x = place.quads;
    const Share* share = place.shares;
    for (int g = first; g < last; ++g) {
        const Scales of = scales_of(m, tile, g);
        const Sums zero = zero_of<BITS, CODING>(m, tile, g);
        for (int rows = m.group_starts[g + 1] - m.group_starts[g]; rows > 0; rows -= SHARED) {
            Sums upper[SETS * T] = {}, lower[SETS * T] = {};
            for (int left = std::min(rows, SHARED); left > 0; left -= STEP<BITS, CODING>) {
                if (T <= 2)  // With few rows memory is what takes the time, and its own streams end with a page of 4 KiB.
                    for (int i = 0; i < BLOCK_LINES<BITS>; ++i) __builtin_prefetch(codes + AHEAD + i * LINE);
                read_step<BITS, CODING>(book, codes, g % 2, [&](int quad, const Line& four) __attribute__((always_inline)) {
#pragma GCC unroll 8
                    for (int t = 0; t < T; ++t, x += 8) {
                        add_products<PRODUCT_BITS>(upper[quad % SETS * T + t], four, x);
                        add_products<PRODUCT_BITS>(lower[quad % SETS * T + t], four, x + 4);
                    }
                });
            }
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t, ++share)
                for (int p = 0; p < PARTS; ++p) {
                    Ints up = upper[t].part[p], low = lower[t].part[p];
                    if (SETS == 2) up += upper[1].part[p], low += lower[1].part[p];
                    const Ints whole = (up << 8) + low - zero.part[p] * share->sum;
                    total[t].part[p] += __builtin_convertvector(whole, Floats) * (of.scale.part[p] * share->scale);
                    if (m.mins) total[t].part[p] += of.min.part[p] * share->total;
                }
        }
    }
    for (int t = 0; t < T; ++t) totals[t] = total[t];
    place = {codes, x, share};
}

}  // namespace quantized
