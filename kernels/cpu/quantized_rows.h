// Single outputs of a quantized matrix as the numbers that they stand for: rows of a table of tokens.
#pragma once

#include "quantized.h"

namespace quantized {

// What one output multiplies each input by, into `out` [inputs].
static void expand_output(const Matrix& m, int output, float* out) {
    const int tile = output / OUTPUTS, part = output % OUTPUTS / LANES, lane = output % LANES;
    const Book book(m.codebook);
    const uint8_t* codes = m.codes + tile * m.tile_bytes;
    if (m.source) std::fill_n(out, m.inputs, 0.0f);
    for_runs(m, 0, m.groups, [&](auto bits, auto coding, int first, int last) __attribute__((always_inline)) {
        constexpr int BITS = bits.value;
        constexpr Coding CODING = Coding(coding.value);
        for (int g = first; g < last; ++g) {
            const Scales of = scales_of(m, tile, g);
            const double scale = of.scale.part[part][lane];
            const float min = of.min.part[part][lane];
            const int zero = zero_of<BITS, CODING>(m, tile, g).part[part][lane];
            for (int row = m.group_starts[g]; row < m.group_starts[g + 1]; row += STEP<BITS, CODING>)
                read_step<BITS, CODING>(book, codes, g % 2, [&](int quad, const Line& four) __attribute__((always_inline)) {
                    const uint32_t word = four.part[part][lane];
                    const int at = row + (CODING == HALVES ? quad % (STEP<BITS, CODING> / 4) : quad) * 4;
                    for (int j = 0; j < 4; ++j) {
                        // In double, the product is exact: it is rounded once, and not together with the sum.
                        const float number = float((int(word >> (8 * j) & 255) - zero) * scale) + min;
                        if (!m.source) out[at + j] = number;
                        else if (m.source[at + j] >= 0) out[m.source[at + j]] = number;
                    }
                });
        }
    });
}

// Those of `count` outputs by their numbers, [count][inputs].
inline void expand_outputs(const Matrix& m, const int64_t* numbers, int count, float* out) {
    const auto one = [&](int i) { expand_output(m, int(numbers[i]), out + size_t(i) * m.inputs); };
    if (count <= MOST_ROWS)
        for (int i = 0; i < count; ++i) one(i);
    else
        pool().run(count, one);
}

}  // namespace quantized
