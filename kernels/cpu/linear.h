// x [T, K] float32 times the transpose of a weight [N, K] of any float type.
//
// Few rows: the weight is read once, as it is stored, and multiplied by all rows as it passes; memory is the limit.
// Many rows: columns of x are packed to panels, rows of the weight expanded to float32 a few at a time; arithmetic is.
#pragma once

#include <algorithm>

#include "pool.h"
#include "tile.h"

constexpr int FEW = 24;                     // at most so many rows go the first way
constexpr int DOT_ROWS = 4;                 // weight rows at a time
constexpr int DOT_COLUMNS = LANES == 16 ? 6 : 3;  // rows of x at a time, as many as the registers allow
constexpr int DEPTH = 2048;                 // of K at a time
constexpr int EXPANDED = DEPTH + 16;        // floats between expanded rows: no power of two, which would share cache sets
constexpr size_t PACKED = 192 * 1024;       // floats of x that are packed at a time, so that they stay in a core's cache
constexpr int TASK_BYTES = 96 * 1024;       // of weight: large enough to hide the taking of a task

struct Linear {
    const float* x;
    const void* weight;
    const float* bias;  // or null
    float* out;
    int rows, inputs, outputs;
};

// N rows of the weight times T rows of x. Where rows are short the processor's own prefetching finds no stream to follow.
template <class W, int N, int T> INLINE void dots(const Linear& l, const W* weight, const float* x, float* out, int n) {
    constexpr int STEP = std::max(LANES, int(64 / sizeof(W)));  // a cache line
    Floats acc[(N * T + LANES - 1) / LANES * LANES];
#pragma GCC unroll 32
    for (Floats& a : acc) a = Floats{};
    const size_t width = l.inputs;
    const size_t ahead = width * sizeof(W) <= 4096 ? N * width : 2048 / sizeof(W);
    const auto multiply = [&](int k) __attribute__((always_inline)) {
        Floats w[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) w[i] = load(weight + i * width + k);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const Floats v = load(x + t * width + k);
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) acc[i * T + t] += w[i] * v;
        }
    };
    int k = 0;
    for (; k + STEP <= l.inputs; k += STEP) {
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) __builtin_prefetch(weight + i * width + k + ahead, 0, 2);
#pragma GCC unroll 8
        for (int part = 0; part < STEP; part += LANES) multiply(k + part);
    }
    for (; k + LANES <= l.inputs; k += LANES) multiply(k);
    float totals[N * T + LANES];
    if constexpr (N * T * 2 <= LANES)
        for (int i = 0; i < N * T; ++i) totals[i] = sum(acc[i]);
    else
#pragma GCC unroll 8
        for (int i = 0; i < N * T; i += LANES) store(totals + i, sums(acc + i));
    for (int i = 0; i < N; ++i)
        for (int t = 0; t < T; ++t) {
            float total = totals[i * T + t] + (l.bias ? l.bias[n + i] : 0.0f);
            for (int rest = k; rest < l.inputs; ++rest) total += to_float(weight[i * width + rest]) * x[t * width + rest];
            out[size_t(t) * l.outputs + i] = total;
        }
}

template <class W, int N> INLINE void dots_of_all_rows(const Linear& l, int n) {
    const W* weight = (const W*)l.weight + size_t(n) * l.inputs;
    for (int t = 0; t < l.rows;) {
        const int left = l.rows - t;
        const float* x = l.x + size_t(t) * l.inputs;
        float* out = l.out + size_t(t) * l.outputs + n;
        const auto step = [&](auto columns) {
            dots<W, N, columns.value>(l, weight, x, out, n);
            t += columns.value;
        };
        if constexpr (DOT_COLUMNS == 6) {
            if (left >= 6) { step(std::integral_constant<int, 6>()); continue; }
            if (left == 5) { step(std::integral_constant<int, 5>()); continue; }
            if (left == 4) { step(std::integral_constant<int, 4>()); continue; }
        }
        if (left >= 3) step(std::integral_constant<int, 3>());
        else if (left == 2) step(std::integral_constant<int, 2>());
        else step(std::integral_constant<int, 1>());
    }
}

template <class W> void linear_few_rows(const Linear& l) {
    const int wanted = std::max<int>(1, TASK_BYTES / (l.inputs * sizeof(W)));
    const int rows = (wanted + DOT_ROWS - 1) / DOT_ROWS * DOT_ROWS;
    pool().run((l.outputs + rows - 1) / rows, [&](int task) {
        int n = task * rows;
        const int end = std::min(n + rows, l.outputs);
        for (; n + DOT_ROWS <= end; n += DOT_ROWS) dots_of_all_rows<W, DOT_ROWS>(l, n);
        for (; n < end; ++n) dots_of_all_rows<W, 1>(l, n);
    });
}

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
            constexpr int BLOCKS = 4;  // a task
            pool().run((blocks + BLOCKS - 1) / BLOCKS, [&](int task) {
                float* const expanded = of_thread.floats(TALL * EXPANDED);
                for (int b = task * BLOCKS; b < std::min(blocks, (task + 1) * BLOCKS); ++b) {
                    for (int i = 0; i < TALL; ++i) {
                        const int n = std::min(b * TALL + i, l.outputs - 1);  // repeats the last row, which isn't stored
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
    const int rest = l.rows % PANEL;  // fewer than half a panel go faster the first way
    const int few = l.rows <= FEW ? l.rows : 2 * rest <= PANEL ? rest : 0;
    Linear part = l;
    part.rows = l.rows - few;
    if (part.rows) linear_many_rows<W>(part);
    part.x += size_t(part.rows) * l.inputs;
    part.out += size_t(part.rows) * l.outputs;
    part.rows = few;
    if (few) linear_few_rows<W>(part);
}
