// Cached values of a span of pages, weighted and summed for the heads of a group as they are read.
#pragma once

#include <cfloat>

#include "scores.h"
#include "words.h"

// A part's pages from one correction of the softmax to the next, and the places in them that are seen.
struct Span {
    const int32_t *pages, *later;  // The later ones are of the next span, so far as there are as many.
    int count, num_later, first, last;  // The first place of the first page, the end in the last.

    int first_of(int i) const { return i ? 0 : first; }
    int last_of(int i) const { return i + 1 < count ? PAGE : last; }
};

// out[g] = out[g] * corrections[g] + sum over places of weights[g][place] * values, for HEADS heads, of VECTORS vectors
// from dimension d: enough sums at a time that none waits for its own last step.
template <int FORMAT, int HEADS, int VECTORS>
INLINE void add_values_at(const Cache& c, const Span& span, int head, const float* all_weights,
                          const float* corrections, int d, float* out) {
    constexpr int GROUPS = VECTORS * LANES > GROUP ? VECTORS * LANES / GROUP : 1;
    constexpr int BYTES = VECTORS * LANES * (FORMAT == F16 ? 4 : FORMAT == Q8 ? 2 : 1) / 2;
    const int code_bytes = c.code_bytes(), byte = FORMAT == F16 ? 2 * d : FORMAT == Q8 ? d : d / 2;
    Floats acc[HEADS][VECTORS];
#pragma GCC unroll 8
    for (int g = 0; g < HEADS; ++g)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) acc[g][j] = load(out + g * ROW + d + j * LANES) * corrections[g];
    for (int i = 0; i < span.count; ++i, all_weights += PAGE) {
        alignas(64) float weights[GROUPS][HEADS][PAGE], scales[MOST_DIMS / GROUP][PAGE];  // The weights are times the scales.
        if constexpr (FORMAT != F16)
            read_scales(c.value_scales + c.token(span.pages[i], head) * c.groups(), c.groups(), scales[0]);
        for (int k = 0; k < GROUPS; ++k)
            for (int part = 0; part < PAGE; part += LANES) {
                const Floats scale = FORMAT == F16 ? all(1.0f) : load(scales[d / GROUP + k] + part);
#pragma GCC unroll 8
                for (int g = 0; g < HEADS; ++g)
                    store(weights[k][g] + part, load(all_weights + g * SPAN + part) * scale);
            }
        const auto block = [&](const uint8_t* codes, int page) { return codes + c.token(page, head) * code_bytes; };
        const uint8_t* token = block(c.value_codes, span.pages[i]) + span.first_of(i) * code_bytes;
        const uint8_t* ahead = block(c.value_codes, span.pages[std::min(i + 1, span.count - 1)]) + byte;
        const uint8_t* later = i < span.num_later ? block(c.key_codes, span.later[i]) + byte : ahead;
        if (FORMAT != F16 && !d && i < span.num_later)
            __builtin_prefetch(c.key_scales + c.token(span.later[i], head) * c.groups(), 0, 2);
        const int last = span.last_of(i);
        for (int place = span.first_of(i); place < last; ++place, token += code_bytes) {
            for (int at = 0; at < BYTES; at += 64) {
                __builtin_prefetch(ahead + at);
                __builtin_prefetch(later + at, 0, 2);
            }
            ahead += code_bytes, later += code_bytes;
            Floats v[VECTORS];
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) v[j] = codes_at<FORMAT>(token, d + j * LANES, c.dims);
#pragma GCC unroll 8
            for (int g = 0; g < HEADS; ++g)
#pragma GCC unroll 4
                for (int j = 0; j < VECTORS; ++j) acc[g][j] += v[j] * weights[j * LANES / GROUP][g][place];
        }
    }
#pragma GCC unroll 8
    for (int g = 0; g < HEADS; ++g)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) store(out + g * ROW + d + j * LANES, acc[g][j]);
}

#if defined(__AVX512VNNI__)

// 32 codes of one token from dimension d, as words.
template <int FORMAT> INLINE __m512i code_words(const uint8_t* token, int d) {
    if constexpr (FORMAT == Q8) return _mm512_maskz_cvtepi8_epi16(~0u, load_as<__m256i>(token + d));
    const __m128i packed = load_as<__m128i>(token + d / 2), mask = _mm_set1_epi8(15);
    const __m128i upper = _mm_and_si128(_mm_srli_epi16(packed, 4), mask);
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_and_si128(packed, mask)), upper, 1);
    return _mm512_maskz_cvtepi8_epi16(~0u, _mm256_sub_epi8(both, _mm256_set1_epi8(8)));
}

// Weights times scales of GROUPS groups from group `first`, as words [GROUPS][HEADS][SPAN] with units [GROUPS][HEADS].
// Their sum with codes can't overflow: 256 times 32767 times 127 is less than 2^31.
template <int HEADS, int GROUPS>
INLINE void weight_words(const Cache& c, const Span& span, int head, const float* weights, int first, int16_t* words,
                         float* units) {
    alignas(64) float products[GROUPS][HEADS][SPAN];
    Ints most[GROUPS][HEADS] = {};  // Magnitudes are ordered as floats are, infinity and NaN last.
    Ints lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    for (int i = 0; i < span.count; ++i) {
        alignas(64) float scales[MOST_DIMS / GROUP][PAGE];
        read_scales(c.value_scales + c.token(span.pages[i], head) * c.groups(), c.groups(), scales[0]);
        const Ints is_seen = (lane >= all(span.first_of(i))) & (lane < all(span.last_of(i)));
        for (int k = 0; k < GROUPS; ++k)
#pragma GCC unroll 8
            for (int g = 0; g < HEADS; ++g) {
                const Floats product = load(weights + g * SPAN + i * PAGE) * load(scales[first + k]);
                const Ints seen = (Ints)product & is_seen, magnitude = seen & 0x7fffffff;
                store(products[k][g] + i * PAGE, (Floats)seen);
                most[k][g] = (Ints)_mm512_maskz_max_epi32(0xffff, (__m512i)most[k][g], (__m512i)magnitude);
            }
    }
    for (int k = 0; k < GROUPS; ++k)
        for (int g = 0; g < HEADS; ++g, words += SPAN) {
            const int32_t bits = _mm512_reduce_max_epi32((__m512i)most[k][g]);
            float largest;
            memcpy(&largest, &bits, 4);
            const float steps = largest < FLT_MIN ? 0.0f : MOST_WORD / largest;
            *units++ = largest / MOST_WORD;
            for (int i = 0; i < span.count * PAGE; i += LANES) {
                const Ints whole = rounded(load(products[k][g] + i) * steps);
                const __m256i narrow = _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)whole);
                memcpy(words + i, &narrow, sizeof narrow);
            }
        }
}

// add_values_at for GROUPS groups of codes from dimension d, two tokens at a time.
template <int FORMAT, int HEADS, int GROUPS>
INLINE void add_code_words(const Cache& c, const Span& span, int head, const float* weights, const float* corrections,
                           int d, float* out) {
    constexpr int BYTES = GROUPS * (FORMAT == Q8 ? GROUP : GROUP / 2);
    const int code_bytes = c.code_bytes(), byte = FORMAT == Q8 ? d : d / 2;
    alignas(64) int16_t words[GROUPS][HEADS][SPAN];
    float units[GROUPS][HEADS];
    weight_words<HEADS, GROUPS>(c, span, head, weights, d / GROUP, words[0][0], units[0]);
    __m512i acc[GROUPS][HEADS][2];  // Sums of the first four of each eight dimensions, and of the others.
    for (auto& group : acc)
        for (auto& sums : group) sums[0] = sums[1] = _mm512_setzero_si512();
    for (int i = 0; i < span.count; ++i) {
        const auto block = [&](const uint8_t* codes, int page) { return codes + c.token(page, head) * code_bytes; };
        const uint8_t* token = block(c.value_codes, span.pages[i]);
        const uint8_t* ahead = block(c.value_codes, span.pages[std::min(i + 1, span.count - 1)]) + byte;
        const uint8_t* later = i < span.num_later ? block(c.key_codes, span.later[i]) + byte : ahead;
        if (!d && i < span.num_later)
            __builtin_prefetch(c.key_scales + c.token(span.later[i], head) * c.groups(), 0, 2);
        for (int place = 0; place < PAGE; place += 2, token += 2 * code_bytes) {
            for (int next = 0; next < 2; ++next, ahead += code_bytes, later += code_bytes)
                for (int at = 0; at < BYTES; at += 64) {
                    __builtin_prefetch(ahead + at);
                    __builtin_prefetch(later + at, 0, 2);
                }
#pragma GCC unroll 2
            for (int k = 0; k < GROUPS; ++k) {
                const __m512i first = code_words<FORMAT>(token, d + k * GROUP);
                const __m512i second = code_words<FORMAT>(token + code_bytes, d + k * GROUP);
                const __m512i lower = _mm512_unpacklo_epi16(first, second), upper = _mm512_unpackhi_epi16(first, second);
#pragma GCC unroll 8
                for (int g = 0; g < HEADS; ++g) {
                    const __m512i weight = _mm512_set1_epi32(load_as<int32_t>(words[k][g] + i * PAGE + place));
                    acc[k][g][0] = _mm512_dpwssd_epi32(acc[k][g][0], lower, weight);
                    acc[k][g][1] = _mm512_dpwssd_epi32(acc[k][g][1], upper, weight);
                }
            }
        }
    }
    Ints in_order;  // Four of the first sums, then four of the others.
    for (int i = 0; i < LANES; ++i) in_order[i] = i / 8 * 4 + i % 4 + (i % 8 < 4 ? 0 : LANES);
    for (int k = 0; k < GROUPS; ++k)
        for (int g = 0; g < HEADS; ++g)
            for (int j = 0; j < 2; ++j) {
                float* const to = out + g * ROW + d + k * GROUP + j * LANES;
                const Ints sums = __builtin_shuffle((Ints)acc[k][g][0], (Ints)acc[k][g][1], in_order + j * LANES / 2);
                store(to, load(to) * corrections[g] + __builtin_convertvector(sums, Floats) * units[k][g]);
            }
}

#endif

template <int FORMAT, int HEADS>
INLINE void add_values(const Cache& c, const Span& span, int head, const float* weights, const float* corrections,
                       float* out) {
#if defined(__AVX512VNNI__)
    if constexpr (FORMAT != F16) {
        constexpr int GROUPS = HEADS <= 4 ? 2 : 1;
        int d = 0;
        for (; d + GROUPS * GROUP <= c.padded(); d += GROUPS * GROUP)
            add_code_words<FORMAT, HEADS, GROUPS>(c, span, head, weights, corrections, d, out);
        for (; d < c.padded(); d += GROUP)
            add_code_words<FORMAT, HEADS, 1>(c, span, head, weights, corrections, d, out);
        return;
    }
#endif
    constexpr int VECTORS = LANES == 16 && HEADS <= 4 ? 4 : 2;
    int d = 0;
    for (; d + VECTORS * LANES <= c.dims; d += VECTORS * LANES)
        add_values_at<FORMAT, HEADS, VECTORS>(c, span, head, weights, corrections, d, out);
    for (; d < c.dims; d += LANES) add_values_at<FORMAT, HEADS, 1>(c, span, head, weights, corrections, d, out);
}
