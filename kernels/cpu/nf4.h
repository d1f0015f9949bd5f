// x [T, K] float32 times a matrix of four-bit codes of a book of sixteen numbers, which is looked up in registers.
#pragma once

#include "quantized.h"

namespace quantized {

struct Codebook {
#if defined(__AVX512F__)
    Floats numbers;
    explicit Codebook(const float* from) : numbers(load(from)) {}
    INLINE Floats at(Words lanes) const {  // The lowest four bits of a lane count.
        return (Floats)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)lanes, (__m512)numbers);
    }
#elif defined(__AVX2__)
    Floats low, high;
    explicit Codebook(const float* from) : low(load(from)), high(load(from + 8)) {}
    INLINE Floats at(Words lanes) const {
        return (Floats)_mm256_blendv_ps(_mm256_permutevar8x32_ps((__m256)low, (__m256i)lanes),
                                        _mm256_permutevar8x32_ps((__m256)high, (__m256i)lanes), (__m256)(lanes << 28));
    }
#else
    const float* numbers;
    explicit Codebook(const float* from) : numbers(from) {}
    INLINE Floats at(Words lanes) const {
        return Floats{numbers[lanes[0] & 15], numbers[lanes[1] & 15], numbers[lanes[2] & 15], numbers[lanes[3] & 15]};
    }
#endif
};

// A tile times T rows of x.
template <int T> __attribute__((noinline)) void multiply_tile(const Nf4Matrix& m, int tile, const float* x, Tile* totals) {
    constexpr int SETS = T == 1 ? 4 : T == 2 ? 2 : 1;  // Sets of sums take turns.
    const Codebook book(m.codebook);
    const int blocks = m.inputs / m.blocksize;
    const size_t width = m.inputs;
    const int32_t* codes = m.codes + size_t(tile) * (m.inputs / 8) * OUTPUTS;
    const float* scales = m.scales + size_t(tile) * blocks * OUTPUTS;
    Tile total[T] = {};
    for (int b = 0; b < blocks; ++b, scales += OUTPUTS) {
        Tile sums[SETS * T] = {};
        for (int k = 0; k < m.blocksize; k += 8, x += 8, codes += OUTPUTS)
            for (int p = 0; p < PARTS; ++p) {
                const Words lanes = load_as<Words>(codes + p * LANES);
#pragma GCC unroll 8
                for (int j = 0; j < 8; ++j) {
                    const Floats weight = book.at(lanes >> (4 * j));
#pragma GCC unroll 8
                    for (int t = 0; t < T; ++t) sums[j % SETS * T + t].part[p] += weight * x[t * width + j];
                }
            }
        for (int t = 0; t < T; ++t)
            for (int p = 0; p < PARTS; ++p) {
                for (int s = 1; s < SETS; ++s) sums[t].part[p] += sums[s * T + t].part[p];
                total[t].part[p] += sums[t].part[p] * load(scales + p * LANES);
            }
    }
    for (int t = 0; t < T; ++t) totals[t] = total[t];
}

void linear(const Nf4Matrix* const* matrices, int count, const float* x, int rows, const float* bias, float* out) {
    int width = 0;
    for (int i = 0; i < count; ++i) width += matrices[i]->outputs;
    for (int i = 0, column = 0; i < count; column += matrices[i++]->outputs) {
        const Nf4Matrix& m = *matrices[i];
        const int tiles = (m.outputs + OUTPUTS - 1) / OUTPUTS;
        for_tiles(tiles, size_t(tiles) * m.inputs * OUTPUTS / 2, rows, [&](int begin, int end) {
            for_lots(rows, [&](int first, auto together) {
                for (int tile = begin; tile < end; ++tile) {
                    const int n = column + tile * OUTPUTS;
                    Tile totals[together.value];
                    multiply_tile<together.value>(m, tile, x + size_t(first) * m.inputs, totals);
                    for (int t = 0; t < together.value; ++t)
                        store_tile(totals[t], bias ? bias + n : nullptr, out + size_t(first + t) * width + n,
                                   std::min(OUTPUTS, m.outputs - tile * OUTPUTS));
                }
            });
        });
    }
}

}  // namespace quantized
