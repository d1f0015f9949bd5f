// Rows of x in fixed point: whole numbers of 16 bits with one scale for some neighbours, cut into two bytes.
//
// Products with integer codes are then exact sums of integers. The error of a number is half a unit, 2^-16 of the
// largest number that shares its scale; or more of it where weights are codes times codes of scales, whose sums have to
// stay in 32 bits.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "quantized_lines.h"
#include "units.h"

namespace quantized {

constexpr int SHARED = 128;        // No more numbers of a group share a scale; they are whole blocks of any width.
constexpr int UNIT_ROWS = 256;     // As many do of groups that share theirs: see QuantizedMatrix.
constexpr float LARGEST = 32512;   // Its upper byte is 127.
constexpr float LEAST = 1e-30f;    // What is smaller throughout counts as zero: its inverse would not be a number

struct Share {
    float scale;
    int32_t sum;  // The sum of its whole numbers.
    float total;  // The same times the scale.
};

INLINE int count_shares(const Matrix& m) {
    int count = 0;
    for (int g = 0; g < m.groups; ++g) count += (m.group_starts[g + 1] - m.group_starts[g] + SHARED - 1) / SHARED;
    return count;
}

INLINE Bytes narrow(Ints v) {
#if defined(__AVX512F__)
    return (Bytes)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v);
#else
    return __builtin_convertvector(v, Bytes);
#endif
}

// Rows row .. row + count of a matrix, whose inputs share a scale; each `part` of them are of one group, the first of `group`.
struct Segment { int group, row, count, part; };

// Calls use(segment) for those of groups first .. last.
template <class Use> INLINE void for_segments(const Matrix& m, int first, int last, Use&& use) {
    if (m.scale_codes)
        for (int g = first; g < last; g += UNIT_ROWS / m.group_rows)
            use(Segment{g, m.group_starts[g], UNIT_ROWS, m.group_rows});
    else
        for (int g = first; g < last; ++g)
            for (int row = m.group_starts[g], end = m.group_starts[g + 1]; row < end; row += SHARED) {
                const int count = std::min(SHARED, end - row);
                use(Segment{g, row, count, count});
            }
}

// How long (the root of summed squares) a segment's whole numbers may be together, as vectors: with those of its weights,
// which are 16 times as long as the largest one or less, no sum then is beyond 2^31 (Cauchy and Schwarz).
INLINE float most_length(const Matrix& m) {
    if (!m.scale_codes) return FLT_MAX;
    const int bits = m.group_bits[0], code = m.mins ? (1 << bits) - 1 : m.codebook ? 128 : 1 << (bits - 1);
    const int scale = m.mins ? m.are_six_bits ? 63 : 15 : m.are_six_bits || m.codebook ? 32 : 128;
    return 0x1p27f / float(code * scale) - 10;  // Rounding adds half a unit to each number, 8 together.
}

struct Unit { float size, inverse; };  // The inverse is 0 where nothing counts.

// Of `count` numbers, whole vectors. A number that isn't finite makes the size so.
INLINE Unit unit_of(const float* x, int count, float longest) {
    Ints most = {};
    for (int i = 0; i < count; i += LANES) {
        const Ints magnitude = load_as<Ints>(x + i) & 0x7fffffff;  // These are ordered as floats are, infinity and NaN last.
        most = magnitude > most ? magnitude : most;
    }
    const int32_t bits = largest(most);
    float peak;
    memcpy(&peak, &bits, 4);
    const bool is_usual = peak > LEAST && peak <= FLT_MAX;
    Unit unit{peak / LARGEST, is_usual ? LARGEST / peak : 0.0f};
    if (!is_usual || longest == FLT_MAX) return unit;
    Floats squares = {};
    for (int i = 0; i < count; i += LANES) {
        const Floats scaled = load(x + i) * unit.inverse;
        squares += scaled * scaled;
    }
    const float length = sqrtf(sum(squares));
    if (length > longest) unit.size *= length / longest, unit.inverse *= longest / length;
    return unit;
}

// `count` numbers, whole vectors, in fixed point: calls put(i, whole) with LANES at a time.
template <class Put> INLINE Share to_whole(const float* x, int count, const Unit& unit, Put&& put) {
    Ints sum_of_all = {};
    for (int i = 0; i < count; i += LANES) {
        const Floats scaled = unit.inverse ? load(x + i) * unit.inverse : Floats{};
        const Ints whole = (Ints)(scaled + 12582912.0f) - 0x4b400000;  // The nearest whole number.
        put(i, whole);
        sum_of_all += whole;
    }
    const int32_t total = sum(sum_of_all);
    return {unit.size, total, float(total) * unit.size};
}

// The same to quads of 8 bytes, `stride` bytes apart: four numbers' upper bytes, then their lower ones, all signed.
INLINE Share to_fixed(const float* x, int count, const Unit& unit, int8_t* quads, size_t stride) {
    alignas(64) uint8_t upper[SHARED + LANES], lower[SHARED + LANES];
    const Share share = to_whole(x, count, unit, [&](int i, Ints whole) __attribute__((always_inline)) {
        const Bytes up = narrow((whole + 128) >> 8), down = narrow(whole);
        memcpy(upper + i, &up, LANES);
        memcpy(lower + i, &down, LANES);
    });
    for (int i = 0; i < count; i += 4, quads += stride) {
        memcpy(quads, upper + i, 4);
        memcpy(quads + 4, lower + i, 4);
    }
    return share;
}

// A segment's inputs, followed by zeros up to whole vectors.
INLINE void gather(const Matrix& m, const float* x, const Segment& s, float* numbers) {
    if (m.source)
        for (int i = 0; i < s.count; ++i) {
            const int32_t from = m.source[s.row + i];
            numbers[i] = from < 0 ? 0.0f : x[from];
        }
    else
        memcpy(numbers, x + s.row, 4 * s.count);
    for (int i = s.count; i % LANES; ++i) numbers[i] = 0;
}

// A row of x as the matrix has its rows. `stride` bytes between quads, `together` rows' shares side by side.
INLINE void to_fixed(const Matrix& m, const float* x, int8_t* quads, Share* shares, int together) {
    alignas(64) float numbers[UNIT_ROWS + LANES];
    const size_t stride = size_t(8) * together;
    const float longest = most_length(m);
    for_segments(m, 0, m.groups, [&](const Segment& s) __attribute__((always_inline)) {
        gather(m, x, s, numbers);
        const Unit unit = unit_of(numbers, s.count, longest);
        for (int i = 0; i < s.count; i += s.part, shares += together, quads += s.part / 4 * stride)
            *shares = to_fixed(numbers + i, s.part, unit, quads, stride);
    });
}

}  // namespace quantized
