// Whole numbers of 16 bits with a shared unit, and dot products of them: processors with VNNI add twice as many products
// a cycle as of floats.
//
// A product's sum can't overflow: numbers are scaled so that the lengths (roots of summed squares) of the two sides, as
// whole numbers, multiply to less than 2^31, which no dot product exceeds (Cauchy and Schwarz).
#pragma once

#include <algorithm>
#include <cmath>

#include "tile.h"

#if defined(__AVX512VNNI__)

constexpr float LONG = 65500, SHORTER = 32760;  // Lengths of the two sides, less what rounding adds.
constexpr float MOST_WORD = 32767;
constexpr float LEAST_LENGTH = 1e-18f, MOST_LENGTH = 1e18f;  // Only lengths between are scaled: squares stay in range.

enum Unit { ANY, POWER_OF_TWO };  // The latter keeps numbers of few bits exact where they are large enough.

INLINE Ints rounded(Floats x) { return (Ints)_mm512_maskz_cvtps_epi32(0xffff, (__m512)x); }

// `count` numbers, a multiple of LANES, as multiples of the unit that is returned, `length` long together, or less. The
// error of a number is half a unit. Less than LEAST_LENGTH counts as zero; with more than MOST_LENGTH, or what isn't a
// number, the unit isn't one either.
template <Unit UNIT> INLINE float to_words(const float* x, int count, float length, int16_t* words) {
    Floats squares = {}, most = {};
    for (int i = 0; i < count; i += LANES) {
        const Floats part = held(load(x + i));
        squares += part * part;
        most = larger(most, (Floats)((Ints)part & 0x7fffffff));
    }
    const float squared = sum(squares);
    const bool is_usual = squared >= LEAST_LENGTH * LEAST_LENGTH && squared <= MOST_LENGTH * MOST_LENGTH;
    float scale = is_usual ? length / sqrtf(squared) : 0.0f;
    if (is_usual && length > MOST_WORD) scale = std::min(scale, MOST_WORD / largest(most));
    if (UNIT == POWER_OF_TWO) {
        uint32_t bits;
        memcpy(&bits, &scale, 4);
        bits &= 0x7f800000;
        memcpy(&scale, &bits, 4);
    }
    for (int i = 0; i < count; i += LANES) {
        const Floats scaled = is_usual ? load(x + i) * scale : Floats{};
        const __m256i narrow = _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)rounded(scaled));
        memcpy(words + i, &narrow, sizeof narrow);
    }
    return is_usual ? 1 / scale : squared < 1 ? 0.0f : NAN;
}

// acc[i][j] += sum over pairs k of a[i * row + k * step] * panel[j][k], a pair being two words in four bytes.
template <int ROWS>
INLINE void word_products(Ints (&acc)[ROWS][WIDE], const int32_t* a, size_t row, size_t step, const int32_t* left,
                          const int32_t* right, int pairs) {
    for (int k = 0; k < pairs; ++k, a += step, left += LANES, right += LANES) {
        const __m512i l = load_as<__m512i>(left), r = load_as<__m512i>(right);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
            const __m512i x = _mm512_set1_epi32(a[i * row]);
            acc[i][0] = (Ints)_mm512_dpwssd_epi32((__m512i)acc[i][0], x, l);
            acc[i][1] = (Ints)_mm512_dpwssd_epi32((__m512i)acc[i][1], x, r);
        }
    }
}

// Lane by lane a pair of words of two whole numbers.
INLINE Ints paired_words(Ints first, Ints second) {
    return (Ints)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)first, (__m512i)(second << 16));
}

#endif
