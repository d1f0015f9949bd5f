// Vectors of floats as wide as the build's registers, and how stored numbers become floats.
//
// One source for every instruction set: GCC's vector extensions do the arithmetic, intrinsics only what they can't say.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

#define INLINE inline __attribute__((always_inline))

template <class V> INLINE V load_as(const void* from) {
    V v;
    memcpy(&v, from, sizeof v);  // One unaligned instruction comes of it.
    return v;
}
INLINE Floats load(const float* from) { return load_as<Floats>(from); }
INLINE void store(float* to, Floats v) { memcpy(to, &v, sizeof v); }
INLINE Floats all(float x) {  // Not as a sum with zeros, which keeps an addition: it turns -0 to 0.
#if defined(__AVX512F__)
    return (Floats)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (Floats)_mm256_set1_ps(x);
#else
    return Floats{x, x, x, x};
#endif
}
INLINE Ints all(int x) { return Ints{} + x; }

INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b)  /* unmasked, GCC 12 warns */;
#elif defined(__AVX2__)
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// c + a * b, rounded once where the processor can: compilers fuse what stands in one expression, and do so everywhere.
INLINE Floats plus_product(Floats c, Floats a, Floats b) { return c + a * b; }
INLINE Floats root(Floats x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(__AVX2__)
    return (Floats)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < LANES; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}
// The nearest whole numbers, of which no magnitude is 2^31 or more; what isn't a number gives any.
INLINE Ints rounded(Floats x) {
#if defined(__AVX512F__)
    return (Ints)_mm512_maskz_cvtps_epi32(0xffff, (__m512)x);
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtps_epi32((__m256)x);
#elif defined(__x86_64__)
    return (Ints)_mm_cvtps_epi32((__m128)x);
#else
    Ints whole;
    for (int i = 0; i < LANES; ++i) whole[i] = int32_t(__builtin_rintf(x[i]));
    return whole;
#endif
}

// v, in a register from here on: used often, it would else be loaded for every use.
INLINE Floats held(Floats v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__x86_64__)
    asm("" : "+x"(v));
#endif
    return v;
}

// Numbers as they are stored: bfloat16 is the upper half of a float, float16 is IEEE binary16.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

INLINE Floats load(const bf16* from) {
    return (Floats)(__builtin_convertvector(load_as<Halves>(from), Words) << 16);
}
INLINE Floats of_f16(Halves halves) {
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)halves);
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps((__m128i)halves);
#else
    const Words h = __builtin_convertvector(halves, Words);
    Words bits = (Words)((Floats)((h & 0x7fff) << 13) * 0x1p112f);  // This moves the exponent, of subnormals, too.
    bits |= (h & 0x7c00) == 0x7c00 ? Words{} + 0x7f800000 : Words{};
    return (Floats)(bits | (h & 0x8000) << 16);
#endif
}
INLINE Floats load(const f16* from) { return of_f16(load_as<Halves>(from)); }

// Signed bytes. In GCC 12 the widening of so many bytes has no instruction of its own, so it is named.
INLINE Ints whole(Bytes bytes) {
#if defined(__AVX512F__)
    return (Ints)_mm512_maskz_cvtepi8_epi32(0xffff, (__m128i)bytes);
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)bytes));
#else
    return Ints{int8_t(bytes[0]), int8_t(bytes[1]), int8_t(bytes[2]), int8_t(bytes[3])};
#endif
}
INLINE Floats widen(Bytes bytes) { return __builtin_convertvector(whole(bytes), Floats); }

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
INLINE float to_float(f16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    uint16_t padded[LANES] = {x.bits};
    return load((const f16*)padded)[0];
#endif
}

// Rounded to the nearest float16, to the even one of two; what is too large becomes infinity.
INLINE f16 to_f16(float x) {
#if defined(__F16C__)
    return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits >= 0x47800000) return {uint16_t(sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00))};
    if (bits < 0x38800000) {  // Of a subnormal float16, adding a half lines the bits up and rounds them
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, 4);
        return {uint16_t(sign | (bits - 0x3f000000))};
    }
    return {uint16_t(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13)};
#endif
}

// Lanes i and i ^ distance change places.
INLINE Floats swapped(Floats v, int distance) {
    Ints other;
    for (int i = 0; i < LANES; ++i) other[i] = i ^ distance;
    return __builtin_shuffle(v, other);
}
INLINE float sum(Floats v) {
#pragma GCC unroll 4
    for (int distance = LANES / 2; distance; distance /= 2) v += swapped(v, distance);
    return v[0];
}
INLINE float largest(Floats v) {
#pragma GCC unroll 4
    for (int distance = LANES / 2; distance; distance /= 2) v = larger(v, swapped(v, distance));
    return v[0];
}
INLINE int32_t largest(Ints v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)v);
#else
    int32_t most = v[0];
    for (int i = 1; i < LANES; ++i) most = v[i] > most ? v[i] : most;
    return most;
#endif
}
INLINE int32_t sum(Ints v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)v);
#else
    int32_t total = 0;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
#endif
}

// Lanes with the bit `distance` clear are a's, with it set b's, each plus the lane of the same vector that far away.
INLINE Floats paired(Floats a, Floats b, int distance) {
    Ints of_own, of_other;
    for (int i = 0; i < LANES; ++i) {
        of_own[i] = i & distance ? i + LANES : i;
        of_other[i] = i & distance ? i : i + LANES;
    }
    return __builtin_shuffle(a, b, of_own) + swapped(__builtin_shuffle(a, b, of_other), distance);
}
// The first COUNT lanes of the result, a power of two, are the sums of so many vectors, in their order. A tree of calls, so
// that all stay in registers.
template <int COUNT = LANES, int STEP = 1> INLINE Floats sums(const Floats* v) {
    if constexpr (STEP < COUNT) {
        return paired(sums<COUNT, 2 * STEP>(v), sums<COUNT, 2 * STEP>(v + STEP), STEP);
    } else if constexpr (STEP < LANES) {
        const Floats halves = sums<COUNT, 2 * STEP>(v);
        return halves + swapped(halves, STEP);
    } else {
        return v[0];
    }
}

// How many vectors of `count` go into one such tree.
constexpr int largest_tree(int count) {
    int tree = LANES;
    while (tree > count) tree /= 2;
    return tree;
}

// e^x with a relative error under 2e-7, for x from -87.3 to 88.
// Polynomial: S. Moshier, Cephes Mathematical Library, expf.
INLINE Floats exponential_inside(Floats x) {
    const Floats shifted = x * 1.44269504f + 12582912.0f;  // Its lowest bits are the nearest whole number.
    const Floats n = shifted - 12582912.0f;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (Floats)((Ints)(p * r * r + r + 1.0f) + ((Ints)shifted << 23));
}
// For every x; 0 below -87.3, and no more than 2^127.
INLINE Floats exponential(Floats x) {
    const Floats result = exponential_inside(-larger(-larger(x, all(-87.3f)), all(-88.0f)));
    return x < -87.3f ? Floats{} : result;
}
INLINE Floats hyperbolic_tangent(Floats x) { return 1.0f - 2.0f / (exponential(x + x) + 1.0f); }

// 2^x with a relative error under 2e-7, and 1 of 0, for every x up to 127; 0 below -126.
// The polynomial is a minimax fit of 2^f for -1/2 <= f <= 1/2 that is 1 at 0.
INLINE Floats power_of_two(Floats x) {
#if defined(__AVX512F__)
    const Floats n = (Floats)_mm512_maskz_roundscale_ps(0xffff, (__m512)x, 0x08);
#else
    const Floats shifted = larger(x, all(-126.0f)) + 12582912.0f;  // Its lowest bits are the nearest whole number.
    const Floats n = shifted - 12582912.0f;
#endif
    const Floats f = x - n;
    Floats p = plus_product(all(0.00967151299f), f, all(0.00132647273f));
    p = plus_product(all(0.0555073358f), f, p);
    p = plus_product(all(0.240222424f), f, p);
    p = plus_product(all(0.693147004f), f, p);
    p = plus_product(all(1.0f), f, p);
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
    const Floats power = (Floats)((Ints)p + ((Ints)shifted << 23));
    return x < -126.0f ? Floats{} : power;
#endif
}
