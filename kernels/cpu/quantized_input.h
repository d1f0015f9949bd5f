// Rows of x in fixed point: whole numbers of 16 bits with one scale for at most 128 of them, cut into two bytes.
//
// Products with integer codes are then exact sums of integers. The error of a number is half a unit, 2^-16 of the
// largest number that shares its scale.
#pragma once

#include <algorithm>
#include <cfloat>

#include "quantized_lines.h"
#include "units.h"

namespace quantized {

constexpr int SHARED = 128;        // No more numbers share a scale; they are whole blocks of any width.
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

// `count` numbers, followed by zeros up to whole vectors, in fixed point: calls put(i, whole) with LANES at a time. A number
// that isn't finite makes the scale so.
template <class Put> INLINE Share to_whole(const float* x, int count, Put&& put) {
    Ints most = {};
    for (int i = 0; i < count; i += LANES) {
        const Ints magnitude = load_as<Ints>(x + i) & 0x7fffffff;  // These are ordered as floats are, infinity and NaN last.
        most = magnitude > most ? magnitude : most;
    }
    int32_t bits = 0;
    for (int i = 0; i < LANES; ++i) bits = std::max<int32_t>(bits, most[i]);
    float largest;
    memcpy(&largest, &bits, 4);
    const bool is_usual = largest > LEAST && largest <= FLT_MAX;
    const float inverse = is_usual ? LARGEST / largest : 0.0f;

    Ints sum = {};
    for (int i = 0; i < count; i += LANES) {
        const Floats scaled = is_usual ? load(x + i) * inverse : Floats{};
        const Ints whole = (Ints)(scaled + 12582912.0f) - 0x4b400000;  // The nearest whole number.
        put(i, whole);
        sum += whole;
    }
    int32_t total = 0;
    for (int i = 0; i < LANES; ++i) total += sum[i];
    const float scale = largest / LARGEST;
    return {scale, total, float(total) * scale};
}

// The same to quads of 8 bytes, `stride` bytes apart: four numbers' upper bytes, then their lower ones, all signed.
INLINE Share to_fixed(const float* x, int count, int8_t* quads, size_t stride) {
    alignas(64) uint8_t upper[SHARED], lower[SHARED];
    const Share share = to_whole(x, count, [&](int i, Ints whole) __attribute__((always_inline)) {
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

// Inputs of stored rows row .. row + count, followed by zeros up to whole vectors.
INLINE void gather(const Matrix& m, const float* x, int row, int count, float* numbers) {
    if (m.source)
        for (int i = 0; i < count; ++i) {
            const int32_t from = m.source[row + i];
            numbers[i] = from < 0 ? 0.0f : x[from];
        }
    else
        memcpy(numbers, x + row, 4 * count);
    for (int i = count; i % LANES; ++i) numbers[i] = 0;
}

// A row of x as the matrix has its rows. `stride` bytes between quads, `together` rows' shares side by side.
INLINE void to_fixed(const Matrix& m, const float* x, int8_t* quads, Share* shares, int together) {
    alignas(64) float numbers[SHARED + LANES];
    const size_t stride = size_t(8) * together;
    for (int g = 0; g < m.groups; ++g)
        for (int row = m.group_starts[g], end = m.group_starts[g + 1]; row < end; row += SHARED) {
            const int count = std::min(SHARED, end - row);
            gather(m, x, row, count, numbers);
            *shares = to_fixed(numbers, count, quads, stride);
            shares += together;
            quads += count / 4 * stride;
        }
}

}  // namespace quantized
