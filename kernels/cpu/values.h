// Scales of a tile's values, by which weights are multiplied before they become words; and the weighted sums of one
// query's heads.
#pragma once

#include <cfloat>

#include "keys.h"

// A group's words and what they count: the largest scale that a query sees in the tile is MOST_WORD. A sum of words times
// codes can't overflow: TILE times 32767 times 127 is less than 2^31.
struct ScaleUnit {
    float steps, unit;

    ScaleUnit() = default;
    explicit ScaleUnit(float largest)
        : steps(largest < FLT_MIN ? 0.0f : MOST_WORD / largest), unit(largest * (1 / MOST_WORD)) {}
};

// Of a tile's values, in rows [groups][TILE]; zeros where nothing was read.
struct ValueScales {
    alignas(64) float rows[MOST_DIMS / GROUP][TILE];

    INLINE void clear(int groups) { std::fill_n(rows[0], groups * TILE, 0.0f); }
    // A page's places first .. end, at place k of the tile. A key that has no number as its unit is to spoil what sees it.
    INLINE void read(const Cache& c, int page, int head, int k, int first, int end, const float* key_units) {
        read_scales(c.value_scales + c.token(page, head) * c.groups(), c.groups(), rows[0] + k, TILE);
        for (int part = 0; part < PAGE; part += LANES) {
            Ints place;
            for (int i = 0; i < LANES; ++i) place[i] = part + i;
            const Ints is_read = (place >= all(first)) & (place < all(end));
            const Floats unit = load(key_units + part);
            for (int g = 0; g < c.groups(); ++g) {
                const Floats scale = unit == unit ? load(rows[g] + k + part) : unit;
                store(rows[g] + k + part, (Floats)((Ints)scale & is_read));
            }
        }
    }
    // The unit of those that are seen, or of all: magnitudes are ordered as floats are, infinity and NaN last.
    INLINE ScaleUnit unit(int g, const Seen& seen) const {
        if (seen.is_all()) return unit(g);
        Ints most = {};
        for (int k = seen.first / LANES * LANES; k < seen.end; k += LANES) {
            Ints place;
            for (int i = 0; i < LANES; ++i) place[i] = k + i;
            const Ints is_seen = (place >= all(seen.first)) & (place < all(seen.end));
            most = more(most, load_as<Ints>(rows[g] + k) & is_seen);
        }
        return of(most);
    }
    INLINE ScaleUnit unit(int g) const {
        Ints most = {};
#pragma GCC unroll 8
        for (int k = 0; k < TILE; k += LANES) most = more(most, load_as<Ints>(rows[g] + k));
        return of(most);
    }

  private:
    static INLINE Ints more(Ints most, Ints scale) {
        const Ints magnitude = scale & 0x7fffffff;
        return magnitude > most ? magnitude : most;
    }
    static INLINE ScaleUnit of(Ints most) {
        const int32_t bits = largest(most);
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        return ScaleUnit(magnitude);
    }
};

// What one query's tile is of: pages from the first that is seen, and how far they are read.
struct TilePages {
    const int32_t *pages, *later;  // The tile's own, and those of the next, `num_later` of which are there.
    int num_later;
    Seen seen;

    int first_page() const { return seen.first / PAGE; }
    int end_page() const { return (seen.end + PAGE - 1) / PAGE; }
    // What comes next while a page's values are used: the keys of the next tile's page, whose scales' reading is started.
    INLINE const uint8_t* ahead(const Cache& c, int i, int head) const {
        if (i >= num_later) return c.value_codes + c.token(pages[i], head) * c.code_bytes();
        fetch_scales(c, c.key_scales, later[i], head);
        return c.key_codes + c.token(later[i], head) * c.code_bytes();
    }
};

#if defined(__AVX512BW__)

// 32 codes of one token from dimension d, as words.
template <int FORMAT> INLINE __m512i code_words(const uint8_t* token, int d) {
    if constexpr (FORMAT == Q8) return _mm512_maskz_cvtepi8_epi16(~0u, load_as<__m256i>(token + d));
    const __m128i packed = load_as<__m128i>(token + d / 2), mask = _mm_set1_epi8(15);
    const __m128i upper = _mm_and_si128(_mm_srli_epi16(packed, 4), mask);
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_and_si128(packed, mask)), upper, 1);
    return _mm512_maskz_cvtepi8_epi16(~0u, _mm256_sub_epi8(both, _mm256_set1_epi8(8)));
}

#endif

// Sums of codes d .. d + GROUP times weights, by pairs of tokens. They are in an order of their own until they are put right.
template <int FORMAT> struct CodeSums {
    static constexpr int VECTORS = GROUP / LANES;
    Ints acc[VECTORS] = {};

    struct Pair { Ints of[VECTORS]; };  // Of two tokens' codes.
    static INLINE Pair pair(const uint8_t* token, size_t code_bytes, int d) {
#if defined(__AVX512BW__)
        const __m512i first = code_words<FORMAT>(token, d), second = code_words<FORMAT>(token + code_bytes, d);
        return {{(Ints)_mm512_unpacklo_epi16(first, second), (Ints)_mm512_unpackhi_epi16(first, second)}};
#else
        Pair pair;
        for (int j = 0; j < VECTORS; ++j)
            pair.of[j] = paired_words(codes_at<FORMAT>(token, d + j * LANES),
                                      codes_at<FORMAT>(token + code_bytes, d + j * LANES));
        return pair;
#endif
    }
    INLINE void add(const Pair& pair, Ints weights) {
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) acc[j] = plus_pairs(acc[j], pair.of[j], weights);
    }
    INLINE Floats sum(int j) const {
#if defined(__AVX512BW__)
        Ints in_order;  // Four of the first sums, then four of the others.
        for (int i = 0; i < LANES; ++i) in_order[i] = i / 8 * 4 + i % 4 + (i % 8 < 4 ? 0 : LANES);
        return __builtin_convertvector(__builtin_shuffle(acc[0], acc[1], in_order + j * LANES / 2), Floats);
#else
        return __builtin_convertvector(acc[j], Floats);
#endif
    }
};

// Adds to out [HEADS][ROW] the weights [HEADS][TILE] times the values of a tile, for GROUPS groups from dimension d.
// `coefficients` [GROUPS of all][TILE] are scales times steps; before and now [HEADS] are a Joint's.
template <int FORMAT, int HEADS, int GROUPS>
INLINE void add_codes(const Cache& c, const TilePages& tile, int head, const float* weights, const float* coefficients,
                      const ScaleUnit* units, const float* before, const float* now, int d, float* out) {
    const size_t code_bytes = c.code_bytes();
    const int begin = tile.first_page() * PAGE, end = tile.end_page() * PAGE;
    alignas(64) int16_t words[GROUPS][HEADS][TILE];
    for (int k = begin; k < end; k += LANES)
        for (int j = 0; j < GROUPS; ++j) {
            const Floats coefficient = load(coefficients + (d / GROUP + j) * TILE + k);
#pragma GCC unroll 8
            for (int g = 0; g < HEADS; ++g)
                store_words(words[j][g] + k, rounded(load(weights + g * TILE + k) * coefficient));
        }
    CodeSums<FORMAT> sums[GROUPS][HEADS];
    for (int i = tile.first_page(); i < tile.end_page(); ++i) {
        const uint8_t* token = c.value_codes + c.token(tile.pages[i], head) * code_bytes;
        const uint8_t* ahead = tile.ahead(c, i, head) + d * code_bytes / c.padded();
        for (int k = i * PAGE; k < (i + 1) * PAGE; k += 2, token += 2 * code_bytes, ahead += 2 * code_bytes) {
            __builtin_prefetch(ahead, 0, 2), __builtin_prefetch(ahead + code_bytes, 0, 2);
#pragma GCC unroll 2
            for (int j = 0; j < GROUPS; ++j) {
                const auto pair = CodeSums<FORMAT>::pair(token, code_bytes, d + j * GROUP);
#pragma GCC unroll 8
                for (int g = 0; g < HEADS; ++g) sums[j][g].add(pair, all(load_as<int32_t>(words[j][g] + k)));
            }
        }
    }
    for (int j = 0; j < GROUPS; ++j)
        for (int g = 0; g < HEADS; ++g)
            for (int v = 0; v < GROUP / LANES; ++v) {
                float* const to = out + g * ROW + d + j * GROUP + v * LANES;
                store(to, plus_product(sums[j][g].sum(v) * (now[g] * units[d / GROUP + j].unit), load(to), all(before[g])));
            }
}

// The same of values that are float16, VECTORS vectors from dimension d. Keys come one after the other, as in prefill.h.
template <int HEADS, int VECTORS>
INLINE void add_halves(const Cache& c, const TilePages& tile, int head, const float* weights, const float* before,
                       const float* now, int d, float* out) {
    Floats acc[HEADS][VECTORS] = {};
    const size_t code_bytes = c.code_bytes();
    for (int i = tile.first_page(); i < tile.end_page(); ++i) {
        const uint8_t* const page = c.value_codes + c.token(tile.pages[i], head) * code_bytes;
        const uint8_t* ahead = tile.ahead(c, i, head) + 2 * d;
        for (int k = std::max(tile.seen.first, i * PAGE); k < std::min(tile.seen.end, (i + 1) * PAGE); ++k) {
            for (int at = 0; at < 2 * VECTORS * LANES; at += 64)
                __builtin_prefetch(ahead + (k - i * PAGE) * code_bytes + at, 0, 2);
            Floats v[VECTORS];
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) v[j] = halves_at(page + (k - i * PAGE) * code_bytes, d + j * LANES, c.dims);
#pragma GCC unroll 8
            for (int g = 0; g < HEADS; ++g)
#pragma GCC unroll 4
                for (int j = 0; j < VECTORS; ++j) acc[g][j] = plus_product(acc[g][j], v[j], all(weights[g * TILE + k]));
        }
    }
    for (int g = 0; g < HEADS; ++g)
        for (int j = 0; j < VECTORS; ++j) {
            float* const to = out + g * ROW + d + j * LANES;
            store(to, plus_product(acc[g][j] * now[g], load(to), all(before[g])));
        }
}

template <int FORMAT, int HEADS>
INLINE void add_values(const Cache& c, const TilePages& tile, int head, const float* weights, const float* coefficients,
                       const ScaleUnit* units, const float* before, const float* now, float* out) {
    int d = 0;
    if constexpr (FORMAT == F16) {
        constexpr int VECTORS = LANES == 16 && HEADS <= 4 ? 4 : 2;
        for (; d + VECTORS * LANES <= c.dims; d += VECTORS * LANES)
            add_halves<HEADS, VECTORS>(c, tile, head, weights, before, now, d, out);
        for (; d < c.dims; d += LANES) add_halves<HEADS, 1>(c, tile, head, weights, before, now, d, out);
    } else {
        constexpr int GROUPS = LANES == 16 && HEADS <= 4 ? 2 : 1;
        for (; d + GROUPS * GROUP <= c.padded(); d += GROUPS * GROUP)
            add_codes<FORMAT, HEADS, GROUPS>(c, tile, head, weights, coefficients, units, before, now, d, out);
        for (; d < c.padded(); d += GROUP)
            add_codes<FORMAT, HEADS, 1>(c, tile, head, weights, coefficients, units, before, now, d, out);
    }
}
