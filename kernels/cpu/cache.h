// Pages of cached keys and values: how numbers get in (quantized) and out (as codes).
// The layouts are those of kernels/forms/layout.py.
#pragma once

#include <algorithm>
#include <cmath>

#include "pool.h"
#include "units.h"

constexpr int MOST_DIMS = 256;       // A head has no more dimensions.

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

// Tokens from slots [count] to slots [count], none of which is both, bit for bit.
static void copy_slots(const Cache& c, const int64_t* sources, const int64_t* targets, int count) {
    constexpr int TOKENS = 64;  // A task takes so many.
    const size_t code_bytes = c.code_bytes(), scales = c.format == F16 ? 0 : c.groups();
    const auto place = [&](int64_t slot, int head) { return c.token(int(slot / PAGE), head) + slot % PAGE; };
    pool().run((count + TOKENS - 1) / TOKENS, [&](int task) {
        for (int t = task * TOKENS; t < std::min(count, (task + 1) * TOKENS); ++t)
            for (int h = 0; h < c.kv_heads; ++h) {
                const size_t from = place(sources[t], h), to = place(targets[t], h);
                memcpy(c.key_codes + to * code_bytes, c.key_codes + from * code_bytes, code_bytes);
                memcpy(c.value_codes + to * code_bytes, c.value_codes + from * code_bytes, code_bytes);
                std::copy_n(c.key_scales + from * scales, scales, c.key_scales + to * scales);
                std::copy_n(c.value_scales + from * scales, scales, c.value_scales + to * scales);
            }
    });
}

// Codes of dimensions d .. d + LANES of one token.
template <int FORMAT> INLINE Ints codes_at(const uint8_t* token, int d) {
    if constexpr (FORMAT == Q8) return whole(load_as<Bytes>(token + d));
    const Bytes packed = load_as<Bytes>(token + d / GROUP * (GROUP / 2) + d % (GROUP / 2));
    return whole((d % GROUP < GROUP / 2 ? packed & 15 : packed >> 4) - 8);
}

// Numbers d .. d + LANES of one token, zeros after the last.
INLINE Floats halves_at(const uint8_t* token, int d, int dims) {
    if (d + LANES <= dims) return load((const f16*)token + d);
    uint16_t last[LANES] = {};  // A vector would read past the end.
    if (d < dims) memcpy(last, token + 2 * d, 2 * (dims - d));
    return load((const f16*)last);
}

// Starts the reading of scales, or of codes, of one head of a page, to the second cache: pages lie anywhere in memory, and
// no processor guesses where the next one is. Codes are asked for little by little, as others are used: a core can wait for a
// few lines only.
INLINE void fetch_scales(const Cache& c, const f16* scales, int page, int head) {
    for (int at = 0; at < PAGE * c.groups(); at += 32)
        __builtin_prefetch(scales + c.token(page, head) * c.groups() + at, 0, 2);
}
INLINE void fetch(const Cache& c, const uint8_t* codes, const f16* scales, int page, int head) {
    const size_t token = c.token(page, head), bytes = c.code_bytes();
    for (size_t at = 0; at < PAGE * bytes; at += 64) __builtin_prefetch(codes + token * bytes + at, 0, 2);
    fetch_scales(c, scales, page, head);
}
