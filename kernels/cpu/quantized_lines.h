// How codes of a quantized matrix lie in memory (kernels/forms/quantized.py is the specification), and their products with
// x in fixed point.
#pragma once

#include "simd.h"

namespace quantized {

constexpr int OUTPUTS = 16;  // A tile has so many.
constexpr int LINE = 64;     // Bytes of a line: four for each output.
constexpr int PARTS = OUTPUTS / LANES;

struct Line { Words part[PARTS]; };  // Bytes 4n .. 4n + 3 are of output n.
struct Sums { Ints part[PARTS]; };   // Each output has one.

INLINE Line load_line(const uint8_t* from) {
    Line line;
    memcpy(&line, from, sizeof line);
    return line;
}

// The bits of each byte that are in `mask` once they are moved right by `shift`, or left where that is negative.
INLINE Line bits_of(const Line& line, int shift, int mask) {
    const uint32_t everywhere = 0x01010101u * mask;
    Line moved;
    for (int p = 0; p < PARTS; ++p)
        moved.part[p] = (shift < 0 ? line.part[p] << -shift : line.part[p] >> shift) & everywhere;
    return moved;
}
INLINE Line both(const Line& a, const Line& b) {
    Line line;
    for (int p = 0; p < PARTS; ++p) line.part[p] = a.part[p] | b.part[p];
    return line;
}

template <int BITS> constexpr int BLOCK_ROWS = BITS == 3 || BITS == 5 ? 32 : BITS == 2 || BITS == 6 ? 16 : 8;
template <int BITS> constexpr int BLOCK_LINES = BLOCK_ROWS<BITS> * BITS / 32;

// Codes of rows 4 * quad .. 4 * quad + 3 of a block, from its planes of low bits and of high ones.
template <int BITS> INLINE Line codes_of(const Line* block, int quad) {
    if constexpr (BITS == 8) return block[quad];
    if constexpr (BITS == 4) return bits_of(block[0], 4 * quad, 15);
    if constexpr (BITS == 2) return bits_of(block[0], 2 * quad, 3);
    if constexpr (BITS == 3) return both(bits_of(block[quad / 4], 2 * (quad % 4), 3), bits_of(block[2], quad - 2, 4));
    if constexpr (BITS == 5) return both(bits_of(block[quad / 2], 4 * (quad % 2), 15), bits_of(block[4], quad - 4, 16));
    if constexpr (BITS == 6)
        return both(bits_of(block[quad / 2], 4 * (quad % 2), 15), bits_of(block[2], 2 * quad - 4, 48));
}

// Sixteen numbers, each more by 128 so that none is below zero, by their codes.
struct Book {
    alignas(64) uint8_t numbers[LINE] = {};  // Once for every 16 bytes of a line.

    explicit Book(const int8_t* from) {
        if (from)
            for (int i = 0; i < LINE; ++i) numbers[i] = uint8_t(from[i % 16] + 128);
    }
    INLINE Line at(const Line& codes) const {
        Line found;
        for (int p = 0; p < PARTS; ++p) {
#if defined(__AVX512BW__)
            found.part[p] = (Words)_mm512_shuffle_epi8(load_as<__m512i>(numbers), (__m512i)codes.part[p]);
#elif defined(__AVX2__)
            found.part[p] = (Words)_mm256_shuffle_epi8(load_as<__m256i>(numbers), (__m256i)codes.part[p]);
#else
            uint8_t bytes[sizeof(Words)];
            memcpy(bytes, &codes.part[p], sizeof bytes);
            for (uint8_t& byte : bytes) byte = numbers[byte];
            memcpy(&found.part[p], bytes, sizeof bytes);
#endif
        }
        return found;
    }
};

// Adds each output's four codes times x[0] .. x[3].
template <int BITS> INLINE void add_products(Sums& sums, const Line& codes, const int8_t* x) {
#if defined(__AVX512VNNI__)
    sums.part[0] = (Ints)_mm512_dpbusd_epi32((__m512i)sums.part[0], (__m512i)codes.part[0],
                                             _mm512_set1_epi32(load_as<int32_t>(x)));
#elif defined(__AVX2__)
    // two products are added in 16 bits, which those of 8-bit codes would exceed: their highest bit goes alone
    typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));
    const Ints four = all(load_as<int32_t>(x));
    const auto pairs = [&](Words of) __attribute__((always_inline)) {
#if defined(__AVX512F__)
        return (Shorts)_mm512_maddubs_epi16((__m512i)of, (__m512i)four);
#else
        return (Shorts)_mm256_maddubs_epi16((__m256i)of, (__m256i)four);
#endif
    };
    const auto sum = [&](Shorts of, int16_t factor) __attribute__((always_inline)) {
#if defined(__AVX512F__)
        return (Ints)_mm512_madd_epi16((__m512i)of, (__m512i)(Shorts{} + factor));
#else
        return (Ints)_mm256_madd_epi16((__m256i)of, (__m256i)(Shorts{} + factor));
#endif
    };
    for (int p = 0; p < PARTS; ++p) {
        const Words c = codes.part[p];
        if constexpr (BITS == 8) {
            sums.part[p] += sum(pairs(c & 0x7f7f7f7fu), 1) + sum(pairs(c >> 7 & 0x01010101u), 128);
        } else {
            sums.part[p] += sum(pairs(c), 1);
        }
    }
#else
    for (int p = 0; p < PARTS; ++p)
        for (int j = 0; j < 4; ++j) sums.part[p] += (Ints)(codes.part[p] >> (8 * j) & 255) * int(x[j]);
#endif
}

}  // namespace quantized
