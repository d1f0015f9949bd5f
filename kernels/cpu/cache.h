// Pages of cached keys and values: how numbers get in (quantized) and out (as floats, keys rotated).
// The layouts are those of kernels/forms/layout.py.
#pragma once

#include <algorithm>
#include <cmath>

#include "pool.h"
#include "units.h"

constexpr int MOST_DIMS = 256;       // A head has no more dimensions.
constexpr int ROW = MOST_DIMS + 16;  // Floats between expanded tokens: no power of two, which would share cache sets

INLINE int nearest(float x) {
#if defined(__x86_64__)
    return _mm_cvtss_si32(_mm_set_ss(x));
#else
    return int(lrintf(x));
#endif
}

// One head of one token into codes and scales. Divisions and roundings are those of the reference, to the last bit.
static void quantize(const float* x, const float* factor, const Cache& c, uint8_t* codes, f16* scales) {
    for (int g = 0; g < c.groups(); ++g) {
        float group[GROUP] = {};
        const int count = std::min(GROUP, c.dims - g * GROUP);
        for (int i = 0; i < count; ++i) group[i] = factor ? x[g * GROUP + i] / factor[g * GROUP + i] : x[g * GROUP + i];
        if (c.format == F16) {
            for (int i = 0; i < count; ++i) ((f16*)codes)[g * GROUP + i] = to_f16(group[i]);
            continue;
        }
        float most = 0;  // The value of largest magnitude, the first of several.
        for (int i = 0; i < GROUP; ++i) most = fabsf(group[i]) > fabsf(most) ? group[i] : most;
        scales[g] = to_f16(c.format == Q8 ? fabsf(most) / 127.0f : most / -8.0f);
        const float scale = to_float(scales[g]), inverse = scale == 0 ? 0 : 1 / scale;
        int code[GROUP];
        for (int i = 0; i < GROUP; ++i) code[i] = nearest(group[i] * inverse);
        if (c.format == Q8)
            for (int i = 0; i < GROUP; ++i) codes[g * GROUP + i] = uint8_t(std::max(-127, std::min(127, code[i])));
        else
            for (int i = 0; i < GROUP / 2; ++i) {
                const int low = std::max(0, std::min(15, code[i] + 8));
                const int high = std::max(0, std::min(15, code[i + GROUP / 2] + 8));
                codes[g * GROUP / 2 + i] = uint8_t(low | high << 4);
            }
    }
}

// keys and values [T, Hkv, D], tokens `stride` floats apart, into slots [T]; a negative one stores nothing.
void store_kv(const Cache& c, const float* keys, size_t key_stride, const float* values, size_t value_stride,
                     const int64_t* slots, int tokens) {
    constexpr int TOKENS = 16;  // A task takes so many.
    pool().run((tokens + TOKENS - 1) / TOKENS, [&](int task) {
        for (int t = task * TOKENS; t < std::min(tokens, (task + 1) * TOKENS); ++t)
            for (int h = 0; h < c.kv_heads && slots[t] >= 0; ++h) {
                const size_t token = c.token(int(slots[t] / PAGE), h) + slots[t] % PAGE;
                const size_t code = token * c.code_bytes(), scale = token * c.groups();
                quantize(keys + t * key_stride + h * c.dims, c.key_factor + h * c.dims, c, c.key_codes + code,
                         c.key_scales + scale);
                quantize(values + t * value_stride + h * c.dims, nullptr, c, c.value_codes + code,
                         c.value_scales + scale);
            }
    });
}

// Codes of dimensions d .. d + LANES of one token as floats, not scaled yet; what is past the last one has no meaning.
template <int FORMAT> INLINE Floats codes_at(const uint8_t* token, int d, int dims) {
    if constexpr (FORMAT == Q8) return widen(load_as<Bytes>(token + d));
    if constexpr (FORMAT == Q4) {
        const Bytes packed = load_as<Bytes>(token + d / GROUP * (GROUP / 2) + d % (GROUP / 2));
        return widen((d % GROUP < GROUP / 2 ? packed & 15 : packed >> 4) - 8);
    }
    if (d + LANES <= dims) return load((const f16*)token + d);
    uint16_t last[LANES] = {};  // A vector would read past the end.
    memcpy(last, token + 2 * d, 2 * (dims - d));
    return load((const f16*)last);
}

// One head of a page's tokens: where its codes are, and its scales as floats [PAGE][groups]. Reading a page starts the
// reading of the same part of the page that comes next, `ahead`, which lies anywhere in memory.
template <int FORMAT> struct PageReader {
    const uint8_t *codes, *ahead;
    int code_bytes, dims, groups;
    alignas(64) float scales[FORMAT == F16 ? 1 : PAGE * MOST_DIMS / GROUP];

    INLINE PageReader(const Cache& c, const uint8_t* all_codes, const f16* all_scales, int page, int next, int head)
        : codes(all_codes + c.token(page, head) * c.code_bytes()),
          ahead(all_codes + c.token(next, head) * c.code_bytes()), code_bytes(c.code_bytes()), dims(c.dims),
          groups(c.groups()) {
        if constexpr (FORMAT != F16) {
            const f16* from = all_scales + c.token(page, head) * groups;
            for (int i = 0; i < PAGE * groups; i += LANES) store(scales + i, load(from + i));
            __builtin_prefetch(all_scales + c.token(next, head) * groups);
        }
    }
    // Dimensions d .. d + LANES of a token, scaled.
    INLINE Floats values(int place, int d) {
        const int byte = FORMAT == F16 ? 2 * d : FORMAT == Q8 ? d : d / 2;
        if (byte % 64 == 0) __builtin_prefetch(ahead + place * code_bytes + byte);
        const Floats raw = codes_at<FORMAT>(codes + place * code_bytes, d, dims);
        return FORMAT == F16 ? raw : raw * scales[place * groups + d / GROUP];
    }
};

// Values of tokens first .. last of a page into out [PAGE][ROW].
template <int FORMAT>
INLINE void read_values(const Cache& c, int page, int next, int head, int first, int last, float* out) {
    PageReader<FORMAT> reader(c, c.value_codes, c.value_scales, page, next, head);
    for (int place = first; place < last; ++place)
        for (int d = 0; d < c.dims; d += LANES) store(out + place * ROW + d, reader.values(place, d));
}

// How a page's keys are turned: [PAGE][4][half] of its angles and the places' together, each times the factor of the
// dimension that it will multiply. For a pair (x, y) = (code i, code i + half), the four are what x and y are
// multiplied by to make i, and what y and x are to make i + half.
INLINE void turns_of_page(const float* page, const float* places, const float* factor, int half,
                          float* __restrict out) {
    for (int place = 0; place < PAGE; ++place, places += 2 * half, out += 4 * half)
        for (int i = 0; i < half; ++i) {
            const float c = places[i], s = places[half + i];
            const float cosine = page[i] * c - page[half + i] * s, sine = page[half + i] * c + page[i] * s;
            out[i] = factor[i] * cosine;
            out[half + i] = -factor[half + i] * sine;
            out[2 * half + i] = factor[half + i] * cosine;
            out[3 * half + i] = factor[i] * sine;
        }
}

// Keys likewise, times the head's factor [padded to LANES] and turned by `turns` where half > 0.
template <int FORMAT>
INLINE void read_keys(const Cache& c, int page, int next, int head, int first, int last, const float* factor,
                      const float* turns, int half, float* out) {
    PageReader<FORMAT> reader(c, c.key_codes, c.key_scales, page, next, head);
    const auto turn_pairs = [&](auto count) __attribute__((always_inline)) {  // The count may be a constant.
        for (int d = 0; d < count; d += LANES)
            for (int place = first; place < last; ++place) {
                const float* const turn = turns + size_t(place) * 4 * count + d;
                const Floats x = reader.values(place, d), y = reader.values(place, d + count);
                store(out + place * ROW + d, x * load(turn) + y * load(turn + count));
                store(out + place * ROW + d + count, y * load(turn + 2 * count) + x * load(turn + 3 * count));
            }
    };
    const int paired = half % LANES ? 0 : half;  // Pairs that are turned as they are read.
    if (half == 32) turn_pairs(std::integral_constant<int, 32>());  // Addresses that are known save registers.
    else if (half == 64) turn_pairs(std::integral_constant<int, 64>());
    else turn_pairs(paired);
    const int turned = 2 * (half - paired);  // Dimensions whose factor is in their turn.
    for (int d = 2 * paired; d < c.dims; d += LANES)
        for (int place = first; place < last; ++place) store(out + place * ROW + d, reader.values(place, d));
    for (int place = first; place < last; ++place) {
        float* const key = out + place * ROW;
        const float* const turn = turns + size_t(place) * 4 * half;
        for (int i = 0; i < turned / 2; ++i) {
            const float x = key[i], y = key[i + half];
            key[i] = x * turn[i] + y * turn[half + i];
            key[i + half] = y * turn[2 * half + i] + x * turn[3 * half + i];
        }
        for (int i = 2 * half; i < c.dims; ++i) key[i] *= factor[i];
    }
}
