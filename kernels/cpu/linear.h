// x [T, K] float32 times the transpose of a weight [N, K] of any float type.
//
// Few rows take dots.h's way. Many: columns of x are packed to panels, rows of the weight expanded to float32 a few at a
// time; arithmetic is the limit.
#pragma once

#include "linear_words.h"

constexpr int DEPTH = 2048;                 // K is taken so many at a time.
constexpr int EXPANDED = DEPTH + 16;        // Floats between expanded rows: no power of two, which would share cache sets
constexpr size_t PACKED = 192 * 1024;       // Floats of x packed at a time: a core's cache holds them.

// Columns `first` .. of x, transposed, in panels [panels][depth][PANEL]; rows past the last are zero.
INLINE void pack(const Linear& l, int first_row, int k0, int depth, float* panel) {
    const int count = std::min(PANEL, l.rows - first_row);
    for (int k = 0; k < depth; ++k)
        for (int t = count; t < PANEL; ++t) panel[size_t(k) * PANEL + t] = 0;
    for (int t = 0; t < count; ++t) {
        const float* x = l.x + size_t(first_row + t) * l.inputs + k0;
        for (int k = 0; k < depth; ++k) panel[size_t(k) * PANEL + t] = x[k];
    }
}

// Rows n .. n + TALL of the weight times one panel, into `out`, or added to it where k0 > 0.
INLINE void block(const Linear& l, const float* expanded, const float* panel, int n, int first_row, int depth, int k0) {
    Floats acc[TALL][WIDE] = {};
    outer_products<TALL, EXPANDED, 1>(acc, expanded, panel, depth);
    const int columns = std::min(PANEL, l.rows - first_row), rows = std::min(TALL, l.outputs - n);
    float lanes[TALL][PANEL];
    memcpy(lanes, acc, sizeof lanes);
    for (int t = 0; t < columns; ++t) {
        float* out = l.out + size_t(first_row + t) * l.outputs + n;
        for (int i = 0; i < rows; ++i)
            out[i] = lanes[i][t] + (k0 ? out[i] : l.bias ? l.bias[n + i] : 0.0f);
    }
}

template <class W> void linear_many_rows(const Linear& l) {
    static thread_local Scratch of_caller, of_thread;
    for (int k0 = 0; k0 < l.inputs; k0 += DEPTH) {
        const int depth = std::min(DEPTH, l.inputs - k0);
        const int panels = (l.rows + PANEL - 1) / PANEL;
        const int panels_at_a_time = std::max<int>(1, std::min<size_t>(panels, PACKED / (size_t(depth) * PANEL)));
        float* const packed = of_caller.floats(size_t(panels_at_a_time) * depth * PANEL);
        for (int p0 = 0; p0 < panels; p0 += panels_at_a_time) {
            const int count = std::min(panels_at_a_time, panels - p0);
            pool().run(count, [&](int p) {
                pack(l, (p0 + p) * PANEL, k0, depth, packed + size_t(p) * depth * PANEL);
            });
            const int blocks = (l.outputs + TALL - 1) / TALL;
            constexpr int BLOCKS = 4;  // A task takes so many.
            pool().run((blocks + BLOCKS - 1) / BLOCKS, [&](int task) {
                float* const expanded = of_thread.floats(TALL * EXPANDED);
                for (int b = task * BLOCKS; b < std::min(blocks, (task + 1) * BLOCKS); ++b) {
                    for (int i = 0; i < TALL; ++i) {
                        const int n = std::min(b * TALL + i, l.outputs - 1);  // The last row is repeated, and not stored.
                        const W* row = (const W*)l.weight + size_t(n) * l.inputs + k0;
                        int k = 0;
                        for (; k + LANES <= depth; k += LANES) store(expanded + i * EXPANDED + k, load(row + k));
                        for (; k < depth; ++k) expanded[i * EXPANDED + k] = to_float(row[k]);
                    }
                    for (int p = 0; p < count; ++p)
                        block(l, expanded, packed + size_t(p) * depth * PANEL, b * TALL, (p0 + p) * PANEL, depth, k0);
                }
            });
        }
    }
}

template <class W> void linear(const Linear& l) {
#if defined(__AVX512VNNI__)
    if (std::is_same<W, bf16>() && l.rows > FEW_FOR_WORDS) return linear_words(l);
#endif
    const int rest = l.rows % PANEL;  // Fewer than half a panel go faster the first way.
    const int few = l.rows <= FEW ? l.rows : 2 * rest <= PANEL ? rest : 0;
    Linear part = l;
    part.rows = l.rows - few;
    if (part.rows) linear_many_rows<W>(part);
    part.x += size_t(part.rows) * l.inputs;
    part.out += size_t(part.rows) * l.outputs;
    part.rows = few;
    if (few) dots<W>(part);
}

void linear(const Linear& l, int dtype) {
    if (dtype == PLAIN_FLOAT32) linear<float>(l);
    if (dtype == PLAIN_BFLOAT16) linear<bf16>(l);
    if (dtype == PLAIN_FLOAT16) linear<f16>(l);
}
