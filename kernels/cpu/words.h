// Whole numbers of 16 bits with a shared unit, and dot products of them: exact, whatever their order, and on processors
// with VNNI twice as many a cycle as of floats.
//
// A product's sum can't overflow: numbers are scaled so that the lengths (roots of summed squares) of the two sides, as
// whole numbers, multiply to less than 2^31, which no dot product exceeds (Cauchy and Schwarz).
#pragma once

#include <algorithm>
#include <cmath>

#include "tile.h"

constexpr float LONG = 65500, SHORTER = 32760;  // Lengths of the two sides, less what rounding adds.
constexpr float MOST_WORD = 32767;
constexpr float LEAST_LENGTH = 1e-18f, MOST_LENGTH = 1e18f;  // Only lengths between are scaled: squares stay in range.

enum Unit { ANY, POWER_OF_TWO };  // The latter keeps numbers of few bits exact where they are large enough.

INLINE void store_words(int16_t* to, Ints numbers) {
#if defined(__AVX512F__)
    const __m256i narrow = _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)numbers);
#else
    typedef int16_t Narrow __attribute__((vector_size(2 * LANES)));
    const Narrow narrow = __builtin_convertvector(numbers, Narrow);
#endif
    memcpy(to, &narrow, sizeof narrow);
}

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
        store_words(words + i, rounded(scaled));
    }
    return is_usual ? 1 / scale : squared < 1 ? 0.0f : NAN;
}

// Lane by lane a pair of words, in four bytes, of two whole numbers.
INLINE Ints paired_words(Ints first, Ints second) {
#if defined(__AVX512F__)
    return (Ints)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)first, (__m512i)(second << 16));
#else
    return (first & 0xffff) | (second << 16);
#endif
}

// Word by word the product's upper half: a * b / 2^15, rounded to the nearest.
INLINE Ints upper_products(Ints a, Ints b) {
#if defined(__AVX512BW__)
    return (Ints)_mm512_maskz_mulhrs_epi16(~0u, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Ints)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
    const __m128i upper = _mm_mulhi_epi16((__m128i)a, (__m128i)b), lower = _mm_mullo_epi16((__m128i)a, (__m128i)b);
    const __m128i next = _mm_and_si128(_mm_srli_epi16(lower, 14), _mm_set1_epi16(1));
    const __m128i whole = _mm_or_si128(_mm_add_epi16(upper, upper), _mm_srli_epi16(lower, 15));
    return (Ints)_mm_add_epi16(whole, next);
#else
    const Ints first = (a << 16 >> 16) * (b << 16 >> 16), second = (a >> 16) * (b >> 16);
    return paired_words((first + 0x4000) >> 15, (second + 0x4000) >> 15);
#endif
}
// Sums and differences of words.
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));
INLINE Ints word_sum(Ints a, Ints b) { return (Ints)((Shorts)a + (Shorts)b); }
INLINE Ints word_difference(Ints a, Ints b) { return (Ints)((Shorts)a - (Shorts)b); }
// The first two or the last two bytes of every lane as the upper bytes of words whose lower bytes are 0.
template <int HALF> INLINE Ints upper_bytes(Ints bytes) {
#if defined(__AVX512BW__)
    typedef int8_t Places __attribute__((vector_size(64)));
    Places places;
    for (int i = 0; i < 64; ++i) places[i] = i % 2 ? i % 16 / 4 * 4 + i % 4 / 2 + 2 * HALF : -1;
    return (Ints)_mm512_maskz_shuffle_epi8(~0ull, (__m512i)bytes, (__m512i)places);
#else
    if constexpr (HALF) return (Ints)(((Words)bytes >> 8 & 0xff00) | ((Words)bytes & 0xff000000));
    return (Ints)(((Words)bytes << 8 & 0xff00) | ((Words)bytes << 16 & 0xff000000));
#endif
}

// acc + a0 * b0 + a1 * b1, of pairs of words.
INLINE Ints plus_pairs(Ints acc, Ints a, Ints b) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return acc + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return acc + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
    return acc + (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return acc + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// acc[i][j] += sum over pairs k of a[i * row + k * step] * panel[j][k].
template <int ROWS>
INLINE void word_products(Ints (&acc)[ROWS][WIDE], const int32_t* a, size_t row, size_t step, const int32_t* left,
                          const int32_t* right, int pairs) {
    for (int k = 0; k < pairs; ++k, a += step, left += LANES, right += LANES) {
        const Ints l = load_as<Ints>(left), r = load_as<Ints>(right);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
            const Ints x = all(a[i * row]);
            acc[i][0] = plus_pairs(acc[i][0], x, l);
            acc[i][1] = plus_pairs(acc[i][1], x, r);
        }
    }
}
