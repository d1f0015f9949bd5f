// The inner loop of every matrix product: a small block of outer products, held in registers.
#pragma once

#include "simd.h"

constexpr int WIDE = 2;             // Vectors side by side in a panel.
constexpr int PANEL = WIDE * LANES;
constexpr int TALL = LANES == 16 ? 12 : 6;   // Rows at a time, as many as the registers allow.
constexpr int SHORT = LANES == 16 ? 8 : 4;   // Rows at a time where TALL doesn't divide.

// acc[i][j] += sum over k < depth of a[i * ROW + k * STEP] * panel[k][j], panel rows being PANEL floats long.
template <int ROWS, int ROW, int STEP>
INLINE void outer_products(Floats (&acc)[ROWS][WIDE], const float* a, const float* panel, int depth) {
    for (int k = 0; k < depth; ++k, a += STEP, panel += PANEL) {
        const Floats left = load(panel), right = load(panel + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
            const Floats x = all(a[i * ROW]);
            acc[i][0] = plus_product(acc[i][0], x, left);
            acc[i][1] = plus_product(acc[i][1], x, right);
        }
    }
}
