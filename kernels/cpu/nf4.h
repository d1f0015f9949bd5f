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

// TILES tiles times T rows of x: totals [TILES][T]. A row's sums have the same order however many rows there are; of few
// rows several tiles take turns, as a product waits for the one before.
template <int T> constexpr int TILES_OF = PARTS > 1 ? 1 : T == 1 ? 4 : T == 2 ? 2 : 1;
template <int T, int TILES>
__attribute__((noinline)) void multiply_tiles(const Nf4Matrix& m, int tile, const float* x, Tile* totals) {
    const Codebook book(m.codebook);
    const int blocks = m.inputs / m.blocksize;
    const size_t width = m.inputs, apart = width / 8 * OUTPUTS;
    const int32_t* codes = m.codes + tile * apart;
    const float* scales = m.scales + size_t(tile) * blocks * OUTPUTS;
    Tile total[TILES * T] = {};
    for (int b = 0; b < blocks; ++b, scales += OUTPUTS) {
        Tile sums[TILES * T] = {};
        for (int k = 0; k < m.blocksize; k += 8, x += 8, codes += OUTPUTS)
            for (int p = 0; p < PARTS; ++p) {
                Words lanes[TILES];
                for (int i = 0; i < TILES; ++i) lanes[i] = load_as<Words>(codes + i * apart + p * LANES);
#pragma GCC unroll 8
                for (int j = 0; j < 8; ++j)
#pragma GCC unroll 4
                    for (int i = 0; i < TILES; ++i) {
                        const Floats weight = book.at(lanes[i] >> (4 * j));
#pragma GCC unroll 8
                        for (int t = 0; t < T; ++t) {
                            Floats& sum = sums[i * T + t].part[p];
                            sum = plus_product(sum, weight, all(x[t * width + j]));
                        }
                    }
            }
        for (int i = 0; i < TILES; ++i)
            for (int t = 0; t < T; ++t)
                for (int p = 0; p < PARTS; ++p) {
                    Floats& sum = total[i * T + t].part[p];
                    const Floats scale = load(scales + size_t(i) * blocks * OUTPUTS + p * LANES);
                    sum = plus_product(sum, sums[i * T + t].part[p], scale);
                }
    }
    for (int i = 0; i < TILES * T; ++i) totals[i] = total[i];
}

void linear(const Nf4Matrix* const* matrices, int count, const float* x, int rows, const float* bias, float* out) {
    int width = 0;
    for (int i = 0; i < count; ++i) width += matrices[i]->outputs;
    for (int i = 0, column = 0; i < count; column += matrices[i++]->outputs) {
        const Nf4Matrix& m = *matrices[i];
        const int tiles = (m.outputs + OUTPUTS - 1) / OUTPUTS;
        for_tiles(tiles, size_t(tiles) * m.inputs * OUTPUTS / 2, rows, [&](int begin, int end) {
            for_lots(rows, [&](int first, auto together) {
                constexpr int T = together.value, TILES = TILES_OF<T>;
                const auto tiles_from = [&](int tile, auto number) {
                    Tile totals[number.value * T];
                    multiply_tiles<T, number.value>(m, tile, x + size_t(first) * m.inputs, totals);
                    for (int i = 0; i < number.value * T; ++i) {
                        const int n = column + (tile + i / T) * OUTPUTS;
                        store_tile(totals[i], bias ? bias + n : nullptr, out + size_t(first + i % T) * width + n,
                                   std::min(OUTPUTS, m.outputs - (tile + i / T) * OUTPUTS));
                    }
                };
                int tile = begin;
                for (; tile + TILES <= end; tile += TILES) tiles_from(tile, Number<TILES>());
                for (; tile < end; ++tile) tiles_from(tile, Number<1>());
            });
        });
    }
}

}  // namespace quantized
