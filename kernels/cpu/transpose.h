// Rows of bytes, a page of them, to columns of four bytes each: neighbours in a column are the lanes of a vector.
#pragma once

#include <algorithm>

#include "structs.h"

// Lanes of 128 bits: a0 b0 a1 b1, and a2 b2 a3 b3.
template <int FROM> INLINE Words interleaved(Words a, Words b) {
    Ints lanes;
    for (int i = 0; i < LANES; ++i) lanes[i] = i / 4 * 4 + FROM + i % 4 / 2 + (i % 2 ? LANES : 0);
    return __builtin_shuffle(a, b, lanes);
}
// Likewise of pairs: a0 a1 b0 b1, and a2 a3 b2 b3.
template <int FROM> INLINE Words interleaved_pairs(Words a, Words b) {
    Ints lanes;
    for (int i = 0; i < LANES; ++i) lanes[i] = i / 4 * 4 + FROM + i % 2 + (i % 4 < 2 ? 0 : LANES);
    return __builtin_shuffle(a, b, lanes);
}
// Sixteen bytes of each fourth row.
INLINE Words each_fourth(const uint8_t* row, size_t stride) {
#if defined(__AVX512F__)
    __m512i pieces = _mm512_castsi128_si512(load_as<__m128i>(row));
    pieces = _mm512_inserti32x4(pieces, load_as<__m128i>(row + 4 * stride), 1);
    pieces = _mm512_inserti32x4(pieces, load_as<__m128i>(row + 8 * stride), 2);
    return (Words)_mm512_inserti32x4(pieces, load_as<__m128i>(row + 12 * stride), 3);
#elif defined(__AVX2__)
    const __m256i piece = _mm256_castsi128_si256(load_as<__m128i>(row));
    return (Words)_mm256_inserti128_si256(piece, load_as<__m128i>(row + 4 * stride), 1);
#else
    return load_as<Words>(row);
#endif
}

// PAGE rows of `bytes` bytes, `stride` bytes apart, to columns of four bytes [columns][PAGE]; zeros fill the last one.
INLINE void transpose(const uint8_t* rows, size_t stride, int bytes, uint32_t* columns) {
    int at = 0;
    for (; at + 16 <= bytes; at += 16, columns += 4 * PAGE)
#pragma GCC unroll 4
        for (int first = 0; first < PAGE; first += LANES) {
            const uint8_t* const from = rows + first * stride + at;
            const Words a = each_fourth(from, stride), b = each_fourth(from + stride, stride),
                        c = each_fourth(from + 2 * stride, stride), d = each_fourth(from + 3 * stride, stride);
            const Words ab = interleaved<0>(a, b), cd = interleaved<0>(c, d);
            const Words ab2 = interleaved<2>(a, b), cd2 = interleaved<2>(c, d);
            const Words column[4] = {interleaved_pairs<0>(ab, cd), interleaved_pairs<2>(ab, cd),
                                     interleaved_pairs<0>(ab2, cd2), interleaved_pairs<2>(ab2, cd2)};
            for (int i = 0; i < 4; ++i) memcpy(columns + i * PAGE + first, &column[i], sizeof column[i]);
        }
    for (; at < bytes; at += 4, columns += PAGE)
        for (int place = 0; place < PAGE; ++place) {
            columns[place] = 0;
            memcpy(columns + place, rows + place * stride + at, std::min(4, bytes - at));
        }
}
