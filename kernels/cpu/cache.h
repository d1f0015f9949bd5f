// Pages of cached keys and values: how numbers get in (quantised) and out (as floats, keys rotated).
// The layouts are those of kernels/layout.py.
#pragma once

#include <algorithm>
#include <cmath>

#include "pool.h"
#include "simd.h"

constexpr int PAGE = 16;        // tokens
constexpr int GROUP = 32;       // values that share a scale
constexpr int MOST_DIMS = 256;  // of a head
constexpr int ROW = MOST_DIMS + 16;  // floats between expanded tokens: no power of two, which would share cache sets

enum Format { F16, Q8, Q4 };

struct Cache {
    uint8_t *key_codes, *value_codes;
    f16 *key_scales, *value_scales;
    const float* key_factor;  // [Hkv, D]
    int format, kv_heads, dims;

    int groups() const { return (dims + GROUP - 1) / GROUP; }
    int padded() const { return groups() * GROUP; }
    int code_bytes() const { return format == F16 ? 2 * dims : format == Q8 ? padded() : padded() / 2; }
    size_t token(int page, int head) const { return (size_t(page) * kv_heads + head) * PAGE; }  // its first
};

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
        float most = 0;  // of largest magnitude, the first of several
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

// keys and values [T, Hkv, D], tokens `stride` floats apart, into slots [T].
static void store_kv(const Cache& c, const float* keys, size_t key_stride, const float* values, size_t value_stride,
                     const int64_t* slots, int tokens) {
    constexpr int TOKENS = 16;  // a task
    pool().run((tokens + TOKENS - 1) / TOKENS, [&](int task) {
        for (int t = task * TOKENS; t < std::min(tokens, (task + 1) * TOKENS); ++t)
            for (int h = 0; h < c.kv_heads; ++h) {
                const size_t token = c.token(int(slots[t] / PAGE), h) + slots[t] % PAGE;
                const size_t code = token * c.code_bytes(), scale = token * c.groups();
                quantize(keys + t * key_stride + h * c.dims, c.key_factor + h * c.dims, c, c.key_codes + code,
                         c.key_scales + scale);
                quantize(values + t * value_stride + h * c.dims, nullptr, c, c.value_codes + code,
                         c.value_scales + scale);
            }
    });
}

// Codes of dimensions d .. d + LANES of one token as floats, not scaled yet.
template <int FORMAT> INLINE Floats codes_at(const uint8_t* codes, int d) {
    if constexpr (FORMAT == F16) return load((const f16*)codes + d);
    if constexpr (FORMAT == Q8) return widen(load_as<Bytes>(codes + d));
    const Bytes packed = load_as<Bytes>(codes + d / GROUP * (GROUP / 2) + d % (GROUP / 2));
    return widen((d % GROUP < GROUP / 2 ? packed & 15 : packed >> 4) - 8);
}

// One head of a page's tokens: where its codes are, and its scales as floats [PAGE][groups].
template <int FORMAT> struct PageReader {
    const uint8_t* codes;
    int code_bytes, dims, groups;
    float scales[FORMAT == F16 ? 1 : PAGE * MOST_DIMS / GROUP];
    uint8_t tail[FORMAT == F16 ? 2 * MOST_DIMS : 1];

    INLINE PageReader(const Cache& c, const uint8_t* all_codes, const f16* all_scales, int page, int head)
        : codes(all_codes + c.token(page, head) * c.code_bytes()), code_bytes(c.code_bytes()), dims(c.dims),
          groups(c.groups()) {
        if constexpr (FORMAT != F16) {
            const f16* from = all_scales + c.token(page, head) * groups;
            for (int i = 0; i < PAGE * groups; i += LANES) store(scales + i, load(from + i));
        }
    }
    // A token's codes; where vectors would read past the end of a float16 token, a padded copy.
    INLINE const uint8_t* token(int place) {
        const uint8_t* from = codes + place * code_bytes;
        if constexpr (FORMAT == F16)
            if (dims % LANES) {
                memcpy(tail, from, code_bytes);
                memset(tail + code_bytes, 0, 2 * (LANES - dims % LANES));
                return tail;
            }
        return from;
    }
    INLINE Floats scale(int place, int d) const {
        if constexpr (FORMAT == F16) return all(1.0f);
        return all(scales[place * groups + d / GROUP]);
    }
    INLINE Floats values(const uint8_t* token, int place, int d) const {
        if constexpr (FORMAT == F16) return codes_at<FORMAT>(token, d);
        return codes_at<FORMAT>(token, d) * scale(place, d);
    }
};

// x rotated in place, in pairs i and i + half, by angles [2][half]: cosines, then sines.
INLINE void rotate_head(float* __restrict x, const float* __restrict angles, int half) {
    const float *cosine = angles, *sine = angles + half;
    for (int i = 0; i < half; ++i) {
        const float first = x[i], second = x[i + half];
        x[i] = first * cosine[i] - second * sine[i];
        x[i + half] = second * cosine[i] + first * sine[i];
    }
}

// Values of tokens first .. last of a page into out [PAGE][ROW].
template <int FORMAT> INLINE void read_values(const Cache& c, int page, int head, int first, int last, float* out) {
    PageReader<FORMAT> reader(c, c.value_codes, c.value_scales, page, head);
    for (int place = first; place < last; ++place) {
        const uint8_t* token = reader.token(place);
        for (int d = 0; d < c.dims; d += LANES) store(out + place * ROW + d, reader.values(token, place, d));
    }
}

// Keys likewise, times the head's factor [padded to LANES], rotated by each place's `angles` [PAGE][2][half].
template <int FORMAT>
INLINE void read_keys(const Cache& c, int page, int head, int first, int last, const float* factor, const float* angles,
                      int half, float* out) {
    PageReader<FORMAT> reader(c, c.key_codes, c.key_scales, page, head);
    for (int place = first; place < last; ++place) {
        const uint8_t* token = reader.token(place);
        float* const key = out + place * ROW;
        const float *cosine = angles + size_t(place) * 2 * half, *sine = cosine + half;
        int d = 0;
        if (half % LANES == 0) {
            for (; d < half; d += LANES) {
                const Floats x = reader.values(token, place, d) * load(factor + d);
                const Floats y = reader.values(token, place, d + half) * load(factor + d + half);
                store(key + d, x * load(cosine + d) - y * load(sine + d));
                store(key + d + half, y * load(cosine + d) + x * load(sine + d));
            }
            d = 2 * half;
        }
        for (; d < c.dims; d += LANES) store(key + d, reader.values(token, place, d) * load(factor + d));
        if (half % LANES) rotate_head(key, cosine, half);
    }
}
